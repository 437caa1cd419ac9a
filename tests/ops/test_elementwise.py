"""rms_norm, rotary and gated_activation against transformers, output and gradients."""

import pytest
import torch
from transformers.activations import ACT2FN
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm, apply_rotary_pos_emb
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from common.ops.gated_activation import gated_activation
from common.ops.rms_norm import rms_norm
from common.ops.rotary import rotary, rotary_tables


def draw(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype).requires_grad_()


def reference_norm(unit_offset, weight):
    norm = (Gemma2RMSNorm if unit_offset else LlamaRMSNorm)(len(weight), eps=1e-3)
    norm.weight.data = weight.detach().clone()
    return norm


@pytest.mark.parametrize("unit_offset", [True, False])
def test_rms_norm_equals_transformers(unit_offset):
    x, weight, direction = draw(7, 24), draw(24, seed=1), draw(7, 24, seed=2).detach()
    norm = reference_norm(unit_offset, weight)
    out = rms_norm(x, weight, eps=1e-3, unit_offset=unit_offset)
    gradients = torch.autograd.grad(out, (x, weight), direction)
    expected = norm(x)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(gradients, torch.autograd.grad(expected, (x, norm.weight), direction))
    assert not torch.allclose(rms_norm(x, weight, eps=1e-6, unit_offset=unit_offset), expected)
    assert not torch.allclose(rms_norm(x, weight, eps=1e-3, unit_offset=not unit_offset), expected)


@pytest.mark.parametrize("unit_offset", [True, False])
def test_rms_norm_casts_in_the_published_order(unit_offset):
    x, weight = draw(200, 24, dtype=torch.bfloat16), draw(24, dtype=torch.bfloat16, seed=1)
    expected = reference_norm(unit_offset, weight)(x)
    same = (rms_norm(x, weight, eps=1e-3, unit_offset=unit_offset) == expected).float().mean()
    assert same > 0.999  # float32 sums of another order may round differently
    scale = 1 + weight.float() if unit_offset else weight.float()
    exact = x.float() / (x.float().square().mean(-1, keepdim=True) + 1e-3).sqrt()
    other_order = exact.bfloat16() * scale.bfloat16() if unit_offset else (exact * scale).bfloat16()
    assert (other_order == expected).float().mean() < 0.95


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rotary_equals_transformers(dtype):
    positions, theta, width = torch.tensor([0, 1, 2, 0, 1, 300]), 500.0, 10
    q, direction = draw(6, 3, width, dtype=dtype), draw(6, 3, width, dtype=dtype, seed=1).detach()
    cos, sin = rotary_tables(positions, theta=theta, head_dim=width)
    assert cos.dtype == sin.dtype == torch.float32 and cos.shape == (6, width // 2)
    out = rotary(q, cos, sin)
    assert out.dtype == dtype
    angle = positions[:, None] * theta ** (-torch.arange(0, width, 2) / width)
    tables = [torch.cat([table, table], -1) for table in (angle.cos(), angle.sin())]
    expected, _ = apply_rotary_pos_emb(q.float(), q.float(), *tables)
    torch.testing.assert_close(out.float(), expected, **tolerance(dtype))
    gradient = torch.autograd.grad(out, q, direction)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, q, direction.float()))
    wrong, _ = rotary_tables(positions, theta=600.0, head_dim=width)
    assert not torch.allclose(wrong, cos, atol=1e-2)


def tolerance(dtype):
    return {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 2**-8, "atol": 1e-3}


@pytest.mark.parametrize(("activation", "published"), [("gelu_tanh", "gelu_pytorch_tanh"), ("silu", "silu")])
def test_gated_activation_equals_transformers(activation, published):
    gate, up, direction = draw(7, 24), draw(7, 24, seed=1), draw(7, 24, seed=2).detach()
    out = gated_activation(gate, up, activation=activation)
    expected = ACT2FN[published](gate) * up
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(
        torch.autograd.grad(out, (gate, up), direction), torch.autograd.grad(expected, (gate, up), direction)
    )
    other = {"gelu_tanh": "silu", "silu": "gelu_tanh"}[activation]
    assert not torch.allclose(gated_activation(gate, up, activation=other), expected, atol=1e-2)
