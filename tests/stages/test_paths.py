"""A path is a path: brackets, stars, question marks and name=value in a folder's name mean nothing."""

from pathlib import Path

import numpy as np
import polars as pl
import pytest
from calling import call
from helpers import make_comparisons, read_competition_file
from samples import SOURCES, write_rows
from test_evaluate import table as probability_table

from bundle import fit_weights
from common.data.held_out import read_trained_on
from common.data.sources.find import fetch, find_raw, find_tables
from common.data.sources.made import prompt_keys
from common.data.table import LABELS, TEXTS, content_hashes, read_comparisons, write_table
from common.score.ensemble import read_table
from stages.demo import known_floor
from stages.doctor import judge_file
from stages.evaluate import write_submission
from stages.pseudo_label import merge
from stages.report import read_probabilities
from stages.stage2 import join_labels

VOTES = make_comparisons(200)
NAMES = [f"{group}/{label}" for group in ("m/given", "m/mean", "ensemble") for label in LABELS]
THIRDS = [pl.lit(1 / 3, pl.Float32).alias(name) for name in NAMES]
ANSWERS = VOTES.select("source", "id", *LABELS).with_columns(THIRDS)


@pytest.fixture(params=["a[1]*?", "[ab]", "x=1"])
def folder(tmp_path, request):
    """Beside it lie folders that it would mean as a pattern, each with a file of another kind."""
    for name in ("a1xy", "a", "b", request.param):
        (tmp_path / name).mkdir(exist_ok=True)
        (tmp_path / name / "x.parquet").write_text("no Parquet")
    return tmp_path / request.param


def written(folder: Path, frame: pl.DataFrame, name: str = "x.parquet") -> Path:
    write_table(frame, folder / name)
    return folder / name


def read_merged(folder: Path) -> pl.DataFrame:
    merge([written(folder / "t", ANSWERS.drop(LABELS), "probabilities.parquet")], folder / "ensemble")
    return pl.read_parquet(folder / "ensemble/labels.parquet", glob=False, hive_partitioning=False)


def trained_on(folder: Path) -> int:
    written(folder, pl.DataFrame({"content_hash": content_hashes(VOTES)}), "trained_on.parquet")
    return len(read_trained_on(folder))


def fitted(folder: Path) -> int:
    written(folder, ANSWERS, "probabilities.parquet")
    models = [{"model": "m", "name": "m", "order": "given", "weight": 1.0}]
    fit_weights(models, folder)
    return len(models) * len(VOTES)


def submitted(folder: Path) -> int:
    write_submission(folder / "submission.csv", written(folder, ANSWERS), VOTES)
    return len((folder / "submission.csv").read_text().splitlines()) - 1


def evaluated(folder: Path) -> int:
    probability_table().write_parquet(folder / "t.parquet")
    words = ("--artifacts", folder, "--table", folder / "t.parquet", "--calibrate")
    call("evaluate", *words)
    return len(VOTES) * ("up to date" in call("evaluate", *words, "--submission", folder / "s.csv").stdout)


def converted(folder: Path) -> int:
    """Each script of data_prep/: its input, its output, what it excludes."""
    excluded = (written(folder, VOTES, "excluded.parquet"),)
    for name, source in SOURCES.items():
        (folder / name).mkdir()
        write_rows(folder / name / "x.parquet", source.rows(60))
        source.run(folder / name, output=folder / f"{name}.out.parquet", exclude=excluded)
        assert read_comparisons(folder / f"{name}.out.parquet")[0].columns[0] == "id"
    return len(VOTES)


READERS = {
    "comparisons": lambda f: len(read_comparisons(written(f, VOTES))[0]),
    "columns": lambda f: len(VOTES) * (read_comparisons(written(f, VOTES))[0].columns == VOTES.columns),
    "competition": lambda f: len(read_competition_file(written(f, VOTES.select("id", *TEXTS, *LABELS)))[0]),
    "folder": lambda f: len(fetch([str(written(f, VOTES).parent)], f)) * len(VOTES),
    "found": lambda f: len(VOTES) * (find_raw(f, "x") == f / "x.parquet"),
    "tables": lambda f: len(VOTES) * (find_tables(written(f, VOTES).parent) == (f / "x.parquet",)),
    "excluded": lambda f: len(VOTES) * bool(len(prompt_keys([written(f, VOTES)]))),
    "trained on": trained_on,
    "given": lambda f: len(read_table(written(f, probability_table()[:200]))[0]),
    "soft labels": lambda f: len(join_labels(VOTES, written(f, ANSWERS))),
    "pseudo labels": lambda f: len(read_merged(f)),
    "report": lambda f: len(read_probabilities(written(f, ANSWERS))["labels"]),
    "doctor": lambda f: int(judge_file(written(f, VOTES), "", "", "").found.split()[0]),
    "doctor, CSV": lambda f: int(judge_file(written(f, ANSWERS, "x.csv"), "", "", "").found.split()[0]),
    "floor": lambda f: len(VOTES) * np.isfinite(known_floor(written(f, ANSWERS), VOTES)),
    "weights": fitted,
    "submission": submitted,
    "evaluation": evaluated,
    "scripts": converted,
}


@pytest.mark.parametrize("reader", READERS)
def test_every_reader_takes_a_folder_for_its_name(folder, reader):
    assert READERS[reader](folder) == len(VOTES)
