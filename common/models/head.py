"""The classification head, its seeded initialisation and its fingerprint.

Shape suffixes: S sequences, D model width, C classes.
"""

import hashlib
from collections.abc import Mapping

import torch
from torch import nn


class PreferenceHead(nn.Module):
    """Dropout, Linear(D, D / 2), Dropout, GELU, Linear(D / 2, C)."""

    def __init__(self, *, hidden_size: int, num_classes: int, dropout: float) -> None:
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.dense = nn.Linear(hidden_size, hidden_size // 2)
        self.activation = nn.GELU()
        self.out = nn.Linear(hidden_size // 2, num_classes)

    def forward(self, hidden_SD: torch.Tensor) -> torch.Tensor:
        """hidden_SD -> logits_SC in the dtype of the weights."""
        return self.out(self.activation(self.dropout(self.dense(self.dropout(hidden_SD)))))


def initial_head(*, hidden_size: int, num_classes: int, seed: int) -> dict[str, torch.Tensor]:
    """Draws a head's tensors as `torch.nn.Linear` does: uniform in +-1 / sqrt(inputs), weights and biases.

    The stock classification head of transformers starts with a very high loss; this one starts near log C.
    Drawn in float32 on the CPU by a generator of its own, it depends on the sizes and the seed alone.

    Args:
        hidden_size: D.
        num_classes: C.
        seed: Seed of the generator.

    Returns:
        float32 tensors by their state-dict names, `head.dense.weight` and so on.
    """
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, outputs, inputs in (
        ("dense", hidden_size // 2, hidden_size),
        ("out", num_classes, hidden_size // 2),
    ):
        bound = inputs**-0.5
        weight = torch.empty(outputs, inputs).uniform_(-bound, bound, generator=generator)
        bias = torch.empty(outputs).uniform_(-bound, bound, generator=generator)
        tensors |= {f"head.{name}.weight": weight, f"head.{name}.bias": bias}
    return tensors


def head_hash(tensors: Mapping[str, torch.Tensor]) -> str:
    """sha256 of the head's float32 bytes, in the order of its names; other tensors do not count."""
    digest = hashlib.sha256()
    for name in sorted(name for name in tensors if name.startswith("head.")):
        values = tensors[name].detach().to("cpu", torch.float32).contiguous()
        digest.update(values.numpy().tobytes())
    return digest.hexdigest()
