"""RMSNorm and rotary embedding by Transformer Engine's kernels, forward and backward.

Shape suffixes: T packed tokens, N heads, H head width, R rotation frequencies (H / 2), D model width.
"""

import functools

import torch

from common.ops.backend import Asked
from common.ops.rms_norm import rms_norm
from common.ops.rotary import rotary, rotary_tables
from common.ops.trial import first_line, try_out


def rms_norm_te(x: torch.Tensor, weight_D: torch.Tensor, *, eps: float, unit_offset: bool) -> torch.Tensor:
    """As `common.ops.rms_norm.rms_norm`, with one rounding at the end whatever the offset."""
    return _RMSNorm.apply(x, weight_D, eps, unit_offset)


class _RMSNorm(torch.autograd.Function):
    """Source: transformer_engine 2.20, pytorch/ops/basic/rmsnorm.py, which keeps a weight of its own."""

    @staticmethod
    def forward(ctx, x, weight_D, eps, unit_offset):
        import transformer_engine_torch as kernels
        from transformer_engine.pytorch.constants import TE_DType

        rows_TD = x.reshape(-1, x.shape[-1]).contiguous()
        dtype = TE_DType[x.dtype]
        out_TD, _, inverse_rms_T = kernels.rmsnorm_fwd(
            rows_TD, weight_D, eps, None, None, dtype, 0, unit_offset
        )
        ctx.save_for_backward(rows_TD, inverse_rms_T, weight_D)
        ctx.unit_offset = unit_offset
        return out_TD.view(x.shape)

    @staticmethod
    def backward(ctx, gradient):
        import transformer_engine_torch as kernels

        rows_TD, inverse_rms_T, weight_D = ctx.saved_tensors
        gradient_TD = gradient.reshape(rows_TD.shape).contiguous()
        dx_TD, dweight_D = kernels.rmsnorm_bwd(
            gradient_TD, rows_TD, inverse_rms_T, weight_D, 0, ctx.unit_offset
        )
        return dx_TD.view(gradient.shape), dweight_D, None, None


def rotary_te(x_TNH: torch.Tensor, cos_TR: torch.Tensor, sin_TR: torch.Tensor) -> torch.Tensor:
    """As `common.ops.rotary.rotary`; the kernel takes angles, which the tables give back."""
    from transformer_engine.pytorch.attention.rope import apply_rotary_pos_emb

    angle_TR = torch.atan2(sin_TR, cos_TR)
    angle_T11H = torch.cat([angle_TR, angle_TR], dim=-1)[:, None, None]
    return apply_rotary_pos_emb(x_TNH[:, None], angle_T11H, tensor_format="sbhd", fused=True)[:, 0]


def rms_norm_te_refuses(asked: Asked) -> str | None:
    """Why the norm cannot be computed by Transformer Engine, in words; None where it can."""
    return _refuses(asked) or _trial_of_norm(asked)


def rotary_te_refuses(asked: Asked) -> str | None:
    """Why the rotary embedding cannot be computed by Transformer Engine, in words; None where it can."""
    return _refuses(asked) or _trial_of_rotary(asked)


def _refuses(asked: Asked) -> str | None:
    if asked.device.type != "cuda":
        return f"needs a GPU, the model is on {asked.device.type}"
    if asked.compiles:
        return "cannot be part of compiled layers, which are faster: say --compile off, or leave it"
    try:
        import transformer_engine.pytorch  # noqa: F401  (whether it loads is the question)
    except ModuleNotFoundError as error:
        return f"is not installed ({error.name} is missing; just setup gpu)"
    except Exception as error:  # a build for another PyTorch or CUDA raises anything
        return f"does not load: {first_line(error)}; a build for another PyTorch or CUDA: install it again"
    return None


@functools.cache
def _trial_of_norm(asked: Asked) -> str | None:
    make = functools.partial(torch.randn, device=asked.device, dtype=asked.dtype)
    tensors = [make(40, 8 * asked.head_dim), make(8 * asked.head_dim)]
    trial = functools.partial(try_out, rms_norm_te, rms_norm, tensors, eps=1e-6)
    return trial(unit_offset=True) or trial(unit_offset=False)


@functools.cache
def _trial_of_rotary(asked: Asked) -> str | None:
    x_TNH = torch.randn(40, 2, asked.head_dim, device=asked.device, dtype=asked.dtype)
    positions_T = torch.arange(40, device=asked.device) % 13
    cos_TR, sin_TR = rotary_tables(positions_T, theta=1e4, head_dim=asked.head_dim)
    return try_out(rotary_te, rotary, [x_TNH], cos_TR=cos_TR, sin_TR=sin_TR)
