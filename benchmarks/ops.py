"""Norm, rotary, gate and gradient sums at the width of a 9B model: definition, compiled, liger, others.

Run   just bench ops        (below 8 minutes, one GPU)

4,400 tokens of width 3,584, 16 heads of 256, feed-forward 14,336, vocabulary 256,000, in bf16; forward (fwd)
and forward with gradients (both). GB/s count what must be read and written once, "of copy" is their share of
what `copy_` reaches on this card. Gradients are summed in fp32: `torch` computes one in bf16 and adds it,
`sums` is one matmul with fp32 output, or one `index_add_`. Errors are 2-norms against the definition in fp32,
of the output and the worst of the gradients. Liger turns one head of keys beside the 16 of queries.
"""

import argparse
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch

from common.console import clear_errors
from common.ops.gated_activation import gated_activation
from common.ops.rms_norm import rms_norm
from common.ops.rotary import rotary, rotary_tables
from common.ops.trial import errors, relative_error
from common.ops.weight_gradient import add_weight_gradient
from variants import Parser, Row, attempt, ops_or_absent, run, timed

OURS = ("compiled", "sums", "torch", "transformer_engine")
EPS = 1e-6


class Sizes(NamedTuple):
    """Of the tensors."""

    tokens: int = 4_400
    width: int = 3_584
    heads: int = 16
    head_dim: int = 256
    feed_forward: int = 14_336
    vocabulary: int = 256_000
    copied: int = 2**29


TOY = Sizes(44, 32, 2, 16, 64, 100, 2**10)


class Case(NamedTuple):
    """An op of `common.ops` with its inputs."""

    definition: partial
    inputs: tuple[torch.Tensor, ...]
    """Those that get a gradient, in fp32."""
    passes: int
    """Tensors of the first input's size that must be read or written, with gradients."""


def elementwise_cases(sizes: Sizes, device: str) -> dict[str, Case]:
    """The ops that are not attention. A norm reads x, writes y; then reads x and dy, writes dx: 5 passes."""
    T, D, N, H, width, *_ = sizes
    make = partial(torch.randn, device=device)
    cos_TR, sin_TR = rotary_tables(torch.arange(T, device=device), theta=1e4, head_dim=H)
    norm, gate = (make(T, D), 1 + 0.1 * make(D)), (make(T, width), make(T, width))
    return {
        "norm, Gemma": Case(partial(rms_norm, eps=EPS, unit_offset=True), norm, 5),
        "norm, Llama": Case(partial(rms_norm, eps=EPS, unit_offset=False), norm, 5),
        "rotary": Case(partial(rotary, cos_TR=cos_TR, sin_TR=sin_TR), (make(T, N, H),), 4),
        "gate, gelu": Case(partial(gated_activation, activation="gelu_tanh"), gate, 8),
        "gate, silu": Case(partial(gated_activation, activation="silu"), gate, 8),
    }


def liger(case: str, definition: partial) -> Callable[..., torch.Tensor]:
    """Liger's kernel; ImportError where it is not installed."""
    from liger_kernel.ops.geglu import LigerGELUMulFunction
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction
    from liger_kernel.ops.rope import LigerRopeFunction
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    def turned(x_TNH):
        tables = (torch.cat([definition.keywords[name]] * 2, -1)[None] for name in ("cos_TR", "sin_TR"))
        q_1NTH, k_11TH = x_TNH.transpose(0, 1)[None], torch.zeros_like(x_TNH[None, None, :, 0])
        return LigerRopeFunction.apply(q_1NTH, k_11TH, *tables)[0][0].transpose(0, 1)

    return {
        "norm, Gemma": lambda x, weight: LigerRMSNormFunction.apply(x, weight, EPS, 1.0, "gemma", False),
        "norm, Llama": lambda x, weight: LigerRMSNormFunction.apply(x, weight, EPS, 0.0, "llama", False),
        "rotary": turned,
        "gate, gelu": LigerGELUMulFunction.apply,
        "gate, silu": LigerSiLUMulFunction.apply,
    }[case]


def elementwise_row(name: str, case: str, one: Case, device: str, dtype: torch.dtype) -> Row:
    """Speed and errors of one way to compute an op."""
    op = one.definition.func.__name__
    if name == "torch":
        compute = one.definition
    elif name == "compiled":
        compute = torch.compile(lambda *inputs: one.definition(*inputs), dynamic=True)
    elif name == "liger":
        compute = liger(case, one.definition)
    else:
        head_dim = one.inputs[0].shape[-1]
        asked = {"device": device, "dtype": dtype, "head_dim": head_dim, "softcap": None, "window": None}
        ops = ops_or_absent(f"{op}={name}", **asked)
        compute = partial(getattr(ops, op), **one.definition.keywords)
    inputs = [x.to(dtype).requires_grad_() for x in one.inputs]
    # Liger turns its inputs in place, but only once the truth is there.
    output_error, *gradient_errors = errors(compute, one.definition, inputs)
    gradient = torch.randn_like(inputs[0])
    forward = timed(lambda: compute(*inputs), device)
    both = timed(lambda: torch.autograd.grad(compute(*inputs), inputs, gradient), device)
    num_bytes = one.passes * inputs[0].numel() * inputs[0].element_size()
    return {
        "forward_ms": forward,
        "both_ms": both,
        "both_gb_s": gb_per_s(num_bytes, both),
        "output_error": output_error,
        "gradient_error": max(gradient_errors),
    }


def weight_sum_row(name: str, sizes: Sizes, device: str, dtype: torch.dtype) -> Row:
    """fp32 sum += gradient^T x, the weight gradient of a Linear."""
    make = partial(torch.randn, dtype=dtype, device=device)
    x_TD, gradient_TF = make(sizes.tokens, sizes.width), make(sizes.tokens, sizes.feed_forward)

    def add(total_FD: torch.Tensor) -> torch.Tensor:
        if name == "torch":
            return total_FD.add_(gradient_TF.t() @ x_TD)
        add_weight_gradient(total_FD, gradient_TF, x_TD)
        return total_FD

    truth = gradient_TF.t().float() @ x_TD.float()
    found = sum_row(add, truth, (x_TD.numel() + gradient_TF.numel()) * x_TD.element_size(), device)
    flops = 2 * sizes.tokens * sizes.width * sizes.feed_forward
    return {**found, "tflops": flops / found["both_ms"]["median"] / 1e9}


def embedding_sum_row(name: str, sizes: Sizes, device: str, dtype: torch.dtype) -> Row:
    """fp32 sum += the gradient of the embedding, which touches the rows of the tokens alone."""
    gradient_TD = torch.randn(sizes.tokens, sizes.width, dtype=dtype, device=device)
    ids_T = torch.randint(sizes.vocabulary, (sizes.tokens,), device=device)

    def add(total_VD: torch.Tensor) -> torch.Tensor:
        if name == "torch":
            dense = torch.ops.aten.embedding_dense_backward(gradient_TD, ids_T, sizes.vocabulary, -1, False)
            return total_VD.add_(dense)
        return total_VD.index_add_(0, ids_T, gradient_TD.float())

    truth = torch.zeros(sizes.vocabulary, sizes.width, device=device)
    truth.index_add_(0, ids_T, gradient_TD.float())
    return sum_row(add, truth, gradient_TD.numel() * gradient_TD.element_size(), device, ids_T.unique())


def sum_row(add: Callable, truth: torch.Tensor, num_bytes: int, device: str, rows=slice(None)) -> Row:
    """Speed and error of adding to a sum, whose `rows` are read and written; `num_bytes` are read beside."""
    total = torch.zeros_like(truth)
    error = relative_error(add(total), truth)
    both = timed(lambda: add(total), device)
    return {
        "both_ms": both,
        "both_gb_s": gb_per_s(num_bytes + 8 * truth[rows].numel(), both),
        "gradient_error": error,
    }


def copy_rate(num_bytes: int, device: str) -> float:
    """GB/s of copying, read and written."""
    source = torch.ones(num_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return gb_per_s(2 * num_bytes, timed(lambda: target.copy_(source), device))


def gb_per_s(num_bytes: int, found: dict[str, float]) -> float:
    """Rate of what takes `found` milliseconds. Example: 3 MB in 1 ms -> 3 GB/s."""
    return num_bytes / found["median"] / 1e6


def measure(name: str, args: argparse.Namespace) -> Iterator[Row]:
    """The rows of one backend."""
    sizes, device, dtype = (TOY, "cpu", torch.float32) if args.toy else (Sizes(), "cuda", torch.bfloat16)
    torch.manual_seed(0)
    rows: dict[str, Callable[[], Row]] = {}
    if name != "sums":
        for case, one in elementwise_cases(sizes, device).items():
            rows[case] = partial(elementwise_row, name, case, one, device, dtype)
    if name in ("sums", "torch"):
        rows["weight sum"] = partial(weight_sum_row, name, sizes, device, dtype)
        rows["embedding sum"] = partial(embedding_sum_row, name, sizes, device, dtype)
    rate = copy_rate(sizes.copied, device)
    for case, row in rows.items():
        yield {"case": case, "copy_gb_s": rate, **attempt(row)}


def compare(row: Row, base: Row, rows: list[Row]) -> Row:
    """Time as a multiple of the first of ours, rate as a share of copying."""
    times = row["both_ms"]["median"] / base["both_ms"]["median"]
    return {"times_ours": times, "share": row["both_gb_s"] / row["copy_gb_s"]}


COLUMNS = {
    "case": "{case}",
    "fwd ms": "{forward_ms[median]:.3f}",
    "both ms": "{both_ms[median]:.3f}",
    "from": "{both_ms[min]:.3f}",
    "to": "{both_ms[max]:.3f}",
    "x ours": "{times_ours:.2f}",
    "GB/s": "{both_gb_s:,.0f}",
    "of copy": "{share:.0%}",
    "error": "{output_error:.1e}",
    "grads": "{gradient_error:.1e}",
}


if __name__ == "__main__":
    with clear_errors():
        args = Parser(__doc__.splitlines()[0], [*OURS, "liger"]).parse_args()
        run(args, OURS, measure, COLUMNS, compare)
