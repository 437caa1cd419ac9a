"""What a user can get wrong in a stage or its launch: one clear message, a status, nothing half-written."""

import contextlib
import json
import os
import re
import resource
import shutil
import subprocess
import sys
from unittest import mock

import polars as pl
import pytest
import torch
from calling import call
from helpers import ROOT, make_comparisons
from launching import free_port
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from common.data.table import LABELS, write_comparisons
from common.files import file_hash, read_json
from common.models import threads
from common.runs import Run
from common.train.fit import fit, plan_steps
from common.train.recipe import Recipe

SMALL = ("--conversation-tokens", 128, "--comparisons-per-step", 12, "--lr", "3e-3", "--tracker", "none")
needs_no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without a GPU")


@pytest.fixture(scope="module")
def teacher(world, tmp_path_factory):
    """A finished stage 1 run."""
    artifacts = tmp_path_factory.mktemp("teacher")
    call(*stage1(world, artifacts))
    return artifacts / "stage1/tiny-gemma"


def stage1(world, artifacts, *more, checkpoint=None, votes=None):
    where = ("--artifacts", artifacts, "--checkpoint", checkpoint or world / "gemma")
    return ("stage1", "tiny-gemma", *where, "--votes", votes or world / "votes.parquet", *SMALL, *more)


def stage2(world, artifacts, labels):
    data = ("--votes", world / "votes.parquet", "--comparisons", world / "pool.parquet", "--labels", labels)
    return ("stage2", "tiny-gemma", "--artifacts", artifacts, "--checkpoint", world / "gemma", *data, *SMALL)


def evaluate(world, artifacts, *more):
    data = ("--comparisons", world / "votes.parquet", "--fold", 0)
    return ("evaluate", "--artifacts", artifacts, *data, *more)


def assert_refused(words, *expected, artifacts=None, num_lines=1):
    """The script ends with status 1 and one message that holds every expected pattern."""
    found = call(*words, check=False)
    assert found.status == 1, found.stdout
    assert found.stderr.startswith("error: ") and "Traceback" not in found.stderr + found.stdout
    assert len(found.stderr.splitlines()) <= num_lines, found.stderr
    for pattern in expected:
        assert re.search(pattern, found.stderr), f"{pattern!r} is not in {found.stderr!r}"
    if artifacts is not None:
        assert_nothing_looks_complete(artifacts)
    return found.stderr


def assert_nothing_looks_complete(artifacts):
    """No checkpoint, no finished run, no file that a dead process would leave."""
    for path in artifacts.rglob("*"):
        assert path.name not in ("preference.json", "labels.parquet", "scores.json"), path
        assert ".tmp" not in path.name, path
        if path.name == "run.json":
            assert read_json(path)["status"] == "started"


def edited(source, target, change):
    """A copy of a checkpoint whose tensors `change` was applied to."""
    shutil.copytree(source, target)
    tensors = load_file(target / "model.safetensors")
    change(tensors)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


# Checkpoints


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda t: t.pop("model.norm.weight"), r"tensor model\.norm\.weight of shape \[32\] is missing"),
        (lambda t: t.update(odd=t["model.norm.weight"].clone()), r"unexpected tensor odd of shape \[32\]"),
    ],
)
def test_missing_and_unexpected_tensors(world, teacher, tmp_path, change, expected):
    name, artifacts = r"model\.safetensors", tmp_path / "artifacts"
    backbone = edited(world / "gemma", tmp_path / "backbone", change)
    words = stage1(world, artifacts, checkpoint=backbone)
    assert_refused(words, name, expected, "take another checkpoint", artifacts=artifacts)
    assert not (artifacts / "stage1").exists(), "a run that never began must not stand in a better one's way"
    broken = edited(teacher, tmp_path / "broken", change)
    words = ("pseudo_label", "--artifacts", artifacts, "--comparisons", world / "pool.parquet")
    assert_refused((*words, "--teachers", broken), name, expected, artifacts=artifacts)
    words = evaluate(world, artifacts, "--checkpoints", broken)
    assert_refused(words, name, expected, artifacts=artifacts)


def test_a_wrong_template_hash(world, teacher, tmp_path):
    other, artifacts = shutil.copytree(teacher, tmp_path / "other"), tmp_path / "artifacts"
    preference = read_json(other / "preference.json")
    preference["prompt"]["template_hash"] = preference["prompt"]["prompt_hash"] = "f" * 64
    (other / "preference.json").write_text(json.dumps(preference))
    hashes = ("other was trained with", "f" * 12, "tokenizer")
    words = evaluate(world, artifacts, "--checkpoints", other)
    assert_refused(words, *hashes, artifacts=artifacts)
    words = ("pseudo_label", "--artifacts", artifacts, "--comparisons", world / "pool.parquet")
    assert_refused((*words, "--teachers", other), *hashes, artifacts=artifacts)
    words = ("stage3", "tiny-gemma", "--artifacts", artifacts, "--votes", world / "votes.parquet", *SMALL)
    assert_refused((*words, "--checkpoint", other), *hashes, artifacts=artifacts)


@pytest.mark.parametrize(
    ("spoil", "expected"),
    [
        (lambda f: (f / "tokenizer.json").unlink(), "has no tokenizer.json"),
        (lambda f: (f / "tokenizer.json").write_text('{"model": '), "tokenizer in .* cannot be read"),
        (lambda f: (f / "tokenizer.json").write_text("{}"), "tokenizer in .* cannot be read"),
        (lambda f: (f / "chat_template.jinja").unlink(), "has no chat template"),
        (lambda f: (f / "config.json").write_text("{"), r"config\.json"),
        (lambda f: (f / "model.safetensors").write_bytes(b"x" * 100), r"model\.safetensors cannot be read"),
    ],
)
def test_broken_checkpoint_files(world, tmp_path, spoil, expected):
    folder = shutil.copytree(world / "gemma", tmp_path / "gemma")
    spoil(folder)
    artifacts = tmp_path / "artifacts"
    assert_refused(stage1(world, artifacts, checkpoint=folder), str(folder), expected, artifacts=artifacts)


def test_checkpoints_that_are_none_of_ours(world, teacher, tmp_path):
    label = ("pseudo_label", "--artifacts", tmp_path, "--comparisons", world / "pool.parquet")
    assert_refused((*label, "--teachers", tmp_path / "nowhere"), "nowhere is not a folder")
    assert_refused((*label, "--teachers", world / "gemma"), r"no trained_on\.parquet.*Finish its stage")
    assert_refused(label, "stage1 holds no finished run; train one first")
    twin = shutil.copytree(teacher, tmp_path / "twin/tiny-gemma")
    assert_refused((*label, "--teachers", teacher, twin), "two have the same folder name")
    words = ("evaluate", "--artifacts", tmp_path, "--comparisons", world / "pool.parquet")
    assert_refused((*words, "--checkpoints", world / "gemma"), r"no preference\.json: it is a backbone")
    unlearnt = shutil.copytree(teacher, tmp_path / "unlearnt")
    (unlearnt / "trained_on.parquet").write_bytes(b"PAR1 torn")
    assert_refused((*label, "--teachers", unlearnt), r"unlearnt/trained_on\.parquet cannot be read")
    assert_refused(
        stage1(world, tmp_path, checkpoint=tmp_path / "gone"), "no checkpoint .*gone'.*run that stage"
    )
    words = ("stage3", "tiny-gemma", "--artifacts", tmp_path, "--votes", world / "votes.parquet", *SMALL)
    assert_refused(words, "no checkpoint .*stage2/tiny-gemma'.*run that stage first")


# Command lines


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("stage1", "gemma7b"), ("gemma9b", "gemma27b", "armorm8b", "tiny-gemma", "tiny-llama")),
        (("stage3", "gemma27b"), ("gemma9b", "armorm8b")),  # FACTS: 27B ends with the pseudo labels
        (("stage1", "tiny-gemma", "--learning-rate", "1"), ("--learning-rate", "--help")),
        (("stage1", "tiny-gemma", "--lr", "fast"), ("--lr", "'fast'")),
        (("stage1", "tiny-gemma", "--lr", "-1"), ("--lr is -1.0", "above 0")),
        (("stage1", "tiny-gemma", "--optimizer", "sgd"), ("sgd", "stable_adamw")),
        (("stage1", "tiny-gemma", "--accumulation", "stochastic"), ("--dtype bf16", "--accumulation fp32")),
        (("stage1", "tiny-gemma", "--keep-states", "0"), ("--keep-states is 0", "at least 1")),
        (("pseudo_label", "--comparisons-per-shard", "0"), ("--comparisons-per-shard is 0", "at least 1")),
        (("pseudo_label", "--max-tokens-per-micro-batch", "0"), ("micro-batch is 0", "at least 1")),
        (("evaluate", "--max-tokens-per-micro-batch", "-5"), ("micro-batch is -5", "at least 1")),
        (("evaluate", "--ops", "te"), ("no op has a backend 'te' (--ops); there are auto, flash, flex",)),
        (
            ("stage2", "tiny-gemma", "--ops", "attention=te"),
            ("no backend 'te' (--ops)", "flex"),
        ),
        (("stage3", "tiny-gemma", "--ops", "te=torch"), ("--ops te=torch names the op 'te'", "rotary")),
        (("stage1", "tiny-gemma", "--recompute", "-1"), ("--recompute is -1", "at least 0")),
        (("stage1", "tiny-gemma", "--recompute", "some"), ("--recompute", "{auto,all,none}|INT")),
        (("pseudo_label", "--orders", "given", "given"), ("--orders is", "one or both")),
        (("evaluate", "--weights", "1", "-1"), ("--weights is (1.0, -1.0)", ">= 0")),
    ],
)
def test_unknown_names_flags_and_values(words, expected):
    found = call(*words, check=False)
    text = " ".join((found.stderr + found.stdout).split())
    assert found.status == (1 if text.startswith("error: ") else 2) and "Traceback" not in text
    assert all(part in text for part in expected), text


@needs_no_gpu
def test_a_gpu_recipe_on_a_cpu(world, tmp_path):
    data = ("--checkpoint", world / "gemma", "--votes", world / "votes.parquet", "--artifacts", tmp_path)
    words = ("stage1", "gemma9b", *data)
    assert_refused(words, "gemma9b would train on a CPU", "just stage1 gemma9b", "--allow-cpu")
    assert list(tmp_path.iterdir()) == [], "nothing is tokenised for a run that cannot be"
    small = ("--conversation-tokens", 128, "--dtype", "fp32", "--tracker", "none")
    call(*words, *small, "--allow-cpu")
    assert (tmp_path / "stage1/gemma9b/preference.json").is_file()


def test_a_tracker_that_is_not_installed(world, tmp_path):
    words = [word for word in stage1(world, tmp_path) if word not in ("--tracker", "none")]
    assert_refused((*words, "--tracker", "wandb"), "--tracker wandb is not installed", "tensorboard")
    assert list(tmp_path.iterdir()) == []


def test_a_budget_below_the_fixed_part(world, tmp_path):
    words = list(stage1(world, tmp_path))
    words[words.index("--conversation-tokens") + 1] = 20
    assert_refused(words, "conversation_tokens is 20", r"need \d+ tokens", "raise --conversation-tokens")
    assert list(tmp_path.iterdir()) == []


def test_a_step_larger_than_the_data(world, tmp_path):
    words = list(stage1(world, tmp_path))
    words[words.index("--comparisons-per-step") + 1] = 121
    assert_refused(words, "120 comparisons do not fill one .* 121", "lower --comparisons-per-step")
    assert_nothing_looks_complete(tmp_path)


def test_instructions_that_cannot_be_read(world, tmp_path):
    for content, expected in (
        (None, "cannot be read"),
        (b"\xff\xfe\xff", "cannot be read"),
        (b" \n", "empty"),
    ):
        path = tmp_path / "instruction.txt"
        if content is not None:
            path.write_bytes(content)
        words = stage1(world, tmp_path / "artifacts", "--instruction", path)
        assert_refused(words, "--instruction", r"instruction\.txt", expected)


@needs_no_gpu
def test_a_backend_that_cannot_compute_here(world, tmp_path):
    words = stage1(world, tmp_path, "--ops", "flash")
    assert_refused(words, "'flash' needs a GPU, the model is on cpu.* nearest .* 'torch'", artifacts=tmp_path)


def test_memory_that_does_not_suffice_to_predict(world, teacher, tmp_path, monkeypatch):
    error = mock.Mock(side_effect=torch.OutOfMemoryError("CUDA out of memory."))
    monkeypatch.setattr("common.score.predict.predict", error)
    words = ("--comparisons", world / "pool.parquet", "--artifacts", tmp_path)
    told = r"out of memory in micro-batches of up to 16,384 tokens\. Lower --max-tokens-per-micro-batch"
    assert_refused(("evaluate", *words, "--checkpoints", teacher), told)
    assert_refused(("pseudo_label", *words, "--teachers", teacher), told)
    told = r"out of memory scoring what is held out; the last training state is kept\. Ways out"
    assert_refused(stage1(world, tmp_path), told)
    assert (tmp_path / "stage1/tiny-gemma/state").is_dir()


# Tables


def test_files_that_are_absent_corrupt_or_without_labels(world, tmp_path):
    artifacts = tmp_path / "artifacts"

    def refused(votes, *expected):
        assert_refused(stage1(world, artifacts, votes=votes), *expected, artifacts=artifacts)

    refused(tmp_path / "nowhere.parquet", r"nowhere\.parquet does not exist")
    corrupt = tmp_path / "corrupt.parquet"
    corrupt.write_bytes((world / "votes.parquet").read_bytes()[:3000])
    refused(corrupt, r"corrupt\.parquet \(3,000 bytes\) cannot be read", "data_prep")
    refused(world / "pool.parquet", r"--held-out-fold 0 holds no comparison; folds present: \[\]")
    half = make_comparisons(40, source="half").with_columns(
        pl.when(pl.col("id").str.ends_with("7")).then(None).otherwise(name).alias(name) for name in LABELS
    )
    write_comparisons(half, tmp_path / "half.parquet")
    refused(tmp_path / "half.parquet", "stage1 needs labels", "have none, first half/", "pseudo_label")
    assert not artifacts.exists()
    words = stage1(world, artifacts, "--held-out-fold", 7)
    assert_refused(words, r"--held-out-fold 7 holds no comparison; folds present: \[0, 1, 2, 3, 4\]")
    data = ("--artifacts", artifacts, "--checkpoint", world / "gemma", "--votes", world / "pool.parquet")
    assert_refused(("stage3", "tiny-gemma", "--final", *data, *SMALL), "60 of 60 comparisons have none")
    assert not artifacts.exists()


DEFAULTS = {
    "stage1": ("arena55k", ("tiny-gemma",)),
    "stage2": ("lmsys1m_pairs", ("tiny-gemma",)),
    "stage3": ("arena55k", ("tiny-gemma",)),
    "pseudo_label": ("lmsys1m_pairs", ("--teachers", "nowhere")),
    "evaluate": ("arena55k", ("--checkpoints", "nowhere")),
}


@pytest.mark.parametrize("script", DEFAULTS)
def test_without_tables_a_script_says_how_to_make_the_first(tmp_path, script):
    first, words = DEFAULTS[script]
    said = f"none of the default tables is there: .*{first}.parquet.*Make {first}.parquet with just prep"
    assert_refused((script, *words, "--artifacts", tmp_path), said)


@pytest.mark.parametrize(
    ("script", "there", "absent", "next_fault"),
    [
        ("stage1", "arena55k", "arena33k", "nowhere"),
        ("stage2", "preference_sets", "lmsys1m_pairs", "soft labels"),
        ("stage3", "arena55k", "arena33k", "nowhere"),
        ("pseudo_label", "preference_sets", "lmsys1m_pairs", "nowhere is not a folder"),
    ],
)
def test_an_absent_default_table_is_left_out_and_named(world, tmp_path, script, there, absent, next_fault):
    """It goes on: what it then lacks is the checkpoint."""
    (tmp_path / "data").mkdir()
    shutil.copy(world / "votes.parquet", tmp_path / f"data/{there}.parquet")
    words = DEFAULTS[script][1] + (("--checkpoint", "nowhere") if script[:5] == "stage" else ())
    found = call(script, *words, "--artifacts", tmp_path, *SMALL * (script[:5] == "stage"), check=False)
    assert found.status == 1 and next_fault in found.stderr
    assert f"left out: {tmp_path / 'data' / absent}.parquet" in found.stdout.replace("\n", "")


def test_no_bad_row_passes_and_skipped_ones_are_listed(world, tmp_path):
    votes = pl.read_parquet(world / "votes.parquet")
    bad = votes.with_columns(
        pl.when(pl.col("id") == "1-7").then(0.9).otherwise("winner_tie").alias("winner_tie")
    )
    bad = bad.with_columns(pl.col("winner_tie").cast(pl.Float32))
    bad.write_parquet(tmp_path / "bad.parquet")
    words = stage1(world, tmp_path, votes=tmp_path / "bad.parquet")
    expected = ("row 7, id 1-7: labels that do not sum to 1", "expected 1", "--skip-bad-rows")
    assert_refused(words, *expected, num_lines=3)
    assert "1 rejected rows are in" in call(*words, "--skip-bad-rows", "--dry-run").stdout
    assert pl.read_parquet(tmp_path / "rejected/bad.parquet")["id"].to_list() == ["1-7"]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda labels: labels.with_columns(id=pl.lit("x") + pl.col("id")), "labels none of the 60"),
        (lambda labels: pl.concat([labels, labels[:1]]), "labels a comparison twice"),
        (lambda labels: labels.drop("winner_tie"), "winner_tie"),
        (lambda labels: labels.with_columns(winner_tie=pl.lit("yes")), "winner_tie"),
        (lambda labels: labels.with_columns(winner_tie=pl.lit(None, pl.Float32)), "60 of 60 .* have none"),
        (
            lambda labels: labels.with_columns(winner_tie=pl.lit(0.9)),
            r"labels of 60 .* no probabilities.*0\.9",
        ),
        (lambda labels: labels.with_columns(winner_tie=pl.lit(float("nan"))), "no probabilities.*nan"),
        (lambda labels: None, r"Run stages/pseudo_label\.py"),
    ],
)
def test_soft_labels_that_do_not_fit(world, tmp_path, change, expected):
    thirds = [pl.lit(1 / 3, pl.Float32).alias(name) for name in LABELS]
    labels = change(pl.read_parquet(world / "pool.parquet").select("source", "id", *thirds))
    if labels is not None:
        labels.write_parquet(tmp_path / "labels.parquet")
    assert_refused(stage2(world, tmp_path / "artifacts", tmp_path / "labels.parquet"), expected)
    assert not (tmp_path / "artifacts").exists()


def test_evaluations_of_nothing(world, teacher, tmp_path):
    words = ("evaluate", "--artifacts", tmp_path, "--comparisons", world / "votes.parquet")
    some = ("--checkpoints", teacher)
    assert_refused(words, "stage3 holds no finished run; train one first, or name checkpoints")
    assert_refused((*words, *some, "--fold", 9), r"--fold 9 .*folds present: \[0, 1, 2, 3, 4\]")
    assert_refused((*words, *some, "--weights", 1, 2), "--weights has 2 entries for 1 models .*tiny-gemma")
    assert list(tmp_path.iterdir()) == []


# Disks


@pytest.mark.parametrize("flag", ["--artifacts", "--output"])
@pytest.mark.parametrize("below", ["", "x", "x/y"])
def test_an_unwritable_folder(world, tmp_path, flag, below):
    """A file in the folder's place: what no permission can mend, so that tests may run as root."""
    (tmp_path / "file").write_text("precious")
    words = [*stage1(world, tmp_path / "artifacts"), "--output", tmp_path / "output"]
    words[words.index(flag) + 1] = tmp_path / "file" / below
    assert_refused(words, "cannot write .*/file", "needs a folder", "choose a folder")
    assert (tmp_path / "file").read_text() == "precious"
    assert_nothing_looks_complete(tmp_path)


def test_an_unwritable_submission(world, teacher, tmp_path):
    (tmp_path / "file").write_text("precious")
    words = evaluate(world, tmp_path, "--checkpoints", teacher, "--submission", tmp_path / "file/x.csv")
    assert_refused(words, r"cannot write .*file/x\.csv")
    call(*words[:-1], tmp_path / "submission.csv")


@contextlib.contextmanager
def no_file_beyond(num_bytes):
    """Writing more than that into one file fails, as it does on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize(
    ("num_bytes", "is_tokenised", "expected"),
    [
        (0, False, "cannot write .*tokens"),
        (10_000, False, "cannot write .*tokens"),
        (300, True, r"cannot write .*run\.json"),
        (3_000, True, r"cannot write .*metrics\.jsonl"),
        (100_000, True, "cannot save the training state in .*step-"),
    ],
)
def test_a_disk_that_fills_up_while_training(world, teacher, tmp_path, num_bytes, is_tokenised, expected):
    """Whatever file it hits; with space again the same command ends where it would have without."""
    words = list(stage1(world, tmp_path))
    words[words.index("--comparisons-per-step") + 1] = 3  # many lines of metrics
    if is_tokenised:
        call(*words, "--dry-run")
    with no_file_beyond(num_bytes):
        assert_refused(words, expected, "full|space", artifacts=tmp_path)
    if num_bytes == 100_000:
        call(*words)
        call(*words, "--output", tmp_path / "undisturbed")
        found, undisturbed = tmp_path / "stage1/tiny-gemma", tmp_path / "undisturbed"
        for name in ("model.safetensors", "trained_on.parquet"):
            assert file_hash(found / name) == file_hash(undisturbed / name)


@pytest.mark.parametrize("num_bytes", [100, 1_500])
def test_a_disk_that_fills_up_while_labelling(world, teacher, tmp_path, num_bytes):
    pool = ("--artifacts", tmp_path, "--comparisons", world / "pool.parquet", "--teachers", teacher)
    words = ("pseudo_label", *pool, "--comparisons-per-shard", 30)
    call(*words, "--no-merge", "--output", tmp_path / "undisturbed")  # the tokens are now there
    with no_file_beyond(num_bytes):
        assert_refused(
            words, r"cannot write .*(run\.json|shards)", "File too large", artifacts=tmp_path / "pseudo"
        )
    call(*words)
    name = "tiny-gemma/probabilities.parquet"
    found, undisturbed = (pl.read_parquet(tmp_path / part / name) for part in ("pseudo", "undisturbed"))
    assert found.equals(undisturbed)


def test_a_disk_that_fills_up_while_evaluating(world, teacher, tmp_path):
    words = evaluate(world, tmp_path, "--checkpoints", teacher)
    call(*words, "--name", "undisturbed")
    with no_file_beyond(1_000):
        assert_refused(words, "cannot write .*evaluation", "File too large")
    assert_nothing_looks_complete(tmp_path / "evaluate/evaluation")
    call(*words)


# Numbers


def overflow(token_id):
    """A change of a checkpoint: finite itself, but Gemma's embedding scale makes infinity of that token."""

    def change(tensors):
        tensors["model.embed_tokens.weight"][token_id, 0] = 3e38

    return change


def bell_in(frame, key):
    """Comparisons alike but for their ids; the answer of one holds a byte that nothing else does."""
    rings = pl.when(pl.col("id") == key).then(pl.lit(["\a"])).otherwise(pl.lit(["b"]))
    return frame.with_columns(prompt=pl.concat_list("id"), response_a=rings, response_b=pl.lit(["c"]))


def bell_id(checkpoint):
    [token_id] = AutoTokenizer.from_pretrained(checkpoint)("\a", add_special_tokens=False).input_ids
    return token_id


def test_a_loss_that_is_not_finite_names_the_rows(world, tmp_path, monkeypatch):
    """The comparison of step 3 whose text overflows is named, and no weight is changed."""
    votes = make_comparisons(25, seed=6, source="votes").sort("id")
    train = votes.filter(pl.col("fold") != 0)
    marked = train["id"][int(plan_steps(20, Recipe(comparisons_per_step=4))[2, 1])]
    write_comparisons(bell_in(votes, marked), tmp_path / "votes.parquet")
    checkpoint = edited(world / "gemma", tmp_path / "gemma", overflow(bell_id(world / "gemma")))
    words = list(stage1(world, tmp_path, checkpoint=checkpoint, votes=tmp_path / "votes.parquet"))
    words[words.index("--comparisons-per-step") + 1] = 4
    words += ["--state-interval-steps", 1]

    models = []
    monkeypatch.setattr(
        "common.train.fit.fit", lambda model, *a, **k: (models.append(model), fit(model, *a, **k))
    )
    expected = rf"step 3: the loss is not finite for votes/{marked} \(1 comparisons\)"
    message = assert_refused(words, expected, "lower --lr", artifacts=tmp_path / "stage1")
    folder = tmp_path / "stage1/tiny-gemma"
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == 2
    assert [path.name for path in (folder / "state").iterdir()] == ["step-00000002"]
    saved = {f"model.{name}": torch.empty_like(p) for name, p in models[0].named_parameters()}
    Run(folder=folder, description={}, is_complete=False).load_state(2, saved)
    for name, parameter in models[0].named_parameters():
        assert torch.equal(parameter, saved[f"model.{name}"]), name
    assert assert_refused(words) == message, "started again, the same"


def test_answers_that_are_not_finite_name_the_rows(world, teacher, tmp_path):
    """The same in inference, in a later shard, where a row's number would say nothing."""
    pool = bell_in(make_comparisons(30, seed=7, source="pool", labelled=False), "7-8")
    write_comparisons(pool, tmp_path / "pool.parquet")
    broken = edited(teacher, tmp_path / "broken", overflow(bell_id(teacher)))
    where = ("--artifacts", tmp_path / "artifacts", "--comparisons", tmp_path / "pool.parquet")
    words = ("pseudo_label", *where, "--teachers", broken, "--comparisons-per-shard", 4)
    assert_refused(words, "not finite for 1 comparisons, first pool/7-8", artifacts=tmp_path / "artifacts")


# Launches, most in processes of their own


@pytest.mark.parametrize(
    "words",
    [
        ("stage1", "tiny-gemma"),
        ("stage2", "tiny-gemma"),
        ("stage3", "tiny-gemma"),
        ("pseudo_label",),
        ("evaluate",),
    ],
)
def test_every_stage_says_once_how_many_threads_it_takes(tmp_path, monkeypatch, words):
    monkeypatch.setattr(threads, "num_cores", lambda: 3)
    for told, times in (({}, 1), ({"OMP_NUM_THREADS": "1"}, 0)):
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
        with mock.patch.dict(os.environ, told):
            found = call(*words, "--artifacts", tmp_path, check=False)
        assert found.status == 1 and found.stdout.count("the CPU computes with 1 thread a process") == times


def run(words, environment=None, launcher=()):
    """Starts a stage as a user would; output and errors are kept apart."""
    script, *flags = words
    inherited = {name: value for name, value in os.environ.items() if name != "WORLD_SIZE"}
    return subprocess.run(
        [sys.executable, *launcher, f"stages/{script}.py", *map(str, flags)],
        cwd=ROOT,
        env=inherited | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | (environment or {}),
        capture_output=True,
        text=True,
        timeout=200,
    )


@needs_no_gpu
@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, r"nowhere\.parquet does not exist"),
        ({"WORLD_SIZE": "2"}, r"started 2 processes, but this one sees 1: they are not connected.*cpu\.yaml"),
        ({"ACCELERATE_USE_FSDP": "true"}, r"asks for FSDP, but .* turned it off.*cpu\.yaml"),
    ],
)
def test_a_process_ends_with_one_line_and_a_status(world, tmp_path, environment, expected):
    votes = world / "votes.parquet" if environment else tmp_path / "nowhere.parquet"
    found = run(stage1(world, tmp_path / "artifacts", votes=votes), environment)
    assert found.returncode == 1 and re.search(expected, found.stderr), found.stderr
    assert "Traceback" not in found.stderr + found.stdout
    assert [line for line in found.stderr.splitlines() if line.startswith("error: ")] == (
        found.stderr.splitlines()[-1:]
    )
    assert not (tmp_path / "artifacts").exists()


@needs_no_gpu
@pytest.mark.parametrize(
    ("is_connected", "expected"),
    [
        (False, "the launch started 2 processes, but this one sees 1"),
        (True, "nowhere.parquet does not exist"),
    ],
)
def test_several_processes_end_with_one_line_and_a_status(world, tmp_path, is_connected, expected):
    """Without a GPU, Accelerate starts two processes that do not know of each other, with status 0."""
    words = stage1(world, tmp_path / "artifacts", votes=tmp_path / "nowhere.parquet")
    config = ("--config_file", "accelerate_configs/ddp.yaml", "--num_processes", "2")
    launcher = ("-m", "common.train.launcher", *config, "--main_process_port", str(free_port()))
    shim = ("tests/shim.py",) if is_connected else ()
    found = run(words, {"ACCELERATE_TORCH_DEVICE": "cpu"}, launcher=(*launcher, *shim))
    assert found.returncode == 1
    [line] = found.stderr.splitlines()
    assert line.startswith("error: ") and expected in line
    assert not (tmp_path / "artifacts").exists()
