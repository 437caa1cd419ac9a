"""Mathematical operations of the models: plain PyTorch definitions, and which backend computes each.

The definition of an op runs on any device in any dtype and is the truth in tests. A model asks once, with
what it is going to compute, and hands the `Ops` that it gets to its layers. Asking for a backend that is not
there or cannot compute what is asked is an error, never a fallback.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch

from common.ops.attention import attention
from common.ops.gated_activation import gated_activation
from common.ops.rms_norm import rms_norm
from common.ops.rotary import rotary


@dataclass(frozen=True, kw_only=True)
class Ops:
    """One callable an op, with the signature of its definition."""

    attention: Callable[..., torch.Tensor]
    rms_norm: Callable[..., torch.Tensor]
    rotary: Callable[..., torch.Tensor]
    gated_activation: Callable[..., torch.Tensor]
    backends: tuple[tuple[str, str], ...]
    """(op, name of its backend)."""

    def __str__(self) -> str:
        return ", ".join(f"{op} {backend}" for op, backend in self.backends)


class Asked(NamedTuple):
    """What a model computes with its ops."""

    device: torch.device
    dtype: torch.dtype
    head_dim: int
    softcap: float | None
    """Cap of the attention scores, None for off."""
    window: int | None
    """Visible keys in the layers that have a window, None for all."""


class Backend(NamedTuple):
    """One way to compute an op."""

    compute: Callable[..., torch.Tensor]
    refuses: Callable[[Asked], str | None] = lambda asked: None
    """Why it cannot compute what is asked, in words; None where it can."""


BACKENDS: dict[str, dict[str, Backend]] = {  # the fastest first, the definition last
    "attention": {"torch": Backend(attention)},
    "rms_norm": {"torch": Backend(rms_norm)},
    "rotary": {"torch": Backend(rotary)},
    "gated_activation": {"torch": Backend(gated_activation)},
}


def choose(
    backend: str = "auto",
    *,
    device: torch.device | str,
    dtype: torch.dtype,
    head_dim: int,
    softcap: float | None,
    window: int | None,
) -> Ops:
    """The ops of one model.

    Args:
        backend: "auto", for each op the first of `BACKENDS` that can compute what is asked; or a name.
        device: Of the parameters.
        dtype: Of the parameters.
        head_dim: Width of an attention head.
        softcap: Cap of the attention scores, None for off.
        window: Visible keys in the layers that have a window, None for all.

    Raises:
        ValueError: An op has no such backend, or that one cannot compute what is asked.
    """
    asked = Asked(torch.device(device), dtype, head_dim, softcap, window)
    chosen = {op: _choose(op, backend, asked) for op in BACKENDS}
    computes = {op: BACKENDS[op][name].compute for op, name in chosen.items()}
    return Ops(**computes, backends=tuple(chosen.items()))


def _choose(op: str, backend: str, asked: Asked) -> str:
    """Name of the backend of one op."""
    available = BACKENDS[op]
    if backend == "auto":
        return next(name for name, one in available.items() if one.refuses(asked) is None)
    if backend not in available:
        raise ValueError(
            f"{op} has no backend {backend!r} here; available: auto, {', '.join(available)}. "
            "Choose one of these, or install the package that brings the other."
        )
    if reason := available[backend].refuses(asked):
        raise ValueError(f"{op}: the backend {backend!r} {reason}; choose another, or auto")
    return backend
