"""Evaluation of a table of votes and probabilities, its calibration and fitted ensemble, and bad tables."""

import re

import numpy as np
import polars as pl
import pytest
from calling import call, snapshot
from helpers import make_comparisons

from common.data.table import LABELS, labels_array, write_comparisons
from common.files import read_json, write_json
from common.score.calibration import fit_weights
from common.score.ensemble import check_ensemble_orders, checkpoint_prior, score_groups, slices
from common.score.metrics import rescale
from common.score.probability_files import group_columns, read_table

NUM_ROWS = 400
WORDS = ("a", "b", "tie")


def probabilities(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).dirichlet([1.0, 1.0, 1.0], NUM_ROWS)


def winners() -> np.ndarray:
    """Drawn from seven parts of the first model and three of the second."""
    truth = 0.7 * probabilities(1) + 0.3 * probabilities(2)
    return (truth.cumsum(1) < np.random.default_rng(0).random((NUM_ROWS, 1))).sum(1)


def table(label: str = "label") -> pl.DataFrame:
    """Two over-confident models, rows in no order."""
    columns = {"id": [str(i * 7 % NUM_ROWS) for i in range(NUM_ROWS)], label: [WORDS[w] for w in winners()]}
    for name, seed in (("gemma", 1), ("llama 8b", 2)):
        values = rescale(probabilities(seed), 3 * np.ones(3), np.zeros(3))
        columns |= {f"{name}_{word}": values[:, i] for i, word in enumerate(WORDS)}
    return pl.DataFrame(columns)


def evaluate(folder, path, *words, check=True):
    return call("evaluate", "--artifacts", folder, "--table", path, *words, check=check)


def printed(output: str) -> dict[str, list[str]]:
    """Rows of the first table: first cell -> the other cells."""
    rows = [line.strip("│").split("│") for line in output.splitlines() if line.startswith("│")]
    found = {}
    for first, *others in rows:
        found.setdefault(first.strip(), [cell.strip() for cell in others])
    return found


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A finished evaluation of a CSV: its artifacts, the CSV, what was printed."""
    folder = tmp_path_factory.mktemp("table")
    table().write_csv(folder / "votes.csv")
    words = ("--weights", 2, 1, "--calibrate", "--submission", folder / "submission.csv")
    return folder, folder / "votes.csv", words, evaluate(folder, folder / "votes.csv", *words).stdout


def test_a_table_gives_scores_ensembles_and_pictures(done):
    folder, _, _, output = done
    names, raw, rows = ("gemma", "llama 8b"), table(), printed(output)
    labels = np.eye(3)[winners()]
    models = [raw.select(f"{name}_{word}" for word in WORDS).to_numpy() for name in names]
    for name, values in zip(names, models, strict=True):
        expected = -np.log((values * labels).sum(1)).mean()
        assert rows[f"{name}/given"][:2] == ["400", f"{expected:.4f}"] == rows[f"{name}/mean"][:2]
    ensemble = -np.log(((2 * models[0] + models[1]) / 3 * labels).sum(1)).mean()
    assert rows["ensemble"][1] == f"{ensemble:.4f}"
    prior = -np.log(labels @ labels.mean(0)).mean()
    assert rows["prior"][1] == f"{prior:.4f}" and "the mean of these labels" in output

    output = folder / "evaluate/evaluation"
    scores, saved = read_json(output / "scores.json"), pl.read_parquet(output / "probabilities.parquet")
    assert saved.columns[:5] == ["source", "id", *LABELS]
    assert saved["id"].to_list() == sorted(raw["id"])
    by_id = raw.sort("id")
    assert saved.select(LABELS).to_numpy().argmax(1).tolist() == [WORDS.index(w) for w in by_id["label"]]
    np.testing.assert_allclose(saved["gemma/given/winner_tie"], by_id["gemma_tie"], atol=1e-6)
    fitted = scores["ensemble-fitted"]
    weights = fit_weights(models, labels)
    assert list(fitted["weights"].values()) == pytest.approx(weights, abs=1e-3)
    gain = scores["ensemble"]["log_loss"] - fitted["log_loss"]
    assert fitted["gain"] == pytest.approx(gain, abs=1e-6)
    assert fitted["gain_interval"][0] < gain < fitted["gain_interval"][1]
    assert rows["ensemble-fitted"][1] == f"{fitted['log_loss']:.4f}"
    assert scores["prior"]["from"] == "these labels"
    assert set(scores["ensemble"]["slices"]) == {"source"}
    assert (output / "reliability.png").read_bytes().startswith(b"\x89PNG")


def test_the_submission_of_a_table_keeps_its_order(done):
    folder, *_ = done
    submission = pl.read_csv(folder / "submission.csv", schema_overrides={"id": pl.String})
    assert submission["id"].equals(table()["id"])
    expected = (2 * table()["gemma_tie"] + table()["llama 8b_tie"]) / 3
    np.testing.assert_allclose(submission["winner_tie"], expected, atol=1e-6)


def test_calibration_of_a_table(done):
    folder, _, _, output = done
    found = read_json(folder / "evaluate/evaluation/calibration.json")
    assert found["models"] == ["gemma", "llama 8b"] == list(found["per_model"])
    assert found["weights"] == [2, 1] and found["orders"] == ["both", "both"]
    assert found["num_comparisons"] == NUM_ROWS
    scores = read_json(folder / "evaluate/evaluation/scores.json")
    assert found["uncalibrated_log_loss"] == pytest.approx(scores["ensemble"]["log_loss"])
    for name, one in found["per_model"].items():
        assert one["uncalibrated_log_loss"] == pytest.approx(scores[f"{name}/mean"]["log_loss"])
        assert one["kept"] is not None and one["temperature"]["scale"][0] < 0.5, "over-confident by design"
    kept = found["kept"]
    assert found["scaling"] == {part: found[kept][part] for part in ("scale", "bias")}
    assert f"{found['temperature']['log_loss']:.4f}" in output and "calibrated across folds" in output


def test_calibration_is_added_to_a_finished_evaluation(done, tmp_path):
    """The same file as when asked for at once; nothing else is touched; without the flag it stays."""
    folder, path, words, _ = done
    without = [word for word in words if word != "--calibrate"]
    evaluate(tmp_path, path, *without)
    target = tmp_path / "evaluate/evaluation"
    before = snapshot(target)
    assert "calibration.json" not in before
    assert "up to date" in evaluate(tmp_path, path, *words).stdout
    assert read_json(target / "calibration.json") == read_json(
        folder / "evaluate/evaluation/calibration.json"
    )
    after = snapshot(target)
    assert before.items() <= after.items() and set(after) - set(before) == {"calibration.json"}
    assert "calibrated across folds" in evaluate(tmp_path, path, *words).stdout
    evaluate(tmp_path, path, *without)
    assert snapshot(target) == after


def test_its_own_probabilities_are_a_table(done, tmp_path):
    """Orders are told apart, earlier ensembles left out, and each model adds the order asked for."""
    folder, *_ = done
    own = pl.read_parquet(folder / "evaluate/evaluation/probabilities.parquet")
    swapped = {f"gemma/swapped/{label}": own[f"llama 8b/given/{label}"] for label in LABELS}
    own.with_columns(**swapped).write_parquet(tmp_path / "own.parquet")
    words = ("--weights", 3, 1, "--ensemble-orders", "swapped", "both")
    found = evaluate(tmp_path, tmp_path / "own.parquet", *words)
    assert "6 columns of an earlier ensemble are left out" in found.stdout
    again = pl.read_parquet(tmp_path / "evaluate/evaluation/probabilities.parquet")
    np.testing.assert_allclose(again["ensemble/winner_tie"], own["llama 8b/given/winner_tie"], atol=1e-6)
    mean = (own["gemma/given/winner_tie"] + own["llama 8b/given/winner_tie"]) / 2
    np.testing.assert_allclose(again["gemma/mean/winner_tie"], mean, atol=1e-6)
    refused = evaluate(tmp_path, tmp_path / "own.parquet", *words[:-1], "given", check=False)
    assert refused.status == 1 and "recipe.ensemble_orders" in refused.stderr


def test_few_or_no_labels(tmp_path):
    """Unlabelled rows get probabilities; below the minimum nothing is fitted, and --calibrate says so."""
    few = table().with_columns(label=pl.when(pl.int_range(pl.len()) < 50).then("label"))
    few.write_parquet(tmp_path / "few.parquet")
    refused = evaluate(tmp_path, tmp_path / "few.parquet", "--calibrate", check=False)
    assert refused.status == 1 and "--calibrate has 50 labelled comparisons, at least 100" in refused.stderr
    assert not (tmp_path / "evaluate").exists()
    found = evaluate(tmp_path, tmp_path / "few.parquet").stdout
    assert "50 labelled comparisons are too few to fit weights on" in found
    folder = tmp_path / "evaluate/evaluation"
    saved, scores = pl.read_parquet(folder / "probabilities.parquet"), read_json(folder / "scores.json")
    assert len(saved) == NUM_ROWS and saved["winner_tie"].null_count() == NUM_ROWS - 50
    assert saved["ensemble/winner_tie"].null_count() == 0
    assert scores["ensemble"]["num_comparisons"] == 50 and "ensemble-fitted" not in scores
    table().drop("label").write_parquet(tmp_path / "none.parquet")
    found = evaluate(tmp_path, tmp_path / "none.parquet", "--name", "none").stdout
    assert "unlabelled: no score" in found and read_json(tmp_path / "evaluate/none/scores.json") == {}
    assert not (tmp_path / "evaluate/none/reliability.png").exists()


def test_unlabelled_rows_beside_labelled_ones_are_answered_with_the_fit_of_all(tmp_path):
    most = table().with_columns(label=pl.when(pl.int_range(pl.len()) < 300).then("label"))
    most.write_parquet(tmp_path / "most.parquet")
    evaluate(tmp_path, tmp_path / "most.parquet")
    folder = tmp_path / "evaluate/evaluation"
    saved = pl.read_parquet(folder / "probabilities.parquet").filter(pl.col("winner_tie").is_null())
    weights = read_json(folder / "scores.json")["ensemble-fitted"]["weights"]
    expected = sum(saved[f"{name}/mean/winner_tie"] * weight for name, weight in weights.items())
    assert len(saved) == 100
    np.testing.assert_allclose(saved["ensemble-fitted/winner_tie"], expected, atol=1e-6)


@pytest.mark.parametrize(
    "spelling",
    [
        lambda i: i,
        lambda i: float(i),
        lambda i: WORDS[i],
        lambda i: ("A", "B", "tie")[i],
        lambda i: ("model_a", "model_b", "tie")[i],
        lambda i: LABELS[i],
    ],
)
@pytest.mark.parametrize("name", ["label", "winner"])
def test_labels_in_any_spelling(tmp_path, spelling, name):
    frame = table(name)
    labelled = frame.with_columns(pl.Series(name, [spelling(int(w)) for w in winners()]))
    labelled.write_csv(tmp_path / "votes.csv")
    found, _ = read_table(tmp_path / "votes.csv")
    assert (labels_array(found).argmax(1) == winners()).all() and found["id"].equals(frame["id"])


def test_labels_in_three_columns_may_be_soft(tmp_path):
    soft = probabilities(4)
    frame = table().drop("label").with_columns(pl.Series(n, soft[:, i]) for i, n in enumerate(LABELS))
    frame.write_csv(tmp_path / "votes.csv")
    np.testing.assert_allclose(labels_array(read_table(tmp_path / "votes.csv")[0]), soft, atol=1e-6)


@pytest.mark.parametrize(
    "names",
    [
        ("m_a", "m_b", "m_tie"),
        ("m_A", "m_B", "m_Tie"),
        ("m_model_a", "m_model_b", "m_tie"),
        ("m_winner_model_a", "m_winner_model_b", "m_winner_tie"),
        ("m/winner_model_a", "m/winner_model_b", "m/winner_tie"),
        ("m/given/winner_model_a", "m/given/winner_model_b", "m/given/winner_tie"),
        ("m.a", "m.b", "m.tie"),
        ("prob_a_m", "prob_b_m", "prob_tie_m"),
    ],
)
def test_columns_in_any_spelling(names):
    expected = {"m": {"given": list(names)}, "n-2_a": {"given": ["n-2_a_a", "n-2_a_b", "n-2_a_tie"]}}
    assert group_columns(["n-2_a_tie", "n-2_a_b", *names[::-1], "n-2_a_a"], "x.csv") == expected


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda t: t.drop("id"), "lacks the column id; found label"),
        (lambda t: t[:0], "no comparison in it"),
        (lambda t: t.drop("gemma_b"), "model gemma has the columns gemma_a, gemma_tie, but none for b"),
        (lambda t: t.rename({"gemma_b": "gemma"}), "column gemma is not known.*<model>_a, <model>_b"),
        (lambda t: t.with_columns(winner="label"), "more than one label: label, winner"),
        (lambda t: t.rename({"label": "vote"}), "column vote is not known.*a column label or winner"),
        (lambda t: t.with_columns(gemma_model_a="gemma_a"), "gemma_a and gemma_model_a both are .* of a of"),
        (
            lambda t: t.rename({"gemma_a": "winner_a"}),
            "winner_a can be read as class a of model winner or a l",
        ),
        (lambda t: t.rename({"gemma_a": "p_a_x_b"}), "p_a_x_b can be read as class b of .* or class a of"),
        (lambda t: t.with_columns(winner_tie=0.0).drop("label"), "label's columns only winner_tie"),
        (lambda t: t.select("id", "label"), "no column of probabilities"),
        (lambda t: t.with_columns(label=pl.lit("C")), r"the label of id 0 is 'C' \(400 of 400 .* 0 / 1 / 2"),
        (lambda t: t.with_columns(label=pl.lit(3)), "the label of id 0 is 3 "),
        (lambda t: t.with_columns(label=pl.lit(0.5)), r"the label of id 0 is 0\.5 "),
        (lambda t: pl.concat([t, t[3:4]]), "more than one row for an id, first 21"),
        (
            lambda t: t.with_columns(gemma_a=0.9),
            r"gemma_a, gemma_b, gemma_tie of id 0 are \[0\.8999.*sum to 1",
        ),
        (lambda t: t.with_columns(gemma_a=pl.lit("x")), "gemma_a, gemma_b, gemma_tie are not all numbers"),
        (
            lambda t: t.with_columns(gemma_a=pl.when(pl.col("id") == "7").then(None).otherwise("gemma_a")),
            r"of id 7 are \[None",
        ),
        (lambda t: t.with_columns(id=pl.when(pl.col("id") != "7").then("id")), "1 of 400 rows have no id"),
        (
            lambda t: t.drop("label").with_columns(pl.lit(0.5, pl.Float64).alias(n) for n in LABELS),
            r"probabilities of id 0 are \[0\.5, 0\.5, 0\.5\]",
        ),
    ],
)
@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_bad_tables(tmp_path, change, expected, suffix):
    path, frame = tmp_path / f"bad.{suffix}", change(table())
    frame.write_csv(path) if suffix == "csv" else frame.write_parquet(path)
    with pytest.raises(ValueError, match=expected) as error:
        read_table(path)
    assert str(path) in str(error.value)


def test_a_bad_table_ends_the_script_before_anything_is_written(tmp_path):
    (tmp_path / "votes.csv").write_text("id,label,m_a,m_b,m_tie\n1,a,0.5,0.5,0.5\n")
    found = evaluate(tmp_path, tmp_path / "votes.csv", check=False)
    assert found.status == 1 and len(found.stderr.splitlines()) == 1 and "sum to 1" in found.stderr
    found = evaluate(tmp_path, tmp_path / "nowhere.csv", check=False)
    assert found.status == 1 and "nowhere.csv is not a file" in found.stderr
    found = evaluate(tmp_path, tmp_path / "votes.csv", "--fold", 0, "--comparisons", "x", check=False)
    assert found.status == 2 and "leave out --comparisons --fold" in " ".join(found.stderr.split())
    assert [path.name for path in tmp_path.iterdir()] == ["votes.csv"]


@pytest.mark.parametrize(
    ("orders", "expected"),
    [
        (("both",), r"--ensemble-orders has 1 entries \(both\) for 2 models \(gemma llama\)"),
        (("swapped", "both"), "asks for swapped of gemma, of which only given is there; say both or given"),
    ],
)
def test_ensemble_orders_that_are_not_there(orders, expected):
    computed = {"gemma": ("given",), "llama": ("given", "swapped")}
    check_ensemble_orders(("given", "swapped"), computed)
    check_ensemble_orders(("both", "both"), computed)
    with pytest.raises(ValueError, match=expected):
        check_ensemble_orders(orders, computed)


def test_the_prior_of_the_checkpoints(tmp_path):
    for name, content in (("a", [0.5, 0.3, 0.2]), ("b", [0.3, 0.3, 0.4]), ("c", None)):
        (tmp_path / name).mkdir()
        write_json(tmp_path / name / "preference.json", {"label_prior": content} if content else {})
    assert checkpoint_prior(tuple(tmp_path / name for name in "abc")) == pytest.approx([0.4, 0.3, 0.3])
    assert checkpoint_prior((tmp_path / "c",)) is None and checkpoint_prior(()) is None
    frame = make_comparisons(30)
    scores = score_groups(frame, {"ensemble": np.full((30, 3), 1 / 3)}, [0.5, 0.3, 0.2], None)
    expected = -np.log(labels_array(frame) @ [0.5, 0.3, 0.2]).mean()
    assert scores["prior"]["from"] == "training labels"
    assert scores["prior"]["log_loss"] == pytest.approx(expected)
    assert set(scores["prior"]) - {"from"} == set(scores["ensemble"]) - {"slices"}


def test_slices_by_every_dimension():
    """Recomputed from the definition; pairs are unordered, rare ones together, unnamed ones in none."""
    frame = make_comparisons(300, seed=3).with_columns(
        source=pl.when(pl.int_range(pl.len()) < 200).then(pl.lit("x")).otherwise(pl.lit("y")),
        model_a=pl.concat_str(pl.lit("m"), pl.int_range(pl.len()) % 13),
        model_b=pl.when(pl.int_range(pl.len()) >= 10).then(pl.lit("m5")),
    )
    values = np.random.default_rng(0).dirichlet([2, 2, 2], 300)
    losses = -np.log((values * labels_array(frame)).sum(1))
    found = slices(frame, values, labels_array(frame))
    assert list(found) == ["turns", "length", "source", "model pair"]
    rows = frame["source"].to_numpy() == "y"
    assert found["source"]["y"]["num_comparisons"] == 100
    assert found["source"]["y"]["log_loss"] == pytest.approx(losses[rows].mean(), abs=1e-6)
    assert sum(one["num_comparisons"] for one in found["length"].values()) == 300
    pairs = found["model pair"]
    assert len(pairs) == 11 and sum(one["num_comparisons"] for one in pairs.values()) == 290
    assert "m10 and m5" in pairs and "m5 and m10" not in pairs
    swapped = frame.with_columns(model_a="model_b", model_b="model_a")
    assert slices(swapped, values, labels_array(frame))["model pair"] == pairs
    unnamed = frame.with_columns(model_a=pl.lit(None, pl.String))
    assert "model pair" not in slices(unnamed, values, labels_array(frame))


def test_comparisons_with_given_probabilities_in_an_order_of_their_own(tmp_path):
    """The route through comparison tables: prompts make the folds, slices have all dimensions."""
    votes = make_comparisons(150, seed=6)
    write_comparisons(votes, tmp_path / "votes.parquet")
    for seed in (1, 2):
        values = probabilities(seed)[:150]
        given = votes.select("id").with_columns(pl.Series(n, values[:, i]) for i, n in enumerate(LABELS))
        given.write_parquet(tmp_path / f"model{seed}.parquet")
    words = ("--probabilities", *(tmp_path / f"model{seed}.parquet" for seed in (1, 2)), "--calibrate")
    where = ("--artifacts", tmp_path, "--comparisons", tmp_path / "votes.parquet")
    found = call("evaluate", *where, *words, "--ensemble-orders", "given", "both")
    assert read_json(tmp_path / "evaluate/evaluation/calibration.json")["orders"] == ["given", "both"]
    assert re.search(r"1 turn +│ +turns", found.stdout) and re.search(
        r"m1 and m2 +│ +model pair", found.stdout
    )
    refused = call("evaluate", *where, *words, "--ensemble-orders", "given", "swapped", check=False)
    assert refused.status == 1 and "asks for swapped of model2" in refused.stderr
