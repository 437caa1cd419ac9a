"""What a model asks of its ops, and what a backend answers."""

from collections.abc import Callable
from typing import NamedTuple

import torch


class Asked(NamedTuple):
    """What a model computes with its ops."""

    device: torch.device
    dtype: torch.dtype
    head_dim: int
    softcap: float | None
    """Cap of the attention scores, None for off."""
    window: int | None
    """Visible keys in the layers that have a window, None for all."""
    compiles: bool = False
    """May use torch.compile."""


class Backend(NamedTuple):
    """One way to compute an op."""

    compute: Callable[..., torch.Tensor]
    """Has the signature of the op's definition."""
    refuses: Callable[[Asked], str | None] = lambda asked: None
    """Why it cannot compute what is asked, in words; None where it can."""
