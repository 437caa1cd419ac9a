"""Raw files and hub data sets of any shape -> one lazy frame with the columns that a script wants.

Parquet is scanned where it lies. CSV, JSON lines (plain, gzip or zstd) and Parquet whose texts hold JSON
become a temporary Parquet first, row by row, so that a bad row is named by its line; everything after is one
code path.
"""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import gettempdir
from typing import NamedTuple

import polars as pl
import pyarrow.parquet as pq

from common.data.chats import stable_key
from common.data.sources.rows import (
    absent_columns,
    conform_column,
    csv_header,
    csv_rows,
    json_rows,
    parquet_rows,
    whole,
)
from common.data.table import LABELS, REJECTED_SCHEMA, TEXTS, ReadReport, check_rows
from common.data.votes_csv import BadRowError
from common.files import file_hash

KINDS = (".parquet", ".csv", ".jsonl", ".ndjson", ".json")
COMPRESSIONS = (".gz", ".zst")
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
ROWS_PER_GROUP = 20_000
PLACES = {"file": pl.String, "row": pl.Int64}
"""Where a row comes from: its file, and its row there (Parquet and hub, from 0) or line (text, from 1)."""


class RawFile(NamedTuple):
    """One file that was asked for, in a folder or from the hub perhaps."""

    path: Path
    description: dict[str, object]
    """For a manifest: name, as the user knows it (a path, or a hub id), size in bytes and sha256."""

    @property
    def name(self) -> str:
        """As in the description."""
        return str(self.description["name"])

    @property
    def is_json_lines(self) -> bool:
        """Whether its rows may have different columns."""
        return _kind(self.path) not in (".parquet", ".csv")


@dataclass(frozen=True, kw_only=True, eq=False)
class Raw:
    """What files hold, not read yet."""

    frame: pl.LazyFrame
    """The wanted columns, then `PLACES`; rows in the order of the files."""
    rejected: pl.DataFrame
    """`REJECTED_SCHEMA`: rows that could not be read."""
    num_repaired: int
    """Rows of text files in which half of a surrogate pair was replaced by U+FFFD."""
    names: tuple[str, ...]
    """Of the files, as in the column `file`."""
    row_units: frozenset[str]
    """What `row` counts: "row" of a Parquet, "line" of a text file, or both."""

    @property
    def row_unit(self) -> str:
        """The same in words: "row", "line", "row or line"."""
        return " or ".join(sorted(self.row_units, reverse=True))

    @property
    def notes(self) -> dict[str, int]:
        """What is worth knowing, for a report."""
        return {"with a lone surrogate replaced by U+FFFD": self.num_repaired} if self.num_repaired else {}


def fetch(inputs: Sequence[str], scratch: Path) -> tuple[RawFile, ...]:
    """Finds what is asked for: folders become their files, hub data sets temporary Parquets.

    Args:
        inputs: Paths, or hub ids OWNER/NAME (an existing path wins). A folder stands for the Parquets in it,
            or if there are none the CSV and JSON lines files, by name; where some begin with "train", for
            those.
        scratch: Existing folder for temporary files.

    Raises:
        ValueError: No input was given, or one is not there, is empty or of an unknown kind.
    """
    if not inputs:
        raise ValueError("no input was given; name files or a hub id (OWNER/NAME) with --input")
    found: list[tuple[str, Path]] = []
    for number, name in enumerate(inputs):
        path = _expanded(name)
        if path.is_dir():
            found += [(str(file), file) for file in _files_of(path)]
        elif path.exists() or path.is_symlink():
            found.append((str(path), path))
        else:
            found.append((name, _from_hub(name, scratch / f"{number}.hub.parquet")))
    return tuple(_described(name, path) for name, path in found)


def _expanded(name: str) -> Path:
    """The path that a name stands for; "~" is a home folder unless there is a file of just that name."""
    if not name:
        raise ValueError("an --input is empty; name a file, a folder or a hub id OWNER/NAME")
    try:
        return Path(name) if os.path.lexists(name) else Path(name).expanduser()
    except RuntimeError:  # no such user
        return Path(name)


def _described(name: str, path: Path) -> RawFile:
    try:
        name.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"the file name {name!r} is not UTF-8, so no manifest holds it; rename it"
        ) from error
    _kind(path)
    size = path.stat().st_size
    if size == 0:
        raise ValueError(f"{path} is empty; get the file again")
    return RawFile(path, {"name": name, "bytes": size, "sha256": file_hash(path)})


def open_raw(files: Sequence[RawFile], schema: Mapping[str, pl.DataType], scratch: Path) -> Raw:
    """Opens files as one frame, in this order: `open_file` of each, `merge` of all."""
    raws = [open_file(file, schema, scratch / f"raw-{i}.parquet") for i, file in enumerate(files)]
    return merge(raws, [raw.frame for raw in raws])


def open_file(file: RawFile, schema: Mapping[str, pl.DataType], converted: Path) -> Raw:
    """Opens a file.

    Args:
        file: As of `fetch`.
        schema: Wanted columns and their types, as of `rows.conform_column`; numbers are read from the
            texts of a CSV. Further columns are not read; a wanted one that is absent is an error unless
            its name ends in "?", which makes it null.
        converted: Parquet to write where the file is of another kind; it must stay as long as the frame.

    Raises:
        ValueError: The file cannot be read, or lacks a column or has it in another type.
    """
    rejected, num_repaired = [], 0
    if _kind(file.path) == ".parquet" and not _holds_json(file, schema):
        frame = _scan(file, schema)
    else:
        rejected, num_repaired = _convert(file, schema, converted)
        frame = pl.scan_parquet(converted, glob=False)
    return Raw(
        frame=frame,
        rejected=pl.DataFrame(rejected, schema=REJECTED_SCHEMA, orient="row"),
        num_repaired=num_repaired,
        names=(file.name,),
        row_units=frozenset({"row" if _kind(file.path) == ".parquet" else "line"}),
    )


def merge(raws: Sequence[Raw], frames: Sequence[pl.LazyFrame]) -> Raw:
    """Several raws as one; `frames` are what became of theirs, with the same columns by now."""
    return Raw(
        frame=pl.concat(frames),
        rejected=pl.concat(raw.rejected for raw in raws),
        num_repaired=sum(raw.num_repaired for raw in raws),
        names=tuple(name for raw in raws for name in raw.names),
        row_units=frozenset().union(*(raw.row_units for raw in raws)),
    )


def check_raw(
    raw: Raw,
    rows: pl.DataFrame,
    *,
    rejected: pl.DataFrame | None = None,
    notes: Mapping[str, int] | None = None,
    skip_bad_rows: bool = False,
) -> tuple[pl.DataFrame, ReadReport]:
    """`table.check_rows` for rows of raw files; of rows with one key the same stays in any row order.

    Args:
        raw: Where they come from; its unreadable rows join the report.
        rows: Comparisons (`SCHEMA`), further columns, `PLACES`.
        rejected: `REJECTED_SCHEMA` of further bad rows.
        notes: Further notes.
        skip_bad_rows: Leave bad rows out instead of failing.

    Returns:
        The good rows without `PLACES`, sorted by source and id, and the report.

    Raises:
        ValueError: As of `check_rows`.
    """
    content = [*map(stable_key, map(pl.col, TEXTS)), "model_a", "model_b", *LABELS]
    rows = rows.sort("source", "id", *content, nulls_last=True)
    return check_rows(
        rows.drop(PLACES),
        rows.select(*PLACES),
        paths=tuple(map(Path, raw.names)),
        row_unit=raw.row_unit,
        unreadable=raw.rejected if rejected is None else pl.concat([raw.rejected, rejected]),
        notes={**raw.notes, **(notes or {})},
        skip_bad_rows=skip_bad_rows,
    )


def column_names(file: RawFile) -> list[str]:
    """The columns of a file: of its schema, its header, or of any of its JSON objects.

    Raises:
        ValueError: The file cannot be read.
    """
    match _kind(file.path):
        case ".parquet":
            return _parquet_schema(file).names()
        case ".csv":
            return csv_header(file.path)
    fields: dict[str, None] = {}
    for _, values, _ in json_rows(file.path, {}):
        fields |= dict.fromkeys(map(whole, values))
    return list(fields)


def _files_of(folder: Path) -> list[Path]:
    """A folder's files, as `fetch` takes them; ValueError for what cannot be read, lest its rows be lost."""
    files = sorted(_walk(folder))
    parquets = [file for file in files if file.suffix == ".parquet"]
    texts = [file for file in files if re.search(r"\.(csv|jsonl|ndjson)(\.gz|\.zst)?$", file.name)]
    found = parquets or texts
    if not found:
        raise ValueError(f"{folder} holds no Parquet, CSV or JSON lines file; name another folder or a file")
    return [file for file in found if file.name.startswith("train")] or found


def _walk(folder: Path) -> Iterator[Path]:
    """Files below a folder, through links, but for hidden ones; broken links too, which nobody can read."""

    def refuse(error: OSError) -> None:
        raise ValueError(f"{error.filename} cannot be read: {error.strerror}") from error

    seen = set()
    for where, folders, names in os.walk(folder, followlinks=True, onerror=refuse):
        is_loop = os.path.realpath(where) in seen
        seen.add(os.path.realpath(where))
        folders[:] = [] if is_loop else sorted(name for name in folders if name[0] != ".")
        yield from (Path(where) / name for name in names if name[0] != "." and not is_loop)


@contextmanager
def reading(inputs: Sequence[str]) -> Iterator[None]:
    """Turns what polars says of a broken Parquet while it streams into a ValueError that names the files."""
    try:
        yield
    except (OSError, pl.exceptions.PolarsError, pl.exceptions.PanicException) as error:
        first_line = (str(error).splitlines() or [type(error).__name__])[0]
        if "No space left" in first_line:
            raise ValueError(
                f"no space is left for temporary files in {gettempdir()}; free some, or set TMPDIR to "
                "another folder"
            ) from error
        raise ValueError(f"{', '.join(inputs)} cannot be read: {first_line}. Get the file again") from error


def _kind(path: Path) -> str:
    """ ".jsonl" of "votes.jsonl.gz"; ValueError for another ending."""
    kind = path.with_suffix("").suffix if path.suffix in COMPRESSIONS else path.suffix
    is_known = kind in KINDS and not (kind == ".parquet" and path.suffix in COMPRESSIONS)
    if not path.is_file() or not is_known:
        what = "is not a file" if not path.is_file() else "has an ending that is not known"
        raise ValueError(
            f"{path} {what}; expected {', '.join(KINDS)}, the text ones also with {' or '.join(COMPRESSIONS)}"
        )
    return kind


def _from_hub(name: str, target: Path) -> Path:
    """The train split of a hub data set as Parquet."""
    if not HUB_ID.fullmatch(name) or name.endswith((*KINDS, *COMPRESSIONS)):
        raise ValueError(
            f"{name} does not exist; expected a file, a folder or a hub id OWNER/NAME: put it there, or name "
            "another"
        )
    import datasets  # slow to import, and only hub ids need it

    try:
        datasets.load_dataset(name, split="train").to_parquet(target)
    except Exception as error:  # the library and its network stack raise anything
        reason = (str(error).splitlines() or [""])[0]
        raise ValueError(
            f"{name} is no file here, and was not fetched from the hub: {type(error).__name__}: {reason} "
            "- check the name; accept the licence on its page and run hf auth login if it is gated; offline, "
            "download it elsewhere and name its files"
        ) from error
    return target


def _parquet_schema(file: RawFile) -> pl.Schema:
    with reading([file.name]):
        return pl.scan_parquet(file.path, glob=False, hive_partitioning=False).collect_schema()


def _holds_json(file: RawFile, schema: Mapping[str, pl.DataType]) -> bool:
    """Whether a Parquet has texts where lists are wanted: what CSV files become on the hub."""
    found = _parquet_schema(file)
    return any(
        isinstance(kind, pl.List) and found.get(wanted.removesuffix("?")) == pl.String
        for wanted, kind in schema.items()
    )


def _scan(file: RawFile, schema: Mapping[str, pl.DataType]) -> pl.LazyFrame:
    """A Parquet's wanted columns, lazily, with places."""
    found = _parquet_schema(file)
    _check_columns(file, schema, found.names())
    columns = []
    for wanted, kind in schema.items():
        column = wanted.removesuffix("?")
        if column not in found:
            columns.append(pl.lit(None, kind).alias(column))
            continue
        if not _fits(found[column], kind):
            raise ValueError(f"{file.name}: column {column} is {found[column]}, expected {kind}")
        columns.append(_taken(pl.col(column), found[column], kind).alias(column))
    frame = pl.scan_parquet(file.path, glob=False, hive_partitioning=False).select(columns)
    return frame.with_row_index("row").select(
        pl.exclude("row"), pl.lit(file.name).alias("file"), pl.col("row").cast(pl.Int64)
    )


def _check_columns(file: RawFile, schema: Mapping[str, pl.DataType], found: Sequence[str]) -> None:
    if absent := absent_columns(schema, found):
        expected = [name for name in schema if not name.endswith("?")]
        raise ValueError(
            f"{file.name} lacks the column{'s' * (len(absent) > 1)} {', '.join(absent)}; "
            f"found {', '.join(found) or 'none'}; expected {', '.join(expected)}"
        )


def _fits(found: pl.DataType, wanted: pl.DataType, *, is_column: bool = True) -> bool:
    """Whether a column can be taken as it is, a whole number as text, any as float, fields left out."""
    if isinstance(wanted, pl.List):
        return isinstance(found, pl.List) and _fits(found.inner, wanted.inner, is_column=False)
    if isinstance(wanted, pl.Struct):
        if not isinstance(found, pl.Struct):
            return False
        fields = {field.name: field.dtype for field in found.fields}
        return all(
            f.name in fields and _fits(fields[f.name], f.dtype, is_column=False) for f in wanted.fields
        )
    if wanted == pl.String:
        return found in (pl.String, pl.Null) or (is_column and found.is_integer())
    if wanted == pl.Float64:
        return found == pl.Null or found.is_numeric()
    return found == wanted


def _taken(column: pl.Expr, found: pl.DataType, wanted: pl.DataType) -> pl.Expr:
    """The column in the wanted type: fields of structs in the wanted order, others left out."""
    if found == wanted:
        return column
    if isinstance(wanted, pl.List):
        return column.list.eval(_taken(pl.element(), found.inner, wanted.inner))
    if isinstance(wanted, pl.Struct):
        fields = {field.name: field.dtype for field in found.fields}
        parts = [
            _taken(column.struct.field(f.name), fields[f.name], f.dtype).alias(f.name) for f in wanted.fields
        ]
        return pl.when(column.is_not_null()).then(pl.struct(parts))
    return column.cast(wanted)


def _convert(file: RawFile, schema: Mapping[str, pl.DataType], target: Path) -> tuple[list[tuple], int]:
    """Any file -> Parquet with places, in groups of rows; (rejected rows, repaired rows)."""
    kind = _kind(file.path)
    if kind in (".csv", ".parquet"):
        _check_columns(file, schema, column_names(file))
    read = {".csv": csv_rows, ".parquet": parquet_rows}.get(kind, json_rows)
    rejected, num_repaired, rows = [], 0, []
    columns = {wanted.removesuffix("?"): kind for wanted, kind in schema.items()}
    full = pl.Schema(columns | PLACES)
    writer = pq.ParquetWriter(target, pl.DataFrame(schema=full).to_arrow().schema, compression="zstd")
    with reading([file.name]), writer:

        def flush() -> None:
            if rows:
                writer.write_table(pl.DataFrame(rows, schema=full, orient="row").to_arrow())
                rows.clear()

        for row, values, problem in read(file.path, schema):
            try:
                if problem is not None:
                    raise problem
                conformed = [conform_column(values.get(c), kind, c) for c, kind in columns.items()]
            except BadRowError as bad:
                rejected.append((file.name, row, _key_of(values, columns), *map(whole, bad.args)))
                continue
            num_repaired += any(fixed for _, fixed in conformed)
            rows.append((*(value for value, _ in conformed), file.name, row))
            if len(rows) >= ROWS_PER_GROUP:
                flush()
        flush()
    return rejected, num_repaired


def _key_of(values: Mapping[str, object], columns: Mapping[str, pl.DataType]) -> str | None:
    """The first wanted column that is called an id, for a message."""
    key = next((values[name] for name in columns if name.endswith("id") and name in values), None)
    return None if key is None else whole(str(key)[:100])
