import math

import torch
from torch import nn

from common.models.head import PreferenceHead, head_hash, initial_head


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


def test_dropout_stands_before_both_layers():
    head = PreferenceHead(hidden_size=8, num_classes=2, dropout=1.0).train()
    # Everything dropped: the biases alone are left, the second dropout zeroes what enters the last layer.
    torch.testing.assert_close(head(torch.ones(1, 8)), head.out.bias[None])
