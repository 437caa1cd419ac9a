"""Attention over packed sequences: every backend, beside padded scaled_dot_product_attention.

Run   just bench attention        (below 8 minutes, one GPU)

Heads of Gemma 2 9B (with and without its window of 4,096 keys), Gemma 2 27B and Llama 3 8B, on 16,384 tokens
of arena-like lengths and on one sequence of 8,192. Scores reach the softcap. TFLOP/s count the visible pairs
alone, 4 x pairs x heads x width forward (fwd) and 3.5 times that with the gradients (both).
Errors are 2-norms against the definition in fp32, of the output and the worst of the three gradients, and as
a multiple of those of `torch`, the definition in bf16. `sdpa` is what one would take instead: sequences
padded to the longest, a mask, no softcap.
"""

import argparse
from collections.abc import Iterator, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from common.console import clear_errors
from common.ops.attention import attention
from common.ops.trial import errors
from variants import Parser, Row, attempt, ops_or_absent, peak_gb, run, timed

BACKENDS = ("flash", "varlen", "flex", "torch")
SCORE_STD = 10.0
"""Of the scores: of thousands of keys some then lie far above a softcap of 50."""
TOY_SHRINK = 64


class Heads(NamedTuple):
    """Attention of a model."""

    num_heads: int
    num_key_value_heads: int
    head_dim: int
    softcap: float | None
    window: int | None


HEADS = {
    "9B": Heads(16, 8, 256, 50.0, None),
    "9B win": Heads(16, 8, 256, 50.0, 4096),
    "27B": Heads(32, 16, 128, 50.0, None),
    "8B": Heads(32, 8, 128, None, None),
}


def arena_lengths(num_tokens: int) -> list[int]:
    """Lengths as arena votes have them, `num_tokens` in all."""
    lengths = (600 * np.random.default_rng(0).lognormal(0.0, 0.75, 400)).astype(int).clip(90, 4340)
    ends = lengths.cumsum()
    return np.diff([0, *ends[ends < num_tokens], num_tokens]).tolist()


def visible_pairs(lengths: Sequence[int], window: int | None) -> int:
    """Pairs of a query and a key that it sees.

    Example: lengths 3, 2 -> 6 + 3; with a window of 2 keys 5 + 3.
    """
    return sum(min(i + 1, window or length) for length in lengths for i in range(length))


def measure(name: str, args: argparse.Namespace) -> Iterator[Row]:
    """The rows of one backend."""
    device, shrink = ("cpu", TOY_SHRINK) if args.toy else ("cuda", 1)
    for case, heads in HEADS.items():
        for what, lengths in (("arena", arena_lengths(16_384 // shrink)), ("8,192", [8192 // shrink])):
            one = heads._replace(window=heads.window and heads.window // shrink)
            yield {"case": f"{case} {what}", **attempt(partial(row, name, one, lengths, device))}


def row(name: str, heads: Heads, lengths: list[int], device: str) -> Row:
    """Speed, memory and errors of one backend on one case."""
    N, K, H, softcap, window = heads
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    options = {"scale": H**-0.5, "softcap": softcap, "window": window}
    compute = attend_padded if name == "sdpa" else None
    if compute is None:
        asked = {"device": device, "dtype": dtype, "head_dim": H, "softcap": softcap, "window": window}
        compute = ops_or_absent(f"attention={name}", **asked).attention
    torch.manual_seed(0)
    q, k, v, gradient = (torch.randn(sum(lengths), number, H, device=device) for number in (N, K, K, N))
    inputs = [x.to(dtype).requires_grad_() for x in (q * SCORE_STD, k, v)]
    gradient = gradient.to(dtype)
    cu_seqlens = torch.tensor([0, *lengths], device=device).cumsum(0).int()
    options |= {"cu_seqlens_q": cu_seqlens, "cu_seqlens_k": cu_seqlens}
    options |= {"max_seqlen_q": max(lengths), "max_seqlen_k": max(lengths)}
    output_error, *gradient_errors = errors(compute, attention, inputs, **options)

    def passes():
        return torch.autograd.grad(compute(*inputs, **options), inputs, gradient)

    flops = 4 * N * H * visible_pairs(lengths, window)
    forward, both = timed(lambda: compute(*inputs, **options), device), timed(passes, device)
    return {
        "forward_ms": forward,
        "both_ms": both,
        "forward_tflops": flops / forward["median"] / 1e9,
        "both_tflops": 3.5 * flops / both["median"] / 1e9,
        "peak_gb": peak_gb(passes, device),
        "output_error": output_error,
        "gradient_error": max(gradient_errors),
    }


def attend_padded(q_TNH, k_TKH, v_TKH, *, cu_seqlens_q, max_seqlen_q, scale, window, **_) -> torch.Tensor:
    """Padded to the longest sequence, with a mask; keys and values repeated, as transformers does it."""
    L, lengths, groups = max_seqlen_q, cu_seqlens_q.diff().tolist(), q_TNH.shape[1] // k_TKH.shape[1]
    padded = [nn.utils.rnn.pad_sequence(x.split(lengths), batch_first=True) for x in (q_TNH, k_TKH, v_TKH)]
    q, k, v = (x.transpose(1, 2) for x in padded)
    distance_LL = torch.arange(L, device=q.device)[:, None] - torch.arange(L, device=q.device)
    mask_LL = (distance_LL >= 0) & (distance_LL < (window or L))
    is_token_SL = torch.arange(L, device=q.device) < cu_seqlens_q.diff()[:, None]
    mask = mask_LL & (is_token_SL[:, None, None] | (distance_LL == 0))
    k, v = (x.repeat_interleave(groups, 1) for x in (k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale).transpose(1, 2)[is_token_SL]


def compare(row: Row, base: Row, rows: list[Row]) -> Row:
    """Time as a multiple of the first of ours, error as a multiple of the definition's in this dtype."""
    found = {"times_ours": row["both_ms"]["median"] / base["both_ms"]["median"]}
    for plain in rows:
        if plain["variant"] == "torch" and plain["case"] == row["case"] and plain["output_error"]:
            names = ("output_error", "gradient_error")
            found["times_plain_error"] = max(row[name] / plain[name] for name in names)
    return found


COLUMNS = {
    "case": "{case}",
    "fwd ms": "{forward_ms[median]:.2f}",
    "both ms": "{both_ms[median]:.2f}",
    "from": "{both_ms[min]:.2f}",
    "to": "{both_ms[max]:.2f}",
    "x ours": "{times_ours:.2f}",
    "fwd TFLOP/s": "{forward_tflops:.0f}",
    "both TFLOP/s": "{both_tflops:.0f}",
    "GB": "{peak_gb:.1f}",
    "error": "{output_error:.4f}",
    "grads": "{gradient_error:.4f}",
    "x torch": "{times_plain_error:.2f}",
}


if __name__ == "__main__":
    with clear_errors():
        args = Parser(__doc__.splitlines()[0], [*BACKENDS, "sdpa"]).parse_args()
        run(args, BACKENDS, measure, COLUMNS, compare)
