"""Compiled halves of the layers: the same numbers, one compilation for all layers and lengths."""

import copy

import pytest
import torch

from common.batching import pack
from common.models import load_model
from common.ops import cannot_compile
from common.ops.weight_gradient import Embedding, Linear
from common.train.optim import GradientSum, soft_cross_entropy

needs_compiler = pytest.mark.skipif(
    cannot_compile(torch.device("cpu")) is not None, reason=str(cannot_compile(torch.device("cpu")))
)


def train(model, sequences, fuse):
    """Losses and gradient sums of four micro-batches, one of them a single sequence."""
    sums = GradientSum(model, accumulation="fp32", is_replica=True, fuse=fuse)
    losses = []
    for part in (sequences, sequences[3:], sequences[:1], sequences[:3]):
        packed = pack(part, labels=[[0.2, 0.5, 0.3]] * len(part))
        loss = soft_cross_entropy(model(packed), packed.labels_SC).sum()
        loss.backward()
        losses.append(loss.detach())
    return losses, list(sums.sums.values())


@pytest.mark.parametrize("family", ["gemma2", "llama"])
def test_fused_sums_equal_those_of_the_hooks(published, sequences, family):
    model = load_model(published(family)[0], head_dropout=0.0)
    expected = train(copy.deepcopy(model), sequences, fuse=False)
    found = train(model, sequences, fuse=True)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    layers = [module for module in model.modules() if isinstance(module, (Embedding, Linear))]
    assert len(layers) == 1 + 7 * 3 and all(layer.weight_sum is not None for layer in layers)
    assert all(parameter.grad is None for parameter in model.parameters())


@needs_compiler
@pytest.mark.parametrize("family", ["gemma2", "llama"])
def test_compiled_halves_change_nothing_and_are_compiled_once(published, sequences, family):
    plain, compiled = (
        load_model(published(family)[0], compile=compile, head_dropout=0.0).train()
        for compile in ("off", "on")
    )
    assert str(compiled.ops).endswith("compiled")
    expected = train(plain, sequences, fuse=False)
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    found = train(compiled, sequences, fuse=True)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert counters["stats"]["unique_graphs"] == 2  # before and after the attention
    packed = pack(sequences)
    with torch.inference_mode():
        torch.testing.assert_close(compiled.eval()(packed), plain.eval()(packed), rtol=1e-4, atol=1e-5)
