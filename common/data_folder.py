"""Which files of a folder are comparison tables."""

from pathlib import Path

import polars as pl

from common.pairs import SCHEMA

LEAK_COLUMNS = ("kind", "kinds", "other_source", "other_id", "similarity")
"""What `data_prep/leak_check.py` adds to the rows that it lists: such a table repeats rows of others."""


def find_tables(folder: Path) -> tuple[Path, ...]:
    """The comparison tables of a folder, by name; lists of leaks and of rejected rows are left out.

    Raises:
        ValueError: There is none.
    """
    tables = tuple(
        path
        for path in sorted(folder.glob("*.parquet"))
        if set(SCHEMA) <= columns_of(path) and not is_leak_table(path)
    )
    if not tables:
        raise ValueError(
            f"{folder} holds no comparison table; make one with just prep, or name some with --input"
        )
    return tables


def is_leak_table(path: Path) -> bool:
    """Whether a file was written by `data_prep/leak_check.py`."""
    return set(LEAK_COLUMNS) <= columns_of(path)


def columns_of(path: Path) -> set[str]:
    """Column names of a Parquet; none where it cannot be read as one."""
    try:
        return set(pl.read_parquet_schema(path))
    except (OSError, pl.exceptions.PolarsError):
        return set()
