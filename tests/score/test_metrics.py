"""Metrics against numbers worked out by hand, and the properties that hold for any probabilities."""

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.score.metrics import (
    accuracy,
    bootstrap_interval,
    calibration_error,
    log_loss,
    mirror,
    per_row_log_loss,
    prior_log_loss,
    rescale,
    score,
    swap_consistency,
)

ONE_HOT = np.eye(3)


def sampled(num_rows: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities and votes drawn from them: calibrated by construction."""
    generator = np.random.default_rng(seed)
    probabilities = generator.dirichlet([1.0, 1.0, 1.0], num_rows)
    winners = (probabilities.cumsum(axis=1) < generator.random((num_rows, 1))).sum(axis=1)
    return probabilities, ONE_HOT[np.minimum(winners, 2)]


def test_log_loss_by_hand():
    probabilities = [[0.5, 0.25, 0.25], [0.1, 0.2, 0.7]]
    labels = [[1, 0, 0], [0, 0.5, 0.5]]
    expected = [math.log(2), -0.5 * math.log(0.2) - 0.5 * math.log(0.7)]
    assert per_row_log_loss(probabilities, labels) == pytest.approx(expected)
    assert log_loss(probabilities, labels) == pytest.approx(sum(expected) / 2)


def test_a_certain_mistake_is_clipped_and_a_certain_hit_is_free():
    assert log_loss([[0, 1, 0]], [[1, 0, 0]]) == pytest.approx(-math.log(1e-15))
    assert log_loss([[0, 1, 0]], [[0, 1, 0]]) == 0


def test_float32_rows_are_summed_in_float64():
    probabilities = np.full((10_000, 3), 1 / 3, dtype=np.float32)
    labels = np.eye(3, dtype=np.float32)[np.arange(10_000) % 3]
    assert log_loss(probabilities, labels) == pytest.approx(math.log(3), abs=1e-7)


@pytest.mark.parametrize(
    ("probabilities", "labels", "message"),
    [
        ([[0.5, 0.2, 0.298]], [[1, 0, 0]], r"1 of 1 rows .* row 0 .* sum 0.9980"),
        ([[1.2, -0.2, 0.0]], [[1, 0, 0]], "row 0"),
        ([[0.2, 0.2, 0.6], [np.nan, 0.5, 0.5]], ONE_HOT[:2], "row 1"),
        ([[0.2, 0.2, 0.6]], [[np.nan] * 3], "row 0"),
        ([[0.2, 0.2, 0.6]], [[1, 1, 0]], "sum 2.0000"),
        ([[0.2, 0.2, 0.6]], ONE_HOT[:2], r"\(1, 3\) and \(2, 3\)"),
        ([[0.2, 0.2, 0.6]] * 2, ONE_HOT[:1], r"\(2, 3\) and \(1, 3\)"),
        ([[0.5, 0.5]], ONE_HOT[:1], r"\(1, 2\) and \(1, 3\)"),
        (np.empty((0, 3)), np.empty((0, 3)), "not empty"),
        ([0.2, 0.2, 0.6], [1, 0, 0], r"\(3,\)"),
        (np.full((1, 2, 2), 0.5), np.full((1, 2, 2), 0.5), r"\(1, 2, 2\)"),
        ([[1.0]], [[1.0]], r"\(1, 1\)"),
    ],
)
def test_what_is_no_probability_is_refused(probabilities, labels, message):
    for metric in (log_loss, accuracy, calibration_error, score):
        with pytest.raises(ValueError, match=message):
            metric(probabilities, labels)


def test_rows_within_the_tolerance_pass():
    assert log_loss([[0.5, 0.25, 0.2505]], [[1, 0, 0]]) == pytest.approx(math.log(2))


def test_accuracy_counts_hits_of_the_likeliest_class():
    probabilities = [[0.6, 0.3, 0.1], [0.2, 0.5, 0.3], [0.1, 0.2, 0.7], [0.4, 0.4, 0.2]]
    labels = [[1, 0, 0], [0.2, 0.7, 0.1], [0, 1, 0], [1, 0, 0]]
    assert accuracy(probabilities, labels) == 0.75


def test_prior_log_loss_is_the_cross_entropy_of_the_shares():
    train = ONE_HOT[[0, 0, 1, 2]]
    assert prior_log_loss(train, ONE_HOT[[0, 2]]) == pytest.approx((math.log(2) + math.log(4)) / 2)
    entropy = -0.5 * math.log(0.5) - 0.5 * math.log(0.25)
    assert prior_log_loss(train, train) == pytest.approx(entropy)


def test_calibration_error_by_hand():
    """Ten rows claim 0.8 and six of them happen, ten claim 0.6 and eight happen: 0.2 off, either way."""
    claims = np.repeat([0.8, 0.6], 10)
    hits = np.concatenate([np.arange(10) < 6, np.arange(10) < 8])
    error = calibration_error(np.stack([claims, 1 - claims, 0 * claims], 1), ONE_HOT[np.where(hits, 0, 1)])
    assert error["top"] == pytest.approx(0.2)
    assert error["per_class"] == pytest.approx([0.2, 0.2, 0.0])


def test_calibration_error_is_small_for_true_claims_and_large_for_boasts():
    probabilities, labels = sampled(20_000)
    boasts = probabilities**4 / (probabilities**4).sum(axis=1, keepdims=True)
    honest, boasting = calibration_error(probabilities, labels), calibration_error(boasts, labels)
    assert max(honest["top"], *honest["per_class"]) < 0.02
    assert boasting["top"] > 0.15
    assert min(boasting["per_class"]) > 0.05


def test_calibration_error_sees_one_class_that_the_top_hides():
    """A and tie are claimed the wrong way round below the likeliest class, B, which is right."""
    labels = ONE_HOT[np.repeat([1, 0], [60, 40])]
    error = calibration_error(np.tile([0.0, 0.6, 0.4], (100, 1)), labels)
    assert error["top"] == pytest.approx(0)
    assert error["per_class"] == pytest.approx([0.4, 0, 0.4])


def test_calibration_error_of_a_constant_does_not_depend_on_row_order():
    """Equal claims share a bin: sorted labels must not turn an exact constant claim into an error."""
    labels = ONE_HOT[np.repeat([0, 1, 2], [500, 250, 250])]
    constant = np.tile([0.5, 0.25, 0.25], (1000, 1))
    assert calibration_error(constant, labels)["top"] == pytest.approx(0)
    assert max(calibration_error(constant, labels)["per_class"]) == pytest.approx(0)


def test_bins_have_equal_mass():
    """Half the claims crowd together: equal-width bins would average their errors away."""
    claims = np.concatenate([np.linspace(0.500, 0.501, 150), np.linspace(0.9, 0.95, 150)])
    hits = np.concatenate([np.arange(150) < 75, np.ones(150, dtype=bool)])
    probabilities = np.stack([claims, 1 - claims, 0 * claims], 1)
    error = calibration_error(probabilities, ONE_HOT[np.where(hits, 0, 1)])["top"]
    assert error > 0.25


def test_there_are_fifteen_bins():
    """Thirty claims of about a half, right every second time: two rows a bin are right on average."""
    claims = 0.5 + np.arange(30) / 1e4
    error = calibration_error(np.stack([claims, 1 - claims], 1), np.eye(2)[np.arange(30) % 2])
    assert error["per_class"] == pytest.approx([claims.mean() - 0.5] * 2)


def test_mirror_exchanges_a_and_b_only():
    assert mirror(np.array([[0.6, 0.3, 0.1]])).tolist() == [[0.3, 0.6, 0.1]]
    assert mirror(np.array([[0.6, 0.4]])).tolist() == [[0.4, 0.6]]
    probabilities, labels = sampled(50)
    assert (mirror(mirror(probabilities)) == probabilities).all()
    assert log_loss(mirror(probabilities), mirror(labels)) == pytest.approx(log_loss(probabilities, labels))
    assert log_loss(mirror(probabilities), labels) != pytest.approx(log_loss(probabilities, labels))


def test_swap_consistency_compares_what_speaks_of_the_same_a():
    shown_first = np.array([[0.6, 0.3, 0.1], [0.5, 0.4, 0.1]])
    shown_second = np.array([[0.3, 0.6, 0.1], [0.7, 0.2, 0.1]])
    found = swap_consistency(shown_first, mirror(shown_second))
    assert found["mean_absolute_difference"] == pytest.approx((0 + 0.3 + 0.3) / 6)
    assert found["same_winner"] == 0.5
    assert swap_consistency(shown_first, shown_second)["mean_absolute_difference"] > 0.1, "not mirrored back"


def test_bootstrap_interval_matches_the_normal_one_and_is_seeded():
    values = np.random.default_rng(1).normal(3, 2, 4_000)
    low, high = bootstrap_interval(values)
    half = 1.96 * values.std(ddof=1) / math.sqrt(len(values))
    assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.1 * half)
    assert bootstrap_interval(values) == (low, high)
    assert bootstrap_interval(values, seed=1) != (low, high)
    narrow = bootstrap_interval(values, level=0.5)
    assert low < narrow[0] < narrow[1] < high
    assert bootstrap_interval(np.array([0.7])) == (0.7, 0.7)


@pytest.mark.parametrize("values", [[], [[1.0, 2.0]], [1.0, np.nan]])
def test_bootstrap_interval_refuses_what_is_not_one_number_a_row(values):
    with pytest.raises(ValueError, match="one finite number a row"):
        bootstrap_interval(np.array(values))


def test_score_has_the_headline_numbers_as_json():
    probabilities, labels = sampled(500)
    found = score(probabilities.astype(np.float32), labels.astype(np.float32))
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert found["num_comparisons"] == 500
    assert found["log_loss"] == pytest.approx(log_loss(probabilities, labels), abs=1e-6)
    low, high = found["log_loss_interval"]
    assert low < found["log_loss"] < high
    assert found["accuracy"] == accuracy(probabilities, labels)
    assert set(found["calibration_error"]) == {"top", "per_class"}


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), num_rows=st.integers(1, 60))
def test_row_order_changes_no_score(seed, num_rows):
    probabilities, labels = sampled(num_rows, seed)
    probabilities = probabilities.round(1)
    probabilities[:, 2] = 1 - probabilities[:, :2].sum(axis=1)
    probabilities = np.abs(probabilities)
    probabilities /= probabilities.sum(axis=1, keepdims=True)
    order = np.random.default_rng(seed).permutation(num_rows)
    for metric in (log_loss, accuracy):
        assert metric(probabilities[order], labels[order]) == pytest.approx(metric(probabilities, labels))
    found = calibration_error(probabilities[order], labels[order])
    assert found["top"] == pytest.approx(calibration_error(probabilities, labels)["top"])
    assert found["per_class"] == pytest.approx(calibration_error(probabilities, labels)["per_class"])


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), num_rows=st.integers(1, 40))
def test_soft_labels_are_best_met_by_themselves(seed, num_rows):
    labels, other = (sampled(num_rows, seed + i)[0] for i in range(2))
    assert log_loss(labels, labels) <= log_loss(other, labels) + 1e-12


def test_rescale_by_hand():
    root = math.sqrt(0.8), math.sqrt(0.1), math.sqrt(0.1)
    halved = rescale([[0.8, 0.1, 0.1]], [0.5] * 3, [0, 0, 0])
    assert halved[0] == pytest.approx([part / sum(root) for part in root]) and halved.dtype == np.float64
    assert rescale([[0.8, 0.1, 0.1]], [1] * 3, [0, math.log(8), 0])[0] == pytest.approx(
        [8 / 17, 8 / 17, 1 / 17]
    )
    probabilities, _ = sampled(50)
    np.testing.assert_allclose(rescale(probabilities, np.ones(3), np.zeros(3)), probabilities, atol=1e-12)


def test_rescale_clips_and_sums_to_one():
    certain = rescale(np.array([[1, 0, 0]], dtype=np.float32), [2, 0.1, 1], [0, 0, 0])
    assert np.isfinite(certain).all() and certain.sum() == pytest.approx(1)
    assert certain[0, 1] == pytest.approx(1e-15**0.1 / (1 + 1e-15**0.1 + 1e-15))
    extreme = rescale([[1e-9, 1 - 1e-9, 0]], [500, 500, 500], [0, 1e4, 0])
    assert np.isfinite(extreme).all() and extreme.sum() == pytest.approx(1)


@pytest.mark.parametrize(
    ("scale", "bias", "message"),
    [
        ([1, 1], [0, 0, 0], "scale is .* expected 3 finite numbers"),
        ([1, 1, 1], [0, 0, 0, 0], "bias is .* expected 3 finite numbers"),
        ([1, 1, 1], [0, np.nan, 0], "bias is .*nan.* expected 3 finite numbers"),
        ([1, 1, 1], 0.0, "bias is 0.0"),
    ],
)
def test_rescale_with_other_classes(scale, bias, message):
    with pytest.raises(ValueError, match=message):
        rescale([[0.2, 0.3, 0.5]], scale, bias)
