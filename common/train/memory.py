"""How many tokens a micro-batch takes and how many of its layers are recomputed, so that it fits the memory.

Neither changes what is computed, only time and memory: without recomputation a third less is computed. On a
GPU it is measured before the first step, with the weights, sums and optimiser states in place.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist

from common.batching import pack
from common.console import say
from common.models import PreferenceModel
from common.train.recipe import Training

CPU_TOKENS = 8192
MAX_TOKENS = 16_384
"""Beyond it a GPU gains nothing."""
FEW_TOKENS = 2048
"""Below it weights are read from memory more often than they are worth: rather recompute."""
RESERVE = 3 * 10**9
"""Bytes left free: gaps between allocations, buffers that NCCL makes later, the optimiser's temporaries."""
PROBES = (128, 512)
"""Tokens of the passes that are measured without recomputation; few, for they must fit."""


class Memory(NamedTuple):
    """Bytes on one GPU, the least favourable of several.

    The peak of a micro-batch is a straight line of its tokens, without recomputation and with all decoder
    layers recomputed; in the number of recomputed layers it is taken as linear between, a little above what
    it is. (Scores that an attention keeps as a matrix grow faster: only the definition does that, and is
    recomputed unless the user says otherwise.)
    """

    room: float
    """What activations may take."""
    kept: tuple[float, float]
    """Nothing recomputed: constant, and bytes a token."""
    recomputed: tuple[float, float]
    """Everything recomputed."""
    num_layers: int

    def line(self, layers: int) -> tuple[float, float]:
        """Constant and bytes a token with so many layers recomputed."""
        share = layers / self.num_layers
        return tuple(k + (r - k) * share for k, r in zip(self.kept, self.recomputed, strict=True))

    def most_tokens(self, layers: int) -> int:
        """How many fit with so many layers recomputed; 0 where none do."""
        constant, per_token = self.line(layers)
        return max(0, int((self.room - constant) / per_token))

    def fewest_layers(self, tokens: int) -> int | None:
        """How many must be recomputed for so many tokens to fit; None where all are not enough."""
        numbers = range(self.num_layers + 1)
        return next((layers for layers in numbers if tokens <= self.most_tokens(layers)), None)


@dataclass(frozen=True, kw_only=True)
class Budget:
    """How the steps of a run are cut."""

    tokens: int
    """Per rank per micro-batch; a longer sequence gets one of its own."""
    layers: int | None
    """Recomputed in every micro-batch; None: as few as it needs."""
    memory: Memory | None = None
    """What was measured, if it was."""

    def recompute(self, tokens: int) -> int:
        """How many layers, counted from the first, a micro-batch of so many tokens recomputes."""
        layers = self.memory.fewest_layers(tokens) if self.layers is None else self.layers
        assert layers is not None, f"{tokens} tokens do not fit {self}"
        return layers


def choose_budget(
    memory: Memory, *, tokens: int | None, layers: int | None, longest: int, is_sharded: bool
) -> Budget:
    """The budget for a GPU.

    Args:
        tokens: As the user says, or None. Weights that are whole on each GPU need not be large micro-batches:
            as many as fit without recomputation, but not few. Sharded weights are gathered in every
            micro-batch, so there the fewest micro-batches win.
        layers: Recomputed, as the user says, or None: in each micro-batch as few as it needs.
        longest: Tokens of the longest sequence.
        is_sharded: FSDP.

    Raises:
        ValueError: The longest sequence, or what the user says, does not fit.

    Example: room for 4,000 tokens with everything kept, for 40,000 with everything recomputed -> 4,000, or
    16,384 where weights are sharded.
    """
    fullest = memory.num_layers if layers is None else layers
    most = memory.most_tokens(fullest)
    if tokens is None:
        may_keep_all = layers is None and not is_sharded
        tokens = max(memory.most_tokens(0), min(FEW_TOKENS, most)) if may_keep_all else most
        tokens = min(MAX_TOKENS, tokens)
    auto = "Say --recompute auto, lower" if fullest < memory.num_layers else "Lower"
    for what, count, flag in (
        ("the longest sequence", longest, "--conversation-tokens"),
        ("a micro-batch", tokens, "--max-tokens-per-micro-batch"),
    ):
        if count > most:
            constant, per_token = memory.line(fullest)
            raise ValueError(
                f"{what} of {count:,} tokens takes {gigabytes(constant + per_token * count)} with {fullest} "
                f"of {memory.num_layers} layers recomputed, but {gigabytes(memory.room)} are left for it, "
                f"enough for {most:,}. {auto} {flag}, or share the memory of more GPUs "
                "(accelerate_configs/fsdp_*.yaml)"
            )
    return Budget(tokens=tokens, layers=layers, memory=memory)


def find_budget(
    model: PreferenceModel, training: Training, *, longest: int, device: torch.device, is_sharded: bool
) -> Budget:
    """The budget that the flags ask for; on a GPU, what they leave open is measured. Says what it is.

    Args:
        model: In training mode, with everything that stays on the device in place.
        longest: Tokens of the longest sequence.

    Raises:
        ValueError: As of `choose_budget`, or the measuring itself runs out of memory.
    """
    num_layers = len(model.model.layers)
    asked = {"auto": None, "none": 0, "all": num_layers}.get(training.recompute, training.recompute)
    if asked is None and device.type == "cuda" and ("attention", "torch") in model.ops.backends:
        asked = num_layers  # the definition keeps a matrix of scores, which grows faster than is foreseen
    layers = None if asked is None else min(asked, num_layers)
    tokens = None if training.max_tokens_per_micro_batch == "auto" else training.max_tokens_per_micro_batch
    if model.ops.compiles:
        say("the first pass compiles the layers, some 15 s; later runs find what it has made")
    if device.type != "cuda":
        budget = Budget(tokens=tokens or CPU_TOKENS, layers=layers or 0)
    elif tokens is not None and layers is not None:
        budget = Budget(tokens=tokens, layers=layers)
    else:
        what = (
            f"before the first step, trying sequences of up to {longest:,} tokens. {ways_out()}; --recompute "
            f"all with --max-tokens-per-micro-batch {longest}, which tries nothing"
        )
        with clear_out_of_memory(what, device=device):
            memory = measure(model, longest=longest, device=device)
        budget = choose_budget(memory, tokens=tokens, layers=layers, longest=longest, is_sharded=is_sharded)
    ordinary, most = (budget.recompute(count) for count in (budget.tokens, longest))
    text = f"micro-batches of up to {budget.tokens:,} tokens, {ordinary} of {num_layers} layers recomputed"
    if longest > budget.tokens:
        text += f" ({most} for the longest sequence, {longest:,} tokens)"
    if budget.memory is not None:
        state = torch.cuda.memory_allocated(device)
        text += f"; {gigabytes(state)} of state on this GPU, {gigabytes(budget.memory.room)} for activations"
    say(text)
    return budget


def measure(model: PreferenceModel, *, longest: int, device: torch.device) -> Memory:
    """Runs a few small passes without effect and reads what they took; all ranks find the same."""
    _peak(model, PROBES[0], 0, device)  # compiles, and makes what stays for good
    num_layers, lines = len(model.model.layers), []
    for layers, last in ((0, PROBES[1]), (num_layers, max(longest, PROBES[1]))):
        first_peak, last_peak = (_peak(model, size, layers, device) for size in (PROBES[0], last))
        per_token = max(1.0, (last_peak - first_peak) / (last - PROBES[0]))
        lines += [last_peak - per_token * last, per_token]
    free, _ = torch.cuda.mem_get_info(device)
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    worse = torch.tensor([RESERVE - free - unused, *lines], dtype=torch.float64, device=device)
    if dist.is_initialized():
        dist.all_reduce(worse, dist.ReduceOp.MAX)
    lack, *lines = worse.tolist()
    return Memory(-lack, tuple(lines[:2]), tuple(lines[2:]), num_layers)


def _peak(model: PreferenceModel, tokens: int, layers: int, device: torch.device) -> int:
    """Bytes that one made-up sequence takes at most, until its gradient reaches the embedding.

    What comes then does not grow with the tokens, but would hide what does: the embedding's own gradient.
    The gradients that it leaves are zero.
    """
    found = []

    def read_at_backward(_, inputs: tuple[torch.Tensor]) -> None:
        inputs[0].register_hook(lambda _: found.append(torch.cuda.max_memory_allocated(device)))

    handle = model.model.layers[0].register_forward_pre_hook(read_at_backward)
    packed = pack([[0] * tokens]).to(device)
    kept_SE = torch.ones(1, sum(model.head.widths), dtype=torch.bool, device=device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    (model(packed, kept_SE=kept_SE, recompute=layers).sum() * 0).backward()
    handle.remove()
    return found[0] - before


@contextmanager
def clear_out_of_memory(tell: str | Callable[[], str], *, device: torch.device) -> Iterator[None]:
    """Makes a user's mistake of PyTorch's error for too little memory.

    Args:
        tell: Where it was and what to change, or who can say it then.

    Raises:
        ValueError: PyTorch ran out of memory on a device.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        usage = ""
        if device.type == "cuda":
            peak, total = torch.cuda.max_memory_allocated(device), torch.cuda.mem_get_info(device)[1]
            usage = f" (at most {gigabytes(peak)} of {gigabytes(total)} were in use)"
        raise ValueError(f"out of memory{usage} {tell() if callable(tell) else tell}") from error


def clear_prediction(max_tokens: int, *, device: torch.device) -> AbstractContextManager:
    """`clear_out_of_memory` where whole replicas predict in micro-batches of `max_tokens` tokens."""
    tell = f"in micro-batches of up to {max_tokens:,} tokens. Lower --max-tokens-per-micro-batch"
    return clear_out_of_memory(tell, device=device)


def ways_out(lengths: Sequence[int] = (), layers: int = 0, num_layers: int = 0) -> str:
    """What to change where a micro-batch of such sequences and so many recomputed layers does not fit."""
    ways = [f"--max-tokens-per-micro-batch {sum(lengths) // 2}"] if len(lengths) > 1 else []
    if layers < num_layers:
        ways.append(f"--recompute {num_layers if layers else (num_layers + 1) // 2}")
    ways.append("more GPUs with their memory shared (accelerate_configs/fsdp_*.yaml)")
    ways.append("--accumulation stochastic, if the state itself does not fit")
    return f"Ways out: {'; '.join(ways)}"


def gigabytes(count: float) -> str:
    """Bytes for a person."""
    return f"{count / 1e9:.1f} GB"
