"""When Transformer Engine is taken: it loads, nothing is compiled, and a trial finds what it should."""

import sys
import types

import pytest
import torch

from common.ops import BACKENDS
from common.ops import transformer_engine as te
from common.ops.backend import Asked
from common.ops.rms_norm import rms_norm
from common.ops.rotary import rotary

CPU = Asked(torch.device("cpu"), torch.float32, 8, None, None)
GPU = CPU._replace(device=torch.device("cuda"), dtype=torch.bfloat16)


@pytest.mark.parametrize(("op", "trial"), [("rms_norm", "_trial_of_norm"), ("rotary", "_trial_of_rotary")])
def test_it_is_refused_where_it_cannot_be_used(op, trial, monkeypatch, tmp_path):
    refuses = BACKENDS[op]["transformer_engine"].refuses
    monkeypatch.setattr(te, trial, lambda asked: trial)
    assert refuses(CPU) == "needs a GPU, the model is on cpu"
    assert "cannot be part of compiled layers" in refuses(GPU._replace(compiles=True))
    monkeypatch.delitem(sys.modules, "transformer_engine.pytorch", raising=False)
    monkeypatch.setitem(sys.modules, "transformer_engine", None)
    assert refuses(GPU).startswith("is not installed (transformer_engine")

    package = types.ModuleType("transformer_engine")
    package.__path__ = [str(tmp_path)]
    monkeypatch.setitem(sys.modules, "transformer_engine", package)
    (tmp_path / "pytorch.py").write_text("raise OSError('undefined symbol: x')")
    assert refuses(GPU).startswith("does not load: OSError: undefined symbol: x; a build for another")
    monkeypatch.setitem(sys.modules, "transformer_engine.pytorch", types.ModuleType("pytorch"))
    assert refuses(GPU) == trial


def norm_with(unit_offset):
    """As of a build that does not look at the option."""
    return lambda x, weight_D, **options: rms_norm(x, weight_D, **options | {"unit_offset": unit_offset})


@pytest.mark.parametrize(
    ("name", "trial", "compute", "is_right"),
    [
        ("rms_norm_te", te._trial_of_norm, rms_norm, True),
        ("rms_norm_te", te._trial_of_norm, norm_with(True), False),
        ("rms_norm_te", te._trial_of_norm, norm_with(False), False),
        ("rotary_te", te._trial_of_rotary, rotary, True),
        ("rotary_te", te._trial_of_rotary, lambda x, cos_TR, sin_TR: rotary(x, cos_TR, -sin_TR), False),
    ],
)
def test_a_build_that_computes_something_else_is_found_out(name, trial, compute, is_right, monkeypatch):
    monkeypatch.setattr(te, name, compute)
    assert (trial.__wrapped__(CPU) is None) == is_right
