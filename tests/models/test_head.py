import copy
import math

import pytest
import torch
from torch import nn

from common.models.head import PreferenceHead, head_hash, initial_head
from common.train.fit import draw_kept


def test_draws_what_torch_linear_would():
    torch.manual_seed(5)
    dense, out = nn.Linear(24, 12), nn.Linear(12, 4)
    tensors = initial_head(hidden_size=24, num_classes=4, seed=5)
    assert list(tensors) == ["head.dense.weight", "head.dense.bias", "head.out.weight", "head.out.bias"]
    for drawn, expected in zip(tensors.values(), (*dense.parameters(), *out.parameters()), strict=True):
        assert torch.equal(drawn, expected)


def test_depends_on_its_seed_alone():
    first = initial_head(hidden_size=24, num_classes=3, seed=3)
    torch.manual_seed(0)
    torch.rand(3)
    assert head_hash(first) == head_hash(initial_head(hidden_size=24, num_classes=3, seed=3))
    assert head_hash(first) != head_hash(initial_head(hidden_size=24, num_classes=3, seed=4))


def test_hash_sees_every_bit_of_the_head_and_nothing_else():
    tensors = initial_head(hidden_size=24, num_classes=3, seed=3)
    before = head_hash(tensors)
    assert head_hash({"model.norm.weight": torch.ones(3)} | tensors) == before
    assert head_hash(dict(reversed(tensors.items()))) == before
    bias = tensors["head.out.bias"]
    tensors["head.out.bias"] = torch.nextafter(bias, torch.tensor(math.inf))
    assert head_hash(tensors) != before


def test_starts_near_the_uniform_loss():
    head = PreferenceHead(hidden_size=512, num_classes=3, dropout=0.1).eval()
    tensors = initial_head(hidden_size=512, num_classes=3, seed=3)
    head.load_state_dict({name.removeprefix("head."): value for name, value in tensors.items()})
    logits = head(torch.randn(64, 512, generator=torch.Generator().manual_seed(0)))
    loss = nn.functional.cross_entropy(logits, torch.arange(64) % 3)
    assert abs(loss - math.log(3)) < 0.05


def test_both_dropouts_act_in_training():
    """Units of bias 1 that read one input of 1 tell by their value which of the two dropouts struck them."""
    p, num_units = 0.25, 4
    head = PreferenceHead(hidden_size=2 * num_units, num_classes=num_units, dropout=p)
    with torch.no_grad():
        for layer, bias in ((head.dense, 1.0), (head.out, 0.0)):
            nn.init.eye_(layer.weight)
            layer.bias.fill_(bias)
    inputs = torch.ones(5000, 2 * num_units)
    torch.testing.assert_close(head.eval()(inputs), nn.functional.gelu(torch.full((5000, num_units), 2.0)))
    with pytest.raises(ValueError, match=r"dropout 0\.25, but no kept_SE .*\[sequences, 12\]"):
        head.train()(inputs)
    found = head(inputs, draw_kept(head, range(5000), step=0, seed=0))
    kept = 1 / (1 - p)
    levels = nn.functional.gelu(torch.tensor([0.0, kept, (kept + 1) * kept]))
    is_level = torch.isclose(found[..., None], levels)
    assert is_level.any(-1).all(), found.unique()
    # Struck by the second, by the first alone, by neither; a share strays by 0.0035 by chance.
    shares = torch.tensor([p, (1 - p) * p, (1 - p) ** 2])
    torch.testing.assert_close(is_level.float().mean((0, 1)), shares, rtol=0, atol=0.015)


def test_dropout_is_drawn_for_each_sequence_alone():
    """From its index, the step and the seed: whatever else is in the micro-batch."""
    head = PreferenceHead(hidden_size=64, num_classes=3, dropout=0.5)
    together = draw_kept(head, [4, 9, 2], step=7, seed=3)
    assert together.shape == (3, 96) and together.dtype == torch.bool
    assert torch.equal(together[[2, 0]], draw_kept(head, [2, 4], step=7, seed=3))
    others = [draw_kept(head, [4], step=8, seed=3)[0], draw_kept(head, [4], step=7, seed=4)[0], together[1]]
    assert not any(torch.equal(together[0], other) for other in others)
    assert len(draw_kept(head, [], step=7, seed=3)) == 1  # a filler


def test_computes_in_float32_whatever_the_weights():
    """bf16 has a grid of 0.0078 where logits lie; the loss sees what is between."""
    head = PreferenceHead(hidden_size=64, num_classes=3, dropout=0.0)
    for parameter in head.bfloat16().parameters():
        nn.init.normal_(parameter, generator=torch.Generator().manual_seed(1))
    hidden = torch.randn(50, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    logits = head(hidden)
    assert torch.equal(logits, copy.deepcopy(head).float()(hidden.float()))
    assert (logits != logits.bfloat16()).float().mean() > 0.9
    logits.sum().backward()
    assert {parameter.grad.dtype for parameter in head.parameters()} == {torch.bfloat16}
