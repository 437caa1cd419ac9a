"""The classification head, its seeded initialisation and its fingerprint.

Shape suffixes: S sequences, D model width, C classes, E units that dropout may strike (D + D / 2).
"""

import hashlib
from collections.abc import Mapping

import torch
from torch import nn


class Float32Linear(nn.Linear):
    """Computes in float32 whatever its dtype: in bf16, logits of 1 to 2 would lie on a grid of 0.0078."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., inputs] of any dtype -> float32 [..., outputs]."""
        return nn.functional.linear(x.float(), self.weight.float(), self.bias.float())


class PreferenceHead(nn.Module):
    """Dropout, Linear(D, D / 2), Dropout, GELU, Linear(D / 2, C), in float32.

    The caller draws what dropout keeps, a sequence at a time: what else is in the batch must not matter.
    """

    def __init__(self, *, hidden_size: int, num_classes: int, dropout: float) -> None:
        super().__init__()
        self.dropout, self.widths = dropout, (hidden_size, hidden_size // 2)
        self.dense = Float32Linear(hidden_size, hidden_size // 2)
        self.activation = nn.GELU()
        self.out = Float32Linear(hidden_size // 2, num_classes)

    def forward(self, hidden_SD: torch.Tensor, kept_SE: torch.Tensor | None = None) -> torch.Tensor:
        """hidden_SD -> logits_SC, float32.

        Args:
            kept_SE: bool, the inputs of both Linears that dropout keeps, side by side; None: no dropout.

        Raises:
            ValueError: Training with dropout, but `kept_SE` is None.
        """
        if kept_SE is None:
            if self.training and self.dropout:
                raise ValueError(
                    f"the head has dropout {self.dropout}, but no kept_SE was given: pass what to keep "
                    f"(bool, [sequences, {sum(self.widths)}], drawn by common.train.fit.draw_kept), or load "
                    "the model with head_dropout=0"
                )
            return self.out(self.activation(self.dense(hidden_SD)))
        scale_SE = kept_SE / (1 - self.dropout)
        first_SD, second_SE = scale_SE.split(self.widths, dim=-1)
        return self.out(self.activation(self.dense(hidden_SD * first_SD) * second_SE))


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
