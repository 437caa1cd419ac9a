"""Forward and backward, packed, beside transformers' padded batches: same weights, same sequences.

Run   python benchmarks/padding.py [--checkpoint google/gemma-2-9b-it --device cuda --dtype bf16]

Lengths are log-normal around `--median-tokens` (real votes: 515). Padded batches hold as many sequences as
fill the same token budget, padding included; "sorted" sorts by length first, which a user gets from a
length-grouped sampler. The table gives seconds for one pass over all sequences and the ratio.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from transformers import AutoModelForSequenceClassification

from common.batching import pack, plan_micro_batches
from common.console import cli, show_table
from common.models import load_model
from common.models.zoo import find_checkpoint


@dataclass(frozen=True, kw_only=True)
class Args:
    """Packed against padded."""

    checkpoint: str = "tiny-gemma"
    """Folder, hub id or short name."""
    num_sequences: int = 96
    """Sequences in one pass."""
    median_tokens: int = 120
    """Median length in tokens."""
    max_tokens: int = 4096
    """Tokens per batch, padding included."""
    repeats: int = 5
    """Timed passes; the median is shown."""
    device: str = "cpu"
    """Device to compute on, such as cpu or cuda:0."""
    dtype: Literal["fp32", "bf16"] = "fp32"
    """Dtype of parameters and activations."""


def main(args: Args) -> None:
    draw = np.random.default_rng(0)
    lengths = (args.median_tokens * draw.lognormal(0.0, 0.7, args.num_sequences)).astype(int).clip(8, 8000)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[args.dtype]
    ours = load_model(args.checkpoint, dtype=dtype, device=args.device)
    ids = [torch.from_numpy(draw.integers(8, ours.hf_config.vocab_size, n)) for n in lengths]
    theirs = AutoModelForSequenceClassification.from_pretrained(
        find_checkpoint(args.checkpoint), num_labels=3, dtype=dtype, trust_remote_code=False
    ).to(args.device)

    def packed() -> None:
        for indices in plan_micro_batches(lengths.tolist(), 1, args.max_tokens)[0]:
            ours(pack([ids[i] for i in indices]).to(args.device)).logsumexp(-1).sum().backward()

    def padded(order: np.ndarray) -> Callable[[], None]:
        def run() -> None:
            for indices in padded_batches(lengths, order, args.max_tokens):
                batch = torch.nn.utils.rnn.pad_sequence([ids[i] for i in indices], batch_first=True)
                mask = torch.arange(batch.shape[1])[None] < torch.tensor(lengths[indices])[:, None]
                found = theirs(batch.to(args.device), attention_mask=mask.long().to(args.device))
                found.logits.float().logsumexp(-1).sum().backward()

        return run

    ways = {
        "ours, packed": packed,
        "transformers, padded, sorted by length": padded(np.argsort(lengths)),
        "transformers, padded, as drawn": padded(np.arange(len(lengths))),
    }
    seconds = {name: timed(way, args) for name, way in ways.items()}
    total, base = int(lengths.sum()), seconds["ours, packed"]
    show_table(
        f"{args.checkpoint}, {args.dtype} on {args.device}: {len(lengths)} sequences, {total:,} tokens",
        ("way", "seconds", "tokens/s", "times ours"),
        [(name, f"{s:.3f}", f"{total / s:,.0f}", f"{s / base:.2f}") for name, s in seconds.items()],
    )


def padded_batches(lengths: np.ndarray, order: np.ndarray, max_tokens: int) -> list[np.ndarray]:
    """Consecutive sequences whose number x longest stays within the budget."""
    batches, start = [], 0
    for end in range(1, len(order) + 1):
        if (end - start) * lengths[order[start:end]].max() > max_tokens and end - start > 1:
            batches.append(order[start : end - 1])
            start = end - 1
    return [*batches, order[start:]]


def timed(way: Callable[[], None], args: Args) -> float:
    """Median seconds of a pass, after one that is not counted."""
    found = []
    for _ in range(args.repeats + 1):
        began = time.perf_counter()
        way()
        if args.device != "cpu":
            torch.cuda.synchronize()
        found.append(time.perf_counter() - began)
    return float(np.median(found[1:]))


if __name__ == "__main__":
    cli(main)
