"""Which files of a folder are raw data, by the names they are published with, and which are our tables."""

from pathlib import Path

import polars as pl

from common.data.table import SCHEMA

LEAK_COLUMNS = ("kind", "kinds", "other_source", "other_id", "similarity")
"""What `data_prep/leak_check.py` adds to the rows that it lists: such a table repeats rows of others."""


PREFERENCE_SETS = {
    "capybara": "argilla/Capybara-Preferences",  # *_rating (whole), *_model; several turns
    "pku_saferlhf": "RLHFlow/PKU-SafeRLHF-30K-standard",  # *_score
    "argilla_math": "RLHFlow/Argilla-Math-DPO-standard",  # *_score
    "code_ultrafeedback": "RLHFlow/CodeUltraFeedback-standard",  # *_score
    "helpsteer": "RLHFlow/Helpsteer-preference-standard",  # *_score
}
"""Short name, which becomes the column `source` -> hub id."""
ENDINGS = ("", ".parquet", *(f".{kind}{end}" for kind in ("csv", "jsonl") for end in ("", ".gz", ".zst")))


def find_raw(folder: Path, *names: str) -> Path | None:
    """The first of some names that is there below `folder`: a folder, or a file with an ending."""
    places = (folder / f"{name}{ending}" for name in names for ending in ENDINGS)
    return next((place for place in places if place.exists()), None)


def find_tables(folder: Path) -> tuple[Path, ...]:
    """The comparison tables of a folder, by name; lists of leaks and of rejected rows are left out.

    Raises:
        ValueError: There is none, or a Parquet cannot be read.
    """
    tables = tuple(
        path
        for path in sorted(folder.glob("*.parquet"))
        if columns_of(path).keys() >= set(SCHEMA) and not is_leak_table(path)
    )
    if not tables:
        raise ValueError(
            f"{folder} holds no comparison table; make one with just prep, or name some with --input"
        )
    return tables


def is_leak_table(path: Path) -> bool:
    """Whether a file was written by `data_prep/leak_check.py`."""
    return columns_of(path).keys() >= set(LEAK_COLUMNS)


def columns_of(path: Path) -> dict[str, pl.DataType]:
    """Columns and types of a Parquet.

    Raises:
        ValueError: It cannot be read.
    """
    try:
        return dict(pl.scan_parquet(path, glob=False, hive_partitioning=False).collect_schema())
    except (OSError, pl.exceptions.PolarsError, pl.exceptions.PanicException) as error:
        first_line = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{path} cannot be read as a Parquet: {first_line}; remove or remake it") from error
