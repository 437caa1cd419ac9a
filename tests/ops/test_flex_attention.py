"""The block mask of FlexAttention, exact to the block, and what it computes; it is compiled only on a GPU."""

import itertools

import pytest
import torch

from common.ops import flex_attention
from common.ops.attention import attention
from common.ops.flex_attention import BLOCK, attention_flex, block_mask, visible_keys

LENGTHS = {  # name -> (query lengths, key lengths)
    "causal": ([300, 5, 137, 64], [300, 5, 137, 64]),
    "last tokens": ([1, 1, 1, 1], [300, 5, 137, 64]),
    "suffixes": ([30, 5, 1, 64], [300, 5, 137, 64]),
    "long": ([300, 700], [300, 700]),
}
everything = pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS.keys())
windows = pytest.mark.parametrize("window", [None, 100, 127, 128, 129])


def boundaries(lengths):
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)


def ends(lengths, window):
    return visible_keys(*map(boundaries, lengths), sum(lengths[0]), window)


def test_visible_keys():
    first, last = ends(([1, 2], [5, 3]), None)
    assert (first.tolist(), last.tolist()) == ([0, 5, 5], [4, 6, 7])
    first, last = ends(([1, 2], [5, 3]), 2)
    assert (first.tolist(), last.tolist()) == ([3, 5, 6], [4, 6, 7])


@everything
@windows
def test_blocks_are_listed_if_and_only_if_something_or_all_is_visible(lengths, window):
    first, last = ends(lengths, window)
    mask = block_mask(first, last, sum(lengths[1]))
    key = torch.arange(sum(lengths[1]))
    visible = (first[:, None] <= key) & (key <= last[:, None])

    def blocks(filler, rows):
        B, E = (-(-size // BLOCK) for size in visible.shape)
        padded = torch.full((B * BLOCK, E * BLOCK), filler)
        padded[:, visible.shape[1] :] = False
        padded[: len(visible), : visible.shape[1]] = visible
        return rows(padded.view(B, BLOCK, E, BLOCK).transpose(1, 2).flatten(2), -1)

    def listed(numbers, indices):
        return [row[:n].sort().values.tolist() for n, row in zip(numbers[0, 0], indices[0, 0], strict=True)]

    some, whole = blocks(False, torch.any), blocks(True, torch.all)
    assert listed(mask.full_kv_num_blocks, mask.full_kv_indices) == [
        row.nonzero()[:, 0].tolist() for row in whole
    ]
    part = [row.nonzero()[:, 0].tolist() for row in some & ~whole]
    assert listed(mask.kv_num_blocks, mask.kv_indices) == part


@everything
@windows
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_output_equals_the_definition(lengths, window, softcap, monkeypatch):
    monkeypatch.setattr(flex_attention, "_compiled", lambda: flex_attention._attend)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        3 * torch.randn(sum(rows), heads, 16, generator=generator)
        for rows, heads in ((lengths[0], 4), (lengths[1], 2), (lengths[1], 2))
    )
    options = {
        "cu_seqlens_q": boundaries(lengths[0]),
        "cu_seqlens_k": boundaries(lengths[1]),
        "max_seqlen_q": max(lengths[0]),
        "max_seqlen_k": max(lengths[1]),
        "scale": 0.3,  # not the default
        "softcap": softcap,
        "window": window,
    }
    torch.testing.assert_close(
        attention_flex(q, k, v, **options), attention(q, k, v, **options), rtol=1e-4, atol=1e-4
    )
