"""Every script gives the same table, in the same order, whatever form and order its rows come in."""

import random
from pathlib import Path

import polars as pl
import pytest
from helpers import run_script
from samples import SOURCES, write_rows

from common.files import read_json
from common.runs import manifest_path

NUM_ROWS = 600


def write_one(folder: Path, rows: list[dict]) -> list[Path]:
    return [write_rows(folder / "x.parquet", rows)]


def write_parts(folder: Path, rows: list[dict]) -> list[Path]:
    """Three files of different kinds, the rows in another order."""
    random.Random(1).shuffle(rows)
    names = ("x.csv.gz", "y.jsonl.zst", "z.parquet")
    return [write_rows(folder / name, rows[i::3]) for i, name in enumerate(names)]


def write_backwards(folder: Path, rows: list[dict]) -> list[Path]:
    (folder / "in").mkdir()
    for i in range(4):
        write_rows(folder / "in" / f"{i}.parquet", rows[::-1][i::4])
    return [folder / "in"]


WAYS = (
    (write_one, {"POLARS_MAX_THREADS": "1", "POLARS_ENGINE_AFFINITY": "in-memory", "PYTHONHASHSEED": "1"}),
    (write_parts, {"POLARS_MAX_THREADS": "2", "POLARS_ENGINE_AFFINITY": "in-memory", "PYTHONHASHSEED": "2"}),
    (
        write_backwards,
        {
            "POLARS_MAX_THREADS": "2",
            "POLARS_ENGINE_AFFINITY": "streaming",
            "POLARS_IDEAL_MORSEL_SIZE": "50",
            "PYTHONHASHSEED": "3",
        },
    ),
)


@pytest.mark.parametrize("name", SOURCES)
def test_rows_threads_hash_seeds_engines_and_formats_change_nothing(tmp_path, name):
    tables, counts = [], []
    for i, (write, environment) in enumerate(WAYS):
        folder = tmp_path / str(i)
        folder.mkdir()
        inputs = write(folder, SOURCES[name].rows(NUM_ROWS))
        if name == "preference_sets":  # whose sources are named after the files
            inputs = [f"mine={path}" for path in inputs]
        output = tmp_path / f"{i}.parquet"
        done = run_script(
            SOURCES[name].path(), "--input", *inputs, "--output", output, environment=environment
        )
        assert done.returncode == 0, done.stderr
        tables.append(pl.read_parquet(output))
        counts.append(read_json(manifest_path(output))["counts"])
    assert len(tables[0]) > 50
    for table, count in zip(tables[1:], counts[1:], strict=True):
        assert table.equals(tables[0])
        assert count == counts[0]


@pytest.mark.parametrize("name", ["lmsys1m_pairs", "preference_sets"])
def test_another_seed_gives_another_table(tmp_path, name):
    source = write_rows(tmp_path / "x.jsonl", SOURCES[name].rows(NUM_ROWS))
    tables = []
    for seed in (0, 1):
        SOURCES[name].run(source, output=tmp_path / f"{seed}.parquet", seed=seed)
        tables.append(pl.read_parquet(tmp_path / f"{seed}.parquet"))
    assert not tables[0].equals(tables[1])
