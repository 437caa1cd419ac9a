"""Probabilities do not depend on how sequences are packed, in which order, or by how many processes."""

import numpy as np
import pytest
import torch
import torch.distributed as dist
from helpers import make_checkpoint, make_comparisons, make_preference
from transformers import AutoTokenizer

from common.batching import pack
from common.data.table import ORDERS, swap
from common.models import load_model, save_checkpoint
from common.prompts import Prompter
from common.score.predict import average, predict, predict_orders
from common.tokens import tokenise
from common.trained import open_model, open_prompter


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("predict") / "gemma", "gemma")


@pytest.fixture(scope="module")
def model(folder):
    return load_model(folder, head_seed=5)


@pytest.fixture(scope="module")
def prompter(folder):
    return Prompter(AutoTokenizer.from_pretrained(folder), conversation_tokens=128)


@pytest.fixture(scope="module")
def sequences(prompter, tmp_path_factory):
    """25 comparisons in both orders."""
    cache = tmp_path_factory.mktemp("tokens")
    return tokenise(make_comparisons(25, seed=8), prompter, formats=("PAB",), orders=ORDERS, cache=cache)


def run(model, sequences, max_tokens=8192):
    return predict(model, sequences, max_tokens=max_tokens, device="cpu")


@pytest.mark.parametrize("max_tokens", [1, 150, 400, 1_000_000])
def test_any_budget_gives_what_one_by_one_gives(model, sequences, max_tokens):
    with torch.no_grad():
        alone = [model(pack([sequences[i].input_ids])).softmax(-1)[0] for i in range(len(sequences))]
    found = run(model, sequences, max_tokens)
    assert found.dtype == np.float32 and found.shape == (50, 3)
    np.testing.assert_allclose(found, torch.stack(alone), atol=1e-6)
    np.testing.assert_allclose(found.sum(1), 1, atol=1e-6)
    assert found.std(0).min() > 1e-3, "rows that differ, or the check above could not fail"


def test_swapped_sequences_are_mirrored_back(model, prompter, sequences, tmp_path):
    """The swapped order of a comparison is the given order of its twin, seen from the other side."""
    orders = predict_orders(model, sequences, max_tokens=8192, device="cpu")
    assert list(orders) == ["given", "swapped"]
    twins = tokenise(swap(sequences.frame), prompter, formats=("PAB",), orders=("given",), cache=tmp_path)
    twin = predict_orders(model, twins, max_tokens=8192, device="cpu")
    assert list(twin) == ["given"]
    np.testing.assert_allclose(orders["swapped"], twin["given"][:, [1, 0, 2]], atol=1e-6)
    assert np.abs(orders["swapped"] - twin["given"]).max() > 1e-2, "unmirrored, the same check fails"
    found = run(model, sequences)
    np.testing.assert_array_equal(orders["given"], found[0::2])
    np.testing.assert_array_equal(orders["swapped"], found[1::2][:, [1, 0, 2]])


def test_one_format_at_a_time(model, prompter, tmp_path):
    both = tokenise(make_comparisons(3), prompter, formats=("PAB", "PAPB"), orders=("given",), cache=tmp_path)
    with pytest.raises(AssertionError, match="one format"):
        predict_orders(model, both, max_tokens=8192, device="cpu")


def test_average_is_the_mean_over_orders_or_models():
    a, b = np.array([[0.5, 0.25, 0.25]], np.float32), np.array([[0.1, 0.65, 0.25]], np.float32)
    expected = np.array([[0.3, 0.45, 0.25]], np.float32)
    for given in ({"given": a, "swapped": b}, [a, b]):
        found = average(given)
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, expected, atol=1e-7)


def test_predicting_leaves_the_model_as_it_was(model, sequences):
    """Dropout is off while predicting, whatever mode the model is in, and no gradient is kept."""
    reference = run(model, sequences)
    model.train()
    try:
        np.testing.assert_array_equal(run(model, sequences), reference)
        assert model.training
    finally:
        model.eval()
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("num_ranks", [2, 3, 7])
def test_ranks_share_the_work_and_see_the_same(model, sequences, monkeypatch, num_ranks):
    """Each rank fills its own rows and zeros elsewhere, so that the sum over ranks is the answer."""
    reference = run(model, sequences, 400)
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: num_ranks)
    parts, reduced = [], []
    monkeypatch.setattr(dist, "all_reduce", reduced.append)
    for rank in range(num_ranks):
        monkeypatch.setattr(dist, "get_rank", lambda rank=rank: rank)
        parts.append(run(model, sequences, 400))
    assert len(reduced) == num_ranks
    assert (np.stack([part.sum(1) > 0 for part in parts]).sum(0) == 1).all(), "every row by one rank"
    np.testing.assert_allclose(np.sum(parts, axis=0), reference, atol=1e-6)


def test_answers_that_are_not_finite_are_named(model, sequences):
    class Broken(torch.nn.Module):
        def forward(self, packed):
            logits = model(packed)
            logits[packed.row_S == 4] = float("nan")
            return logits

    with pytest.raises(ValueError, match=f"not finite for 1 comparisons, first {sequences.name(4)}"):
        run(Broken(), sequences)


# What a prediction is opened from


@pytest.fixture
def trained(folder, model, prompter, tmp_path):
    """A checkpoint of our own, untrained."""
    preference = make_preference(prompt=prompter.describe())
    save_checkpoint(tmp_path / "trained", model=model, tokenizer=prompter.tokenizer, preference=preference)
    return tmp_path / "trained"


def test_a_saved_checkpoint_predicts_the_same(model, sequences, trained):
    opened = open_model(str(trained), dtype=None, device="cpu", ops="auto")
    assert not opened.training and next(opened.parameters()).dtype == torch.float32
    np.testing.assert_array_equal(run(opened, sequences), run(model, sequences))
    prompter = open_prompter(str(trained), opened.preference)
    assert prompter.describe() == opened.preference["prompt"]


def test_a_prompt_other_than_trained_with_is_refused(trained):
    preference = load_model(trained).preference
    for field, value in (("conversation_tokens", 127), ("instruction", "Which?")):
        changed = {"prompt": preference["prompt"] | {field: value}}
        with pytest.raises(ValueError, match=r"was trained with prompt .* its scores would be wrong"):
            open_prompter(str(trained), changed)
    with pytest.raises(ValueError, match=r"no preference\.json: it is a backbone"):
        open_prompter(str(trained), None)
