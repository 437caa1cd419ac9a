"""What a model asks of its ops, what a backend answers, and how what is compiled is compiled."""

from collections.abc import Callable
from typing import NamedTuple

import torch

MANY_MODELS = 64
"""Compilations of one function in a process: a few for each model, and an ensemble may be large."""


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


def compiled(function: Callable) -> Callable:
    """`function` compiled at its first call, for all lengths; it fails where not all of it can be."""
    config = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, MANY_MODELS)
    return torch.compile(function, dynamic=True, fullgraph=True)
