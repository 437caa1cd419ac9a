"""The gate of the feed-forward blocks: activation(gate) x up.

Shape suffixes: T packed tokens, F feed-forward width.
"""

from typing import Literal

import torch
import torch.nn.functional as F

from common.ops.backends import choose_backend


def gated_activation(
    gate_TF: torch.Tensor,
    up_TF: torch.Tensor,
    *,
    activation: Literal["gelu_tanh", "silu"],
    backend: str = "auto",
) -> torch.Tensor:
    """activation(gate) * up, elementwise.

    Args:
        gate_TF: Output of the gate projection.
        up_TF: Output of the up projection.
        activation: "gelu_tanh", the tanh approximation of GELU (Gemma), or "silu" (Llama).
        backend: "auto" or a key of `BACKENDS`.

    Returns:
        Tensor of the shape and dtype of `gate_TF`.

    Raises:
        ValueError: The backend is not there.

    Source: arXiv 2002.05202, section 2.
    """
    return choose_backend("gated_activation", backend, BACKENDS)(gate_TF, up_TF, activation)


def _gated_activation_torch(gate_TF, up_TF, activation):
    if activation == "gelu_tanh":
        return F.gelu(gate_TF, approximate="tanh") * up_TF
    assert activation == "silu", activation
    return F.silu(gate_TF) * up_TF


BACKENDS = {"torch": _gated_activation_torch}
