"""Two tiny finals as stage 3 leaves them, a bundle of them, and a test.csv."""

import csv
import json
import shutil
from pathlib import Path

import polars as pl
import pytest
from helpers import make_checkpoint, make_preference

import bundle as bundling
from bundle_manifest import MANIFEST, VERIFICATION, files_of, seal
from common.files import file_hash, read_json, write_json
from common.models import load_model, save_checkpoint
from common.prompts import Prompter
from common.tokenizer import load_tokenizer

ROWS = [
    ("7", ["which fox runs"], ["the red fox"], ["a lazy dog sleeps over the hill"]),
    ("4294967299", ["one", "two"], ["good", "bad"], ["fine", None]),
    ("007", ["the river and the hill"], [""], ["quick quick quick"]),
]


def make_final(folder: Path, model: str, family: str, **changes) -> Path:
    """A finished final without training: a random backbone and head, and everything that a stage writes."""
    backbone = make_checkpoint(folder.parent / f"{family}-backbone", family, seed=len(model))
    loaded = load_model(backbone, head_seed=5)
    for name, parameter in loaded.head.named_parameters():
        if name == "out.weight":
            parameter.data *= 8  # answers far from uniform, so that a wrong one shows
    prompter = Prompter(load_tokenizer(backbone), conversation_tokens=200)
    preference = make_preference(model=model, prompt=prompter.describe(), **changes)
    save_checkpoint(folder, model=loaded, tokenizer=prompter.tokenizer, preference=preference)
    pl.DataFrame({"content_hash": ["0" * 32]}).write_parquet(folder / "trained_on.parquet")
    write_json(folder / "run.json", {"recipe": {}, "inputs": {}, "status": "complete"})
    return folder


def write_test_csv(path: Path, rows=ROWS) -> Path:
    """A test.csv of (id, prompt, response_a, response_b) rows."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("id", "prompt", "response_a", "response_b"))
        writer.writerows((key, *map(json.dumps, turns)) for key, *turns in rows)
    return path


def reseal(bundle: Path) -> None:
    """Rewrites the manifest's hashes after a change, so that only a deeper check can find it."""
    manifest = read_json(bundle / MANIFEST)
    manifest["files"] = {name: file_hash(bundle / name) for name in files_of(bundle)}
    write_json(bundle / MANIFEST, manifest)


@pytest.fixture(scope="session")
def built(tmp_path_factory) -> Path:
    """An artifacts folder with two finals and their bundle; never changed by a test."""
    artifacts = tmp_path_factory.mktemp("artifacts")
    make_final(artifacts / "stage3/gemma9b-final", "gemma9b", "gemma")
    make_final(artifacts / "stage3/armorm8b-final", "armorm8b", "llama")
    args = bundling.Args(artifacts=artifacts)
    bundling.build(bundling.describe(args), args, artifacts / "bundle")
    return artifacts


@pytest.fixture
def artifacts(built, tmp_path) -> Path:
    """A copy of `built` to do as one likes with."""
    return copy_artifacts(built, tmp_path / "artifacts")


def copy_artifacts(source: Path, target: Path) -> Path:
    """A copy whose manifest names its own finals, verified if the source is."""
    shutil.copytree(source, target)
    bundle = target / "bundle"
    path = bundle / MANIFEST
    path.write_text(path.read_text().replace(str(source), str(target)))
    if (bundle / VERIFICATION).is_file():
        seal_again(bundle, read_json(bundle / VERIFICATION))
    return target


def seal_again(bundle: Path, result: dict) -> None:
    """Writes a verify.json that speaks of the manifest as it is now."""
    rest = {name: value for name, value in result.items() if name != "seal"}
    rest["manifest_sha256"] = file_hash(bundle / MANIFEST)
    write_json(bundle / VERIFICATION, {**rest, "seal": seal(rest)})
