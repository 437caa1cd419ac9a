"""Weight gradients that go straight into a running sum, without a tensor of their own.

A gradient of its own would be rounded to the weights' dtype, written, read and added; one matmul with fp32
output adds it exactly as it is accumulated, and faster.

Shape suffixes: T packed tokens, I inputs, O outputs, V vocabulary, D model width.
"""

import torch
import torch.nn.functional as F
from torch import nn


class Linear(nn.Linear):
    """Without bias; its weight's gradient is added to `weight_sum`, or without one goes to `.grad`."""

    weight_sum: torch.Tensor | None = None
    """float32 [O, I]."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)

    def forward(self, input_TI: torch.Tensor) -> torch.Tensor:
        """input_TI -> output_TO."""
        if self.weight_sum is None:
            return F.linear(input_TI, self.weight)
        return _LinearIntoSum.apply(input_TI, self.weight, self.weight_sum)


class Embedding(nn.Embedding):
    """Its gradient, on the rows that were looked up alone, goes to `weight_sum` where there is one."""

    weight_sum: torch.Tensor | None = None
    """float32 [V, D]."""

    def forward(self, input_ids_T: torch.Tensor) -> torch.Tensor:
        """input_ids_T -> hidden_TD."""
        if self.weight_sum is None:
            return F.embedding(input_ids_T, self.weight)
        return _EmbeddingIntoSum.apply(input_ids_T, self.weight, self.weight_sum)


# A custom op, so that compiled backward passes change the sum in place too.
@torch.library.custom_op("arena_preference::add_weight_gradient", mutates_args=("sum_OI",))
def add_weight_gradient(sum_OI: torch.Tensor, gradient_TO: torch.Tensor, input_TI: torch.Tensor) -> None:
    """sum_OI += gradient_TO^T input_TI, the product never rounded below the sum's float32.

    Source: `torch.addmm` with `out_dtype`, on CUDA alone.
    """
    if gradient_TO.is_cuda and gradient_TO.dtype != sum_OI.dtype:
        torch.addmm(sum_OI, gradient_TO.t(), input_TI, out_dtype=sum_OI.dtype, out=sum_OI)
    else:
        sum_OI.addmm_(gradient_TO.t().to(sum_OI.dtype), input_TI.to(sum_OI.dtype))


@add_weight_gradient.register_fake
def _(sum_OI, gradient_TO, input_TI):
    return None


class _LinearIntoSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, input_TI, weight_OI, sum_OI):
        ctx.save_for_backward(input_TI, weight_OI, sum_OI)
        return F.linear(input_TI, weight_OI)

    @staticmethod
    def backward(ctx, gradient_TO):
        input_TI, weight_OI, sum_OI = ctx.saved_tensors
        add_weight_gradient(sum_OI, gradient_TO, input_TI)
        return gradient_TO @ weight_OI, None, None


class _EmbeddingIntoSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, input_ids_T, weight_VD, sum_VD):
        ctx.save_for_backward(input_ids_T, sum_VD)
        return F.embedding(input_ids_T, weight_VD)

    @staticmethod
    def backward(ctx, gradient_TD):
        input_ids_T, sum_VD = ctx.saved_tensors
        sum_VD.index_add_(0, input_ids_T, gradient_TD.to(sum_VD.dtype))
        return None, None, None
