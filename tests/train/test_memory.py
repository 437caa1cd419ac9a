"""The budget of a step: what is made of measured numbers, and that the measuring leaves nothing behind."""

from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from helpers import make_checkpoint
from hypothesis import given
from hypothesis import strategies as st

from common.batching import pack
from common.models import load_model
from common.train import launch, memory
from common.train.memory import Budget, Memory, choose_budget, find_budget, ways_out
from common.train.optim import GradientSum, soft_cross_entropy
from common.train.recipe import Training

CPU = torch.device("cpu")
GB = 10**9


def card(room_gb, *, kept=6.5e6, recomputed=0.3e6):
    """A GPU that has so much room; 9B's bytes a token, 2 GB of which do not grow."""
    return Memory(room=room_gb * GB, kept=(2 * GB, kept), recomputed=(2 * GB, recomputed), num_layers=42)


def choose(room_gb, *, tokens=None, layers=None, longest=4_340, is_sharded=False):
    return choose_budget(card(room_gb), tokens=tokens, layers=layers, longest=longest, is_sharded=is_sharded)


@pytest.mark.parametrize(
    ("given", "tokens", "layers", "of_longest"),
    [
        ({"room_gb": 41}, 6_000, 0, 0),  # (41 - 2) / 6.5e-3
        ({"room_gb": 28}, 4_000, 0, 4),  # of 4,340: 42 x 2.21 / 26.9
        ({"room_gb": 200}, 16_384, 0, 0),
        ({"room_gb": 8}, 2_048, 25, 35),  # 923 would fit without recomputation: too few
        ({"room_gb": 2.5, "longest": 1_000}, 1_666, 42, 41),  # fewer than few, for no more fit
        ({"room_gb": 41, "is_sharded": True}, 16_384, 28, 0),
        ({"room_gb": 4, "is_sharded": True}, 6_666, 42, 41),
        ({"room_gb": 41, "layers": 0}, 6_000, 0, 0),
        ({"room_gb": 8, "layers": 42}, 16_384, 42, 42),
        ({"room_gb": 28, "layers": 21}, 7_647, 21, 21),
        ({"room_gb": 8, "tokens": 4_400}, 4_400, 35, 35),
        ({"room_gb": 200, "tokens": 20_000}, 20_000, 0, 0),  # the user's word, beyond what auto takes
    ],
)
def test_budget(given, tokens, layers, of_longest):
    budget = choose(**given)
    longest = given.get("longest", 4_340)
    assert (budget.tokens, budget.recompute(budget.tokens)) == (tokens, layers)
    assert budget.recompute(longest) == of_longest


@given(
    room=st.floats(1e9, 1e11),
    constant=st.floats(0, 5e9),
    per_token=st.floats(1e3, 1e7),
    share=st.floats(0.02, 1),
    num_layers=st.integers(1, 50),
    asked=st.tuples(st.none() | st.integers(1, 30_000), st.none() | st.integers(0, 50)),
    longest=st.integers(1, 9_000),
    is_sharded=st.booleans(),
)
def test_no_micro_batch_is_over_the_room(
    room, constant, per_token, share, num_layers, asked, longest, is_sharded
):
    """Whatever was measured and asked: all that may come fits, with no layer recomputed in vain."""
    found = Memory(room, (constant, per_token), (constant, per_token * share), num_layers)
    tokens, layers = asked[0], None if asked[1] is None else min(asked[1], num_layers)

    def peak(count, recomputed):
        return constant + count * per_token * (1 - (1 - share) * recomputed / num_layers)

    try:
        budget = choose_budget(found, tokens=tokens, layers=layers, longest=longest, is_sharded=is_sharded)
    except ValueError:
        assert peak(max(longest, tokens or 1), num_layers if layers is None else layers) > room - per_token
        return
    numbers = [budget.recompute(count) for count in (0, 1, budget.tokens // 2, budget.tokens)]
    assert numbers == sorted(numbers)
    for count in (1, longest, budget.tokens):
        recomputed = budget.recompute(count)
        assert peak(count, recomputed) <= room + 1
        if layers is None and recomputed:
            assert peak(count, recomputed - 1) > room - per_token


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"room_gb": 3},
            "the longest sequence of 4,340 tokens takes 3.3 GB with 42 of 42 layers recomputed, but 3.0 GB "
            "are left for it, enough for 3,333. Lower --conversation-tokens, or share",
        ),
        (
            {"room_gb": 28, "layers": 0},
            "the longest sequence of 4,340 tokens takes 30.2 GB with 0 of 42 layers recomputed, but 28.0 GB "
            "are left for it, enough for 4,000. Say --recompute auto, lower --conversation-tokens",
        ),
        (
            {"room_gb": 8, "tokens": 30_000},
            "a micro-batch of 30,000 tokens takes 11.0 GB .*enough for 20,000. Lower --max",
        ),
        ({"room_gb": -1}, "but -1.0 GB are left for it, enough for 0"),
    ],
)
def test_what_does_not_fit_is_refused_before_the_first_step(given, message):
    with pytest.raises(ValueError, match=message):
        choose(**given)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return load_model(make_checkpoint(tmp_path_factory.mktemp("memory") / "gemma", "gemma"))


@pytest.mark.parametrize(
    ("flags", "tokens", "layers"),
    [
        ({}, 8_192, 0),
        ({"max_tokens_per_micro_batch": 300, "recompute": "none"}, 300, 0),
        ({"recompute": "all"}, 8_192, 2),
        ({"recompute": 1}, 8_192, 1),
        ({"recompute": 9}, 8_192, 2),
    ],
)
def test_a_cpu_takes_what_is_said_or_the_default(model, capsys, flags, tokens, layers):
    budget = find_budget(model, Training(**flags), longest=9_000, device=CPU, is_sharded=False)
    assert budget == Budget(tokens=tokens, layers=layers) and budget.recompute(9_000) == layers
    told = f"micro-batches of up to {tokens:,} tokens, {layers} of 2 layers recomputed"
    assert told in capsys.readouterr().out


def test_a_compilation_is_announced(model, capsys, monkeypatch):
    for compiles in (False, True):
        monkeypatch.setattr(model, "ops", replace(model.ops, compiles=compiles))
        find_budget(model, Training(), longest=9_000, device=CPU, is_sharded=False)
        assert ("the first pass compiles the layers" in capsys.readouterr().out) == compiles


def test_a_gpu_is_measured_where_a_flag_leaves_something_open(model, capsys, monkeypatch):
    measured = card(28)._replace(num_layers=2)
    monkeypatch.setattr(memory, "measure", lambda model, longest, device: measured)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 92_500_000_000)
    monkeypatch.setattr(model, "ops", replace(model.ops, backends=(("attention", "flash"),)))
    find = partial(find_budget, model, longest=4_340, device=torch.device("cuda"), is_sharded=False)
    assert find(Training()) == Budget(tokens=4_000, layers=None, memory=measured)
    assert capsys.readouterr().out == (
        "micro-batches of up to 4,000 tokens, 0 of 2 layers recomputed (1 for the longest sequence, 4,340 "
        "tokens); 92.5 GB of state on this GPU, 28.0 GB for activations\n"
    )
    assert find(Training(), is_sharded=True).tokens == 16_384
    assert "longest" not in capsys.readouterr().out
    with pytest.raises(ValueError, match="the longest sequence of 90,000 tokens"):
        find(Training(), longest=90_000)
    assert find(Training(max_tokens_per_micro_batch=600)).recompute(4_340) == 1
    assert find(Training(recompute="all")) == Budget(tokens=16_384, layers=2, memory=measured)
    both = Training(recompute="none", max_tokens_per_micro_batch=9_000)
    assert find(both) == Budget(tokens=9_000, layers=0)


def test_scores_kept_as_a_matrix_are_recomputed_unless_said_otherwise(model, monkeypatch):
    """By the definition of attention, on a GPU, where they might not fit."""
    monkeypatch.setattr(memory, "measure", lambda model, longest, device: card(200)._replace(num_layers=2))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 0)
    find = partial(find_budget, model, longest=4_340, device=torch.device("cuda"), is_sharded=False)
    assert find(Training()).layers == 2 and find(Training(recompute="none")).layers == 0


def test_measuring_may_run_out_of_memory(model, monkeypatch):
    monkeypatch.setattr(memory, "measure", Mock(side_effect=torch.OutOfMemoryError("CUDA out of memory.")))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 79 * GB)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (0, 80 * GB))
    message = r"at most 79\.0 GB of 80\.0 GB were in use. before .* up to 4,340 tokens.*--recompute all"
    with pytest.raises(ValueError, match=message):
        find_budget(model, Training(), longest=4_340, device=torch.device("cuda"), is_sharded=False)


@pytest.mark.parametrize("theirs", [{}, {"PYTORCH_CUDA_ALLOC_CONF": "a"}, {"PYTORCH_ALLOC_CONF": "b"}])
def test_the_allocator_is_told_unless_the_user_has_told_it(monkeypatch, theirs):
    environment = dict(theirs)
    monkeypatch.setattr(launch, "os", SimpleNamespace(environ=environment))
    monkeypatch.setattr(launch, "Accelerator", Mock(side_effect=ZeroDivisionError))
    with pytest.raises(ZeroDivisionError):
        launch.start()
    assert environment == (theirs or {"PYTORCH_ALLOC_CONF": "expandable_segments:True"})


@pytest.mark.parametrize("flags", [{"recompute": -1}, {"max_tokens_per_micro_batch": 0}])
def test_numbers_too_small_are_refused(flags):
    with pytest.raises(ValueError, match="expected at least"):
        Training(**flags)
    assert Training(recompute=0, max_tokens_per_micro_batch=1)


def test_a_measured_pass_ends_before_the_embeddings_gradient_and_leaves_zeros(model, monkeypatch):
    """On a CPU, where memory is a number of gradients that are there."""
    added = []
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(added.append)
    sums = GradientSum(model, accumulation="fp32", is_replica=True)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 1000)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: added.clear())
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 1000 + len(added))
    passes = []
    handle = model.model.layers[1].input_layernorm.register_forward_hook(lambda *_: passes.append(1))
    model.train()
    for layers in (0, 2):
        assert memory._peak(model, 30, layers, CPU) == len(added) - 1 == len(list(model.parameters())) - 1
    assert len(passes) == 1 + 2  # kept, then recomputed
    handle.remove()
    assert not model.model.layers[0]._forward_pre_hooks
    assert not any(total.any() for total in sums.sums.values())
    packed = pack([[5, 6, 7]], labels=[[1, 0, 0]])
    soft_cross_entropy(model.eval()(packed), packed.labels_SC).sum().backward()
    assert all(total.any() for total in sums.sums.values())


def test_lines_are_read_off_the_passes(model, monkeypatch):
    """Room is what the card has free and what PyTorch holds without use, less the reserve."""
    lines, peaks = {0: (3e6, 5e4), 2: (4e6, 2e3)}, []

    def peak(model, tokens, layers, device):
        constant, per_token = lines[layers]
        peaks.append(constant + per_token * tokens + 1e9 * (not peaks))  # the first pass makes what stays
        return peaks[-1]

    monkeypatch.setattr(memory, "_peak", peak)
    numbers = {"mem_get_info": (20 * GB, 80 * GB), "memory_reserved": 50 * GB, "memory_allocated": 40 * GB}
    for name, value in numbers.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    found = memory.measure(model, longest=4_340, device=CPU)
    assert found.room == 30 * GB - memory.RESERVE and found.num_layers == 2
    assert (*found.kept, *found.recomputed) == pytest.approx((*lines[0], *lines[2]))

    peaks.clear()
    assert memory.measure(model, longest=memory.PROBES[0], device=CPU) == found
    with monkeypatch.context() as flat:
        flat.setattr(memory, "_peak", lambda *arguments: 7e6)
        assert memory.measure(model, longest=4_340, device=CPU).kept == (7e6 - memory.PROBES[1], 1.0)
    peaks.clear()

    def another_rank(numbers, op):
        """It has more room, and more to keep."""
        assert op == memory.dist.ReduceOp.MAX
        numbers.copy_(numbers.maximum(torch.tensor([-40.0 * GB, 5e6, 6e4, 1e6, 1e3], dtype=numbers.dtype)))

    monkeypatch.setattr(memory.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(memory.dist, "all_reduce", another_rank)
    least = memory.measure(model, longest=4_340, device=CPU)
    assert least.room == found.room
    assert (*least.kept, *least.recomputed) == pytest.approx((5e6, 6e4, *lines[2]))


def test_ways_out_are_concrete():
    assert "--max-tokens-per-micro-batch 2000; --recompute 21; more" in ways_out([3_000, 1_000], 0, 42)
    assert "--recompute 42; more" in ways_out([4_000], 21, 42)
    assert ways_out([4_000], 42, 42) == ways_out()
