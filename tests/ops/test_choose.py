"""Which backend computes an op: chosen once, forced by name, refused where it cannot."""

import builtins
import dataclasses
import re
import shutil
import sys
import types

import pytest
import torch

from common import ops
from common.ops import Backend, cannot_compile, choose, flash_attention
from common.ops.backend import MANY_MODELS, Asked, compiled
from common.ops.flex_attention import flex_refuses

ASKED = {"device": "cpu", "dtype": torch.float32, "head_dim": 8, "softcap": 50.0, "window": None}


def test_every_op_has_its_definition_last_and_refuses_nothing():
    definitions = (ops.attention, ops.rms_norm, ops.rotary, ops.gated_activation)
    chosen = choose(**ASKED)
    assert chosen == choose("torch", **ASKED)
    for op, definition in zip(ops.BACKENDS, definitions, strict=True):
        assert list(ops.BACKENDS[op])[-1] == "torch" and getattr(chosen, op) is definition
    assert str(chosen) == "attention torch, rms_norm torch, rotary torch, gated_activation torch"
    with pytest.raises(dataclasses.FrozenInstanceError):
        chosen.attention = None


@pytest.mark.parametrize(
    ("backend", "message"),
    [
        (
            "tritn",
            r"'tritn' .--ops.; there are auto, flash, flex, torch, transformer_engine, varlen",
        ),
        (
            "attention=tritn",
            "has no backend 'tritn' .--ops.; it has auto, flash, varlen, flex, torch",
        ),
        ("atention=torch", "--ops atention=torch names the op 'atention'; the ops are attention, rms_norm,"),
        ("attention=torch,", "names the op ''; the ops are"),
        ("varlen", "attention: the backend 'varlen' has no softcap, and 50.0 .* nearest that can is 'torch'"),
        ("flex", "attention: the backend 'flex' has no gradients but on a GPU, the model is on cpu"),
    ],
)
def test_a_backend_that_is_not_there_or_cannot_is_an_error_that_names_the_others(backend, message):
    with pytest.raises(ValueError, match=message):
        choose(backend, **ASKED)


def test_auto_takes_the_first_that_can_and_a_forced_one_that_cannot_is_an_error(monkeypatch):
    def fast():
        """Stands for a faster attention."""

    def refuses(asked):
        return "computes no softcap" if asked.softcap is not None else None

    for op, backends in ops.BACKENDS.items():
        monkeypatch.setitem(ops.BACKENDS, op, {"fast": Backend(fast, refuses), **backends})
    assert choose(**ASKED).attention is ops.attention
    assert choose(**ASKED | {"softcap": None}).attention is fast
    mixed = choose("attention=fast, rotary=torch", **ASKED | {"softcap": None})
    assert (mixed.attention, mixed.rotary, mixed.rms_norm) == (fast, ops.rotary, fast)
    with pytest.raises(ValueError, match=r"'fast' computes no softcap.* The nearest that can is 'torch'"):
        choose("fast", **ASKED)


def test_compilation_is_off_on_a_cpu_unless_asked_for_and_says_what_it_lacks(monkeypatch):
    assert not choose(**ASKED).compiles and not choose(compile="off", **ASKED).compiles
    function = lambda x: x  # noqa: E731
    assert choose(**ASKED).fuse(function) is function
    monkeypatch.setattr(ops, "cannot_compile", lambda device: None)
    chosen = choose(compile="on", **ASKED)
    assert chosen.compiles and str(chosen).endswith(", compiled") and chosen.fuse(function) is not function
    monkeypatch.undo()
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert not choose(**ASKED).compiles and not choose(compile="off", **ASKED).compiles
    with pytest.raises(
        ValueError, match=r"there is no C compiler: install one of g\+\+, clang\+\+, or set CXX"
    ):
        choose(compile="on", **ASKED)
    monkeypatch.undo()
    monkeypatch.setattr(ops.sysconfig, "get_path", lambda name: "/nowhere")
    if any(map(shutil.which, ("g++", "clang++"))):
        with pytest.raises(ValueError, match="Python's headers are missing"):
            choose(compile="on", **ASKED)


@pytest.mark.parametrize("limit", [8, 10 * MANY_MODELS])
def test_many_models_may_be_compiled_and_what_cannot_wholly_be_fails(limit):
    def breaks(x):
        torch._dynamo.graph_break()
        return x

    with torch._dynamo.config.patch(recompile_limit=limit):
        function = compiled(breaks)
        assert torch._dynamo.config.recompile_limit == max(limit, MANY_MODELS)
        with pytest.raises(torch._dynamo.exc.Unsupported):
            function(torch.ones(1))


GPU = Asked(torch.device("cuda"), torch.bfloat16, 256, None, None, compiles=True)


@pytest.fixture
def on_gpu(monkeypatch):
    """A card of this compute capability; nothing is computed on it."""
    capability = [9, 0]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: tuple(capability))
    monkeypatch.setattr(flash_attention, "_trial", lambda compute, asked: None)
    monkeypatch.setitem(sys.modules, "flash_attn", types.ModuleType("flash_attn"))
    return capability


def test_auto_on_a_gpu_compiles_and_takes_flash_attention(on_gpu, monkeypatch):
    reason = None
    monkeypatch.setattr(ops, "cannot_compile", lambda device: reason)
    asked = ASKED | {"device": "cuda", "dtype": torch.bfloat16}
    chosen = choose(**asked)
    assert chosen.compiles and chosen.attention is ops.attention_flash
    assert choose("flex", **asked | {"head_dim": 16}).attention is ops.attention_flex
    assert choose("varlen", **asked | {"softcap": None}).attention is ops.attention_varlen
    plain = "attention=auto,rms_norm=torch,rotary=torch"
    off = choose(plain, compile="off", **asked)
    assert off.attention is ops.attention_flash and not off.compiles
    reason = "there is no C compiler"
    assert not choose(plain, **asked).compiles


def test_compilation_needs_the_compiler_of_the_device_or_the_one_that_is_named(on_gpu, monkeypatch, tmp_path):
    (tmp_path / "Python.h").touch()
    monkeypatch.setattr(ops.sysconfig, "get_path", lambda name: str(tmp_path))
    found, cpu, gpu = {"cc"}, torch.device("cpu"), torch.device("cuda")
    monkeypatch.setattr(shutil, "which", lambda name: name if name in found else None)
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.delenv("CXX", raising=False)
    assert cannot_compile(gpu) is None and "or set CXX" in cannot_compile(cpu)
    monkeypatch.setenv("CXX", "theirs")
    found = {"theirs"}
    assert "one of cc, gcc, clang, or set CC" in cannot_compile(gpu) and cannot_compile(cpu) is None
    monkeypatch.setenv("CC", "theirs")
    on_gpu[:] = 7, 0
    assert cannot_compile(gpu) is None
    on_gpu[:] = 6, 1
    assert cannot_compile(gpu) == "this card is older than compute capability 7.0"


@pytest.mark.parametrize(
    "refuses", [flash_attention.flash_refuses, flash_attention.varlen_refuses, flex_refuses]
)
def test_gpu_kernels_refuse_what_they_cannot_take(on_gpu, monkeypatch, refuses):
    assert refuses(GPU) is None and refuses(GPU._replace(head_dim=16, dtype=torch.float16)) is None
    assert "GPU, the model is on cpu" in refuses(GPU._replace(device=torch.device("cpu")))
    if refuses is flex_refuses:
        assert "head widths from 16, 8 is asked for" in refuses(GPU._replace(head_dim=8))
        assert "compilation is off" in refuses(GPU._replace(compiles=False))
        assert refuses(GPU._replace(dtype=torch.float32)) is None
    else:
        assert "multiples of 8; 264 is asked" in refuses(GPU._replace(head_dim=264))
        assert "multiples of 8; 100 is asked" in refuses(GPU._replace(head_dim=100))
        assert "bf16 and fp16, torch.float32 is asked" in refuses(GPU._replace(dtype=torch.float32))
        monkeypatch.setattr(flash_attention, "_trial", lambda compute, asked: compute.__name__)
        assert refuses(GPU) == f"attention_{refuses.__name__.removesuffix('_refuses')}"
    on_gpu[:] = 8, 0
    assert "Ampere" not in str(refuses(GPU))
    on_gpu[:] = 7, 5
    assert "needs compute capability 8.0 (Ampere), this card has 7.5" in refuses(GPU)


def test_varlen_needs_a_pytorch_whose_attention_has_windows(on_gpu, monkeypatch):
    assert flash_attention.varlen_refuses(GPU._replace(window=4096)) is None
    assert "has no softcap, and 50.0 is" in flash_attention.varlen_refuses(GPU._replace(softcap=50.0))
    monkeypatch.setattr(flash_attention, "_varlen_parameters", lambda: frozenset({"window_size"}))
    assert flash_attention.varlen_refuses(GPU) is None
    monkeypatch.setattr(flash_attention, "_varlen_parameters", lambda: frozenset({"is_causal"}))
    assert "needs PyTorch 2.11" in flash_attention.varlen_refuses(GPU)


def test_flash_attn_that_is_absent_or_of_another_pytorch_says_which(on_gpu, monkeypatch):
    monkeypatch.delitem(sys.modules, "flash_attn")
    load, error = builtins.__import__, ModuleNotFoundError("No module named 'flash_attn'", name="flash_attn")

    def fails(name, *rest):
        if name == "flash_attn":
            raise error
        return load(name, *rest)

    monkeypatch.setattr(builtins, "__import__", fails)
    assert flash_attention.flash_refuses(GPU) == "is not installed (just setup gpu)"
    error = ModuleNotFoundError("No module named 'einops'", name="einops")
    assert "does not load: ModuleNotFoundError: No module named 'einops'" in flash_attention.flash_refuses(
        GPU
    )
    error = ImportError("flash_attn_2_cuda.so: undefined symbol: _ZN3c104cuda\nmore")
    assert "undefined symbol: _ZN3c104cuda; it was built for another PyTorch" in (
        flash_attention.flash_refuses(GPU)
    )


CPU = Asked(torch.device("cpu"), torch.float32, 8, 50.0, 4096)


def changed(**wrong):
    """The definition with another option."""
    return lambda q, k, v, **options: ops.attention(q, k, v, **options | wrong)


def joined(q, k, v, **options):
    """Both sequences taken for one."""
    for name, rows in (("q", q), ("k", k)):
        options[f"cu_seqlens_{name}"] = torch.tensor([0, len(rows)], dtype=torch.int32)
        options[f"max_seqlen_{name}"] = len(rows)
    return ops.attention(q, k, v, **options)


def aligned_at_the_start(q, k, v, **options):
    """The first queries stand at the first keys of their sequence: no suffix."""
    rows = torch.tensor([*range(3), *range(7, 47)])
    ends = {name: options[name.replace("_k", "_q")] for name in ("cu_seqlens_k", "max_seqlen_k")}
    return ops.attention(q, k[rows], v[rows], **options | ends)


def ungrouped(q, k, v, **options):
    assert q.shape[1] == k.shape[1], "grouped queries"
    return ops.attention(q, k, v, **options)


def fails(q, k, v, **options):
    raise RuntimeError("CUDA error: no kernel image is available for execution on the device\nmore")


class WrongGradient(torch.autograd.Function):
    """Right output, half the gradient of v."""

    @staticmethod
    def forward(ctx, v):
        return v.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient / 2


@pytest.mark.parametrize(
    ("compute", "reason"),
    [
        (ops.attention, None),
        (changed(softcap=None), "computes something else on this machine: relative error of the output"),
        (changed(window=None), "relative error of the output"),
        (changed(window=8), "relative error of the output"),
        (joined, "relative error of the output"),
        (aligned_at_the_start, "relative error of the output"),
        (ungrouped, "fails on this machine: AssertionError: grouped queries"),
        (
            lambda q, k, v, **rest: ops.attention(q, k, WrongGradient.apply(v), **rest),
            "error of gradient 3 0.5",
        ),
        (lambda q, k, v, **rest: ops.attention(q, k, v, **rest) * torch.nan, "error of the output nan"),
        (fails, "fails on this machine: RuntimeError: CUDA error: no kernel image is .* install a build for"),
    ],
)
def test_a_build_that_computes_something_else_is_found_out(compute, reason):
    found = flash_attention._trial(compute, CPU)
    assert found is reason or re.search(reason, found)
