"""Norms, rotary and gates by Transformer Engine and compiled, against the definitions in fp32, on a GPU."""

import pytest
import torch

from common.ops import BACKENDS
from common.ops.backend import Asked, compiled
from common.ops.gated_activation import gated_activation
from common.ops.rms_norm import rms_norm
from common.ops.rotary import rotary, rotary_tables

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.filterwarnings("ignore"),
]
T, D, N, H = 1021, 3584, 3, 256


def draw(*shape):
    return torch.randn(*shape, device="cuda", generator=torch.Generator("cuda").manual_seed(sum(shape)))


def tables(theta=1e4):
    positions_T = torch.arange(T, device="cuda") % 700
    return dict(zip(("cos_TR", "sin_TR"), rotary_tables(positions_T, theta=theta, head_dim=H), strict=True))


CASES = {  # name -> op, definition, shapes of what gets a gradient, options, options that are wrong
    "norm, Gemma": ("rms_norm", rms_norm, [(T, D), (D,)], {"eps": 1e-2, "unit_offset": True}, {"eps": 1e-6}),
    "norm, Llama": (
        "rms_norm",
        rms_norm,
        [(T, D), (D,)],
        {"eps": 1e-2, "unit_offset": False},
        {"unit_offset": True},
    ),
    "rotary": ("rotary", rotary, [(T, N, H)], tables, lambda: tables(1.1e4)),
    "gate, gelu": (
        "gated_activation",
        gated_activation,
        [(T, D), (T, D)],
        {"activation": "gelu_tanh"},
        {"activation": "silu"},
    ),
    "gate, silu": (
        "gated_activation",
        gated_activation,
        [(T, D), (T, D)],
        {"activation": "silu"},
        {"activation": "gelu_tanh"},
    ),
}


def errors(function, tensors, options, truth, dtype=torch.bfloat16):
    """Relative errors of output and gradients; without `truth` the values themselves."""
    tensors = [tensor.to(dtype).requires_grad_() for tensor in tensors]
    out = function(*tensors, **options)
    assert out.dtype == dtype
    values = [out.detach(), *torch.autograd.grad(out, tensors, draw(*out.shape).to(torch.bfloat16).to(dtype))]
    if truth is None:
        return values
    return [float((a.float() - b).norm() / b.norm()) for a, b in zip(values, truth, strict=True)]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("backend", ["compiled", "transformer_engine"])
def test_error_is_at_most_twice_that_of_plain_bf16_and_wrong_options_exceed_it(backend, case):
    op, definition, shapes, options, wrong = CASES[case]
    options, wrong = (given() if callable(given) else given for given in (options, wrong))
    if backend == "compiled":
        function = compiled(lambda *tensors, **options: definition(*tensors, **options))
    elif backend not in BACKENDS[op]:
        pytest.skip(f"{op} has no {backend}")
    else:
        function, refuses = BACKENDS[op][backend]
        if reason := refuses(Asked(torch.device("cuda"), torch.bfloat16, H, None, None)):
            pytest.skip(f"{backend} {reason}")
    tensors = [draw(*shape).to(torch.bfloat16) for shape in shapes]
    truth = errors(definition, tensors, options, None, torch.float32)
    plain = errors(definition, tensors, options, truth)
    found = errors(function, tensors, options, truth)
    assert all(ours <= 2 * theirs for ours, theirs in zip(found, plain, strict=True)), (found, plain)
    assert errors(function, tensors, options | wrong, truth)[0] > 2 * plain[0]
