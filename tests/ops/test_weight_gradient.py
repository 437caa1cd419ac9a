"""Weight gradients straight into a sum: those of autograd, in float32, and no others."""

import pytest
import torch
from torch.nn import functional as F

from common.ops.weight_gradient import Embedding, Linear


def draw(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_linear_adds_to_its_sum_what_autograd_finds(dtype):
    layer = Linear(5, 7).to(dtype)
    x, direction = draw(11, 5, dtype=dtype).requires_grad_(), draw(11, 7, seed=1, dtype=dtype)
    expected = torch.autograd.grad(F.linear(x, layer.weight), x, direction)[0]
    layer(x).backward(direction)
    assert layer.weight.grad is not None and torch.equal(x.grad, expected)

    layer.weight.grad, layer.weight_sum = None, torch.full((7, 5), 2.0)
    out = layer(x)
    assert torch.equal(out, F.linear(x, layer.weight))
    assert torch.equal(torch.autograd.grad(out, x, direction)[0], expected)
    layer(x).backward(direction)
    assert layer.weight.grad is None
    exact = direction.double().t() @ x.detach().double()  # twice: both backward passes have added
    torch.testing.assert_close(layer.weight_sum.double(), 2.0 + 2 * exact, rtol=1e-5, atol=1e-5)


def test_a_sum_keeps_what_bf16_would_lose():
    """1.0 + 200 x 0.001 is 1.2."""
    layer = Linear(1, 1).to(torch.bfloat16)
    layer.weight_sum = torch.zeros(1, 1)
    for factor in [1.0, *[0.001] * 200]:
        layer(torch.tensor([[factor]], dtype=torch.bfloat16)).backward(torch.ones(1, 1, dtype=torch.bfloat16))
    assert abs(layer.weight_sum.item() - 1.2) < 0.001


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_embedding_adds_repeated_rows(dtype):
    layer = Embedding(9, 4).to(dtype)
    ids, direction = torch.tensor([3, 0, 3, 8, 3]), draw(5, 4, dtype=dtype)
    layer(ids).backward(direction)
    assert layer.weight.grad is not None
    layer.weight.grad, layer.weight_sum = None, torch.ones(9, 4)
    out = layer(ids)
    assert torch.equal(out, layer.weight[ids])
    out.backward(direction)
    assert layer.weight.grad is None
    exact = torch.ones(9, 4).index_add(0, ids, direction.float())
    torch.testing.assert_close(layer.weight_sum, exact)
