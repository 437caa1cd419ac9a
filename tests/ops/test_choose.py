"""Which backend computes an op: chosen once, forced by name, refused where it cannot."""

import dataclasses

import pytest
import torch

from common import ops
from common.ops import Backend, choose

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


def test_an_unknown_backend_names_those_available():
    with pytest.raises(ValueError, match="attention has no backend 'tritn' here; available: auto, torch"):
        choose("tritn", **ASKED)


def test_auto_takes_the_first_that_can_and_a_forced_one_that_cannot_is_an_error(monkeypatch):
    def fast():
        """Stands for a faster attention."""

    def refuses(asked):
        return "computes no softcap" if asked.softcap is not None else None

    for op, backends in ops.BACKENDS.items():
        monkeypatch.setitem(ops.BACKENDS, op, {"fast": Backend(fast, refuses), **backends})
    assert choose(**ASKED).attention is ops.attention
    assert choose(**ASKED | {"softcap": None}).attention is fast
    with pytest.raises(ValueError, match="attention: the backend 'fast' computes no softcap; choose another"):
        choose("fast", **ASKED)
