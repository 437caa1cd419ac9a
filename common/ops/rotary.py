"""Rotary position embedding: tables computed once a forward pass, applied to queries and keys.

Shape suffixes: T packed tokens, N heads (of queries or keys), H head width, R rotation frequencies (H / 2).
"""

import torch


def rotary_tables(
    position_ids_T: torch.Tensor, *, theta: float, head_dim: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine and sine of position x theta^(-2r / H).

    Args:
        position_ids_T: int64, position of each token within its sequence.
        theta: Base of the frequencies.
        head_dim: H, even.

    Returns:
        cos_TR and sin_TR, float32 whatever the model's dtype: bf16 cannot tell position 257 from 258.

    Source: arXiv 2104.09864, section 3.4.2.
    """
    # Double precision costs nothing here and makes the frequencies the same on every device.
    exponent_R = torch.arange(0, head_dim, 2, dtype=torch.float64, device=position_ids_T.device) / head_dim
    angle_TR = position_ids_T.float()[:, None] * (theta**-exponent_R).float()
    return angle_TR.cos(), angle_TR.sin()


def rotary(x_TNH: torch.Tensor, cos_TR: torch.Tensor, sin_TR: torch.Tensor) -> torch.Tensor:
    """Rotates the pairs (x[r], x[r + H / 2]) of every head by the token's angles, in fp32.

    Args:
        x_TNH: Queries or keys.
        cos_TR: float32 from `rotary_tables`.
        sin_TR: float32 from `rotary_tables`.

    Returns:
        Tensor of the shape and dtype of `x_TNH`.
    """
    first_TNR, second_TNR = x_TNH.float().chunk(2, dim=-1)
    cos_T1R, sin_T1R = cos_TR[:, None], sin_TR[:, None]
    rotated = (first_TNR * cos_T1R - second_TNR * sin_T1R, second_TNR * cos_T1R + first_TNR * sin_T1R)
    return torch.cat(rotated, dim=-1).to(x_TNH.dtype)
