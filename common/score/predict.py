"""Probabilities for comparisons: length-sorted packed batches over all ranks, orders mirrored back."""

from collections.abc import Sequence
from contextlib import nullcontext

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from common.batching import VarlenCollator, plan_micro_batches
from common.console import progress
from common.data.table import ORDERS
from common.score.metrics import mirror
from common.tokens import Sequences

MAX_TOKENS = 16_384
"""Tokens per rank per micro-batch, unless a flag says otherwise: enough to fill a GPU, little memory without
a backward pass."""


@torch.no_grad()
def predict(
    model: nn.Module,
    sequences: Sequences,
    *,
    max_tokens: int,
    device: torch.device | str,
    description: str | None = "predicting",
) -> np.ndarray:
    """Class probabilities of every sequence, as the model saw it (a swapped one is not mirrored back here).

    All ranks run the same number of micro-batches, so a sharded model can be used as well as replicas.

    Args:
        model: `model(packed) -> logits_SC`.
        max_tokens: Tokens per rank per micro-batch.
        description: Of the progress bar; None shows none.

    Returns:
        float32 [sequences, classes], the same on every rank.

    Raises:
        ValueError: A logit is not finite; the comparisons are named.
    """
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    plan = plan_micro_batches(sequences.lengths.tolist(), world_size, max_tokens)[rank]
    collate = VarlenCollator()
    was_training = model.training
    model.eval()
    found = torch.zeros(len(sequences.lengths), len(collate.filler.labels), device=device)
    bar = (
        nullcontext(lambda n: None)
        if description is None
        else progress(description, len(plan), "micro-batches")
    )
    with bar as advance:
        for indices in plan:
            logits_SC = model(collate([sequences[i] for i in indices]).to(device))
            if indices:
                found[indices] = logits_SC.float().softmax(-1)
            advance(1)
    model.train(was_training)
    if world_size > 1:
        dist.all_reduce(found)
    bad = (~found.isfinite().all(-1)).nonzero().flatten().tolist()
    if bad:
        rows = sorted({int(sequences.row[i]) for i in bad})
        raise ValueError(
            f"the model's answers are not finite for {len(rows)} comparisons, first "
            f"{', '.join(sequences.name(row) for row in rows[:10])}: look at their text, or the checkpoint "
            "does not fit the dtype that it is computed in"
        )
    return found.cpu().numpy()


def predict_orders(
    model: nn.Module,
    sequences: Sequences,
    *,
    max_tokens: int,
    device: torch.device | str,
    description: str | None = "predicting",
) -> dict[str, np.ndarray]:
    """Probabilities of comparisons rendered in one format, by the order in which the answers were shown.

    Returns:
        "given" and "swapped" (those that `sequences` hold) -> float32 [comparisons, classes], mirrored back.
    """
    found = predict(model, sequences, max_tokens=max_tokens, device=device, description=description)
    result = {}
    for swapped, name in enumerate(ORDERS):
        mask = sequences.variant % 2 == swapped
        if mask.any():
            assert len(np.unique(sequences.row[mask])) == mask.sum(), "one format, every comparison once"
            result[name] = np.empty((mask.sum(), found.shape[1]), dtype=np.float32)
            result[name][sequences.row[mask]] = mirror(found[mask]) if swapped else found[mask]
    return result


def average(orders: dict[str, np.ndarray] | Sequence[np.ndarray]) -> np.ndarray:
    """Mean probabilities over orders (swap averaging) or models, float32 [comparisons, classes]."""
    values = list(orders.values()) if isinstance(orders, dict) else list(orders)
    return np.mean(values, axis=0, dtype=np.float64).astype(np.float32)
