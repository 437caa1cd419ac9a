"""Scalings and weights that are recovered where there is something to find, and kept nowhere else."""

import json

import numpy as np
import pytest

from common.score.calibration import (
    MIN_LABELLED,
    NUM_PARTS,
    assign_parts,
    calibrate,
    cross_fit_weights,
    fit_temperature,
    fit_vector,
    fit_weights,
    pool,
)
from common.score.metrics import log_loss, rescale

ONES, ZEROS = np.ones(3), np.zeros(3)


def sampled(num_rows: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities and votes drawn from them: calibrated by construction."""
    generator = np.random.default_rng(seed)
    probabilities = generator.dirichlet([2.0, 2.0, 1.0], num_rows)
    winners = (probabilities.cumsum(axis=1) < generator.random((num_rows, 1))).sum(axis=1)
    return probabilities, np.eye(3)[np.minimum(winners, 2)]


def numbered(num_rows: int) -> list[str]:
    return [f"prompt {i}" for i in range(num_rows)]


def test_a_temperature_is_recovered_and_kept():
    truth, labels = sampled(6000)
    found = calibrate(rescale(truth, 2 * ONES, ZEROS), labels, numbered(6000))
    scale, bias = found["temperature"]["scale"], found["temperature"]["bias"]
    assert scale == pytest.approx([0.5] * 3, abs=0.03) and len(set(scale)) == 1 and bias == [0, 0, 0]
    assert found["temperature"]["log_loss"] == pytest.approx(log_loss(truth, labels), abs=0.001)
    low, high = found["temperature"]["gain_interval"]
    gain = found["uncalibrated_log_loss"] - found["temperature"]["log_loss"]
    assert 0 < low < found["temperature"]["gain"] < high
    assert found["temperature"]["gain"] == pytest.approx(gain, abs=1e-12)
    assert found["kept"] in ("temperature", "vector")
    assert found["scaling"] == {name: found[found["kept"]][name] for name in ("scale", "bias")}
    json.dumps(found, allow_nan=False)


def test_calibrated_probabilities_are_left_alone():
    truth, labels = sampled(6000, seed=1)
    found = calibrate(truth, labels, numbered(6000))
    assert found["kept"] is None and found["scaling"] is None
    assert found["temperature"]["scale"] == pytest.approx([1] * 3, abs=0.05)


def test_a_gain_that_may_be_chance_is_not_kept():
    """Slightly too sure, on a few rows: the gain is there, its interval reaches below 0."""
    truth, labels = sampled(300)
    found = calibrate(rescale(truth, 1.25 * ONES, ZEROS), labels, numbered(300))
    low, high = found["temperature"]["gain_interval"]
    assert found["temperature"]["gain"] > 0 and low < 0 < high
    assert found["kept"] is None and found["scaling"] is None


def test_biased_classes_need_a_vector():
    truth, labels = sampled(6000)
    shift = np.array([0.0, 0.2, 1.0])
    found = calibrate(rescale(truth, ONES, shift), labels, numbered(6000))
    assert found["kept"] == "vector"
    bias = np.array(found["scaling"]["bias"])
    assert bias - bias.mean() == pytest.approx(shift.mean() - shift, abs=0.2)
    assert found["vector"]["log_loss"] == pytest.approx(log_loss(truth, labels), abs=0.002)
    assert found["vector"]["gain"] > found["temperature"]["gain"] + 0.02


def test_soft_labels_take_their_share():
    """Labels that are the truth itself: its inverse scaling is the optimum."""
    truth, _ = sampled(500)
    scale, bias = np.array([1.5, 0.8, 1.2]), np.array([0.3, -0.1, -0.2])
    wrong = rescale(truth, 1 / scale, -bias / scale)
    assert log_loss(rescale(wrong, *fit_vector(wrong, truth)), truth) == pytest.approx(
        log_loss(truth, truth), abs=2e-3
    )


def test_the_fit_is_the_minimum_of_the_stated_loss():
    """Against a fine grid over the temperature, and against steps away from the vector in all directions."""
    truth, labels = sampled(300, seed=3)
    confident = rescale(truth, 3 * ONES, ZEROS)
    grid = np.linspace(0.1, 1.5, 2801)
    losses = [300 * log_loss(rescale(confident, s * ONES, ZEROS), labels) + (s - 1) ** 2 / 2 for s in grid]
    assert fit_temperature(confident, labels)[0][0] == pytest.approx(grid[np.argmin(losses)], abs=1e-3)

    def penalised(parameters):
        scale, bias = parameters[:3], parameters[3:]
        penalty = ((scale - 1) ** 2).sum() / 2 + (bias**2).sum() / 2
        return 300 * log_loss(rescale(confident, scale, bias), labels) + penalty

    best = np.concatenate(fit_vector(confident, labels))
    steps = 0.01 * np.random.default_rng(0).normal(size=(200, 6))
    assert penalised(best) < min(penalised(best + step) for step in steps)


def test_separable_rows_stay_finite():
    labels = np.eye(3)[np.arange(120) % 3]
    probabilities = 0.5 * labels + 0.5 / 3
    for fit in (fit_temperature, fit_vector):
        scale, bias = fit(probabilities, labels)
        assert scale.min() > 1 and scale.max() < 20 and np.abs(bias).max() < 1
    certain = calibrate(labels, labels, numbered(120))
    assert np.isfinite(certain["vector"]["scale"]).all() and certain["kept"] is None
    always_wrong = np.roll(labels, 1, axis=1)
    scale, _ = fit_temperature(always_wrong, labels)
    assert np.isfinite(scale).all() and scale[0] < 0.01


def test_weights_are_recovered():
    """The votes come from a mixture of two models; a third is noise."""
    generator = np.random.default_rng(0)
    models = [generator.dirichlet([0.5, 0.5, 0.5], 8000) for _ in range(3)]
    truth = pool(models, (0.7, 0.3, 0.0))
    winners = (truth.cumsum(axis=1) < generator.random((8000, 1))).sum(axis=1)
    labels = np.eye(3)[np.minimum(winners, 2)]
    weights = fit_weights(models, labels)
    assert weights == pytest.approx([0.7, 0.3, 0.0], abs=0.04)
    assert weights.sum() == pytest.approx(1) and (weights >= 0).all()
    found, fit = cross_fit_weights(models, labels, numbered(8000), (1, 1, 1))
    assert fit["gain_interval"][0] > 0 and fit["weights"] == pytest.approx(weights)
    assert fit["log_loss"] == pytest.approx(log_loss(found, labels), abs=1e-12)
    _, fit = cross_fit_weights(models, labels, numbered(8000), (7, 3, 0))
    assert fit["gain_interval"][0] < 0 < fit["gain_interval"][1]


def test_fitted_weights_are_the_least_loss_and_bear_twins():
    truth, labels = sampled(400)
    models = [rescale(truth, 2 * ONES, ZEROS), np.full((400, 3), 1 / 3)]
    grid = np.linspace(0, 1, 1001)
    losses = [log_loss(pool(models, (w, 1 - w)), labels) for w in grid]
    assert log_loss(pool(models, fit_weights(models, labels)), labels) <= min(losses) + 1e-7
    assert fit_weights([models[0]] * 2, labels) == pytest.approx([0.5, 0.5])
    certain = [labels, np.roll(labels, 1, axis=1)]
    assert fit_weights(certain, labels) == pytest.approx([1, 0], abs=1e-6)


def test_the_order_of_the_rows_does_not_matter():
    truth, labels = sampled(900)
    other, keys = sampled(900, seed=7)[0], [f"prompt {i // 2}" for i in range(900)]
    shuffled = np.random.default_rng(5).permutation(900)
    assert (assign_parts(keys)[shuffled] == assign_parts([keys[i] for i in shuffled])).all()
    confident = rescale(truth, 2 * ONES, ZEROS)
    first = calibrate(confident, labels, keys)
    second = calibrate(confident[shuffled], labels[shuffled], [keys[i] for i in shuffled])
    for name in ("temperature", "vector"):
        for number in ("scale", "bias", "log_loss", "gain"):
            assert first[name][number] == pytest.approx(second[name][number], abs=1e-9)
    one, _ = cross_fit_weights([truth, other], labels, keys, (1, 1))
    two, _ = cross_fit_weights(
        [truth[shuffled], other[shuffled]], labels[shuffled], [keys[i] for i in shuffled], (1, 1)
    )
    np.testing.assert_allclose(one[shuffled], two, atol=1e-9)


def test_parts_follow_from_the_key_alone():
    keys = numbered(500)
    parts = assign_parts(keys)
    assert (assign_parts(keys[:MIN_LABELLED]) == parts[:MIN_LABELLED]).all()
    assert (np.bincount(parts, minlength=NUM_PARTS) > 60).all()
    twice = assign_parts([key for key in keys for _ in range(2)])
    assert (twice[::2] == twice[1::2]).all()
    assert parts[:8].tolist() == [1, 3, 1, 2, 3, 2, 2, 3], "the same on every machine"


def test_gains_are_out_of_fold():
    """The labels of each part are tilted against those of all others: only a fit that saw them would gain."""
    keys = numbered(1000)
    parts, generator = assign_parts(keys), np.random.default_rng(0)
    tilt = np.array(
        [[0.9, 0.05, 0.05], [0.05, 0.9, 0.05], [0.05, 0.05, 0.9], [0.5, 0.5, 0.0], [0.0, 0.5, 0.5]]
    )
    winners = [generator.choice(3, p=tilt[part]) for part in parts]
    labels, even = np.eye(3)[winners], np.full((1000, 3), 1 / 3)
    in_sample = log_loss(even, labels) - log_loss(rescale(even, *fit_vector(even, labels)), labels)
    found = calibrate(even, labels, keys)
    assert in_sample > 0 > found["vector"]["gain"] and found["kept"] is None

    experts = [
        even,
        np.where((parts == 0)[:, None], 0.8 * labels + 0.2 / 3, np.roll(labels, 1, 1) * 0.5 + 0.5 / 3),
    ]
    _, fit = cross_fit_weights(experts, labels, keys, (1, 0))
    assert fit["weights"][1] > 0, "over all rows the expert of one part earns some weight"
    assert fit["gain"] < log_loss(even, labels) - log_loss(pool(experts, fit["weights"]), labels)


def test_rows_of_one_prompt_are_not_on_both_sides():
    """Copies of a prompt under one key are answered without each other; under two keys they leak."""
    generator = np.random.default_rng(2)
    labels = np.repeat(np.eye(3)[generator.integers(3, size=60)], 2, axis=0)
    even = np.full((120, 3), 1 / 3)
    together, apart = [f"{i // 2}" for i in range(120)], numbered(120)
    assert calibrate(even, labels, together)["vector"] != calibrate(even, labels, apart)["vector"]


@pytest.mark.parametrize(
    ("num_rows", "keys", "message"),
    [
        (99, numbered(99), "99 labelled comparisons are too few .* at least 100"),
        (120, ["the same"] * 120, "120 labelled comparisons share 1 prompts"),
    ],
)
def test_too_few_rows(num_rows, keys, message):
    truth, labels = sampled(num_rows)
    with pytest.raises(ValueError, match=message):
        calibrate(truth, labels, keys)
    with pytest.raises(ValueError, match=message):
        cross_fit_weights([truth, truth], labels, keys, (1, 1))


def test_what_is_no_probability():
    truth, labels = sampled(200)
    for call in (fit_temperature, fit_vector, lambda p, y: fit_weights([p], y)):
        with pytest.raises(ValueError, match="row 0"):
            call(2 * truth, labels)
    with pytest.raises(ValueError, match="no model"):
        fit_weights([], labels)
