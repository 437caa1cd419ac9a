"""Root mean square normalisation, in the two casting orders of the published models.

Shape suffixes: D model width; the leading dimensions are free.
"""

import torch
import torch.nn.functional as F


def rms_norm(x: torch.Tensor, weight_D: torch.Tensor, *, eps: float, unit_offset: bool) -> torch.Tensor:
    """x / sqrt(mean(x^2) + eps) over the last dimension, computed in fp32, times a learned scale.

    Args:
        x: [..., D], any floating dtype.
        weight_D: Learned scale.
        eps: Added to the mean square.
        unit_offset: True: times 1 + weight in fp32, then cast (Gemma). False: cast, then multiplied by
            the weight in the dtype of x (Llama).

    Returns:
        Tensor of the shape and dtype of `x`.

    Source: arXiv 1910.07467, section 4; casting orders: transformers 5.23, models/gemma2 and models/llama.
    """
    if unit_offset:
        return F.rms_norm(x.float(), weight_D.shape, 1.0 + weight_D.float(), eps).to(x.dtype)
    return F.rms_norm(x.float(), weight_D.shape, None, eps).to(x.dtype) * weight_D
