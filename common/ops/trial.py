"""Whether an installed kernel computes what it should here: not believed, but tried once on a small input."""

from collections.abc import Callable, Sequence

import torch

TOLERANCE = 0.05
"""Relative error: rounding to bf16 gives 0.01, a dropped softcap, window or offset above 0.2."""


def try_out(
    compute: Callable[..., torch.Tensor],
    definition: Callable[..., torch.Tensor],
    tensors: Sequence[torch.Tensor],
    **options: object,
) -> str | None:
    """What is wrong with output or gradients, in words; None where nothing.

    Args:
        compute: Has the signature of the definition.
        definition: The op in plain PyTorch, computed in fp32 here.
        tensors: Positional arguments, whose gradients are compared.
        options: Keyword arguments.
    """
    try:
        found = _with_gradients(compute, tensors, options)
    except Exception as error:  # CUDA and loading errors of any kind
        return f"fails on this machine: {first_line(error)}; install a build for this card and PyTorch"
    expected = _with_gradients(definition, [tensor.float() for tensor in tensors], options)
    for number, (ours, truth) in enumerate(zip(found, expected, strict=True)):
        error = float((ours - truth).norm() / truth.norm())
        if not error < TOLERANCE:
            what = f"gradient {number}" if number else "the output"
            return f"computes something else on this machine: relative error of {what} {error:.2g}"
    return None


def _with_gradients(compute, tensors, options):
    with torch.enable_grad():
        tensors = [tensor.detach().requires_grad_() for tensor in tensors]
        out = compute(*tensors, **options)
        direction = torch.linspace(-1, 1, out.numel(), device=out.device).view(out.shape)
        return out.detach(), *torch.autograd.grad(out, tensors, direction.to(out.dtype))


def first_line(error: BaseException) -> str:
    """The error's kind and the beginning of its message."""
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]
