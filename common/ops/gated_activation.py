"""The gate of the feed-forward blocks: activation(gate) x up.

Shape suffixes: T packed tokens, F feed-forward width.
"""

from typing import Literal

import torch
import torch.nn.functional as F


def gated_activation(
    gate_TF: torch.Tensor,
    up_TF: torch.Tensor,
    *,
    activation: Literal["gelu_tanh", "silu"],
) -> torch.Tensor:
    """activation(gate) * up, elementwise.

    Args:
        gate_TF: Output of the gate projection.
        up_TF: Output of the up projection.
        activation: "gelu_tanh", the tanh approximation of GELU (Gemma), or "silu" (Llama).

    Returns:
        Tensor of the shape and dtype of `gate_TF`.

    Source: arXiv 2002.05202, section 2.
    """
    if activation == "gelu_tanh":
        return F.gelu(gate_TF, approximate="tanh") * up_TF
    assert activation == "silu", activation
    return F.silu(gate_TF) * up_TF
