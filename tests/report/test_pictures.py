"""Pictures: valid PNGs of any input that a run can give, and the numbers in them."""

import warnings
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

from common.report import pictures


@pytest.fixture
def votes():
    """(probabilities, labels) of 400 comparisons whose labels are drawn from the probabilities."""
    generator = np.random.default_rng(0)
    probabilities = generator.dirichlet((1, 1, 0.5), size=400)
    return probabilities, np.eye(3)[[generator.choice(3, p=p) for p in probabilities]]


def check_png(path: Path) -> np.ndarray:
    image = imread(path)
    assert image.shape[1] >= 1000
    assert image[..., :3].std() > 0.02, "the picture is blank"
    assert list(path.parent.glob(".*")) == [], "a temporary file was left"
    return image


def test_wilson_interval_of_known_cases():
    low, high = pictures.wilson_interval(np.array([0.0, 0.5, 1.0]), np.array([10, 100, 10]))
    np.testing.assert_allclose(low, [0.0, 0.4038, 0.7225], atol=1e-3)
    np.testing.assert_allclose(high, [0.2775, 0.5962, 1.0], atol=1e-3)


def test_bins_hold_equally_many_and_equal_claims_share_one():
    claimed = np.linspace(0, 1, 400)
    means, happened, low, high = pictures.binned(claimed, claimed > 0.5)
    assert len(means) == pictures.NUM_BINS
    np.testing.assert_allclose(means, np.arange(0.05, 1, 0.1), atol=0.01)
    np.testing.assert_allclose(happened, [0] * 5 + [1] * 5)
    assert ((low <= happened) & (happened <= high)).all()
    assert len(pictures.binned(np.full(400, 0.3), claimed > 0.5)[0]) == 1


def test_a_calibrated_model_lies_within_its_intervals_and_a_wrong_one_does_not(votes):
    probabilities, labels = votes
    for claimed, expected in ((probabilities[:, 0], True), (1 - probabilities[:, 0], False)):
        means, _, low, high = pictures.binned(claimed, labels[:, 0])
        assert bool(((low <= means) & (means <= high)).mean() >= 0.8) is expected


def test_running_mean_leaves_out_what_is_not_finite():
    np.testing.assert_allclose(
        pictures.running_mean(np.array([1.0, np.nan, 3.0, 5.0]), 3), [1.0, 2.0, 4.0, 4.0]
    )
    np.testing.assert_allclose(pictures.running_mean(np.array([1.0, 2.0]), 1), [1.0, 2.0])
    assert np.isnan(pictures.running_mean(np.array([np.inf]), 1)).all()


def test_shortened_keeps_both_ends():
    assert pictures.shortened("short", 5) == "short"
    assert pictures.shortened("a-long-name-1", 7) == "a-l…e-1"


@pytest.mark.parametrize("num_rows", [1, 400])
@pytest.mark.parametrize(
    "names", [["one"], [f"a-very-long-model-name-that-does-not-end-{i}" for i in range(9)]], ids=len
)
def test_reliability(tmp_path, votes, names, num_rows):
    path = tmp_path / "new" / "reliability.png"
    pictures.reliability(path, {name: tuple(part[:num_rows] for part in votes) for name in names})
    check_png(path)


def test_names_are_text_and_not_markup(tmp_path, votes):
    names = ["$x_1$", "$\\frac{broken$", "_hidden", "模型", "<script>"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pictures.reliability(tmp_path / "r.png", dict.fromkeys(names, votes))
        pictures.swap_consistency(tmp_path / "s.png", dict.fromkeys(names, (votes[0], votes[0])))
        pictures.ladder(
            tmp_path / "l.png", {"$": {"rows": dict.fromkeys(names, (0.7, 0.6, 0.8)), "marks": {}}}
        )
    for name in "rsl":
        check_png(tmp_path / f"{name}.png")


def test_a_legend_grows_by_a_line_for_every_name_even_with_an_underscore(tmp_path, votes):
    heights = []
    for names in (["a" * 20], ["a" * 20, "_" + "b" * 20]):
        pictures.reliability(tmp_path / "r.png", dict.fromkeys(names, votes))
        image = check_png(tmp_path / "r.png")
        is_empty = (image[..., :3].min(axis=(1, 2)) > 0.99).astype(int)
        heights.append((np.diff(is_empty) == 1).sum())  # lines of ink
    assert heights[1] > heights[0]


@pytest.mark.parametrize("loss", [[0.9], [1.0, 0.8, 0.7], [float("nan")] * 3, [0.9, float("inf"), 0.8]])
def test_curves(tmp_path, loss):
    logged = {"step": range(1, len(loss) + 1), "loss": loss, "lr": [1e-6] * len(loss)}
    pictures.curves(tmp_path / "curves.png", {f"model-{i}": logged for i in range(9)})
    check_png(tmp_path / "curves.png")


def test_ladder_swap_lengths(tmp_path, votes):
    rows = {f"model-{i}": (0.9 + i / 100, 0.88 + i / 100, 0.92 + i / 100) for i in range(9)}
    pictures.ladder(
        tmp_path / "ladder.png", {"a": {"rows": rows, "marks": {"prior": 1.1}}, "b": {"rows": rows}}
    )
    pictures.swap_consistency(tmp_path / "swap.png", {"m": (votes[0], votes[0][:, [1, 0, 2]])})
    histogram = {"edges": np.arange(5.0), "counts": np.array([1, 0, 4, 2]), "budget": 3, "note": "2 of 7 cut"}
    pictures.lengths(tmp_path / "lengths.png", {"m": histogram, "empty": histogram | {"counts": np.zeros(4)}})
    for name in ("ladder", "swap", "lengths"):
        check_png(tmp_path / f"{name}.png")
