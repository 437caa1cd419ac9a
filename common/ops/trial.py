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
        found = errors(compute, definition, tensors, **options)
    except Exception as error:  # CUDA and loading errors of any kind
        return f"fails on this machine: {first_line(error)}; install a build for this card and PyTorch"
    for number, error in enumerate(found):
        if not error < TOLERANCE:
            what = f"gradient {number}" if number else "the output"
            return f"computes something else on this machine: relative error of {what} {error:.2g}"
    return None


def errors(
    compute: Callable[..., torch.Tensor],
    definition: Callable[..., torch.Tensor],
    tensors: Sequence[torch.Tensor],
    **options: object,
) -> list[float]:
    """Relative errors of the output and of the gradient of each of `tensors`; as of `try_out`."""
    truths = _with_gradients(definition, [tensor.float() for tensor in tensors], options)
    found = _with_gradients(compute, tensors, options)
    return [relative_error(ours, truth) for ours, truth in zip(found, truths, strict=True)]


def relative_error(found: torch.Tensor, truth: torch.Tensor) -> float:
    """2-norm of the difference / 2-norm of the truth, a float32 tensor."""
    return float((found - truth).norm() / truth.norm())


def _with_gradients(compute, tensors, options):
    with torch.enable_grad():
        tensors = [tensor.detach().requires_grad_() for tensor in tensors]
        out = compute(*tensors, **options)
        direction = torch.linspace(-1, 1, out.numel(), device=out.device).bfloat16()  # the same in any dtype
        return out.detach(), *torch.autograd.grad(out, tensors, direction.view(out.shape).to(out.dtype))


def first_line(error: BaseException) -> str:
    """The error's kind and the beginning of its message."""
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]
