"""Padding-free batches: sequences are laid end to end, and `cu_seqlens` says where each one ends.

Shape suffixes: T packed tokens, S sequences, C classes.
"""

import heapq
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch

FILLER_ROW = -1


class PackedBatch(NamedTuple):
    """Sequences end to end, no padding. Lengths 5, 3, 7 -> `cu_seqlens` [0, 5, 8, 15], `max_seqlen` 7."""

    input_ids_T: torch.Tensor
    """int64, token ids of all sequences."""
    position_ids_T: torch.Tensor
    """int64, position of each token within its own sequence."""
    cu_seqlens: torch.Tensor
    """int32, S + 1 boundaries: sequence s is tokens cu_seqlens[s] to cu_seqlens[s + 1]."""
    max_seqlen: int
    """Longest sequence in tokens, a Python int (a tensor would synchronise the device in every layer)."""
    labels_SC: torch.Tensor
    """float32, one-hot votes or soft labels; a row of zeros weighs nothing."""
    row_S: torch.Tensor
    """int64, index of the comparison; -1 for a filler."""

    def to(self, device: torch.device | str) -> "PackedBatch":
        """The same batch on `device`."""
        return PackedBatch(
            *(x.to(device, non_blocking=True) if isinstance(x, torch.Tensor) else x for x in self)
        )


def pack(
    sequences: Sequence[Sequence[int]],
    *,
    labels: Sequence[Sequence[float]] | None = None,
    rows: Sequence[int] | None = None,
    num_classes: int = 3,
) -> PackedBatch:
    """Lays token id sequences end to end.

    Args:
        sequences: S sequences of token ids, none of them empty.
        labels: S rows of C label weights; zeros when absent.
        rows: S indices of comparisons; 0 to S - 1 when absent.
        num_classes: C, used when `labels` is absent.

    Returns:
        PackedBatch on the CPU.

    Raises:
        ValueError: No sequence, or one of them is empty.
    """
    lengths = [len(sequence) for sequence in sequences]
    if not lengths or min(lengths) == 0:
        raise ValueError(f"every sequence needs at least one token; got lengths {lengths}")
    num_sequences = len(lengths)
    return PackedBatch(
        input_ids_T=torch.cat([torch.as_tensor(sequence, dtype=torch.int64) for sequence in sequences]),
        position_ids_T=torch.cat([torch.arange(length) for length in lengths]),
        cu_seqlens=torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32),
        max_seqlen=max(lengths),
        labels_SC=torch.zeros(num_sequences, num_classes)
        if labels is None
        else torch.as_tensor(np.asarray(labels), dtype=torch.float32),
        row_S=torch.arange(num_sequences) if rows is None else torch.as_tensor(rows, dtype=torch.int64),
    )


class Sample(NamedTuple):
    """One sequence on its way into a batch."""

    input_ids: Sequence[int]
    labels: Sequence[float]
    """C label weights, already swapped where the order is."""
    row: int


class VarlenCollator:
    """Samples -> PackedBatch; a micro-batch without samples becomes one filler sequence of zero label weight.

    Example: samples of 5, 3 and 7 tokens -> `cu_seqlens` [0, 5, 8, 15], 15 tokens, no padding.
    """

    def __init__(self, *, num_classes: int = 3) -> None:
        self.filler = Sample([0], [0.0] * num_classes, FILLER_ROW)

    def __call__(self, samples: Sequence[Sample]) -> PackedBatch:
        input_ids, labels, rows = zip(*(samples or [self.filler]), strict=True)
        return pack(input_ids, labels=labels, rows=rows)


def plan_micro_batches(
    lengths: Sequence[int],
    world_size: int,
    max_tokens: int,
    cost: Callable[[int], float] = float,
) -> list[list[list[int]]]:
    """Cuts one optimiser step into micro-batches, the same number for every rank.

    The fewest micro-batches for which longest-first packing stays inside the budget are used; each sequence
    goes to the micro-batch with the least cost so far that has room for it. Ranks meet in every layer, so the
    micro-batches of one turn are neighbours in cost, and their order alternates so that totals even out.

    Args:
        lengths: Tokens of each sequence of the step.
        world_size: Number of ranks.
        max_tokens: Budget in tokens of one micro-batch on one rank. A longer sequence gets one of its own.
        cost: Work for a sequence of a given length, what is balanced over ranks.

    Returns:
        For every rank its micro-batches, each a list of indices into `lengths`; an empty list stands for a
        filler. Deterministic.

    Raises:
        ValueError: No sequence, or a budget, rank count or length below 1.

    Example: lengths [5, 3, 7], 1 rank, 8 tokens -> [[[0, 1], [2]]].
    """
    if len(lengths) == 0 or min(lengths) < 1 or world_size < 1 or max_tokens < 1:
        raise ValueError(
            f"a plan needs sequences of at least 1 token, 1 rank and a budget of 1 token; got {len(lengths)} "
            f"sequences, world_size {world_size}, max_tokens {max_tokens}"
        )
    longest_first = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    turns = math.ceil(sum(min(length, max_tokens) for length in lengths) / (world_size * max_tokens))
    while (bins := _fill(longest_first, lengths, turns * world_size, max_tokens, cost)) is None:
        turns += 1
    bins.sort(key=lambda b: (-sum(cost(lengths[i]) for i in b), b))
    ranks: list[list[list[int]]] = [[] for _ in range(world_size)]
    for turn in range(turns):
        group = bins[turn * world_size : (turn + 1) * world_size]
        for rank, micro_batch in enumerate(group if turn % 2 == 0 else reversed(group)):
            ranks[rank].append(micro_batch)
    return ranks


def length_sorted_micro_batches(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Sequences of like length together, longest first: for inference, where each device takes the next one.

    The longest micro-batch comes first, so that a device that is too small says so at once, and the last ones
    are short, so that several devices end at about the same time.

    Args:
        lengths: Tokens of each sequence.
        max_tokens: Budget in tokens of one micro-batch. A longer sequence gets one of its own.

    Returns:
        Lists of indices into `lengths`.

    Example: lengths [5, 3, 7], 8 tokens -> [[2], [0, 1]].
    """
    micro_batches: list[list[int]] = []
    room = 0
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if not micro_batches or lengths[i] > room:
            micro_batches.append([])
            room = max_tokens
        micro_batches[-1].append(i)
        room -= lengths[i]
    return micro_batches


def _fill(
    order: Sequence[int], lengths: Sequence[int], num_bins: int, max_tokens: int, cost: Callable[[int], float]
) -> list[list[int]] | None:
    """Least-cost-first packing into bins of `max_tokens`; None when a sequence finds no bin with room."""
    bins: list[list[int]] = [[] for _ in range(num_bins)]
    tokens = [0] * num_bins
    heap = [(0.0, b) for b in range(num_bins)]
    for i in order:
        full = []
        while heap and tokens[heap[0][1]] and tokens[heap[0][1]] + lengths[i] > max_tokens:
            full.append(heapq.heappop(heap))
        if not heap:
            return None
        load, b = heapq.heappop(heap)
        bins[b].append(i)
        tokens[b] += lengths[i]
        for entry in (*full, (load + cost(lengths[i]), b)):
            heapq.heappush(heap, entry)
    return bins
