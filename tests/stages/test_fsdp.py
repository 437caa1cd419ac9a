"""Real FSDP2 on a CPU: groups, placements, dtypes, sums and steps on shards."""

import json

import pytest
from launching import launch


def probe(how, *checkpoints):
    """What the probe says of each checkpoint."""
    printed = launch(how, "tests/stages/fsdp_probe.py", *checkpoints).stdout.splitlines()
    found = [json.loads(line) for line in printed if line.startswith("{")]
    assert len(found) == len(checkpoints)
    return found


def test_full_sharding(world):
    for found in probe("fsdp_27b.yaml:2", world / "gemma", world / "llama"):
        # One group a decoder layer, one each for embedding, final norm and the rest (the head).
        assert found["groups"] == found["layers"] + 3 == 5
        assert found["all_dtensor"] and found["placements"] == ["(Shard(dim=0),)"] and found["mesh"] == [2]
        assert_steps_are_right(found)


def test_hybrid_sharding_shards_in_a_machine_and_replicates_over_machines(world):
    [found] = probe("fsdp_27b_multinode.yaml:4", world / "gemma")
    assert found["mesh"] == [2, 2] and found["placements"] == ["(Replicate(), Shard(dim=0))"]
    assert_steps_are_right(found)


def assert_steps_are_right(found):
    assert found["weights_arrived"]
    assert found["dtypes"] == ["torch.bfloat16"]
    for name in ("adamw", "stable_adamw"):
        assert found[f"{name}_states"] == ["DTensor torch.bfloat16"]
        assert found[f"{name}_norm_error"] < 1e-5
        # Three steps of 0.05 move weights by about 0.15; on shards they land within bf16 rounding of that.
        assert found[f"{name}_moved"] > 0.1 and found[f"{name}_difference"] < 0.02
    assert found["summed"] == pytest.approx([1.2] * 3, abs=0.005)
