"""Root mean square normalisation, in the two casting orders of the published models.

Shape suffixes: D model width; the leading dimensions are free.
"""

import torch
import torch.nn.functional as F

from common.ops.backends import choose_backend


def rms_norm(
    x: torch.Tensor, weight_D: torch.Tensor, *, eps: float, unit_offset: bool, backend: str = "auto"
) -> torch.Tensor:
    """x / sqrt(mean(x^2) + eps) over the last dimension, computed in fp32, times a learned scale.

    Args:
        x: [..., D], any floating dtype.
        weight_D: Learned scale.
        eps: Added to the mean square.
        unit_offset: True: times 1 + weight in fp32, then cast (Gemma). False: cast, then multiplied by
            the weight in the dtype of x (Llama).
        backend: "auto" or a key of `BACKENDS`.

    Returns:
        Tensor of the shape and dtype of `x`.

    Raises:
        ValueError: The backend is not there.

    Source: arXiv 1910.07467, section 4; casting orders: transformers 5.23, models/gemma2 and models/llama.
    """
    return choose_backend("rms_norm", backend, BACKENDS)(x, weight_D, eps, unit_offset)


def _rms_norm_torch(x, weight_D, eps, unit_offset):
    if unit_offset:
        return F.rms_norm(x.float(), weight_D.shape, 1.0 + weight_D.float(), eps).to(x.dtype)
    return F.rms_norm(x.float(), weight_D.shape, None, eps).to(x.dtype) * weight_D


BACKENDS = {"torch": _rms_norm_torch}
