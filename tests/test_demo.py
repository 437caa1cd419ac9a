"""What the demo on the synthetic arena must show, read from its artifacts; `.ci/run` runs the demo first."""

import numpy as np
import polars as pl
import pytest
from helpers import HELD, ROOT, held_elsewhere
from sklearn.linear_model import LogisticRegression

from bundle_manifest import read_bundle, read_verification
from common.data.table import LABELS, labels_array
from common.files import read_json, write_json
from common.runs import Run
from common.score.metrics import log_loss, per_row_log_loss
from data_prep import demo_arena
from stages import demo

DEMO = ROOT / "artifacts" / "demo"
MODELS = ("tiny-gemma", "tiny-llama")


@pytest.fixture(scope="module")
def ladder():
    """(stage, model) -> row of summary.json."""
    if not (DEMO / "summary.json").is_file():
        pytest.skip("no finished demo in artifacts/demo: run just demo first")
    rows = read_json(DEMO / "summary.json")["stages"]
    if rows[0]["floor_log_loss"] is None:
        pytest.skip("artifacts/demo is a demo of real votes, whose floor is not known")
    return {(row["stage"], row["model"]): row for row in rows}


@pytest.fixture(scope="module")
def votes(ladder):
    """(training rows, scored rows in the order of the saved probabilities)."""
    frame = pl.read_parquet(DEMO / "data" / "votes.parquet")
    is_scored = pl.col("fold") == 0
    return frame.filter(~is_scored), frame.filter(is_scored).sort("source", "id")


def test_every_stage_is_in_the_summary(ladder):
    models = (*MODELS, "ensemble")
    assert set(ladder) == {(f"stage{n}", model) for n in (1, 2, 3) for model in models}
    assert (ROOT / read_json(DEMO / "summary.json")["submission"]).is_file()


def test_it_ends_with_a_verified_bundle_its_submission_and_a_report(ladder):
    assert read_verification(DEMO / "bundle")["passed"]
    read_bundle(DEMO / "bundle")
    test, submission = (
        pl.read_csv(DEMO / name, schema_overrides={"id": pl.String})
        for name in ("raw/test.csv", "submission.csv")
    )
    assert submission["id"].equals(test["id"]) and len(test) >= 100
    assert np.allclose(submission.select(LABELS).sum_horizontal(), 1)
    page = (DEMO / "report/report.html").read_text(encoding="utf-8")
    assert f"{ladder['stage3', 'ensemble']['log_loss']:.4f}" in page and "data:image/png" in page


def test_there_is_something_to_learn(ladder):
    row = ladder["stage3", "ensemble"]
    assert row["num_comparisons"] >= 1000
    assert row["prior_log_loss"] - row["floor_log_loss"] >= 0.15


@pytest.mark.parametrize("model", MODELS)
def test_stage3_closes_half_of_the_gap_and_beats_the_lengths(ladder, votes, model):
    row, (train, scored) = ladder["stage3", model], votes
    assert row["log_loss"] <= (row["prior_log_loss"] + row["floor_log_loss"]) / 2
    lengths = pl.col("response_a", "response_b").list.eval(pl.element().str.len_chars()).list.sum()
    features = [np.log1p(frame.select(lengths).to_numpy()) for frame in (train, scored)]
    baseline = LogisticRegression().fit(features[0], labels_array(train).argmax(1))
    assert row["log_loss"] < log_loss(baseline.predict_proba(features[1]), labels_array(scored))


def test_the_ensemble_is_no_worse_than_its_best_member(votes):
    _, scored = votes
    saved = pl.read_parquet(DEMO / "evaluate" / "stage3" / "probabilities.parquet")
    assert saved["id"].equals(scored["id"])
    labels = labels_array(scored)
    losses = {
        name: per_row_log_loss(saved.select(f"{name}/{label}" for label in LABELS).to_numpy(), labels)
        for name in ("ensemble", *(f"{model}/mean" for model in MODELS))
    }
    ensemble = losses.pop("ensemble")
    best = min(losses.values(), key=np.mean)
    standard_error = (ensemble - best).std(ddof=1) / np.sqrt(len(best))
    assert ensemble.mean() <= best.mean() + 2 * standard_error


def test_stage3_beats_stage1_in_the_mean_of_both_models(ladder):
    first, last = (np.mean([ladder[stage, m]["log_loss"] for m in MODELS]) for stage in ("stage1", "stage3"))
    assert last < first


def test_a_demo_of_other_votes_is_refused_and_nothing_touched(tmp_path):
    Run.open(tmp_path, recipe={}, inputs={"train_csv": "abc", "test_csv": None}, code="x").begin()
    before = (tmp_path / "run.json").read_bytes()
    with pytest.raises(
        ValueError, match=r"inputs\.train_csv is abc; here it is None.*--output.*move that folder"
    ):
        demo.main(demo.Args(output=tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]
    assert (tmp_path / "run.json").read_bytes() == before


@pytest.mark.parametrize(
    ("output", "start"),
    [
        ("demo", lambda folder: demo.main(demo.Args(output=folder / "demo"))),
        ("raw", lambda folder: demo_arena.main(demo_arena.Args(output=folder))),
    ],
)
def test_a_demo_has_one_writer(tmp_path, output, start):
    with held_elsewhere(tmp_path / output), pytest.raises(ValueError, match=HELD):
        start(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [f".{output}.lock"]


def test_a_finished_demo_is_shown_again_until_the_code_changes(tmp_path, monkeypatch, capsys):
    row = {"log_loss": 0.75, "log_loss_interval": [0.7, 0.8], "accuracy": 0.5, "prior_log_loss": 1.0}
    stages = [{"stage": "stage1", "model": "m", **row, "floor_log_loss": floor} for floor in (0.5, None)]
    write_json(tmp_path / "summary.json", {"stages": stages, "submission": ""})
    inputs = {"train_csv": None, "test_csv": None}
    Run(folder=tmp_path, description={"recipe": {}, "inputs": inputs, "code": "1"}, is_complete=False).finish(
        {}
    )
    monkeypatch.setattr(demo, "code_hash", lambda *paths: "1")
    demo.main(demo.Args(output=tmp_path))
    said = capsys.readouterr().out
    assert "is up to date" in said and "50%" in said and "0.7000 to 0.8000" in said
    summary = (tmp_path / "summary.json").read_bytes()
    (tmp_path / "summary.json").write_bytes(summary[:-5])
    with pytest.raises(ValueError, match=r"summary\.json: bytes \d+, but \d+ when the run was finished"):
        demo.main(demo.Args(output=tmp_path))
    (tmp_path / "summary.json").write_bytes(summary)
    monkeypatch.setattr(demo, "code_hash", lambda *paths: "2")
    monkeypatch.setattr(demo, "prepare", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        demo.main(demo.Args(output=tmp_path))
    assert read_json(tmp_path / "run.json")["status"] == "started"
