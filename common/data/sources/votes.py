"""Comparisons in the competition's columns, from raw files of any kind."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import polars as pl

from common.data.sources import PLACES, Raw, check_raw, column_names, open_raw
from common.data.sources.find import RawFile
from common.data.table import LABELS, SCHEMA, TEXTS, ReadReport, reading

MODELS = ("model_a", "model_b")
COLUMNS = {
    "id": pl.String(),
    **{f"{name}?": pl.String() for name in MODELS},
    **dict.fromkeys(TEXTS, pl.List(pl.String)),
}


def open_competition(files: Sequence[RawFile], source: str, scratch: Path) -> Raw:
    """Opens files with id, prompt, response_a, response_b, and the models and the votes if they have them.

    Args:
        files: As of `common.data.sources.find.fetch`; texts are lists, or hold JSON lists.
        source: Value of the column `source`.
        scratch: Existing folder for temporary files.

    Returns:
        Comparisons (`SCHEMA`, fold null), not checked yet.

    Raises:
        ValueError: A file cannot be read, lacks a column, has it in another type, or some of the labels only.
    """
    shaped = partial(to_comparisons, source=source)
    return open_raw([(file, _schema_of(file), shaped) for file in files], scratch)


def _schema_of(file: RawFile) -> dict[str, pl.DataType]:
    is_voted_on = file.kind != "json" and any(name in LABELS for name in column_names(file))
    return COLUMNS | {f"{name}{'' if is_voted_on else '?'}": pl.Float64() for name in LABELS}


def to_comparisons(frame: pl.LazyFrame, *further: str, source: str) -> pl.LazyFrame:
    """`SCHEMA` (fold null; labels in double), `PLACES` and `further` columns; "" is no model's name."""
    return frame.select(
        "id",
        pl.lit(source).alias("source"),
        *(pl.when(pl.col(name) != "").then(name).alias(name) for name in MODELS),
        *TEXTS,
        *(pl.col(name).cast(pl.Float64) for name in LABELS),
        pl.lit(None, pl.Int8).alias("fold"),
        *PLACES,
        *further,
    )


def read_competition(raw: Raw, *, skip_bad_rows: bool = False) -> tuple[pl.DataFrame, ReadReport]:
    """Reads and checks comparisons, in id order.

    Args:
        raw: As of `open_competition`.
        skip_bad_rows: Leave bad rows out, listed in the report, instead of failing.

    Returns:
        Comparisons (`SCHEMA`, fold null) in the order of `id_order`, and the report.

    Raises:
        ValueError: There is no row, none is good, or (without `skip_bad_rows`) one is bad: malformed JSON,
            unequal turn counts, labels that do not sum to 1, a repeated id.
    """
    with reading(*raw.names):
        rows = raw.frame.collect()
    frame, report = check_raw(raw, rows, skip_bad_rows=skip_bad_rows)
    return frame.select(SCHEMA.names()).sort(*id_order()), report


def id_order() -> tuple[pl.Expr, ...]:
    """Sort keys: whole numbers by value, then all other ids by their letters' code points. 9, 10, a10, a9"""
    is_number = pl.col("id").str.contains(r"^[0-9]+$")
    digits = pl.when(is_number).then(pl.col("id").str.strip_chars_start("0"))
    return ~is_number, digits.str.len_bytes().fill_null(0), digits.fill_null(""), pl.col("id")
