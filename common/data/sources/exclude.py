"""Prompts that must not occur in a table: what --exclude of the scripts in data_prep/ names."""

from collections.abc import Sequence
from pathlib import Path

import polars as pl

from common.data.chats import stable_key
from common.data.sources.find import columns_of
from common.data.sources.frames import reading
from common.data.table import SCHEMA
from common.files import file_hash

EXCLUDED = "prompt stands in --exclude"
"""Why a row is left out."""


def exclude_hashes(paths: Sequence[Path]) -> list[str]:
    """sha256 of each comparison table, for a manifest; ValueError where one is not there."""
    for path in paths:
        if not path.is_file():
            raise ValueError(
                f"--exclude {path} is not a file; expected a comparison Parquet (just prep makes them)"
            )
    return sorted(map(file_hash, paths))


def prompt_keys(paths: Sequence[Path]) -> pl.Series:
    """The different keys (`stable_key`) of all prompts in comparison tables.

    Raises:
        ValueError: A file cannot be read, or has no column of prompts.
    """
    keys = [pl.Series("prompt_key", [], dtype=pl.Binary)]
    for path in paths:
        found = columns_of(path).get("prompt")
        if found != SCHEMA["prompt"]:
            raise ValueError(
                f"--exclude {path}: the column prompt is {found or 'not there'}, expected {SCHEMA['prompt']} "
                "in a comparison Parquet (just prep makes them)"
            )
        with reading([str(path)]):
            table = pl.scan_parquet(path, glob=False, hive_partitioning=False)
            keys.append(table.select(prompt_key=stable_key(pl.col("prompt"))).collect()["prompt_key"])
    return pl.concat(keys).drop_nulls().unique()


def without_prompts(frame: pl.DataFrame, paths: Sequence[Path]) -> tuple[pl.DataFrame, dict[str, int]]:
    """`frame` less the rows whose prompt (all user turns) stands in a comparison table, and their count."""
    if not paths:
        return frame, {}
    kept = frame.filter(~stable_key(pl.col("prompt")).is_in(prompt_keys(paths).implode()))
    return kept, {EXCLUDED: len(frame) - len(kept)}
