"""Attention by FlashAttention 2 on GPUs: from the package flash-attn, or from PyTorch itself (no softcap).

Whether an installed build does what is asked is not believed but tried once, on a small input with gradients:
a build for another card fails there, and one that ignores the softcap or the window is found out.

Shape suffixes: T packed tokens (queries and keys may differ in number), N query heads, K key/value heads, H
head width.
"""

import functools
import inspect
from collections.abc import Callable

import torch

from common.ops.attention import attention
from common.ops.backend import Asked
from common.ops.trial import first_line, try_out

MAX_HEAD_DIM = 256


def attention_flash(
    q_TNH: torch.Tensor,
    k_TKH: torch.Tensor,
    v_TKH: torch.Tensor,
    *,
    scale: float,
    softcap: float | None = None,
    window: int | None = None,
    **boundaries: torch.Tensor | int,
) -> torch.Tensor:
    """As `common.ops.attention.attention`, by flash-attn, whose `boundaries` have the same names."""
    from flash_attn import flash_attn_varlen_func

    return flash_attn_varlen_func(
        q_TNH,
        k_TKH,
        v_TKH,
        **boundaries,
        softmax_scale=scale,
        causal=True,
        softcap=softcap or 0.0,
        window_size=_window_size(window),
    )


def attention_varlen(
    q_TNH: torch.Tensor,
    k_TKH: torch.Tensor,
    v_TKH: torch.Tensor,
    *,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    scale: float,
    softcap: None = None,
    window: int | None = None,
) -> torch.Tensor:
    """As `common.ops.attention.attention` without softcap, by `torch.nn.attention.varlen`."""
    from torch.nn.attention.varlen import varlen_attn  # here, for it imports the compiler

    assert softcap is None, softcap
    # Since 2.12 grouped queries have to be announced; before, they were computed without.
    grouped = {"enable_gqa": True} if "enable_gqa" in _varlen_parameters() else {}
    return varlen_attn(
        q_TNH,
        k_TKH,
        v_TKH,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        scale=scale,
        window_size=_window_size(window),
        **grouped,
    )


@functools.cache
def _varlen_parameters() -> frozenset[str]:
    from torch.nn.attention.varlen import varlen_attn

    return frozenset(inspect.signature(varlen_attn).parameters)


def _window_size(window: int | None) -> tuple[int, int]:
    """Keys left and right of a query's own, -1 for all: a window of W keys reaches W - 1 to the left."""
    return (-1 if window is None else window - 1, 0)


def flash_refuses(asked: Asked) -> str | None:
    """Why flash-attn cannot compute what is asked, in words; None where it can."""
    if reason := _card_refuses(asked):
        return reason
    try:
        import flash_attn  # noqa: F401  (whether it loads is the question)
    except ImportError as error:
        if isinstance(error, ModuleNotFoundError) and error.name == "flash_attn":
            return "is not installed (just setup gpu)"
        return f"does not load: {first_line(error)}; it was built for another PyTorch: install it again"
    return _trial(attention_flash, asked)


def varlen_refuses(asked: Asked) -> str | None:
    """Why PyTorch's own FlashAttention cannot compute what is asked, in words; None where it can."""
    if asked.softcap is not None:
        return f"has no softcap, and {asked.softcap} is asked for"
    if reason := _card_refuses(asked):
        return reason
    if "window_size" not in _varlen_parameters():
        return f"needs PyTorch 2.11, this is {torch.__version__}"
    return _trial(attention_varlen, asked)


def _card_refuses(asked: Asked) -> str | None:
    if asked.device.type != "cuda":
        return f"needs a GPU, the model is on {asked.device.type}"
    if asked.dtype not in (torch.bfloat16, torch.float16):
        return f"computes in bf16 and fp16, {asked.dtype} is asked for"
    if asked.head_dim > MAX_HEAD_DIM or asked.head_dim % 8:
        return f"takes head widths up to {MAX_HEAD_DIM}, multiples of 8; {asked.head_dim} is asked for"
    if (capability := torch.cuda.get_device_capability(asked.device)) < (8, 0):
        return "needs compute capability 8.0 (Ampere), this card has {}.{}".format(*capability)
    return None


@functools.cache
def _trial(compute: Callable[..., torch.Tensor], asked: Asked) -> str | None:
    """What is wrong with two short sequences, the first with fewer queries than keys."""
    make = functools.partial(torch.randn, device=asked.device, dtype=asked.dtype)
    make = functools.partial(make, generator=torch.Generator(asked.device).manual_seed(0))
    cu_seqlens_q, cu_seqlens_k = (
        torch.tensor(ends, dtype=torch.int32, device=asked.device) for ends in ([0, 3, 43], [0, 7, 47])
    )
    return try_out(
        compute,
        attention,
        [make(rows, heads, asked.head_dim) for rows, heads in ((43, 2), (47, 1), (47, 1))],
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        max_seqlen_q=40,
        max_seqlen_k=40,
        # Scores of three times the cap, so that its absence shows, and a window shorter than the sequence.
        scale=3.0 * (asked.softcap or 1.0) * asked.head_dim**-0.5,
        softcap=asked.softcap,
        window=None if asked.window is None else 9,
    )
