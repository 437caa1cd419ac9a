"""Mathematical operations of the models: plain PyTorch definitions, and which backend computes each.

The definition of an op runs on any device in any dtype and is the truth in tests. A model asks once, with
what it is going to compute, and hands the `Ops` that it gets to its layers. Asking for a backend that is not
there or cannot compute what is asked is an error, never a fallback.
"""

import os
import shutil
import sysconfig
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from common.ops.attention import attention
from common.ops.backend import Asked, Backend, compiled
from common.ops.flash_attention import attention_flash, attention_varlen, flash_refuses, varlen_refuses
from common.ops.flex_attention import attention_flex, flex_refuses
from common.ops.gated_activation import gated_activation
from common.ops.rms_norm import rms_norm
from common.ops.rotary import rotary
from common.ops.transformer_engine import rms_norm_te, rms_norm_te_refuses, rotary_te, rotary_te_refuses

Compile = Literal["auto", "on", "off"]


@dataclass(frozen=True, kw_only=True)
class Ops:
    """One callable an op, with the signature of its definition."""

    attention: Callable[..., torch.Tensor]
    rms_norm: Callable[..., torch.Tensor]
    rotary: Callable[..., torch.Tensor]
    gated_activation: Callable[..., torch.Tensor]
    backends: tuple[tuple[str, str], ...]
    """(op, name of its backend)."""
    compiles: bool
    """What stands between the attentions is compiled, by `fuse`."""

    def __str__(self) -> str:
        chosen = ", ".join(f"{op} {backend}" for op, backend in self.backends)
        return chosen + ", compiled" * self.compiles

    def fuse(self, function: Callable) -> Callable:
        """`function`, compiled once for all lengths where this is on."""
        return compiled(function) if self.compiles else function


BACKENDS: dict[str, dict[str, Backend]] = {  # the fastest first, the definition last
    "attention": {
        "flash": Backend(attention_flash, flash_refuses),
        "varlen": Backend(attention_varlen, varlen_refuses),
        "flex": Backend(attention_flex, flex_refuses),
        "torch": Backend(attention),
    },
    "rms_norm": {"transformer_engine": Backend(rms_norm_te, rms_norm_te_refuses), "torch": Backend(rms_norm)},
    "rotary": {"transformer_engine": Backend(rotary_te, rotary_te_refuses), "torch": Backend(rotary)},
    "gated_activation": {"torch": Backend(gated_activation)},
}


def choose(
    backend: str = "auto",
    *,
    compile: Compile = "auto",
    device: torch.device | str,
    dtype: torch.dtype,
    head_dim: int,
    softcap: float | None,
    window: int | None,
) -> Ops:
    """The ops of one model.

    Args:
        backend: "auto", for each op the first of `BACKENDS` that can compute what is asked; the name of a
            backend, for each op that has it; or pairs, as "attention=flex,rms_norm=torch".
        compile: torch.compile of norms, rotary and gates with what surrounds them, and of flex attention;
            "auto" is on for GPUs that can.
        device: Of the parameters.
        dtype: Of the parameters.
        head_dim: Width of an attention head.
        softcap: Cap of the attention scores, None for off.
        window: Visible keys in the layers that have a window, None for all.

    Raises:
        ValueError: An op has no such backend, that one cannot compute what is asked, or nothing can be
            compiled here.
    """
    device = torch.device(device)
    reason = cannot_compile(device)
    if compile == "on" and reason:
        raise ValueError(f"compilation is asked for, but {reason}; or say off (--compile off)")
    compiles = compile == "on" or (compile == "auto" and device.type == "cuda" and reason is None)
    asked = Asked(device, dtype, head_dim, softcap, window, compiles)
    wanted = named_backends(backend)
    chosen = {op: _choose(op, wanted.get(op, "auto"), asked) for op in BACKENDS}
    computes = {op: BACKENDS[op][name].compute for op, name in chosen.items()}
    return Ops(**computes, backends=tuple(chosen.items()), compiles=compiles)


def named_backends(backend: str) -> dict[str, str]:
    """Op -> name of the backend that is asked for, as of `choose`; ValueError where there is no such one."""
    if "=" not in backend:
        ops = [op for op in BACKENDS if backend in BACKENDS[op]]
        if not ops and backend != "auto":
            names = sorted({name for backends in BACKENDS.values() for name in backends})
            raise ValueError(f"no op has a backend {backend!r} (--ops); there are auto, {', '.join(names)}")
        return dict.fromkeys(ops, backend)
    wanted = dict(pair.strip().partition("=")[::2] for pair in backend.split(","))
    for op, name in wanted.items():
        if op not in BACKENDS:
            raise ValueError(f"--ops {backend} names the op {op!r}; the ops are {', '.join(BACKENDS)}")
        if name not in ("auto", *BACKENDS[op]):
            raise ValueError(f"{op} has no backend {name!r} (--ops); it has auto, {', '.join(BACKENDS[op])}")
    return wanted


def _choose(op: str, name: str, asked: Asked) -> str:
    """Name of the backend of one op."""
    if name != "auto":
        reason = BACKENDS[op][name].refuses(asked)
        if reason is None:
            return name
    nearest = next(name for name, one in BACKENDS[op].items() if one.refuses(asked) is None)
    if name != "auto":
        raise ValueError(f"{op}: the backend {name!r} {reason}. The nearest that can is {nearest!r}")
    return nearest


def cannot_compile(device: torch.device) -> str | None:
    """What torch.compile lacks for this device, with the way to it; None where nothing."""
    compilers = ("CC", ("cc", "gcc", "clang")) if device.type == "cuda" else ("CXX", ("g++", "clang++"))
    if not any(map(shutil.which, (os.environ.get(compilers[0], ""), *compilers[1]))):
        return f"there is no C compiler: install one of {', '.join(compilers[1])}, or set {compilers[0]}"
    if not Path(sysconfig.get_path("include"), "Python.h").is_file():
        return "Python's headers are missing: install the package python3-dev"
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (7, 0):
        return "this card is older than compute capability 7.0"
    return None
