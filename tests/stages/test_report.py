"""The report of artifact trees made by hand: what it shows, what it says is missing, what it refuses."""

import json
import re
import shutil
import struct
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from calling import call
from helpers import ROOT

from common.data.table import LABELS

SECTIONS = (
    "Scores",
    "Calibration",
    "Swap consistency",
    "Slices",
    "Training",
    "Sequence lengths",
    "Lineage",
    "Bundle",
)
HOSTILE = "<script>alert(1)</script>"


class Page(HTMLParser):
    """Text, tags and attributes of a page; `open_tags` is empty at the end of a well-formed one."""

    def __init__(self, path: Path):
        super().__init__()
        self.source = path.read_text(encoding="utf-8")
        self.texts, self.tags, self.attributes, self.open_tags = [], [], [], []
        self.feed(self.source)
        self.text = " ".join(" ".join(self.texts).split())

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, *pair) for pair in attrs]
        if tag not in ("meta", "img"):
            self.open_tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open_tags.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open_tags:
            self.texts.append(data)


def put(path: Path, value: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")


def put_training(artifacts: Path, stage: str, name: str, *, parent=("google/gemma", None), source="arena"):
    folder = artifacts / stage / name
    put(folder / "run.json", {"recipe": {}, "inputs": {}, "status": "complete", "metrics": {}})
    steps = [{"step": i, "loss": 1.1 - i / 100, "lr": 1e-6 * i, "tokens": 9} for i in range(1, 21)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))
    put(
        folder / "preference.json",
        {
            "metrics": {} if name.endswith("-final") else {"log_loss": 0.91234},
            "lineage": {"parent": parent[0], "parent_stage": parent[1], "train_sources": {source: 4321}},
        },
    )
    put(
        folder / "sequences.json",
        {
            "num_sequences": 8642,
            "num_truncated": 77,
            "num_became_identical": 5,
            "conversation_tokens": 256,
            "length_edges": list(range(61)),
            "length_counts": list(range(60)),
        },
    )


def a_score(loss: float, **more) -> dict:
    return {
        "num_comparisons": 250,
        "log_loss": loss,
        "log_loss_interval": [loss - 0.03, loss + 0.03],
        "accuracy": 0.625,
        "calibration_error": {"top": 0.041, "per_class": [0.1, 0.1, 0.1]},
    } | more


def put_evaluation(artifacts: Path, name: str, models=("gemma", "llama"), *, source="arena"):
    folder = artifacts / "evaluate" / name
    recipe = {"models": list(models), "weights": [1.0] * len(models), "orders": ["given", "swapped"]}
    put(folder / "run.json", {"recipe": recipe, "inputs": {}, "status": "complete", "metrics": {}})
    swap = {"mean_absolute_difference": 0.0567, "same_winner": 0.885}
    groups = [f"{model}/{order}" for model in models for order in ("given", "swapped", "mean")]
    scores = {group: a_score(0.95 + i / 1000) for i, group in enumerate(groups)}
    for model in models:
        scores[f"{model}/mean"]["swap_consistency"] = swap
    one = {"num_comparisons": 120, "log_loss": 0.9876, "interval": [0.9, 1.05]}
    scores["ensemble"] = a_score(
        0.9321, slices={"turns": {"1 turn": one}, "source": {source: one | {"log_loss": 0.8765}}}
    )
    scores["ensemble-fitted"] = a_score(
        0.9333, weights=dict.fromkeys(models, 0.5), gain=-0.0012, gain_interval=[-0.004, 0.002]
    )
    put(folder / "scores.json", {"prior": a_score(1.0987) | {"from": "training labels"}} | scores)
    generator = np.random.default_rng(0)
    labels = np.eye(3, dtype=np.float32)[generator.integers(3, size=250)]
    columns = {
        "source": [source] * 250,
        "id": [str(i) for i in range(250)],
        **dict(zip(LABELS, labels.T, strict=True)),
    }
    for group in [*groups, "ensemble"]:
        values = generator.dirichlet((2, 2, 1), size=250).astype(np.float32)
        columns |= {f"{group}/{label}": values[:, i] for i, label in enumerate(LABELS)}
    pl.DataFrame(columns).write_parquet(folder / "probabilities.parquet")


def put_calibration(artifacts: Path, name: str, kept: str | None) -> None:
    scaling = {"scale": [0.9] * 3, "bias": [0.0] * 3}
    one = {
        "uncalibrated_log_loss": 0.9321,
        "temperature": scaling | {"log_loss": 0.9211, "gain": 0.011, "gain_interval": [0.004, 0.018]},
        "vector": scaling | {"log_loss": 0.9243, "gain": 0.0078, "gain_interval": [-0.001, 0.016]},
        "kept": kept,
        "scaling": scaling if kept else None,
    }
    put(artifacts / "evaluate" / name / "calibration.json", one | {"per_model": {"gemma": one}})


def put_bundle(artifacts: Path, scaling=None, **models: tuple[str, float]) -> None:
    served = [{"name": name, "order": order, "weight": weight} for name, (order, weight) in models.items()]
    put(artifacts / "bundle/manifest.json", {"models": served, "scaling": scaling, "made_by": "x"})


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A tree with everything in it, and its report."""
    artifacts = tmp_path_factory.mktemp("whole") / "run"
    for model in ("gemma", "llama"):
        put_training(artifacts, "stage1", model)
        put_training(artifacts, "stage2", model, source="pool")
        for name in (model, f"{model}-final"):
            put_training(artifacts, "stage3", name, parent=(f"elsewhere/stage2/{model}", "stage2"))
    put(
        artifacts / "pseudo/ensemble/run.json",
        {
            "recipe": {"teachers": ["gemma", "llama"]},
            "status": "complete",
            "metrics": {"num_comparisons": 99},
        },
    )
    for stage in ("stage1", "stage3"):
        put_evaluation(artifacts, stage)
    put_calibration(artifacts, "stage3", "temperature")
    put(artifacts / "summary.json", {"stages": [{"stage": "stage3", "model": "x", "floor_log_loss": 0.5432}]})
    put_bundle(artifacts, gemma=("both", 2), llama=("both", 2))
    checks = [{"name": "hashes", "passed": True, "detail": "12 files"}, {"name": "size", "passed": False}]
    put(artifacts / "bundle/verify.json", {"passed": False, "checks": checks})
    called = call("report", "--artifacts", artifacts)
    return artifacts, called, Page(artifacts / "report/report.html")


def test_every_section_stands_in_the_page_and_in_the_terminal(whole):
    artifacts, called, page = whole
    assert page.open_tags == []
    assert page.tags.count("h2") == len(SECTIONS)
    lines = called.stdout.splitlines()
    counts = f"{page.tags.count('img')} pictures, {page.tags.count('table')} tables"
    assert lines == [f"report: {counts} in {artifacts / 'report/report.html'}"], "nothing is missing"
    for title in SECTIONS:
        assert f"<h2>{title}</h2>" in page.source
    assert 'class="missing"' not in page.source


def test_pictures_are_valid_and_the_same_in_the_page_and_beside_it(whole):
    artifacts, _, page = whole
    files = {path.name: path.read_bytes() for path in (artifacts / "report").glob("*.png")}
    stages = ("stage1", "stage2", "stage3")
    assert set(files) == {
        "ladder.png",
        *(f"{kind}-{stage}.png" for kind in ("curves", "lengths") for stage in stages),
        *(
            f"{kind}-{name}.png"
            for kind in ("reliability", "swap", "slices")
            for name in ("stage1", "stage3")
        ),
    }
    for data in files.values():
        assert data.startswith(b"\x89PNG") and data.rstrip().endswith(b"IEND\xaeB`\x82")
        width, height = struct.unpack(">II", data[16:24])
        assert width >= 1000 and height >= 500
    assert page.tags.count("img") == len(files)
    alts = [value for tag, name, value in page.attributes if (tag, name) == ("img", "alt")]
    assert len(alts) == len(files) and all(len(alt) > 20 for alt in alts)


def test_the_page_needs_nothing_else_and_fits_a_phone(whole):
    _, _, page = whole
    links = [(tag, name, value) for tag, name, value in page.attributes if name in ("src", "href", "srcset")]
    assert links and all(value.startswith(("data:image/png;base64,", "#")) for _, _, value in links)
    anchors = {value for _, name, value in page.attributes if name == "id"}
    assert all(value[1:] in anchors for tag, _, value in links if tag == "a")
    assert not {"script", "link", "iframe"} & set(page.tags)
    style = page.source.partition("<style>")[2].partition("</style>")[0]
    assert "url(" not in style and "@import" not in style and "@media print" in style
    assert ("meta", "content", "width=device-width, initial-scale=1") in page.attributes


def test_the_numbers_are_those_of_the_files(whole):
    artifacts, _, page = whole
    scores = json.loads((artifacts / "evaluate/stage3/scores.json").read_text())
    for group, score in scores.items():
        assert group in page.text and f"{score['log_loss']:.4f}" in page.text
    assert "0.9321 (95 % 0.9021 to 0.9621) on 250 comparisons" in page.text
    assert "scores 1.0987, and the best that can be reached is 0.5432" in page.text
    assert "0.0567" in page.text and "88.5%" in page.text  # swap consistency
    assert "0.9876" in page.text and "0.8765" in page.text  # slices
    assert "8,642" in page.text and "77" in page.text and "0.9%" in page.text  # truncation
    assert "arena 4,321" in page.text and "elsewhere/stage2/gemma" in page.text  # lineage
    assert "Comparisons with pseudo labels: ensemble 99." in page.text
    assert "did NOT pass" in page.text and "FAILED" in page.text and "12 files" in page.text  # bundle


def test_the_decision_on_calibration_stands_with_both_numbers(whole, tmp_path):
    _, _, page = whole
    assert "Decision (stage3): keep temperature scaling" in page.text
    assert "is 0.9321 without it and 0.9211 (gain +0.0110, 95 % +0.0040 to +0.0180) with it" in page.text
    put_evaluation(tmp_path, "mine")
    put_calibration(tmp_path, "mine", None)
    call("report", "--artifacts", tmp_path)
    assert "Decision (mine): no scaling." in Page(tmp_path / "report/report.html").text


def test_the_last_stage_comes_first(whole):
    _, _, page = whole
    assert headline(page).startswith("The ensemble that the bundle serves (gemma both x 2, llama both x 2), ")
    assert "evaluation stage3 of its validation runs: a log loss of 0.9321" in headline(page)
    assert page.source.index("evaluation stage3") < page.source.index("<summary>stage1</summary>")


def headline(page: Page) -> str:
    return page.text.partition("Arena preference: ")[2].partition("Arena preference: ")[2].split(" ", 1)[1]


def put_served(artifacts: Path, name="mine", orders=("given", "swapped"), weights=(2.0, 1.0), hashes=()):
    """An evaluation of an ensemble of these orders and weights."""
    put_evaluation(artifacts, name)
    run = json.loads((artifacts / "evaluate" / name / "run.json").read_text())
    run["recipe"] |= {"ensemble_orders": list(orders), "weights": list(weights)}
    put(artifacts / "evaluate" / name / "run.json", run | {"inputs": {"checkpoints": list(hashes)}})


SERVED = "The ensemble that the bundle serves (gemma given x 4, llama swapped x 2), evaluation mine"
OTHER = "Best of evaluation mine: ensemble"


@pytest.mark.parametrize(
    ("evaluation", "expected"),
    [
        ({}, SERVED),
        ({"weights": (1.0, 1.0)}, OTHER),
        ({"orders": ("both", "both")}, OTHER),
        ({"hashes": ["teacher"]}, OTHER),
        ({"hashes": ["student"]}, OTHER),
        ({"hashes": ["validation run"]}, SERVED),
    ],
)
def test_the_headline_is_what_the_bundle_serves(tmp_path, evaluation, expected):
    put_training(tmp_path, "stage3", "gemma-final")
    origin = json.loads((tmp_path / "stage3/gemma-final/preference.json").read_text())
    origin["lineage"]["checkpoint"] = "student"
    put(tmp_path / "stage3/gemma-final/preference.json", origin)
    labelled = {"recipe": {}, "inputs": {"teacher": "teacher"}, "status": "complete", "metrics": {}}
    put(tmp_path / "pseudo/gemma/run.json", labelled)
    put_served(tmp_path, **evaluation)
    put_evaluation(tmp_path, "stage3")  # of a later stage in its name, but not what is served
    if expected == OTHER:
        shutil.rmtree(tmp_path / "evaluate/stage3")
    put_bundle(tmp_path, gemma=("given", 4), llama=("swapped", 2))
    call("report", "--artifacts", tmp_path)
    page = Page(tmp_path / "report/report.html")
    assert (
        headline(page).startswith(expected)
        and "0.9321 (95 % 0.9021 to 0.9621) on 250 comparisons" in page.text
    )
    asked = "--ensemble-orders given swapped --weights 4 2 --name served"
    assert (
        f"No evaluation scores what the bundle serves; score its models' validation runs with: just evaluate "
        f"{asked}." in page.text
    ) == (expected == OTHER)


def test_a_served_scaling_stands_in_the_headline(tmp_path):
    put_served(tmp_path)
    put_calibration(tmp_path, "mine", "temperature")
    put_bundle(tmp_path, {"scale": [0.9] * 3, "bias": [0.0] * 3}, gemma=("given", 2), llama=("swapped", 1))
    call("report", "--artifacts", tmp_path)
    said = headline(Page(tmp_path / "report/report.html"))
    assert "The bundle also scales it (temperature), judged across folds: 0.9211." in said


@pytest.mark.parametrize("kind", ["stage", "bundle", "labels"])
def test_nothing_scored_is_said_of_nothing_scored_alone(tmp_path, kind):
    if kind == "stage":
        put_training(tmp_path, "stage1", "gemma")
        put_training(tmp_path, "stage3", "gemma-final")
    elif kind == "bundle":
        put_bundle(tmp_path, gemma=("given", 2))
    else:
        put(tmp_path / "pseudo/x/run.json", {"recipe": {}, "inputs": {}, "status": "started"})
    call("report", "--artifacts", tmp_path)
    said = headline(Page(tmp_path / "report/report.html"))
    held_out = "No evaluation yet. Log loss of each stage's held-out fold, one order: stage1/gemma 0.9123."
    assert said.startswith(held_out if kind == "stage" else "Nothing has been scored yet.")


def test_an_evaluation_alone_is_enough_and_what_is_missing_is_named(tmp_path):
    put_evaluation(tmp_path / "a", "theirs", models=("x",))
    out = tmp_path / "elsewhere"
    call("report", "--artifacts", tmp_path / "a", "--output", out)
    page = Page(out / "report.html")
    assert not (tmp_path / "a/report").exists()
    assert (out / "reliability-theirs.png").is_file() and not (out / "curves-stage1.png").exists()
    for sentence in (
        "No calibration was fitted",
        "Nothing was trained in stage1; do it with: just stage1 MODEL.",
        "There are no pseudo labels; make them with: just pseudo-label.",
        "There is no bundle; build one with: just submit.",
        "No bundle has been verified",
    ):
        assert sentence in page.text
    assert all(f"<h2>{title}</h2>" in page.source for title in SECTIONS)


def test_parts_of_an_evaluation_and_of_a_run_may_be_missing(tmp_path):
    put_evaluation(tmp_path, "old")
    folder = tmp_path / "evaluate/old"
    table = pl.read_parquet(folder / "probabilities.parquet")
    table.drop(LABELS).write_parquet(folder / "probabilities.parquet")
    scores = json.loads((folder / "scores.json").read_text())
    for group in ("prior", "ensemble-fitted"):
        del scores[group]
    del scores["ensemble"]["slices"]
    put(folder / "scores.json", scores)
    put(tmp_path / "evaluate/begun/run.json", {"recipe": {"models": ["x"]}, "status": "started"})
    put(tmp_path / "evaluate/test/run.json", {"recipe": {"models": ["x"]}, "status": "complete"})
    put(tmp_path / "evaluate/test/scores.json", {})
    put(tmp_path / "stage1/begun/run.json", {"recipe": {}, "status": "started"})
    (tmp_path / "stage1/begun/metrics.jsonl").write_text(
        '{"step": 1, "loss": 1.1, "lr": 0.1}\n{"step": 2, "lo'
    )
    call("report", "--artifacts", tmp_path)
    page = Page(tmp_path / "report/report.html")
    for sentence in (
        "old: probabilities.parquet has no labels; evaluate it again.",
        "old: has no prior; evaluate it again.",
        "old: has no slices; evaluate it again.",
        "old: no labelled probabilities of both orders",
        "Evaluation begun is not finished",
        "Evaluation test had no labelled comparisons to score.",
        "stage1/begun is not finished",
        "stage1/begun has no sequences.json",
    ):
        assert sentence in page.text, sentence
    assert (tmp_path / "report/curves-stage1.png").is_file()


def test_hostile_names_are_text(tmp_path):
    name = HOSTILE.replace("/", "")
    put_evaluation(tmp_path, "stage3", models=(HOSTILE, '"><img src=x onerror=alert(1)>'), source=HOSTILE)
    put_training(tmp_path, "stage1", name, parent=(HOSTILE, None), source=HOSTILE)
    put(tmp_path / "pseudo/ensemble/run.json", {"recipe": {"teachers": [name, HOSTILE]}, "status": "started"})
    put(tmp_path / "bundle/manifest.json", {"models": [{"name": HOSTILE}]})
    put(tmp_path / "bundle/verify.json", {"passed": "yes", "checks": [{"name": HOSTILE, "detail": HOSTILE}]})
    call("report", "--artifacts", tmp_path)
    page = Page(tmp_path / "report/report.html")
    assert "script" not in page.tags and page.open_tags == []
    assert page.text.count(HOSTILE) >= 6 and f"{HOSTILE}/given" in page.text
    assert all(value.startswith("data:") for _, name, value in page.attributes if name == "src")
    assert not any(name.startswith("on") for _, name, _ in page.attributes)
    assert "did NOT pass" in page.text, "only a true `passed` counts"


@pytest.mark.parametrize(
    "make", [lambda path: None, Path.mkdir, lambda path: put(path / "report/x.json", {})]
)
def test_nothing_to_report_on_is_an_error_with_a_way_out(tmp_path, make):
    make(tmp_path / "empty")
    called = call("report", "--artifacts", tmp_path / "empty", check=False)
    assert called.status == 1
    assert "holds nothing to report on" in called.stderr and "just demo" in called.stderr
    assert not (tmp_path / "empty/report/report.html").exists()


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("stage1/gemma/run.json", '{"recipe": {'),
        ("stage1/gemma/preference.json", "[]"),
        ("stage1/gemma/sequences.json", ""),
        ("evaluate/stage3/run.json", '"x"'),
        ("evaluate/stage3/scores.json", "\x00"),
        ("evaluate/stage3/calibration.json", "null"),
        ("pseudo/ensemble/run.json", "{'status': 1}"),
        ("bundle/verify.json", "{"),
        ("summary.json", "[1]"),
    ],
)
def test_a_broken_file_is_named(whole, tmp_path, file, text):
    artifacts = tmp_path / "broken"
    shutil.copytree(whole[0], artifacts, ignore=shutil.ignore_patterns("report"))
    (artifacts / file).write_text(text)
    called = call("report", "--artifacts", artifacts, check=False)
    assert called.status == 1
    assert str(artifacts / file) in called.stderr
    assert len(called.stderr.splitlines()) == 1
    assert not (artifacts / "report/report.html").exists()


def test_the_report_waits_for_no_torch():
    source = (ROOT / "stages/report.py").read_text()
    modules = re.findall(r"^from (common\S*) import|^from (common) import", source, re.M)
    code = f"import sys; import {', '.join(a or b for a, b in modules)}; print('torch' in sys.modules)"
    run = [sys.executable, "-c", code]
    found = subprocess.run(run, capture_output=True, text=True, check=True, cwd=ROOT)
    assert found.stdout.strip() == "False"
