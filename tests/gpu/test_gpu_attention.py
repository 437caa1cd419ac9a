"""Attention backends against the definition in fp32, on a GPU: output, every gradient, and planted faults."""

import itertools

import pytest
import torch

from common.ops import BACKENDS
from common.ops.attention import attention
from common.ops.backend import Asked

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.filterwarnings("ignore"),
]

WIDTHS = {"head 256": (4, 2, 256), "head 128": (8, 2, 128)}
"""Query heads, key/value heads, width."""
RAGGED = [1, 700, 129, 3, 512, 1024, 77]
CASES = {  # name -> (query lengths, key lengths, windows)
    "ragged": (RAGGED, RAGGED, [None, 100]),
    "last tokens": ([1] * 8 * len(RAGGED), RAGGED * 8, [None, 100]),
    "suffixes": ([1, 200, 129, 2, 1, 700, 13] * 4, RAGGED * 4, [None, 100]),
    "long": ([8192, 300], [8192, 300], [None, 4095, 4096, 4097]),
}
PARTS = ("output", "dq", "dk", "dv")


def boundaries(lengths):
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device="cuda")


SCORES = {"far above the cap": 150.0, "sharp": 4.0}
"""Standard deviation of the scores. Far above the cap many keys weigh the same, and one key more or less, a
fault of the window, would drown; sharp scores show it."""


def options_of(lengths_q, lengths_k, softcap, window, head_dim):
    return {
        "cu_seqlens_q": boundaries(lengths_q),
        "cu_seqlens_k": boundaries(lengths_k),
        "max_seqlen_q": max(lengths_q),
        "max_seqlen_k": max(lengths_k),
        "scale": head_dim**-0.5,
        "softcap": softcap,
        "window": window,
    }


def draw(lengths_q, lengths_k, width, scores=SCORES["sharp"]):
    num_heads, num_key_value_heads, head_dim = width
    generator = torch.Generator("cuda").manual_seed(0)
    shapes = [(sum(lengths_q), num_heads), *[(sum(lengths_k), num_key_value_heads)] * 2]
    shapes.append(shapes[0])  # the direction of the gradients
    q, *others = (torch.randn(*shape, head_dim, generator=generator, device="cuda") for shape in shapes)
    return [x.bfloat16() for x in (scores * q, *others)]


def compute(function, tensors, options, dtype=torch.bfloat16):
    *tensors, direction = (tensor.to(dtype) for tensor in tensors)
    tensors = [tensor.requires_grad_() for tensor in tensors]
    out = function(*tensors, **options)
    assert out.dtype == dtype and out.shape == tensors[0].shape
    return out.detach(), *torch.autograd.grad(out, tensors, direction)


def errors(found, truth):
    """2-norm of the error / 2-norm of the truth, of output and every gradient."""
    return {
        part: float((ours.float() - exact).norm() / exact.norm())
        for part, ours, exact in zip(PARTS, found, truth, strict=True)
    }


def worst_row(found, truth):
    """Of the output: error of the worst row against a mean row, which one key too many cannot hide from."""
    row = (found[0].float() - truth[0]).norm(dim=-1)
    return float(row.max() / truth[0].norm(dim=-1).square().mean().sqrt())


def joined(options):
    """The first two sequences taken for one."""
    ends = {name: torch.cat([options[name][:1], options[name][2:]]) for name in options if "cu_" in name}
    return options | ends | {name: options[name] * 2 for name in options if "max_" in name}


def faults(options, case, scores):
    """What the bound has to notice here: name -> options that are wrong."""
    if scores == "far above the cap":
        return {"softcap dropped": options | {"softcap": None}}
    wrong = {"two sequences joined": joined(options)} if case == "ragged" else {}
    if (window := options["window"]) and case != "last tokens":
        wrong |= {f"window {other}": options | {"window": other} for other in (window - 1, window + 1)}
    return wrong


@pytest.mark.parametrize(
    ("scores", "softcap"), [("far above the cap", 50.0), ("sharp", 50.0), ("sharp", None)]
)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("backend", [name for name in BACKENDS["attention"] if name != "torch"])
def test_error_is_at_most_twice_that_of_plain_bf16_and_faults_exceed_it(
    backend, width, case, scores, softcap
):
    lengths_q, lengths_k, windows = CASES[case]
    head_dim = WIDTHS[width][2]
    function, refuses = BACKENDS["attention"][backend]
    if reason := refuses(Asked(torch.device("cuda"), torch.bfloat16, head_dim, softcap, windows[-1], True)):
        pytest.skip(f"{backend} {reason}")
    tensors = draw(lengths_q, lengths_k, WIDTHS[width], SCORES[scores])
    for window in windows:
        options = options_of(lengths_q, lengths_k, softcap, window, head_dim)
        truth = compute(attention, tensors, options, torch.float32)
        plain, found = compute(attention, tensors, options), compute(function, tensors, options)
        ours, bounds = errors(found, truth), errors(plain, truth)
        too_large = {part: (ours[part], bounds[part]) for part in PARTS if not ours[part] <= 2 * bounds[part]}
        assert not too_large, (window, too_large)
        bound = 2 * worst_row(plain, truth)
        assert worst_row(found, truth) <= bound, (window, bound)
        for fault, wrong in faults(options, case, scores).items():
            worst = worst_row(compute(function, tensors, wrong), truth)
            assert worst > bound, (fault, window, worst, bound)


@pytest.mark.parametrize("backend", [name for name in BACKENDS["attention"] if name != "torch"])
def test_what_a_kernel_leaves_unwritten_is_seen(backend):
    """The allocator hands out memory that is full of NaN."""
    function, refuses = BACKENDS["attention"][backend]
    if reason := refuses(Asked(torch.device("cuda"), torch.bfloat16, 128, None, None, True)):
        pytest.skip(f"{backend} {reason}")
    tensors = draw(RAGGED, RAGGED, WIDTHS["head 128"])
    options = options_of(RAGGED, RAGGED, None, None, 128)
    compute(function, tensors, options)
    spoiled = [torch.full_like(tensor, torch.nan) for tensor in tensors * 3]
    del spoiled
    assert all(part.isfinite().all() for part in compute(function, tensors, options))
