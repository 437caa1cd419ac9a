"""The comparison table: one row is one prompt, two answers, and which of them a person preferred.

Every source becomes this table once (`data_prep/`), everything after reads it from here. Reading gives the
rows and a report of what was found; a bad row stops the run unless the caller asks to leave such rows out.
"""

import hashlib
import re
import struct
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import gettempdir
from typing import Literal

import numpy as np
import polars as pl

from common.files import replacing

LABELS = ("winner_model_a", "winner_model_b", "winner_tie")
"""Class order everywhere: A, B, tie."""

TEXTS = ("prompt", "response_a", "response_b")
"""Lists with one entry a turn, equally long; an entry may be null."""

Order = Literal["given", "swapped"]
ORDERS: tuple[Order, ...] = ("given", "swapped")
"""How the two answers are shown; in "swapped" B stands first."""

SCHEMA = pl.Schema(
    {
        "id": pl.String,
        "source": pl.String,
        "model_a": pl.String,
        "model_b": pl.String,
        **dict.fromkeys(TEXTS, pl.List(pl.String)),
        **dict.fromkeys(LABELS, pl.Float32),
        "fold": pl.Int8,
    }
)

REJECTED_SCHEMA = pl.Schema(
    {"file": pl.String, "row": pl.Int64, "id": pl.String, "reason": pl.String, "detail": pl.String}
)

WINNERS = {
    **{"a": 0, "b": 1, "model_a": 0, "model_b": 1},
    **dict.fromkeys(("tie", "tie (bothbad)", "tie (both bad)", "bothbad", "both_bad"), 2),
}
"""What sources say of a vote -> index of `LABELS`."""

LABEL_SUM_TOLERANCE = 1e-3 + 1e-9
"""Judged in double precision, on the numbers as they are written; 1e-9 more, so that 0.999 and 1.001 pass."""
OF_AN_OUTPUT = re.compile("No space left|Read-only file system|quota exceeded|File too large")
"""What the system says only of a file that is written."""
NUM_SHOWN = 10
TEXT_TYPES = (pl.String, pl.Categorical, pl.Enum)


@dataclass(frozen=True, kw_only=True, eq=False)
class ReadReport:
    """What a reader found: how many rows, which ones it rejected and why, what is worth knowing."""

    paths: tuple[Path, ...]
    num_read: int
    """Rows in the files, good and bad."""
    num_kept: int
    rejected: pl.DataFrame = field(default_factory=lambda: pl.DataFrame(schema=REJECTED_SCHEMA))
    """`REJECTED_SCHEMA`: one row a rejected row, in the order of the files."""
    notes: dict[str, int] = field(default_factory=dict)
    """What was kept but is worth knowing, e.g. "with a null turn" -> number of comparisons."""
    row_unit: str = "row"
    """What `rejected["row"]` is: "row" of a Parquet, from 0, or "line" of a CSV (its first one), from 1."""

    def __str__(self) -> str:
        files = ", ".join(str(path) for path in self.paths)
        counts = [f"{self.num_read:,} comparisons read", f"{self.num_kept:,} kept"]
        counts += [f"{count:,} {note}" for note, count in self.notes.items()]
        lines = [f"{files}: {', '.join(counts)}"]
        reasons = self.rejected["reason"].value_counts().sort("count", "reason", descending=[True, False])
        lines += [f"  {count:>7,} rejected: {reason}" for reason, count in reasons.iter_rows()]
        return "\n".join(lines)


def is_labelled() -> pl.Expr:
    """True where a row carries a label: `frame.filter(is_labelled())`."""
    return pl.all_horizontal(pl.col(LABELS).is_not_null())


def labels_array(frame: pl.DataFrame) -> np.ndarray:
    """Labels as float32 [num_comparisons, 3] in the order of `LABELS`; rows of NaN where unlabelled."""
    return np.ascontiguousarray(frame.select(LABELS).fill_null(float("nan")).to_numpy(), dtype=np.float32)


def swap(frame: pl.DataFrame) -> pl.DataFrame:
    """Exchanges A and B: models, answers, labels. Further columns stay; twice gives the frame back."""
    pairs = (("model_a", "model_b"), ("response_a", "response_b"), LABELS[:2])
    return frame.with_columns(
        *(pl.col(b).alias(a) for a, b in pairs),
        *(pl.col(a).alias(b) for a, b in pairs),
    )


def content_hashes(frame: pl.DataFrame) -> pl.Series:
    """Names what a comparison shows: its prompt and its two answers, unordered, whoever wrote them and won.

    Stable across processes, row order and library versions; a swapped row has the same hash; a null turn, an
    empty one and the text "null" differ.

    Returns:
        Series "content_hash", 32 hexadecimal digits (blake2b, 16 bytes) a row.
    """
    hashes = []
    for prompt, *answers in frame.select(TEXTS).iter_rows():
        content = b"".join((_encode(prompt), *sorted(map(_encode, answers))))
        hashes.append(hashlib.blake2b(content, digest_size=16).hexdigest())
    return pl.Series("content_hash", hashes, dtype=pl.String)


def table_hash(frame: pl.DataFrame, columns: Sequence[str] = tuple(SCHEMA)) -> str:
    """sha256 of some columns in all rows, whatever the row order and the version of any library.

    Others do not count.
    """
    rows = frame.select(columns).iter_rows()
    digests = sorted(hashlib.blake2b(b"".join(map(_encode, row)), digest_size=32).digest() for row in rows)
    return hashlib.sha256(b"".join(digests)).hexdigest()


def _encode(value: str | float | int | list | None) -> bytes:
    """A value as bytes that say where they end, so that no two different rows are laid out alike."""
    match value:
        case None:
            return b"n"
        case str():
            data = value.encode()
            return b"s" + len(data).to_bytes(8, "little") + data
        case float():
            return b"f" + struct.pack("<f", value + 0.0)  # + 0.0: -0.0 and 0.0 are the same label
        case int():
            return b"i" + struct.pack("<q", value)
        case _:
            return b"l" + len(value).to_bytes(8, "little") + b"".join(map(_encode, value))


def read_comparisons(
    paths: Path | str | Sequence[Path | str], *, skip_bad_rows: bool = False
) -> tuple[pl.DataFrame, ReadReport]:
    """Reads comparison Parquets: files in the order given, rows in file order, further columns kept.

    Args:
        paths: One or more files.
        skip_bad_rows: Leave bad rows out, listed in the report, instead of failing. Of good rows with the
            same key the first one stays.

    Returns:
        The comparisons (`SCHEMA`, then further columns) and the report.

    Raises:
        ValueError: A file is absent, is not a Parquet, lacks a column or has it in another type, has no row;
            a row is bad (the first ten are listed); no row is good.
    """
    paths = tuple(Path(path) for path in ([paths] if isinstance(paths, Path | str) else paths))
    if not paths:
        raise ValueError("no comparison file was given; expected at least one Parquet")
    frames = [_read_parquet(path) for path in paths]
    places = pl.concat(
        pl.select(file=pl.lit(str(path)), row=pl.int_range(len(frame)))
        for path, frame in zip(paths, frames, strict=True)
    )
    try:
        frame = pl.concat(frames, how="diagonal")
    except pl.exceptions.PolarsError as error:
        names = ", ".join(map(str, paths))
        raise ValueError(f"{names} have a column of one name and different types: {error}") from error
    return check_rows(frame, places, paths=paths, skip_bad_rows=skip_bad_rows)


def write_comparisons(frame: pl.DataFrame, path: Path | str) -> None:
    """Writes a comparison Parquet, atomically, and nothing that `read_comparisons` would refuse.

    Args:
        frame: `SCHEMA` and, if need be, further columns.
        path: File to create or replace.

    Raises:
        ValueError: As of `check_writable`, or the file cannot be written.
    """
    write_table(check_writable(frame, path), path)


def check_writable(frame: pl.DataFrame, path: Path | str) -> pl.DataFrame:
    """The frame, columns of `SCHEMA` first.

    Raises:
        ValueError: A column is missing or of another type, or a row is bad.
    """
    frame = _check_schema(frame, path)
    places = pl.select(file=pl.lit(str(path)), row=pl.int_range(len(frame)))
    return check_rows(frame, places, paths=(Path(path),))[0]


def write_table(frame: pl.DataFrame, path: Path | str) -> None:
    """Writes any table, atomically: Parquet if the name ends so, else CSV.

    Raises:
        ValueError: The folder cannot be written or the disk is full. The old file stays.
    """
    with writing_table(frame, path):
        pass


@contextmanager
def writing_table(frame: pl.DataFrame, path: Path | str) -> Iterator[Path]:
    """`write_table`, whose file takes its name when the block succeeds; yields where it lies until then."""
    with replacing(path) as temporary:
        try:
            if Path(path).suffix == ".parquet":
                frame.write_parquet(temporary)
            else:
                frame.write_csv(temporary)
        except pl.exceptions.PolarsError as error:  # how polars reports a full disk
            raise OSError(str(error)) from error
        yield temporary


@contextmanager
def reading(*names: Path | str, way_out: str = "is it cut off? Get or make it again") -> Iterator[None]:
    """Turns what polars says of a broken file, as it is opened or streamed, into a ValueError.

    Args:
        names: The files, as the user knows them.
        way_out: What to do about it.
    """
    try:
        yield
    except (OSError, pl.exceptions.PolarsError, pl.exceptions.PanicException) as error:
        first_line = (str(error).splitlines() or [type(error).__name__])[0]
        if OF_AN_OUTPUT.search(first_line):  # of a stream that also writes
            raise ValueError(scratch_fault(first_line)) from error
        raise ValueError(f"{', '.join(map(str, names))} cannot be read: {first_line}; {way_out}") from error


@contextmanager
def writing_scratch() -> Iterator[None]:
    """Within `reading`: a temporary file that cannot be written is no fault of what is read."""
    try:
        yield
    except (OSError, pl.exceptions.PolarsError) as error:
        raise ValueError(scratch_fault(str(error).partition("\n")[0])) from error


def scratch_fault(reason: str) -> str:
    """What to say, and to do, of a temporary file that cannot be written."""
    return (
        f"temporary files cannot be written in {gettempdir()}: {reason}; free some space there, or set "
        "TMPDIR to another folder"
    )


def scan(path: Path | str | Sequence[Path]) -> pl.LazyFrame:
    """A Parquet, or several; no globbing, no hive columns: a path is a name, whatever characters it has."""
    return pl.scan_parquet(path, glob=False, hive_partitioning=False)


def fits(found: pl.DataType, wanted: pl.DataType) -> bool:
    """Whether a type can be cast: what counts to a float, categories to text, a struct to fewer fields."""
    if isinstance(wanted, pl.List):
        return isinstance(found, pl.List) and fits(found.inner, wanted.inner)
    if isinstance(wanted, pl.Struct):
        fields = {f.name: f.dtype for f in found.fields} if isinstance(found, pl.Struct) else {}
        return all(f.name in fields and fits(fields[f.name], f.dtype) for f in wanted.fields)
    if wanted == pl.Float64:
        return found.is_numeric() or found in (pl.Boolean, pl.Null)
    return found in (wanted, pl.Null) or (wanted == pl.String and found in TEXT_TYPES)


def check_rows(
    frame: pl.DataFrame,
    places: pl.DataFrame,
    *,
    paths: tuple[Path, ...],
    row_unit: str = "row",
    unreadable: pl.DataFrame | None = None,
    notes: Mapping[str, int] | None = None,
    skip_bad_rows: bool = False,
) -> tuple[pl.DataFrame, ReadReport]:
    """Sorts good rows from bad ones, for every reader of comparisons.

    Args:
        frame: Columns of `SCHEMA` and any others; labels of any precision.
        places: `file` and `row` of every row of `frame`.
        paths: The files, in order.
        row_unit: "row" or "line", what `row` counts.
        unreadable: `REJECTED_SCHEMA`, rows that did not make it into `frame`.
        notes: Counts of the reader's own.
        skip_bad_rows: Leave bad rows out instead of failing.

    Returns:
        The good rows and the report.

    Raises:
        ValueError: There is no row, none is good, or (without `skip_bad_rows`) one is bad.
    """
    bad = _bad_rows(frame, places, row_unit)
    good = frame.filter(~pl.int_range(pl.len(), dtype=pl.UInt32).is_in(bad["index"].implode()))
    good = good.with_columns(pl.col(LABELS).cast(pl.Float32))
    rejected = bad.select(REJECTED_SCHEMA.names())
    rejected = rejected if unreadable is None else pl.concat([rejected, unreadable])
    report = ReadReport(
        paths=paths,
        num_read=len(good) + len(rejected),
        num_kept=len(good),
        rejected=rejected,
        notes={**(notes or {}), **_notes(good)},
        row_unit=row_unit,
    )
    return good, check_report(report, skip_bad_rows=skip_bad_rows)


def check_report(report: ReadReport, *, skip_bad_rows: bool, kind: str = "comparison") -> ReadReport:
    """The report with its bad rows in the order of the files; `kind` is what a row of the files is.

    Raises:
        ValueError: There is no row, none is good, or (without `skip_bad_rows`) one is bad; it lists ten.
    """
    files = ", ".join(map(str, report.paths))
    if not report.num_read:
        raise ValueError(f"{files}: no {kind} in it; expected at least one")
    rank = {str(path): i for i, path in reversed(list(enumerate(report.paths)))}
    rejected = report.rejected.sort(pl.col("file").replace_strict(rank, return_dtype=pl.Int64), "row")
    if rejected.is_empty() or (skip_bad_rows and report.num_kept):
        return replace(report, rejected=rejected)
    lines = [f"{len(rejected):,} of {report.num_read:,} rows of {files} are bad:"]
    for file, row, key, reason, detail in rejected.head(NUM_SHOWN).iter_rows():
        lines.append(f"  {file} {report.row_unit} {row}, id {key or 'missing'}: {reason}: {detail}")
    if len(rejected) > NUM_SHOWN:
        lines.append(f"  and {len(rejected) - NUM_SHOWN:,} more")
    way_out = (
        "Correct them, or leave them out with --skip-bad-rows: they are counted and listed in a side file."
    )
    lines.append(way_out if report.num_kept else "No row is good: is this the right file?")
    raise ValueError("\n".join(lines))


def _read_parquet(path: Path) -> pl.DataFrame:
    if not path.is_file():
        found = "is not a file" if path.exists() else "does not exist"
        raise ValueError(
            f"{path} {found}; expected a comparison Parquet. Make it with just prep, or name another"
        )
    what = f"{path} ({path.stat().st_size:,} bytes)"
    with reading(what, way_out="make it again with the script in data_prep/ that wrote it"):
        frame = scan(path).collect()
    if frame.is_empty():
        raise ValueError(f"{path}: no comparison in it; expected at least one")
    return _check_schema(frame, path)


def _check_schema(frame: pl.DataFrame, path: Path | str) -> pl.DataFrame:
    """The frame with the columns of `SCHEMA` first; ValueError where one is missing or of another type.

    Labels become double, for `check_rows`, whatever numbers or truths they are; categories become text.
    """
    missing = [name for name in SCHEMA if name not in frame.columns]
    if missing:
        raise ValueError(
            f"{path} lacks the column{'s' * (len(missing) > 1)} {', '.join(missing)}; "
            f"found {', '.join(frame.columns)}; expected {', '.join(SCHEMA)}"
        )
    types = SCHEMA | dict.fromkeys(LABELS, pl.Float64())
    for name, expected in SCHEMA.items():
        found = frame.schema[name]
        if not fits(found, types[name]):
            raise ValueError(f"{path}: column {name} is {found}, expected {expected}")
    return frame.select(*SCHEMA.names(), pl.exclude(SCHEMA.names())).cast(types)


def _bad_rows(frame: pl.DataFrame, places: pl.DataFrame, row_unit: str) -> pl.DataFrame:
    """`REJECTED_SCHEMA` and `index` (the row of `frame`) of each bad row, first reason that holds."""
    rows = pl.concat([frame.select(SCHEMA.names()).with_row_index("index"), places], how="horizontal").lazy()
    checks = _row_checks()
    is_faulty = pl.any_horizontal(bad for _, bad, _ in checks).fill_null(False)
    place = ("index", "file", "row", "id")
    first = pl.col("index", "file", "row").first().over("source", "id").name.prefix("first_")
    repeated = rows.filter(~is_faulty).select(*place, "source").with_columns(first)
    found = pl.format(f"source {{}} has it in {{}} {row_unit} {{}} too", "source", "first_file", "first_row")
    # rechunk: `pl.format` of polars 2.1 panics where a file (a chunk) has no row left
    faulty = rows.filter(is_faulty).collect().rechunk()
    repeated = repeated.filter(pl.col("index") != pl.col("first_index")).collect().rechunk()
    return pl.concat(
        [
            faulty.select(
                *place,
                reason=pl.coalesce(pl.when(bad).then(pl.lit(reason)) for reason, bad, _ in checks),
                detail=pl.coalesce(pl.when(bad).then(detail) for _, bad, detail in checks),
            ),
            repeated.select(*place, reason=pl.lit("repeated key"), detail=found),
        ]
    )


def _row_checks() -> list[tuple[str, pl.Expr, pl.Expr]]:
    """(reason, is the row bad, what was found); a null in "is the row bad" counts as no."""
    num_turns = [pl.col(name).list.len() for name in TEXTS]
    total = sum(pl.col(name).cast(pl.Float64) for name in LABELS)  # null if one is
    is_given = pl.col(LABELS).is_not_null()
    turns = pl.format("prompt has {} turns, response_a {}, response_b {}", *map(_shown, num_turns))
    labels = pl.format("{}, {}, {}", *(_shown(pl.col(name)) for name in LABELS))
    return [
        (
            "no key",
            pl.any_horizontal(pl.col("id", "source").fill_null("") == ""),
            pl.format("id is {}, source is {}", _shown(pl.col("id")), _shown(pl.col("source"))),
        ),
        ("unequal turn counts", (num_turns[0] != num_turns[1]) | (num_turns[0] != num_turns[2]), turns),
        (
            "no turns",
            pl.any_horizontal(count.fill_null(0) == 0 for count in num_turns),
            pl.format("{}, expected at least 1", turns),
        ),
        (
            "labels that are no probabilities",
            pl.any_horizontal(~pl.col(LABELS).is_finite() | (pl.col(LABELS) < 0))
            | (pl.any_horizontal(is_given) & ~pl.all_horizontal(is_given)),
            pl.format("found {}, expected three numbers from 0 on, or three nulls", labels),
        ),
        (
            "labels that do not sum to 1",
            (total - 1).abs() > LABEL_SUM_TOLERANCE,
            pl.format("found {}, sum {}, expected 1 within 0.001", labels, total.round(6)),
        ),
    ]


def _shown(value: pl.Expr) -> pl.Expr:
    """A value as text, null and "" visible."""
    return value.cast(pl.String).fill_null("null").replace("", '""')


def _notes(frame: pl.DataFrame) -> dict[str, int]:
    """What is fine but worth knowing, in comparisons; only what occurs."""
    counts = frame.select(
        pl.any_horizontal(pl.col(TEXTS).list.drop_nulls().list.len() < pl.col(TEXTS).list.len())
        .sum()
        .alias("with a null turn"),
        pl.any_horizontal(pl.col(TEXTS[1:]).list.contains("")).sum().alias("with an empty answer"),
        (pl.col("response_a") == pl.col("response_b")).sum().alias("with identical answers"),
        (~is_labelled()).sum().alias("without a label"),
    )
    return {name: count for name, count in counts.row(0, named=True).items() if count}
