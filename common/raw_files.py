"""Raw files and hub data sets of any shape -> one lazy frame with the columns that a script wants.

Parquet is scanned where it lies. CSV, JSON lines (plain, gzip or zstd) and hub data sets become a temporary
Parquet first, text row by row, so that a bad row is named by its line; everything after is one code path.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import polars as pl
import pyarrow.parquet as pq

from common.competition_csv import BadRowError
from common.files import file_hash
from common.pairs import REJECTED_SCHEMA
from common.raw_text import conform, csv_rows, json_rows, open_csv, whole

KINDS = (".parquet", ".csv", ".jsonl", ".ndjson", ".json")
COMPRESSIONS = (".gz", ".zst")
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
ROWS_PER_GROUP = 20_000
PLACES = {"file": pl.String, "row": pl.Int64}
"""Where a row comes from: its file, and its row there (Parquet and hub, from 0) or line (text, from 1)."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Raw:
    """What was asked for, not read yet."""

    frame: pl.LazyFrame
    """The wanted columns, then `PLACES`; rows in the order of the inputs."""
    rejected: pl.DataFrame
    """`REJECTED_SCHEMA`: rows of text files that could not be read."""
    num_repaired: int
    """Rows of text files in which half of a surrogate pair was replaced by U+FFFD."""
    inputs: tuple[dict[str, object], ...]
    """Name, size in bytes and sha256 of each file or hub data set, for a manifest."""
    row_unit: str
    """What `row` counts: "row" of a Parquet, "line" of a text file, "row or line" where both were given."""

    @property
    def paths(self) -> tuple[Path, ...]:
        """The names of the inputs, as in the column `file`."""
        return tuple(Path(str(one["name"])) for one in self.inputs)


def open_raw(inputs: Sequence[str], schema: Mapping[str, pl.DataType], scratch: Path) -> Raw:
    """Opens files and hub data sets as one frame.

    Args:
        inputs: Paths, or hub ids OWNER/NAME (an existing path wins), read in this order. A folder stands for
            the Parquets in it, or if there are none the CSV and JSON lines files, by name; where some begin
            with "train", for those.
        schema: Wanted columns and their types; whole numbers become text where text is wanted and a CSV's
            text becomes numbers where those are wanted, nothing else is converted. Further columns of the
            inputs are not read; a wanted one that is absent is an error unless its name ends in "?", which
            makes it null.
        scratch: Existing folder for temporary files.

    Raises:
        ValueError: An input is not there, cannot be read, or lacks a column or has it in another type.
    """
    frames, rejected, described, repaired, units = [], [], [], 0, set()
    for number, (name, path) in enumerate(fetch(inputs, scratch)):
        described.append(_describe(name, path))
        target = scratch / f"{number}.converted.parquet"
        units.add("row" if _kind(path) == ".parquet" else "line")
        if _kind(path) == ".parquet":
            frames.append(_scan(path, name, schema))
            continue
        bad, fixed = _convert(path, name, schema, target)
        rejected += bad
        repaired += fixed
        frames.append(pl.scan_parquet(target, glob=False))
    return Raw(
        frame=pl.concat(frames),
        rejected=pl.DataFrame(rejected, schema=REJECTED_SCHEMA, orient="row"),
        num_repaired=repaired,
        inputs=tuple(described),
        row_unit=" or ".join(sorted(units, reverse=True)),
    )


def fetch(inputs: Sequence[str], scratch: Path) -> list[tuple[str, Path]]:
    """(name, file) of each input: folders become their files, hub data sets temporary Parquets.

    Raises:
        ValueError: No input was given, or one is not there.
    """
    if not inputs:
        raise ValueError("no input was given; name files or a hub id (OWNER/NAME) with --input")
    found = []
    for number, name in enumerate(inputs):
        path = Path(name).expanduser()
        if path.is_dir():
            found += [(str(file), file) for file in _files_of(path)]
        elif path.exists():
            found.append((str(Path(name)), path))
        else:
            found.append((name, _from_hub(name, scratch / f"{number}.hub.parquet")))
    return found


def column_names(path: Path) -> list[str]:
    """The columns of a file: of its schema, its header, or its first line that is a JSON object.

    Raises:
        ValueError: The file cannot be read.
    """
    _check_file(path)
    if _kind(path) == ".parquet":
        with reading([str(path)]):
            return pl.scan_parquet(path, glob=False, hive_partitioning=False).collect_schema().names()
    if _kind(path) == ".csv":
        with open_csv(path) as reader:
            return next(reader, [])
    return next((list(row) for _, row in json_rows(path, {}) if isinstance(row, dict)), [])


def _files_of(folder: Path) -> list[Path]:
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    files = [file for file in files if not any(part[0] == "." for part in file.relative_to(folder).parts)]
    parquets = [file for file in files if file.suffix == ".parquet"]
    texts = [file for file in files if re.search(r"\.(csv|jsonl|ndjson)(\.gz|\.zst)?$", file.name)]
    found = parquets or texts
    if not found:
        raise ValueError(f"{folder} holds no Parquet, CSV or JSON lines file; name another folder or a file")
    return [file for file in found if file.name.startswith("train")] or found


@contextmanager
def reading(inputs: Sequence[str]) -> Iterator[None]:
    """Turns what polars says of a broken Parquet while it streams into a ValueError that names the files."""
    try:
        yield
    except (OSError, pl.exceptions.PolarsError, pl.exceptions.PanicException) as error:
        first_line = (str(error).splitlines() or [type(error).__name__])[0]
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


def _describe(name: str, path: Path) -> dict[str, object]:
    _check_file(path)
    return {"name": name, "bytes": path.stat().st_size, "sha256": file_hash(path)}


def _check_file(path: Path) -> None:
    _kind(path)
    if path.stat().st_size == 0:
        raise ValueError(f"{path} is empty; get the file again")


def _from_hub(name: str, target: Path) -> Path:
    """The train split of a hub data set as Parquet."""
    if not HUB_ID.fullmatch(name):
        raise ValueError(f"{name} does not exist; expected a file, or a hub id OWNER/NAME")
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


def _scan(path: Path, name: str, schema: Mapping[str, pl.DataType]) -> pl.LazyFrame:
    """A Parquet's wanted columns, lazily, with places."""
    with reading([name]):
        frame = pl.scan_parquet(path, glob=False, hive_partitioning=False)
        found = frame.collect_schema()
    columns = []
    for wanted, kind in schema.items():
        column = wanted.removesuffix("?")
        if column not in found:
            if not wanted.endswith("?"):
                raise ValueError(f"{name} lacks the column {column}; found {', '.join(found)}")
            columns.append(pl.lit(None, kind).alias(column))
            continue
        if not _fits(found[column], kind):
            raise ValueError(f"{name}: column {column} is {found[column]}, expected {kind}")
        columns.append(_taken(pl.col(column), found[column], kind).alias(column))
    return frame.with_row_index("row").select(
        *columns, pl.lit(name).alias("file"), pl.col("row").cast(pl.Int64)
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


def _convert(
    path: Path, name: str, schema: Mapping[str, pl.DataType], target: Path
) -> tuple[list[tuple], int]:
    """A text file -> Parquet with places, in groups of rows; (rejected rows, repaired rows)."""
    rejected, num_repaired, rows = [], 0, []
    columns = {wanted.removesuffix("?"): kind for wanted, kind in schema.items()}
    full = pl.Schema(columns | PLACES)
    writer = pq.ParquetWriter(target, pl.DataFrame(schema=full).to_arrow().schema, compression="zstd")
    with writer:

        def flush() -> None:
            if rows:
                writer.write_table(pl.DataFrame(rows, schema=full, orient="row").to_arrow())
                rows.clear()

        read = csv_rows if _kind(path) == ".csv" else json_rows
        for line, values in read(path, schema):
            try:
                if isinstance(values, BadRowError):
                    raise values
                conformed = [conform(values.get(c), kind, c) for c, kind in columns.items()]
            except BadRowError as bad:
                rejected.append((name, line, _key_of(values, columns), *map(whole, bad.args)))
                continue
            num_repaired += any(fixed for _, fixed in conformed)
            rows.append((*(value for value, _ in conformed), name, line))
            if len(rows) >= ROWS_PER_GROUP:
                flush()
        flush()
    return rejected, num_repaired


def _key_of(values: object, columns: Mapping[str, pl.DataType]) -> str | None:
    """The first wanted column that is called an id, for a message."""
    if not isinstance(values, dict):
        return None
    key = next((values[name] for name in columns if name.endswith("id") and name in values), None)
    return None if key is None else whole(str(key)[:100])
