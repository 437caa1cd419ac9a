"""Evaluation of a table of votes and probabilities, its calibration and fitted ensemble, and bad tables."""

import re
import runpy

import numpy as np
import polars as pl
import pytest
from calling import call, snapshot
from helpers import ROOT, make_comparisons

from common.data.table import LABELS, labels_array
from common.files import read_json, write_json
from common.score.calibration import fit_weights
from common.score.ensemble import given_hash, group_keys, make_groups, read_table, score_groups, slices
from common.score.metrics import rescale
from stages.evaluate import checkpoint_prior

NUM_ROWS = 400
WORDS = ("a", "b", "tie")


def probabilities(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).dirichlet([1.0, 1.0, 1.0], NUM_ROWS)


def winners() -> np.ndarray:
    """Drawn from seven parts of the first model and three of the second."""
    truth = 0.7 * probabilities(1) + 0.3 * probabilities(2)
    return (truth.cumsum(1) < np.random.default_rng(0).random((NUM_ROWS, 1))).sum(1)


def table() -> pl.DataFrame:
    """Two over-confident models, rows in no order."""
    columns = {"id": [str(i * 7 % NUM_ROWS) for i in range(NUM_ROWS)], "label": [WORDS[w] for w in winners()]}
    for name, seed in (("gemma", 1), ("llama 8b", 2)):
        values = rescale(probabilities(seed), 3 * np.ones(3), np.zeros(3))
        columns |= {f"{name}_{word}": values[:, i] for i, word in enumerate(WORDS)}
    return pl.DataFrame(columns)


def evaluate(folder, path, *words, check=True):
    return call("evaluate", "--artifacts", folder, "--table", path, *words, check=check)


def printed(output: str) -> dict[str, list[str]]:
    """Rows of the first table: first cell -> the other cells."""
    rows = [line.split("│") for line in output.splitlines() if "│" in line]
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
        assert rows[f"{name}/given"][0] == f"{expected:.4f}" == rows[f"{name}/mean"][0]
    ensemble = -np.log(((2 * models[0] + models[1]) / 3 * labels).sum(1)).mean()
    assert rows["ensemble"][0] == f"{ensemble:.4f}"
    prior = -np.log(labels @ labels.mean(0)).mean()
    assert rows["prior"][0] == f"{prior:.4f}" and "the mean of these labels" in output

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
    assert rows["ensemble-fitted"][0] == f"{fitted['log_loss']:.4f}"
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


def test_each_model_adds_the_order_asked_for():
    """Against the definition, with weights, for a model of two orders and one of a single order."""
    first, second, third = (probabilities(seed) for seed in (1, 2, 3))
    frame = make_comparisons(NUM_ROWS, seed=3).with_columns(
        pl.Series(name, np.eye(3)[winners()][:, i], dtype=pl.Float32) for i, name in enumerate(LABELS)
    )
    orders = {"x": {"given": first, "swapped": second}, "y": {"given": third}}
    groups, fit = make_groups(frame, orders, (3, 1), ("swapped", "both"))
    np.testing.assert_allclose(groups["ensemble"], (3 * second + third) / 4, atol=1e-6)
    np.testing.assert_allclose(groups["x/mean"], (first + second) / 2, atol=1e-6)
    assert groups["y/mean"] == pytest.approx(third, abs=1e-6) and list(fit["weights"]) == ["x", "y"]


def test_rows_of_one_prompt_have_one_key():
    """The answers and the ids do not count; without texts a row stands for itself."""
    frame = make_comparisons(3).with_columns(prompt=pl.Series([["a", "b"], ["a, b"], ["a", "b"]]))
    first, second, third = group_keys(frame)
    assert first == third != second
    assert len(set(group_keys(frame.drop("prompt")))) == 3


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


def test_the_form_of_a_table(tmp_path):
    """Names, labels and probabilities of each model; probabilities in the order of (source, id)."""
    extra = {"source": pl.lit("theirs"), "model_a": pl.lit("x"), "model_b": pl.lit(None, pl.String)}
    raw = table().with_columns(**extra, label=pl.when(pl.int_range(pl.len()) < 300).then("label"))
    raw.write_csv(tmp_path / "votes.csv")
    frame, models = read_table(tmp_path / "votes.csv")
    assert frame.columns == ["id", "source", "model_a", "model_b", *LABELS]
    assert frame.select("id", *extra).equals(raw.select("id", *extra))
    labels = labels_array(frame)
    assert (labels[:300] == np.eye(3)[winners()[:300]]).all() and np.isnan(labels[300:]).all()
    assert list(models) == ["gemma", "llama 8b"]
    for name, values in models.items():
        expected = raw.sort("id").select(f"{name}_{word}" for word in WORDS).to_numpy()
        np.testing.assert_allclose(values, expected, atol=1e-6)
    table().write_csv(tmp_path / "votes.csv")
    assert set(read_table(tmp_path / "votes.csv")[0]["source"]) == {"table"}


def test_labels_in_three_columns_may_be_soft(tmp_path):
    soft = probabilities(4)
    frame = table().drop("label").with_columns(pl.Series(n, soft[:, i]) for i, n in enumerate(LABELS))
    frame.write_csv(tmp_path / "votes.csv")
    np.testing.assert_allclose(labels_array(read_table(tmp_path / "votes.csv")[0]), soft, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda t: t.drop("id"), "the column id is missing; expected id; perhaps source"),
        (lambda t: t[:0], "no comparison in it"),
        (lambda t: t.drop("gemma_b"), "the column gemma_b is missing; .* of each model x: x_a, x_b, x_tie"),
        (
            lambda t: t.rename({"gemma_b": "gemma"}),
            "column gemma is not known, the column gemma_b is missing",
        ),
        (lambda t: t.rename({"label": "vote"}), "column vote is not known.* as label \\(one of a, b"),
        (lambda t: t.rename({"gemma_a": "gemma_A"}), "column gemma_A is not known"),
        (lambda t: t.with_columns(_a="gemma_a"), "column _a is not known"),
        (lambda t: t.with_columns(pl.lit(0.0).alias(n) for n in LABELS), "there is more than one label"),
        (lambda t: t.with_columns(winner_tie=0.0).drop("label"), "column winner_model_a is missing"),
        (lambda t: t.select("id", "label"), "no column of probabilities"),
        (
            lambda t: t.with_columns(label=pl.lit("C")),
            r"the label of id 0 is 'C' \(400 of 400 .* label \(one of a, b",
        ),
        (lambda t: t.with_columns(label=pl.lit(1)), "the label of id 0 is '1' "),
        (lambda t: pl.concat([t, t[3:4]]), "2 of 401 rows have .* an id that another row has, first 21"),
        (
            lambda t: t.with_columns(gemma_a=0.9),
            r"gemma_a, gemma_b, gemma_tie of id 0 are \[0\.9,.*sum to 1 within 0\.001",
        ),
        (
            lambda t: t.with_columns(gemma_a=pl.lit("x")),
            "gemma_a is ('x'|String), expected Float64",
        ),
        (
            lambda t: t.with_columns(gemma_a=pl.when(pl.col("id") == "7").then(None).otherwise("gemma_a")),
            r"of id 7 are \[nan",
        ),
        (
            lambda t: t.with_columns(id=pl.when(pl.col("id") != "7").then("id")),
            "1 of 400 rows have no id.* first None",
        ),
        (
            lambda t: t.drop("label").with_columns(pl.lit(0.5, pl.Float64).alias(n) for n in LABELS),
            r"winner_tie of id 0 are \[0\.5, 0\.5, 0\.5\]",
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
    assert found.status == 1 and "leave out --comparisons --fold" in " ".join(found.stderr.split())
    assert [path.name for path in tmp_path.iterdir()] == ["votes.csv"]


@pytest.mark.parametrize(
    ("words", "status", "expected"),
    [
        (("--ensemble-orders", "both"), 1, "--ensemble-orders has 1 entries for 2 models (gemma llama 8b)"),
        (("--weights", 1, 2, 3), 1, "--weights has 3 entries for 2 models (gemma llama 8b)"),
        (
            ("--ensemble-orders", "given", "swapped"),
            1,
            "asks for swapped, but --table has only given; say both or given",
        ),
    ],
)
def test_flags_that_do_not_fit_the_models(done, tmp_path, words, status, expected):
    found = evaluate(tmp_path, done[1], *words, check=False)
    assert found.status == status and expected in re.sub(r"[\s│]+", " ", found.stderr)
    assert list(tmp_path.iterdir()) == []


def resaved(folder, change):
    """The table of `done` under another name, in another form, in another order."""
    frame = table()
    match change:
        case "moved":
            frame.write_csv(folder / "elsewhere.CSV")
        case "parquet":
            frame.write_parquet(folder / "x.parquet", compression="uncompressed")
        case "gzip":
            frame.write_csv(folder / "x.csv.gz", compression="gzip")
        case "jsonl":
            frame.write_ndjson(folder / "x.jsonl")
        case "row order":
            frame.sample(fraction=1, shuffle=True, seed=1).write_csv(folder / "x.csv")
        case "categories":
            frame.cast({"label": pl.Categorical, "id": pl.Int32}).write_parquet(folder / "x.parquet")
        case "words":
            words = {"a": "model_a", "b": "model_b", "tie": "both_bad"}
            frame.with_columns(pl.col("label").replace(words)).write_csv(folder / "x.csv")
        case "truths":
            votes = [(pl.col("label") == word).alias(name) for word, name in zip(WORDS, LABELS, strict=True)]
            frame.with_columns(votes).drop("label").write_parquet(folder / "x.parquet")
    [path] = folder.iterdir()
    return path


CHANGES = ("moved", "parquet", "gzip", "jsonl", "row order", "categories", "words", "truths")


@pytest.mark.parametrize("change", CHANGES)
def test_equal_tables_are_the_same_evaluation(done, tmp_path, change):
    """Whatever the file's name, place and form: the finished evaluation and its scaling are up to date."""
    folder, first, words, _ = done
    path = resaved(tmp_path, change)
    before = snapshot(folder / "evaluate")
    found = evaluate(folder, path, *words[:3], "--calibrate").stdout
    assert found.count("is up to date") == 2 and snapshot(folder / "evaluate") == before
    assert given_hash(*read_table(path)) == given_hash(*read_table(first))
    keys = [sorted(group_keys(read_table(file)[0])) for file in (path, first)]
    assert keys[0] == keys[1]


@pytest.mark.parametrize("change", ["moved", "row order"])
def test_equal_tables_get_equal_weights_and_scaling(done, tmp_path, change):
    (tmp_path / "in").mkdir()
    evaluate(tmp_path, resaved(tmp_path / "in", change), *done[2][:3], "--calibrate")
    for name in ("scores.json", "calibration.json"):
        found, before = (read_json(folder / "evaluate/evaluation" / name) for folder in (tmp_path, done[0]))
        assert found == before


@pytest.mark.parametrize("column", ["id", "label", "gemma_a", "source"])
def test_another_table_is_another_evaluation(done, column):
    frame, first = table(), given_hash(*read_table(done[1]))
    swap = {"gemma_a": "gemma_b", "gemma_b": "gemma_a"}
    other = {
        "id": lambda: frame.with_columns(pl.col("id").replace("7", "seven")),
        "label": lambda: frame.with_columns(pl.col("label").replace({"a": "b"})),
        "gemma_a": lambda: frame.rename(swap),
        "source": lambda: frame.with_columns(source=pl.lit("theirs")),
    }[column]()
    other.write_csv(done[0] / "other.csv")
    assert given_hash(*read_table(done[0] / "other.csv")) != first


@pytest.mark.parametrize("orders", [("given",), ("swapped",), ("given", "swapped")])
def test_orders_that_are_not_computed_add_nothing(orders):
    args = runpy.run_path(str(ROOT / "stages/evaluate.py"))["Args"]
    args(orders=orders, ensemble_orders=("both", *orders))
    if missing := {"given", "swapped"} - set(orders):
        with pytest.raises(ValueError, match=rf"asks for {missing.pop()}, but --orders has only {orders[0]}"):
            args(orders=orders, ensemble_orders=("both", "given", "swapped"))


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
