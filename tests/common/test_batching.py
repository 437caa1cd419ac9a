"""Packing without padding and the micro-batch plan."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from common.batching import (
    FILLER_ROW,
    Sample,
    VarlenCollator,
    length_sorted_micro_batches,
    pack,
    plan_micro_batches,
)

LENGTHS = st.lists(st.integers(1, 60), min_size=1, max_size=40)


def test_pack_lays_sequences_end_to_end():
    packed = pack([[1] * 5, [2] * 3, [3] * 7])
    assert packed.cu_seqlens.tolist() == [0, 5, 8, 15] and packed.cu_seqlens.dtype == torch.int32
    assert packed.input_ids_T.tolist() == [1] * 5 + [2] * 3 + [3] * 7
    assert packed.position_ids_T.tolist() == [*range(5), *range(3), *range(7)]
    assert packed.max_seqlen == 7 and isinstance(packed.max_seqlen, int)
    assert packed.labels_SC.shape == (3, 3) and packed.row_S.tolist() == [0, 1, 2]


@pytest.mark.parametrize("sequences", [[], [[1], []]])
def test_pack_refuses_what_has_no_token(sequences):
    with pytest.raises(ValueError, match="at least one token"):
        pack(sequences)


def test_collator_fills_an_idle_turn_with_one_weightless_token():
    packed = VarlenCollator()([])
    assert packed.row_S.tolist() == [FILLER_ROW] and packed.labels_SC.sum() == 0
    assert packed.cu_seqlens.tolist() == [0, 1] and packed.input_ids_T.tolist() == [0]
    packed = VarlenCollator()([Sample([4, 5], [0.0, 1.0, 0.0], 7), Sample([6], [1.0, 0.0, 0.0], 2)])
    assert packed.row_S.tolist() == [7, 2]
    assert packed.input_ids_T.tolist() == [4, 5, 6]


def test_plan_example():
    assert plan_micro_batches([5, 3, 7], 1, 8) == [[[0, 1], [2]]]


@given(lengths=LENGTHS, world_size=st.integers(1, 5), max_tokens=st.integers(1, 200))
def test_plan_covers_every_sequence_once_within_the_budget(lengths, world_size, max_tokens):
    plan = plan_micro_batches(lengths, world_size, max_tokens)
    assert len(plan) == world_size and len({len(rank) for rank in plan}) == 1
    flat = [i for rank in plan for micro_batch in rank for i in micro_batch]
    assert sorted(flat) == list(range(len(lengths)))
    for micro_batch in (m for rank in plan for m in rank):
        assert len(micro_batch) <= 1 or sum(lengths[i] for i in micro_batch) <= max_tokens
    assert plan == plan_micro_batches(lengths, world_size, max_tokens)


def plan_slowly(lengths, world_size, max_tokens, cost):
    """The plan as its docstring has it: every bin is looked at for every sequence, from one turn on."""
    for turns in range(1, len(lengths) + 1):
        bins = [[] for _ in range(turns * world_size)]

        def tokens(b):
            return sum(lengths[i] for i in b)

        def work(b):
            return sum(cost(lengths[i]) for i in b)

        for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
            with_room = [b for b in bins if not b or tokens(b) + lengths[i] <= max_tokens]
            if not with_room:
                break
            min(with_room, key=work).append(i)
        else:
            bins.sort(key=lambda b: (-work(b), b))
            plan = [[] for _ in range(world_size)]
            for turn in range(turns):
                group = bins[turn * world_size : (turn + 1) * world_size]
                for rank, micro_batch in zip(plan, group[:: -1 if turn % 2 else 1], strict=True):
                    rank.append(micro_batch)
            return plan


@given(
    lengths=LENGTHS,
    world_size=st.integers(1, 3),
    max_tokens=st.integers(1, 200),
    cost=st.sampled_from([float, lambda n: float(n * n)]),
)
def test_plan_is_what_its_words_say(lengths, world_size, max_tokens, cost):
    expected = plan_slowly(lengths, world_size, max_tokens, cost)
    assert plan_micro_batches(lengths, world_size, max_tokens, cost) == expected


@given(lengths=LENGTHS, max_tokens=st.integers(1, 200))
def test_micro_batches_for_inference_are_full_and_longest_first(lengths, max_tokens):
    found = length_sorted_micro_batches(lengths, max_tokens)
    flat = [i for micro_batch in found for i in micro_batch]
    assert flat == sorted(range(len(lengths)), key=lambda i: -lengths[i])
    sums = [sum(lengths[i] for i in micro_batch) for micro_batch in found]
    for micro_batch, total in zip(found, sums, strict=True):
        assert len(micro_batch) == 1 or total <= max_tokens
    for total, following in zip(sums, found[1:], strict=False):
        assert total + lengths[following[0]] > max_tokens, "it would have fitted in"


def test_micro_batches_for_inference_example():
    assert length_sorted_micro_batches([5, 3, 7], 8) == [[2], [0, 1]]


@given(lengths=st.lists(st.integers(1, 60), min_size=24, max_size=60), world_size=st.integers(2, 4))
def test_plan_balances_ranks(lengths, world_size):
    loads = [
        sum(lengths[i] for m in rank for i in m) for rank in plan_micro_batches(lengths, world_size, 120)
    ]
    assert max(loads) - min(loads) <= 120


def test_plan_balances_what_it_is_told_to():
    lengths = [100, 60, 60, 10, 10, 10]
    by_tokens = plan_micro_batches(lengths, 2, 1000)
    by_square = plan_micro_batches(lengths, 2, 1000, cost=lambda n: n * n)

    def spread(plan, cost):
        loads = [sum(cost(lengths[i]) for m in rank for i in m) for rank in plan]
        return max(loads) - min(loads)

    assert spread(by_square, lambda n: n * n) < spread(by_tokens, lambda n: n * n)


def test_plan_uses_few_micro_batches():
    assert [len(rank) for rank in plan_micro_batches([50] * 8, 2, 100)] == [2, 2]
    assert [len(rank) for rank in plan_micro_batches([500, 1, 1], 2, 100)] == [1, 1]


@pytest.mark.parametrize("arguments", [([], 1, 8), ([0, 3], 1, 8), ([3], 0, 8), ([3], 1, 0)])
def test_plan_refuses_nonsense(arguments):
    with pytest.raises(ValueError, match="a plan needs"):
        plan_micro_batches(*arguments)
