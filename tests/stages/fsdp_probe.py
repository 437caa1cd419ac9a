"""Run under the shim: what FSDP2 did to each model, and whether the optimiser respects it; a JSON line each.

usage: fsdp_probe.py CHECKPOINT_FOLDER ...
"""

import copy
import json
import sys

import torch
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from common.batching import pack
from common.models import load_model
from common.train.launch import leave, place, start
from common.train.optim import GradientSum, KahanOptimizer, soft_cross_entropy


def make_optimizer(model, name):
    return KahanOptimizer(
        model.named_parameters(), name=name, betas=(0.9, 0.99), eps=1e-6, weight_decay=0.01, kahan_sum=True
    )


def backward(model, scale):
    packed = pack([[5, 6, 7, 8], [9, 10, 11]], labels=[[1, 0, 0], [0, 0.5, 0.5]])
    (soft_cross_entropy(model(packed), packed.labels_SC).sum() * scale).backward()


def main() -> None:
    accelerator = start()
    for checkpoint in sys.argv[1:]:
        found = probe(checkpoint, accelerator)
        if accelerator.is_main_process:
            print(json.dumps(found), flush=True)
    leave(accelerator)


def probe(checkpoint, accelerator) -> dict[str, object]:
    """Shards one checkpoint in several ways, beside a whole copy of it."""
    world = accelerator.num_processes
    whole = load_model(checkpoint, dtype=torch.bfloat16, head_dropout=0.0)
    source = load_model(
        checkpoint, dtype=torch.bfloat16, head_dropout=0.0, materialise=accelerator.is_main_process
    )
    sharded = place(source, accelerator, reduce_dtype=None)
    found = {
        "world": world,
        "groups": sum(isinstance(module, FSDPModule) for module in sharded.modules()),
        "layers": len(sharded.model.layers),
        "placements": sorted({str(p.placements) for p in sharded.parameters()}),
        "mesh": list(next(sharded.parameters()).device_mesh.shape),
        "all_dtensor": all(isinstance(p, DTensor) for p in sharded.parameters()),
        "dtypes": sorted({str(p.dtype) for p in sharded.parameters()}),
    }
    equal = all(
        torch.equal(p.full_tensor(), q) for p, q in zip(sharded.parameters(), whole.parameters(), strict=True)
    )
    found["weights_arrived"] = equal

    for name in ("adamw", "stable_adamw"):
        reference = copy.deepcopy(whole)
        mine = load_model(
            checkpoint, dtype=torch.bfloat16, head_dropout=0.0, materialise=accelerator.is_main_process
        )
        mine = place(mine, accelerator, reduce_dtype=torch.float32)
        sums = GradientSum(mine, accumulation="fp32", is_replica=False)
        its_sums = GradientSum(reference, accumulation="fp32", is_replica=False)
        ours, theirs = make_optimizer(mine, name), make_optimizer(reference, name)
        for _ in range(3):
            backward(mine, 1.0)  # averaged over ranks that hold the same batch
            backward(reference, 1.0)
            norm, squares = sums.norm(), sum(s.square().sum() for s in its_sums.sums.values())
            # Only before the first step are the weights equal to the last bit.
            found.setdefault(f"{name}_norm_error", float((norm / squares.sqrt() - 1).abs()))
            ours.step(sums, lr=0.05)
            theirs.step(its_sums, lr=0.05)
        pairs = list(zip(mine.parameters(), reference.parameters(), strict=True))
        found[f"{name}_difference"] = max(float((p.full_tensor() - q).abs().max()) for p, q in pairs)
        found[f"{name}_moved"] = max(
            float((p - q).abs().max())
            for p, q in zip(reference.parameters(), whole.parameters(), strict=True)
        )
        states = [t for key, t in ours.tensors().items() if key != "num_steps"]
        found[f"{name}_states"] = sorted({f"{type(t).__name__} {t.dtype}" for t in states})

    weight = sharded.head.out.weight
    sums = GradientSum(sharded, accumulation="fp32", is_replica=False)
    for factor in [1.0, *[0.001] * 200]:
        packed = pack([[5, 6]])
        # The bias of the last layer has the gradient `factor` for every class.
        (sharded(packed).sum() * factor).backward()
    bias = sums.take_gradient(sharded.head.out.bias).full_tensor()
    found["summed"] = bias.float().tolist()
    found["uneven_shard"] = list(weight.shape)
    return found


if __name__ == "__main__":
    main()
