"""Probabilities for comparisons: length-sorted packed batches over all ranks, orders mirrored back."""

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Protocol

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from common.batching import Sample, VarlenCollator, plan_micro_batches
from common.console import progress
from common.models import PreferenceModel, load_model
from common.models.zoo import find_checkpoint
from common.prompts import ORDERS, Prompter, load_tokenizer
from common.score.metrics import mirror


class SequenceTable(Protocol):
    """Tokenised variants of comparisons, as `common.tokens.Sequences` or the notebook holds them."""

    lengths: np.ndarray
    row: np.ndarray
    variant: np.ndarray

    def __getitem__(self, index: int) -> Sample: ...

    def name(self, row: int) -> str: ...


def open_prompter(checkpoint: str, preference: dict | None) -> Prompter:
    """The prompt that a checkpoint was trained with, checked against the tokenizer that lies beside it.

    Args:
        checkpoint: Folder, hub id or short name.
        preference: Its preference.json.

    Raises:
        ValueError: The checkpoint has no preference head, or its template hash is not what this code and its
            tokenizer give.
    """
    if preference is None:
        raise ValueError(
            f"{checkpoint} has no preference.json: it is a backbone; train it with stages/stage1.py"
        )
    stored = preference["prompt"]
    prompter = Prompter(
        load_tokenizer(find_checkpoint(checkpoint)),
        conversation_tokens=stored["conversation_tokens"],
        instruction=stored["instruction"],
    )
    if prompter.prompt_hash != stored["prompt_hash"]:
        raise ValueError(
            f"{checkpoint} was trained with prompt {stored['prompt_hash'][:12]}, but this code and the "
            f"tokenizer in that folder give {prompter.prompt_hash[:12]}: its scores would be wrong. Use the "
            "code and the tokenizer that it was trained with."
        )
    return prompter


def open_model(
    checkpoint: str, *, dtype: torch.dtype | None, device: torch.device | str, ops: str
) -> PreferenceModel:
    """A trained checkpoint in evaluation mode; `dtype` None computes in fp32 on a CPU and bf16 elsewhere."""
    if dtype is None:
        dtype = torch.float32 if torch.device(device).type == "cpu" else torch.bfloat16
    return load_model(checkpoint, dtype=dtype, device=device, ops=ops).eval()


@torch.no_grad()
def predict(
    model: nn.Module,
    sequences: SequenceTable,
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
    sequences: SequenceTable,
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
