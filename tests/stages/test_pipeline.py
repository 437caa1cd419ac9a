"""The whole story at toy size: two teachers, soft labels, two students, finals, scores, a submission."""

import io
import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import polars as pl
import pytest
import torch
from calling import call, snapshot
from helpers import HELD, ROOT, held_elsewhere, make_comparisons
from launching import launch
from rich.console import Console
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoTokenizer

from common.data.table import (
    LABELS,
    ORDERS,
    content_hashes,
    labels_array,
    swap,
    table_hash,
    write_comparisons,
)
from common.files import file_hash, read_json, write_json
from common.models import checkpoint_hash, load_model
from common.prompts import Prompter
from common.train import launch as launching

FAMILIES = ("gemma", "llama")
RECIPE = ("--conversation-tokens", 128, "--comparisons-per-step", 12, "--lr", "3e-3")


class Story:
    """Paths and command lines of one artifacts folder."""

    def __init__(self, world, artifacts):
        self.world, self.artifacts = world, artifacts
        self.votes, self.pool = world / "votes.parquet", world / "pool.parquet"
        self.where = ("--artifacts", artifacts)
        self.commands = {
            "stage1": ("stage1", "tiny-gemma", *self.teacher("gemma")),
            "pseudo_label": ("pseudo_label", *self.where, "--comparisons", self.pool),
            "stage2": ("stage2", "tiny-llama", *self.student("llama")),
            "stage3": ("stage3", "tiny-llama", *self.where, *RECIPE, "--votes", self.votes),
            "stage3 --final": (
                "stage3",
                "tiny-llama",
                "--final",
                *self.where,
                *RECIPE,
                "--votes",
                self.votes,
            ),
            "evaluate": ("evaluate", *self.where, "--comparisons", self.votes, "--fold", 0),
        }

    def teacher(self, family):
        checkpoint = ("--checkpoint", self.world / family, "--votes", self.votes)
        return (*self.where, *RECIPE, *checkpoint, "--formats", "PAB", "PAPB")

    def student(self, family):
        data = ("--votes", self.votes, "--comparisons", self.pool)
        window = ("--sliding-window", "off" if family == "gemma" else "checkpoint")
        return (*self.where, *RECIPE, "--checkpoint", self.world / family, *data, *window)

    def checkpoints(self):
        stages = ("stage1/tiny-{}", "stage2/tiny-{}", "stage3/tiny-{}", "stage3/tiny-{}-final")
        return [self.artifacts / stage.format(family) for stage in stages for family in FAMILIES]


@pytest.fixture(scope="module")
def story(world, tmp_path_factory):
    """Everything built once; the tests below only look, or work in folders of their own."""
    story = Story(world, tmp_path_factory.mktemp("story") / "artifacts")
    for family in FAMILIES:
        call("stage1", f"tiny-{family}", *story.teacher(family))
    call(*story.commands["pseudo_label"])
    for family in FAMILIES:
        votes = (*story.where, *RECIPE, "--votes", story.votes)
        call("stage2", f"tiny-{family}", *story.student(family))
        call("stage3", f"tiny-{family}", *votes)
        call("stage3", f"tiny-{family}", "--final", *votes)
    call(*story.commands["evaluate"])
    return story


@pytest.fixture
def teachers(story, tmp_path):
    """Artifacts that hold copies of the teachers and nothing else."""
    shutil.copytree(story.artifacts / "stage1", tmp_path / "artifacts/stage1")
    return Story(story.world, tmp_path / "artifacts")


def forget_results(folder):
    """Makes a run one of before, which had noted nothing of its results: what was changed is not seen."""
    run = read_json(folder / "run.json")
    write_json(folder / "run.json", {name: value for name, value in run.items() if name != "files"})


def group(frame, name):
    """float32 [comparisons, 3] of one column group of a table of probabilities."""
    return frame.select(f"{name}/{label}" for label in LABELS).to_numpy()


def tables(output):
    """Rows of all printed tables: first cell -> the other cells."""
    rows = [line.split("│") for line in output.splitlines() if "│" in line]
    return {first.strip(): [cell.strip() for cell in others] for first, *others in rows}


# What lies in a checkpoint folder


def test_checkpoints_are_whole_and_hold_no_pickle(story, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("something was unpickled")

    monkeypatch.setattr("pickle.load", refuse)
    monkeypatch.setattr("pickle.loads", refuse)
    monkeypatch.setattr("torch.load", refuse)
    for folder in story.checkpoints():
        names = {path.name for path in folder.iterdir()}
        assert names - {"held_out.parquet", "logs"} == {
            "chat_template.jinja",
            "config.json",
            "metrics.jsonl",
            "sequences.json",
            "model.safetensors",
            "preference.json",
            "run.json",
            "tokenizer.json",
            "tokenizer_config.json",
            "trained_on.parquet",
        }
        assert ("held_out.parquet" in names) != folder.name.endswith("-final")
        stored = load_file(folder / "model.safetensors")
        assert all(
            torch.equal(tensor, stored[name]) for name, tensor in load_model(folder).state_dict().items()
        )
    files = [path for path in story.artifacts.rglob("*") if path.is_file()]
    suffixes = {path.suffix for path in files if not path.name.startswith("events.out.tfevents.")}
    assert suffixes == {".arrow", ".jinja", ".json", ".jsonl", ".parquet", ".png", ".safetensors"}


def test_backbone_tensors_keep_their_published_names(story):
    for folder, family in zip(story.checkpoints(), FAMILIES * 4, strict=True):
        with (
            safe_open(story.world / family / "model.safetensors", "pt") as published,
            safe_open(folder / "model.safetensors", "pt") as ours,
        ):
            backbone = {name for name in published.keys() if name != "score.weight"}  # noqa: SIM118
            assert {name for name in ours.keys() if not name.startswith("head.")} == backbone  # noqa: SIM118


def test_preference_json_says_what_the_checkpoint_is(story):
    votes = pl.read_parquet(story.votes)
    found = {folder: read_json(folder / "preference.json") for folder in story.checkpoints()}
    teacher = found[story.artifacts / "stage1/tiny-gemma"]
    assert teacher["stage"] == "stage1" and teacher["model"] == "tiny-gemma"
    assert teacher["classes"] == list(LABELS) and teacher["num_classes"] == 3
    assert teacher["formats"] == ["PAB", "PAPB"] == teacher["recipe"]["formats"]
    assert teacher["sliding_window"] == 16 and teacher["softcap"] == 50
    assert teacher["recipe"]["lr"] == 3e-3 and teacher["recipe"]["conversation_tokens"] == 128
    prompter = Prompter(
        AutoTokenizer.from_pretrained(story.world / "gemma"), conversation_tokens=128
    ).describe()
    assert teacher["prompt"] == prompter
    assert teacher["lineage"]["checkpoint"] == checkpoint_hash(story.world / "gemma")
    assert teacher["lineage"]["train"] == table_hash(votes.filter(pl.col("fold") != 0))
    assert teacher["lineage"]["held_out"] == table_hash(votes.filter(pl.col("fold") == 0))
    assert teacher["metrics"]["num_comparisons"] == 30 and 0.5 < teacher["metrics"]["log_loss"] < 2
    assert set(teacher["versions"]) == {"torch", "transformers", "torch-optimi"}

    student = found[story.artifacts / "stage2/tiny-gemma"]
    assert student["sliding_window"] is None and student["formats"] == ["PAB"]
    last = found[story.artifacts / "stage3/tiny-gemma"]
    assert last["lineage"]["checkpoint"] == checkpoint_hash(story.artifacts / "stage2/tiny-gemma")
    assert last["lineage"]["parent_stage"] == "stage2" and last["sliding_window"] is None
    final = found[story.artifacts / "stage3/tiny-gemma-final"]
    assert final["metrics"] == {} and final["lineage"]["held_out"] is None


def test_trained_on_grows_along_the_lineage(story):
    votes, pool = pl.read_parquet(story.votes), pl.read_parquet(story.pool)
    taught = set(content_hashes(votes.filter(pl.col("fold") != 0)))
    pooled, everything = set(content_hashes(pool)), set(content_hashes(votes)) | set(content_hashes(pool))
    for family in FAMILIES:
        expected = {
            f"stage1/tiny-{family}": taught,
            f"stage2/tiny-{family}": pooled,
            f"stage3/tiny-{family}": taught | pooled,
            f"stage3/tiny-{family}-final": everything,
        }
        for folder, hashes in expected.items():
            found = pl.read_parquet(story.artifacts / folder / "trained_on.parquet")
            assert found.columns == ["content_hash"] and set(found["content_hash"]) == hashes
            assert len(found) == len(hashes)


def test_stages_train(story):
    """Every stage moves the weights; a stage starts from what it says it does."""
    for family in FAMILIES:
        weights = [
            load_file(folder / "model.safetensors")
            for folder in (story.world / family, *story.checkpoints()[FAMILIES.index(family) :: 2])
        ]
        name = "model.layers.0.mlp.up_proj.weight"
        distances = [float((w[name] - weights[0][name]).norm()) for w in weights]
        assert all(distance > 0 for distance in distances[1:])
        to_student = float((weights[3][name] - weights[2][name]).norm())
        assert to_student < float((weights[3][name] - weights[1][name]).norm())


# Started again


@pytest.mark.parametrize("name", ["stage1", "pseudo_label", "stage2", "stage3", "stage3 --final", "evaluate"])
def test_started_again_is_up_to_date_and_changes_no_file(story, name):
    before = snapshot(story.artifacts)
    assert "up to date" in call(*story.commands[name]).stdout
    assert snapshot(story.artifacts) == before


@pytest.mark.parametrize(
    ("name", "change", "named"),
    [
        ("stage1", ("--lr", "1e-3"), r"recipe\.lr is 0\.003; here it is 0\.001"),
        ("stage1", ("--formats", "PAB"), r"recipe\.formats"),
        ("stage1", ("--held-out-fold", 1), r"inputs\.held_out"),
        ("stage1", ("--instruction", "instruction.txt"), r"inputs\.prompt"),
        ("stage2", ("--seed", 4), r"recipe\.seed is 3; here it is 4"),
        ("stage3", ("--conversation-tokens", 129), r"recipe\.conversation_tokens is 128; here it is 129"),
        ("pseudo_label", ("--comparisons-per-shard", 7), r"recipe\.comparisons_per_shard"),
        ("pseudo_label", ("--orders", "given"), r"recipe\.orders"),
        ("pseudo_label", ("--comparisons", "other.parquet"), r"inputs\.comparisons"),
        ("evaluate", ("--weights", 2, 1), r"recipe\.weights.*--name"),
        ("evaluate", ("--comparisons", "other.parquet", "--fold", 0), r"inputs\.comparisons"),
    ],
)
def test_another_recipe_is_refused_and_the_field_named(story, tmp_path, name, change, named):
    (tmp_path / "instruction.txt").write_text("Which is better?")
    write_comparisons(make_comparisons(20, seed=9, source="other"), tmp_path / "other.parquet")
    change = [tmp_path / word if (tmp_path / str(word)).is_file() else word for word in change]
    before = snapshot(story.artifacts)
    words = list(story.commands[name])
    if change[0] in words:  # tyro wants a flag once
        at = words.index(change[0])
        end = next((i for i in range(at + 1, len(words)) if str(words[i]).startswith("--")), len(words))
        del words[at:end]
    found = call(*words, *change, check=False)
    assert found.status == 1 and re.search(named, found.stderr) and "Nothing was changed" in found.stderr
    assert snapshot(story.artifacts) == before


@pytest.mark.parametrize("name", ["stage1", "pseudo_label", "evaluate"])
def test_models_run_as_the_command_line_says(story, tmp_path, monkeypatch, name):
    load = Mock(side_effect=ValueError("seen enough"))
    monkeypatch.setattr("common.models.load_model", load)
    monkeypatch.setattr("common.trained.load_model", load)
    output = ("--name", tmp_path.name) if name == "evaluate" else ("--output", tmp_path / "output")
    for flags, expected in (
        ((), {"ops": "auto", "compile": "auto"}),
        (("--ops", "attention=torch", "--compile", "on"), {"ops": "attention=torch", "compile": "on"}),
    ):
        assert "seen enough" in call(*story.commands[name], *output, *flags, check=False).stderr
        assert load.call_args.kwargs | expected == load.call_args.kwargs


OUTPUTS = {
    "stage1": "stage1/tiny-gemma",
    "pseudo_label": "pseudo/tiny-llama",
    "stage2": "stage2/tiny-llama",
    "stage3": "stage3/tiny-llama",
    "stage3 --final": "stage3/tiny-llama-final",
    "evaluate": "evaluate/evaluation",
}


@pytest.mark.parametrize("name", OUTPUTS)
def test_a_second_start_on_one_output_is_refused(story, name):
    before = snapshot(story.artifacts)
    with held_elsewhere(story.artifacts / OUTPUTS[name]) as file:
        found = call(*story.commands[name], check=False)
    Path(file.name).unlink()
    assert found.status == 1 and re.search(f"{OUTPUTS[name]} {HELD}", found.stderr)
    assert snapshot(story.artifacts) == before


@pytest.mark.parametrize(
    ("name", "taken"),
    [
        ("pseudo_label", "stage1/tiny-gemma"),
        ("stage3", "stage2/tiny-llama"),
        ("evaluate", "stage3/tiny-gemma"),
        ("stage3", "stage3/tiny-llama"),
    ],
)
def test_a_checkpoint_that_changed_after_its_run_is_not_taken(story, name, taken):
    path = story.artifacts / taken / "sequences.json"
    text = path.read_bytes()
    try:
        path.write_bytes(text[:-1] + b" ")
        found = call(*story.commands[name], check=False)
    finally:
        path.write_bytes(text)
    assert found.status == 1 and re.search("sequences.json: sha256 .*, but .* when the run", found.stderr)


def test_an_error_of_the_first_process_is_everybodys(monkeypatch):
    """What is sent, the others get; the first process alone looks."""
    sent = []
    monkeypatch.setattr(
        launching, "broadcast_object_list", lambda objects: sent.append(pickle.dumps(objects))
    )
    with pytest.raises(ValueError, match="refused"):
        launching.on_first(SimpleNamespace(is_main_process=True), lambda: int("refused"))
    assert launching.on_first(SimpleNamespace(is_main_process=True), lambda: "a run") == "a run"

    def receive(objects):
        objects[:] = pickle.loads(sent.pop(0))  # noqa: S301 (our own)

    monkeypatch.setattr(launching, "broadcast_object_list", receive)
    with pytest.raises(ValueError, match="refused"):
        launching.on_first(SimpleNamespace(is_main_process=False), lambda: 1 / 0)
    assert launching.on_first(SimpleNamespace(is_main_process=False), lambda: 1 / 0) == "a run"


# Soft labels


def read_labels(story):
    return pl.read_parquet(story.artifacts / "pseudo/ensemble/labels.parquet")


def test_labels_are_the_mean_of_teachers_and_orders(story):
    labels = read_labels(story)
    groups = [f"tiny-{family}/{order}" for family in FAMILIES for order in ORDERS]
    assert labels.columns == ["source", "id", *(f"{g}/{c}" for g in groups for c in LABELS), *LABELS]
    mean = np.mean([group(labels, name) for name in groups], axis=0)
    np.testing.assert_allclose(labels.select(LABELS).to_numpy(), mean, atol=1e-6)
    np.testing.assert_allclose(labels.select(LABELS).to_numpy().sum(1), 1, atol=1e-6)
    assert np.abs(group(labels, groups[0]) - group(labels, groups[2])).max() > 1e-3
    keys = labels.select("source", "id")
    assert keys.equals(pl.read_parquet(story.pool).select("source", "id").sort("source", "id"))


def test_swap_averaging_mirrors_back(story, tmp_path):
    """What the model says of B before A equals what it says of the swapped comparison, mirrored."""
    write_comparisons(swap(pl.read_parquet(story.pool)), tmp_path / "swapped.parquet")
    words = ("--comparisons", tmp_path / "swapped.parquet", "--output", tmp_path / "pseudo")
    call("pseudo_label", *story.where, *words, "--orders", "given")
    labels, mirrored = read_labels(story), pl.read_parquet(tmp_path / "pseudo/ensemble/labels.parquet")
    for family in FAMILIES:
        swapped = group(labels, f"tiny-{family}/swapped")
        given = group(mirrored, f"tiny-{family}/given")
        np.testing.assert_allclose(swapped, given[:, [1, 0, 2]], atol=1e-6)
        assert np.abs(swapped - given).max() > 1e-3  # unmirrored, the same check fails
        assert np.abs(swapped - group(labels, f"tiny-{family}/given")).max() > 1e-4


def test_killed_half_way_and_started_again_gives_the_same_frame(story, teachers):
    words = [*teachers.commands["pseudo_label"], "--comparisons-per-shard", 1]
    process = subprocess.Popen(
        [sys.executable, "stages/pseudo_label.py", *map(str, words[1:])],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.DEVNULL,
    )
    shards = teachers.artifacts / "pseudo/tiny-gemma/shards"
    deadline = time.monotonic() + 120
    while len(list(shards.glob("0*.parquet"))) < 5 and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = {path: path.stat().st_mtime_ns for path in shards.glob("0*.parquet")}
    assert 5 <= len(done) < 60, f"{len(done)} of 60 shards when the process was killed"
    assert not (shards.parent / "probabilities.parquet").exists()
    # what a process dies in the middle of
    (shards / f".{len(done):05d}.parquet.abc.tmp").write_bytes(b"PAR1 half")

    call(*words)
    assert {path: path.stat().st_mtime_ns for path in done} == done, "whole shards were made again"
    assert_close_labels(read_labels(teachers), read_labels(story))
    again = Story(story.world, teachers.artifacts.parent / "again")
    shutil.copytree(story.artifacts / "stage1", again.artifacts / "stage1")
    call(*again.commands["pseudo_label"], "--comparisons-per-shard", 1)
    assert read_labels(teachers).equals(read_labels(again)), "bit for bit what no kill gives"


def assert_close_labels(found, expected):
    """Shards of another size pack other neighbours, which rounds otherwise; nothing else may differ."""
    assert found.select("source", "id").equals(expected.select("source", "id"))
    columns = found.columns[2:]
    np.testing.assert_allclose(found.select(columns), expected.select(columns), atol=1e-6)


def test_two_processes_label_and_score_the_same(story, teachers, tmp_path):
    shutil.copytree(story.artifacts / "stage3", teachers.artifacts / "stage3")
    for script, *flags in (teachers.commands["pseudo_label"], teachers.commands["evaluate"]):
        launch("2", f"stages/{script}.py", *flags)
    assert_close_labels(read_labels(teachers), read_labels(story))
    name = "evaluate/evaluation/probabilities.parquet"
    assert_close_labels(*(pl.read_parquet(one.artifacts / name) for one in (teachers, story)))


def test_labelling_shows_one_bar_on_a_terminal(teachers, monkeypatch):
    screen = Console(file=io.StringIO(), force_terminal=True, width=160)
    monkeypatch.setattr("common.console.console", screen)
    call(*teachers.commands["pseudo_label"], "--comparisons-per-shard", 20)
    assert "labelling with tiny-llama" in screen.file.getvalue() and "3/3" in screen.file.getvalue()


def test_row_order_of_the_pool_changes_nothing(story, teachers, tmp_path):
    pool = pl.read_parquet(story.pool)
    shuffled = pool.sample(fraction=1, shuffle=True, seed=1)
    assert not shuffled["id"].equals(pool["id"])
    write_comparisons(shuffled, tmp_path / "shuffled.parquet")
    call("pseudo_label", *teachers.where, "--comparisons", tmp_path / "shuffled.parquet")
    assert read_labels(teachers).equals(read_labels(story))
    assert "up to date" in call(*teachers.commands["pseudo_label"]).stdout


def test_one_teacher_a_run_then_a_merge_is_the_same(story, teachers):
    for family in reversed(FAMILIES):
        teacher = teachers.artifacts / f"stage1/tiny-{family}"
        call(*teachers.commands["pseudo_label"], "--teachers", teacher, "--no-merge")
        assert not (teachers.artifacts / "pseudo/ensemble").exists()
    found = call(*teachers.commands["pseudo_label"])
    assert found.stdout.count("up to date") == 2
    assert read_labels(teachers).equals(read_labels(story))


def test_merging_joins_by_key_not_by_position(story, teachers):
    shutil.copytree(story.artifacts / "pseudo", teachers.artifacts / "pseudo")
    shutil.rmtree(teachers.artifacts / "pseudo/ensemble")
    path = teachers.artifacts / "pseudo/tiny-llama/probabilities.parquet"
    frame = pl.read_parquet(path)
    permuted = frame.sample(fraction=1, shuffle=True, seed=2)
    assert not permuted.equals(frame)
    permuted.write_parquet(path)
    forget_results(path.parent)
    call(*teachers.commands["pseudo_label"])
    assert read_labels(teachers).equals(read_labels(story))


def test_merging_leaves_out_what_not_every_teacher_labelled(story, teachers):
    shutil.copytree(story.artifacts / "pseudo", teachers.artifacts / "pseudo")
    shutil.rmtree(teachers.artifacts / "pseudo/ensemble")
    path = teachers.artifacts / "pseudo/tiny-llama/probabilities.parquet"
    pl.read_parquet(path)[3:].write_parquet(path)
    forget_results(path.parent)
    assert (
        "3 comparisons are not labelled by every teacher" in call(*teachers.commands["pseudo_label"]).stdout
    )
    assert read_labels(teachers).equals(read_labels(story)[3:])


def test_rows_that_a_teacher_was_trained_on_are_refused_or_dropped(story, teachers, tmp_path):
    votes, pool = pl.read_parquet(story.votes), pl.read_parquet(story.pool)
    taught = votes.filter(pl.col("fold") == 2)[:3].with_columns(source=pl.lit("elsewhere"))
    unknown = votes.filter(pl.col("fold") == 0)[:2]  # held out by both teachers
    mixed = pl.concat([pool[:5], swap(taught), unknown])
    write_comparisons(mixed, tmp_path / "mixed.parquet")
    words = ("pseudo_label", *teachers.where, "--comparisons", tmp_path / "mixed.parquet")
    found = call(*words, check=False)
    assert found.status == 1 and "was trained on 3 of these 10 comparisons" in found.stderr
    assert "elsewhere/" in found.stderr and "--seen drop" in found.stderr
    assert not (teachers.artifacts / "pseudo").exists()
    assert call(*words, "--seen", "drop").stdout.count("3 comparisons that") == 2
    assert set(read_labels(teachers)["id"]) == {*pool["id"][:5], *unknown["id"]}


def test_stage2_joins_labels_by_key_and_ignores_votes(story, tmp_path):
    """Permuted labels, and a pool that carries votes of its own: the same student, bit for bit."""
    read_labels(story).sample(fraction=1, shuffle=True, seed=3).write_parquet(tmp_path / "labels.parquet")
    votes = [pl.lit(value, pl.Float32).alias(name) for name, value in zip(LABELS, (1, 0, 0), strict=True)]
    write_comparisons(pl.read_parquet(story.pool).with_columns(votes).reverse(), tmp_path / "pool.parquet")
    other = Story(story.world, story.artifacts)
    other.pool = tmp_path / "pool.parquet"
    words = ("--labels", tmp_path / "labels.parquet", "--output", tmp_path / "student")
    call("stage2", "tiny-llama", *other.student("llama"), *words)
    expected = story.artifacts / "stage2/tiny-llama/model.safetensors"
    assert file_hash(tmp_path / "student/model.safetensors") == file_hash(expected)

    labels = read_labels(story)
    wrong = labels.with_columns(labels.select("source", "id").reverse())
    wrong.write_parquet(tmp_path / "wrong.parquet")
    words = ("--labels", tmp_path / "wrong.parquet", "--output", tmp_path / "wrong")
    call("stage2", "tiny-llama", *other.student("llama"), *words)
    assert file_hash(tmp_path / "wrong/model.safetensors") != file_hash(expected)


def test_stage2_counts_the_pool_that_is_not_labelled(story, tmp_path):
    read_labels(story)[10:].write_parquet(tmp_path / "labels.parquet")
    words = ("--labels", tmp_path / "labels.parquet", "--output", tmp_path / "student", "--dry-run")
    found = call("stage2", "tiny-llama", *story.student("llama"), *words)
    assert "10 of 60 comparisons have no soft label" in found.stdout
    assert tables(found.stdout)["comparisons"] == ["50"]


def test_what_the_held_out_fold_shows_is_not_taught(story, tmp_path):
    """A copy of a held-out comparison under another name, swapped, leaves the training data, counted."""
    votes = pl.read_parquet(story.votes)
    copies = swap(votes.filter(pl.col("fold") == 0)[:4]).with_columns(
        source=pl.lit("copy"), fold=pl.lit(3, pl.Int8)
    )
    write_comparisons(pl.concat([votes, copies]), tmp_path / "votes.parquet")
    other = Story(story.world, tmp_path / "artifacts")
    other.votes = tmp_path / "votes.parquet"
    found = call("stage1", "tiny-llama", *other.teacher("llama"), "--dry-run").stdout
    assert "4 training rows have the content of a held-out row" in found
    assert tables(found)["comparisons"] == ["120"]


# Scores


def evaluate(story, tmp_path, *words, check=True):
    """Runs an evaluation of its own; returns what was printed, the probabilities and the scores."""
    name = tmp_path.name
    found = call("evaluate", *story.where, "--name", name, *words, check=check)
    folder = story.artifacts / "evaluate" / name
    if found.status:
        assert not (folder / "run.json").exists()
        return found, None, None
    return found, pl.read_parquet(folder / "probabilities.parquet"), read_json(folder / "scores.json")


def held_out(story):
    return pl.read_parquet(story.votes).filter(pl.col("fold") == 0).sort("source", "id")


def test_printed_scores_are_what_the_saved_probabilities_give(story):
    """Recomputed here from the definition, for every model and order, the ensemble and its slices."""
    output = call(*story.commands["evaluate"]).stdout
    printed = tables(output)
    assert "evaluation, 30 comparisons; prior" in output
    frame = held_out(story)
    labels, turns = labels_array(frame), frame["prompt"].list.len().to_numpy()
    saved = pl.read_parquet(story.artifacts / "evaluate/evaluation/probabilities.parquet")
    assert saved["id"].equals(frame["id"])
    names = [f"tiny-{family}/{order}" for family in FAMILIES for order in (*ORDERS, "mean")]
    for name in (*names, "ensemble"):
        probabilities = group(saved, name).astype(np.float64)
        losses = -np.log((probabilities * labels).sum(1))
        accuracy = (probabilities.argmax(1) == labels.argmax(1)).mean()
        loss, interval, hits, _, swap_cell = printed[name]
        assert loss == f"{losses.mean():.4f}" and hits == f"{accuracy:.3f}"
        low, high = (float(part) for part in interval.split(" to "))
        assert low < losses.mean() < high
        assert (swap_cell != "-") == name.endswith("/mean")
    for family in FAMILIES:
        given, swapped = (group(saved, f"tiny-{family}/{order}").astype(np.float64) for order in ORDERS)
        np.testing.assert_allclose(group(saved, f"tiny-{family}/mean"), (given + swapped) / 2, atol=1e-6)
        assert printed[f"tiny-{family}/mean"][4] == f"{np.abs(given - swapped).mean():.3f}"
    single = losses[turns == 1]
    assert f"ensemble by turns: 1 turn {single.mean():.4f} ({len(single)})" in output
    quarters = re.findall(r"(?:shortest|longest) quarter of answers [\d.]+ \((\d+)\)", output)
    assert sum(map(int, quarters)) == pytest.approx(15, abs=2)


def test_a_stage_and_evaluate_agree_on_the_held_out_fold(story):
    """The score in preference.json is that of the given order; the probabilities are those of held_out."""
    saved = pl.read_parquet(story.artifacts / "evaluate/evaluation/probabilities.parquet")
    scores = read_json(story.artifacts / "evaluate/evaluation/scores.json")
    for family in FAMILIES:
        folder = story.artifacts / f"stage3/tiny-{family}"
        metrics = read_json(folder / "preference.json")["metrics"]
        assert metrics["log_loss"] == pytest.approx(scores[f"tiny-{family}/given"]["log_loss"], abs=1e-6)
        stage = pl.read_parquet(folder / "held_out.parquet")
        assert stage["id"].equals(saved["id"])
        np.testing.assert_allclose(
            stage.select(LABELS).to_numpy(), group(saved, f"tiny-{family}/given"), atol=1e-6
        )


def test_weights_and_orders(story, tmp_path):
    words = ("--comparisons", story.votes, "--fold", 0, "--weights", 2, 1, "--orders", "swapped")
    _, saved, scores = evaluate(story, tmp_path, *words)
    gemma, llama = (group(saved, f"tiny-{family}/swapped").astype(np.float64) for family in FAMILIES)
    np.testing.assert_allclose(group(saved, "ensemble"), (2 * gemma + llama) / 3, atol=1e-6)
    assert not any("/given/" in name for name in saved.columns)
    reference = pl.read_parquet(story.artifacts / "evaluate/evaluation/probabilities.parquet")
    np.testing.assert_allclose(gemma, group(reference, "tiny-gemma/swapped"), atol=1e-6)
    assert "swap_consistency" not in scores["tiny-gemma/mean"]


def test_models_of_one_name_are_told_apart(story, tmp_path):
    checkpoints = [story.artifacts / f"{stage}/tiny-llama" for stage in ("stage1", "stage3")]
    words = ("--checkpoints", *checkpoints, "--comparisons", story.votes, "--fold", 0)
    _, found, _ = evaluate(story, tmp_path, *words)
    assert (
        np.abs(group(found, "stage1-tiny-llama/mean") - group(found, "stage3-tiny-llama/mean")).max() > 1e-4
    )
    words = ("--checkpoints", checkpoints[0], checkpoints[0], "--comparisons", story.votes, "--fold", 0)
    found, _, _ = evaluate(story, tmp_path / "twice", *words, check=False)
    assert found.status == 1 and "called the same" in found.stderr


@pytest.mark.parametrize(
    ("folder", "fold"), [("stage3/tiny-llama-final", 0), ("stage3/tiny-llama", 1), ("stage1/tiny-gemma", 4)]
)
def test_seen_votes_are_not_scored(story, tmp_path, folder, fold):
    words = ("--checkpoints", story.artifacts / folder, "--comparisons", story.votes, "--fold", fold)
    found, _, _ = evaluate(story, tmp_path, *words, check=False)
    assert found.status == 1 and "was trained on 30 of these 30 comparisons" in found.stderr
    found, _, _ = evaluate(story, tmp_path, *words, "--seen", "drop", check=False)
    assert found.status == 1 and "nothing is left to score" in found.stderr


def test_seen_votes_can_be_dropped(story, tmp_path):
    words = ("--checkpoints", story.artifacts / "stage3/tiny-llama", "--comparisons", story.votes)
    found, saved, scores = evaluate(story, tmp_path, *words, "--seen", "drop")
    assert "120 comparisons that" in found.stdout
    assert len(saved) == 30 and scores["ensemble"]["num_comparisons"] == 30


def test_the_submission_keeps_the_order_of_the_test_file(story, tmp_path):
    test = make_comparisons(23, seed=5, source="test", labelled=False).sample(
        fraction=1, shuffle=True, seed=5
    )
    assert not test["id"].equals(test["id"].sort())
    write_comparisons(test, tmp_path / "test.parquet")
    finals = [story.artifacts / f"stage3/tiny-{family}-final" for family in FAMILIES]
    words = ("--checkpoints", *finals, "--comparisons", tmp_path / "test.parquet")
    path = tmp_path / "submission.csv"
    found, saved, scores = evaluate(story, tmp_path, *words, "--submission", path)
    assert "unlabelled: no score" in found.stdout and scores == {}
    assert path.read_text().splitlines()[0] == "id,winner_model_a,winner_model_b,winner_tie"
    submission = pl.read_csv(path, schema_overrides={"id": pl.String})
    assert submission["id"].equals(test["id"])
    values = submission.select(LABELS).to_numpy()
    np.testing.assert_allclose(values.sum(1), 1, atol=1e-12)
    by_key = test.select("id").join(saved, on="id", how="left", maintain_order="left")
    np.testing.assert_allclose(values, group(by_key, "ensemble"), atol=1e-6)

    path.unlink()  # an evaluation that is up to date still writes it
    assert "up to date" in evaluate(story, tmp_path, *words, "--submission", path)[0].stdout
    assert pl.read_csv(path, schema_overrides={"id": pl.String}).equals(submission)


# Text meets model only as it did in training


@pytest.mark.parametrize("what", ["vocabulary", "template"])
def test_a_changed_tokenizer_is_refused_wherever_text_meets_model(story, tmp_path, what):
    artifacts = tmp_path / "artifacts"
    for folder in ("stage1/tiny-gemma", "stage2/tiny-gemma"):
        shutil.copytree(story.artifacts / folder, artifacts / folder)
        if what == "template":
            path = artifacts / folder / "chat_template.jinja"
            path.write_text(path.read_text().replace("<start_of_turn>model", "<start_of_turn>assistant"))
        else:
            path = artifacts / folder / "tokenizer.json"
            content = json.loads(path.read_text())
            vocabulary = content["model"]["vocab"]
            vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
            path.write_text(json.dumps(content))
        forget_results(artifacts / folder)
    where = ("--artifacts", artifacts)
    votes = ("--votes", story.votes, *RECIPE)
    refused = {
        "pseudo_label": call("pseudo_label", *where, "--comparisons", story.pool, check=False),
        "evaluate": call(
            *("evaluate", *where, "--comparisons", story.votes, "--fold", 0),
            *("--checkpoints", artifacts / "stage1/tiny-gemma"),
            check=False,
        ),
        "stage3": call("stage3", "tiny-gemma", *where, *votes, check=False),
    }
    for name, found in refused.items():
        assert found.status == 1 and "was trained with" in found.stderr, name
        assert "tokenizer" in found.stderr and len(found.stderr.splitlines()) == 1, name
    assert not {"pseudo", "evaluate", "stage3"} & {path.name for path in artifacts.iterdir()}


# A bare command, a dry run


def test_every_script_finds_its_inputs_by_itself(story, tmp_path):
    """Where everything lies under its usual name, no path is named; evaluation takes the held-out fold."""
    artifacts = tmp_path / "artifacts"
    for stage in ("stage1", "stage2", "stage3"):
        shutil.copytree(story.artifacts / stage, artifacts / stage)
    votes, pool = pl.read_parquet(story.votes), pl.read_parquet(story.pool)
    for name, part in (
        ("arena55k", votes[:100]),
        ("arena33k", votes[100:]),
        ("lmsys1m_pairs", pool[:30]),
        ("preference_sets", pool[30:]),
    ):
        write_comparisons(part, artifacts / f"data/{name}.parquet")
    where = ("--artifacts", artifacts)
    call("pseudo_label", *where)
    assert read_labels(Story(story.world, artifacts)).equals(read_labels(story))
    call("evaluate", *where)
    scores = read_json(artifacts / "evaluate/evaluation/scores.json")
    assert scores["ensemble"]["num_comparisons"] == votes[:100].filter(pl.col("fold") == 0).height
    for stage, model in (("stage1", "armorm8b"), ("stage2", "armorm8b"), ("stage3", "tiny-llama")):
        shutil.rmtree(artifacts / "stage3", ignore_errors=True)
        checkpoint = () if stage == "stage3" else ("--checkpoint", story.world / "llama")
        rows = tables(call(stage, model, *where, *checkpoint, "--dry-run").stdout)
        assert rows["comparisons"] == ["60" if stage == "stage2" else "120"]


def test_dry_run_prints_what_a_run_would_be_and_trains_nothing(story, tmp_path):
    where = ("--artifacts", tmp_path)
    found = call("stage1", "tiny-gemma", *story.teacher("gemma"), *where, "--dry-run")
    votes = pl.read_parquet(story.votes).filter(pl.col("fold") != 0)
    prompter = Prompter(AutoTokenizer.from_pretrained(story.world / "gemma"), conversation_tokens=128)
    rendered = [
        prompter.render(comparison, format=format, swapped=swapped)
        for comparison in prompter.tokenise(votes.select("prompt", "response_a", "response_b").rows())
        for format in ("PAB", "PAPB")
        for swapped in (False, True)
    ]
    lengths = [len(one.input_ids) for one in rendered]
    rows = tables(found.stdout)
    assert rows["comparisons"] == ["120"] and rows["sequences (formats x orders)"] == ["480"]
    assert rows["optimiser steps"] == ["10"] and rows["processes"] == ["1"]
    assert rows["tokens an epoch"] == [f"{sum(lengths):,}"]
    assert rows["tokens a sequence: mean, longest"] == [f"{np.mean(lengths):,.0f}, {max(lengths)}"]
    num_truncated = sum(one.truncated for one in rendered)
    assert rows["truncated sequences"] == [str(num_truncated)] and num_truncated > 0
    assert rows["conversation_tokens"] == ["128", "256"] and rows["formats"][0] == "('PAB', 'PAPB')"
    assert rows["eps"][1] == "", "what equals the table is not marked"
    assert {path.name for path in tmp_path.iterdir()} == {"tokens"}


def test_dry_run_of_a_real_recipe_needs_no_gpu(story, tmp_path):
    words = ("--checkpoint", story.world / "gemma", "--votes", story.votes, "--artifacts", tmp_path)
    rows = tables(call("stage1", "gemma9b", *words, "--comparisons-per-step", 60, "--dry-run").stdout)
    assert rows["comparisons_per_step"] == ["60", "80"] and rows["optimiser steps"] == ["2"]
    assert rows["sliding_window"] == ["checkpoint", ""]
    assert {path.name for path in tmp_path.iterdir()} == {"tokens"}
