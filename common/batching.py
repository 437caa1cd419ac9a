"""Padding-free batches: sequences are laid end to end, and `cu_seqlens` says where each one ends.

Shape suffixes: T packed tokens, S sequences, C classes.
"""

import heapq
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

FILLER_ROW = -1


class PackedBatch(NamedTuple):
    """Sequences end to end, without padding. Lengths 5, 3, 7 -> `cu_seqlens` [0, 5, 8, 15], `max_seqlen` 7."""

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
    variant_S: torch.Tensor
    """int8, 2 x format (0 PAB, 1 PAPB) + order (0 given, 1 swapped)."""

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
    variants: Sequence[int] | None = None,
    num_classes: int = 3,
) -> PackedBatch:
    """Lays token id sequences end to end.

    Args:
        sequences: S sequences of token ids, none of them empty.
        labels: S rows of C label weights; zeros when absent.
        rows: S indices of comparisons; 0 to S - 1 when absent.
        variants: S variant codes; 0 when absent.
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
        else torch.as_tensor(labels, dtype=torch.float32),
        row_S=torch.arange(num_sequences) if rows is None else torch.as_tensor(rows, dtype=torch.int64),
        variant_S=torch.zeros(num_sequences, dtype=torch.int8)
        if variants is None
        else torch.as_tensor(variants, dtype=torch.int8),
    )
