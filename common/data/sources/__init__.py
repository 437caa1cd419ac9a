"""Raw files and hub data sets of any shape -> one lazy frame with the columns that a script wants.

`find.fetch` finds files, `open_raw` opens them as one frame, `check_raw` sorts good rows from bad ones;
`votes` knows the competition's columns. Parquet is scanned where it lies. CSV, JSON lines (plain, gzip or
zstd) and Parquet whose texts hold JSON become temporary Parquets first, row by row (`rows`), so that a bad
row is named by its line; everything after is one code path.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import polars as pl

from common.console import say
from common.data.chats import stable_key
from common.data.sources.find import RawFile, columns_of
from common.data.sources.rows import ROW_READERS, column_names, conform_column, whole
from common.data.table import (
    LABELS,
    REJECTED_SCHEMA,
    TEXT_TYPES,
    TEXTS,
    ReadReport,
    check_rows,
    fits,
    reading,
    scan,
    writing_scratch,
)
from common.data.votes_csv import BadRowError

PLACES = {"file": pl.String, "row": pl.Int64}
"""Where a row comes from: its file, and its row there (Parquet and hub, from 0) or line (text, from 1)."""
ROWS_PER_PART = 20_000

Schema = Mapping[str, pl.DataType]
"""Wanted columns and their types: texts, numbers, or lists and structs of these. Other columns are not read,
but named; a wanted one that is absent is an error unless its name ends in "?", which makes it null."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Raw:
    """What files hold, not read yet."""

    frame: pl.LazyFrame
    """The wanted columns, then `PLACES`; rows in the order of the files."""
    rejected: pl.DataFrame
    """`REJECTED_SCHEMA`: rows that could not be read."""
    names: tuple[str, ...]
    """Of the files, as in the column `file`."""
    row_unit: str
    """What `row` counts: "row" of a Parquet, "line" of a text file, "row or line" where there are both."""
    notes: Mapping[str, int]
    """What is worth knowing, for a report."""


def open_raw(
    files: Sequence[tuple[RawFile, Schema, Callable[[pl.LazyFrame], pl.LazyFrame]]], scratch: Path
) -> Raw:
    """Opens files as one frame, in this order.

    Args:
        files: Each as of `find.fetch`, with the columns wanted of it, and what makes of its frame (these
            columns, then `PLACES`) one with the columns of all the others.
        scratch: Existing folder for temporary files, which must stay as long as the frame.

    Raises:
        ValueError: A file cannot be read, or lacks a column or has it in another type.
    """
    frames, rejected, num_repaired = [], [], 0
    for number, (file, schema, shaped) in enumerate(files):
        found = columns_of(file.path, file.name) if file.kind == "parquet" else {}
        if file.kind == "parquet" and not _holds_json(found, schema):
            frame = _scan(file, schema, found)
        else:
            parts, bad, repaired, found = _convert(file, schema, scratch / f"raw-{number}")
            frame = scan(parts)
            rejected += bad
            num_repaired += repaired
        if unused := [name for name in found if not {name, f"{name}?"} & set(schema)]:
            say(f"{file.name}: not used: {', '.join(unused)}")
        frames.append(shaped(frame))
    units = {"row" if file.kind == "parquet" else "line" for file, *_ in files}
    return Raw(
        frame=pl.concat(frames),
        rejected=pl.DataFrame(rejected, schema=REJECTED_SCHEMA, orient="row"),
        names=tuple(file.name for file, *_ in files),
        row_unit=" or ".join(sorted(units, reverse=True)),
        notes={"with a lone surrogate replaced by U+FFFD": num_repaired} if num_repaired else {},
    )


def check_raw(
    raw: Raw,
    rows: pl.DataFrame,
    *,
    rejected: Sequence[pl.DataFrame] = (),
    dropped: Mapping[str, int] | None = None,
    notes: Mapping[str, int] | None = None,
    skip_bad_rows: bool,
) -> tuple[pl.DataFrame, ReadReport]:
    """`table.check_rows` for rows of raw files; of rows with one key the same stays in any row order.

    Args:
        raw: Where they come from; its unreadable rows join the report.
        rows: Comparisons (`SCHEMA`), further columns, `PLACES`.
        rejected: Further bad rows, each `REJECTED_SCHEMA`.
        dropped: Why rows were left out on purpose -> how many.
        notes: Further notes.
        skip_bad_rows: Leave bad rows out instead of failing.

    Returns:
        The good rows without `PLACES`, sorted by source and id, and the report; it counts all rows as read.

    Raises:
        ValueError: As of `check_rows`, or every row was left out on purpose.
    """
    unreadable = pl.concat([raw.rejected, *rejected])
    num_dropped = sum((dropped or {}).values())
    if num_dropped and rows.is_empty() and unreadable.is_empty():
        raise ValueError(
            f"none of the {num_dropped:,} rows can be compared: {dropped}; are these the right files?"
        )
    content = [*map(stable_key, map(pl.col, TEXTS)), "model_a", "model_b", *LABELS]
    rows = rows.sort("source", "id", *content, nulls_last=True)
    good, report = check_rows(
        rows.drop(PLACES),
        rows.select(*PLACES),
        paths=tuple(map(Path, raw.names)),
        row_unit=raw.row_unit,
        unreadable=unreadable,
        notes={**raw.notes, **(notes or {})},
        skip_bad_rows=skip_bad_rows,
    )
    return good, replace(report, num_read=report.num_read + num_dropped)


def _holds_json(found: pl.Schema, schema: Schema) -> bool:
    """Whether a Parquet has texts where lists are wanted: what CSV files become on the hub."""
    return any(
        isinstance(kind, pl.List) and found.get(name.removesuffix("?")) in TEXT_TYPES
        for name, kind in schema.items()
    )


def _scan(file: RawFile, schema: Schema, found: pl.Schema) -> pl.LazyFrame:
    """A Parquet's wanted columns, lazily, with places; fields of structs in the wanted order, no others."""
    _check_columns(file, schema, found.names())
    columns = []
    for wanted, kind in schema.items():
        name = wanted.removesuffix("?")
        is_id = kind == pl.String and name in found and found[name].is_integer()
        if name in found and not is_id and not fits(found[name], kind):
            raise ValueError(f"{file.name}: column {name} is {found[name]}, expected {kind}")
        columns.append((pl.col(name).cast(kind) if name in found else pl.lit(None, kind)).alias(name))
    frame = scan(file.path).select(columns).with_row_index("row")
    return frame.select(pl.exclude("row"), pl.lit(file.name).alias("file"), pl.col("row").cast(pl.Int64))


def _absent(schema: Schema, found: Collection[str]) -> list[str]:
    """Wanted columns that are not there; those whose name ends in "?" need not be."""
    return [name for name in schema if not name.endswith("?") and name not in found]


def _check_columns(file: RawFile, schema: Schema, found: Sequence[str]) -> None:
    if absent := _absent(schema, found):
        expected = [name for name in schema if not name.endswith("?")]
        raise ValueError(
            f"{file.name} lacks the column{'s' * (len(absent) > 1)} {', '.join(absent)}; "
            f"found {', '.join(found) or 'none'}; expected {', '.join(expected)}"
        )


def _convert(file: RawFile, schema: Schema, stem: Path) -> tuple[list[Path], list[tuple], int, list[str]]:
    """Any file -> Parquets <stem>-N.parquet with places; rejected rows; number of repaired ones; columns."""
    found = {} if file.kind == "json" else dict.fromkeys(column_names(file))
    if file.kind != "json":
        _check_columns(file, schema, list(found))
    parts, rejected, num_repaired = [], [], 0
    columns = {wanted.removesuffix("?"): kind for wanted, kind in schema.items()}

    def good_rows() -> Iterator[tuple]:
        nonlocal num_repaired
        for row, values, problem in ROW_READERS[file.kind](file.path, schema):
            repaired = []
            found.update(dict.fromkeys(values))
            try:
                if problem is not None:
                    raise problem
                if absent := _absent(schema, values):
                    raise BadRowError("missing field", f"{', '.join(absent)}; found {', '.join(values)}")
                conformed = [conform_column(values.get(c), kind, c, repaired) for c, kind in columns.items()]
            except BadRowError as bad:
                rejected.append((file.name, row, _key_of(values, columns), *map(whole, bad.args)))
                continue
            num_repaired += bool(repaired)
            yield *conformed, file.name, row

    with reading(file.name):
        rows = good_rows()
        while (some := list(islice(rows, ROWS_PER_PART))) or not parts:
            parts.append(stem.with_name(f"{stem.name}-{len(parts)}.parquet"))
            with writing_scratch():
                pl.LazyFrame(some, schema=columns | PLACES, orient="row").sink_parquet(parts[-1])
    return parts, rejected, num_repaired, list(map(whole, found))


def _key_of(values: Mapping[str, object], columns: Schema) -> str | None:
    """The first wanted column that is called an id, for a message."""
    key = next((values[name] for name in columns if name.endswith("id") and name in values), None)
    return None if key is None else whole(str(key)[:100])
