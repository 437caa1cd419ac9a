"""Raw rows, one at a time: CSV, JSON lines, Parquet that holds JSON; a bad row is an answer, not an end."""

import io
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from decimal import Decimal
from itertools import islice
from pathlib import Path
from typing import BinaryIO

import polars as pl
import pyarrow as pa

from common.data.sources.find import COMPRESSIONS, RawFile, columns_of
from common.data.table import reading, scan
from common.data.votes_csv import LONE_SURROGATE, BadRowError, check_cells, check_header_text, read_rows

TRUTHS = {"true": 1.0, "false": 0.0}
"""Votes of a CSV, in any case."""
NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)
MAX_NUMBER = 1e300
"""Scores and labels are finite; JSON as Python reads it also has NaN, Infinity and endless integers."""
ROWS_AT_ONCE = 20_000

Row = tuple[int, dict[str, object], BadRowError | None]
"""Its line or number; its values by column, all that are known; what is wrong with it."""


def json_rows(path: Path, _: Mapping[str, pl.DataType]) -> Iterator[Row]:
    """Each line that is not blank, numbered from 1; ValueError where the file is a JSON list."""
    is_first = True
    with _open_binary(path) as file:
        for line, data in enumerate(file, start=1):
            if not data.strip():
                continue
            if is_first and data.lstrip(b"\xef\xbb\xbf \t").startswith(b"["):
                raise ValueError(f"{path} begins with a list; expected one JSON object a line (JSON lines)")
            is_first = False
            try:
                yield line, _json_object(data, "utf-8-sig" if line == 1 else "utf-8"), None
            except BadRowError as bad:
                yield line, {}, bad


def _json_object(data: bytes, encoding: str) -> dict[str, object]:
    """One line of JSON lines; BadRowError where it is something else."""
    try:
        values = json.loads(data.decode(encoding))
    except UnicodeDecodeError as error:
        found = f"found the byte 0x{data[error.start]:02x} at {error.start}; save the file as UTF-8"
        raise BadRowError("not UTF-8", found) from error
    except (ValueError, RecursionError) as error:
        hint = "" if data.endswith(b"\n") else "; is the file cut off here?"
        raise BadRowError("malformed JSON", f"{error}{hint}") from error
    if not isinstance(values, dict):
        raise BadRowError("no JSON object", f"found {str(values)[:60]!r}")
    return values


def csv_rows(path: Path, schema: Mapping[str, pl.DataType]) -> Iterator[Row]:
    """Each row that is not blank, numbered by its first line: texts, and numbers where those are wanted.

    Raises:
        ValueError: The header is broken, or names a column twice.
    """
    kinds = {name.removesuffix("?"): kind for name, kind in schema.items()}
    header = _csv_header(path)
    repeated = sorted({name for name in header if header.count(name) > 1 and name in kinds})
    if repeated:
        raise ValueError(f"{path}: the header has {', '.join(repeated)} more than once; name each once")
    with closing(read_rows(path, _open_binary)) as rows:
        for line, cells in islice(rows, 1, None):
            texts = {} if isinstance(cells, BadRowError) else dict(zip(header, cells, strict=False))
            try:
                check_cells(header, cells)
            except BadRowError as bad:
                yield line, texts, bad
                continue
            numbers = {name: _number(texts[name]) for name in header if kinds.get(name) == pl.Float64}
            yield line, texts | numbers, None


def _number(cell: str) -> float | str | None:
    """A cell as a number, an empty one as null, another as it is."""
    return float(cell) if NUMBER.fullmatch(cell) else TRUTHS.get(cell.lower(), cell or None)


def parquet_rows(path: Path, schema: Mapping[str, pl.DataType]) -> Iterator[Row]:
    """Each row, numbered from 0: for columns whose texts hold JSON."""
    wanted = scan(path).select(pl.col(*(f"^{re.escape(name.removesuffix('?'))}$" for name in schema)))
    start = 0
    while len(rows := wanted.slice(start, ROWS_AT_ONCE).collect()):
        yield from ((start + i, values, None) for i, values in enumerate(rows.iter_rows(named=True)))
        start += len(rows)


ROW_READERS = {"csv": csv_rows, "json": json_rows, "parquet": parquet_rows}


def column_names(file: RawFile) -> list[str]:
    """The columns of a file: of its schema, its header, or of any of its JSON objects.

    Raises:
        ValueError: The file cannot be read.
    """
    if file.kind == "parquet":
        return columns_of(file.path, file.name).names()
    with reading(file.name):
        if file.kind == "csv":
            return _csv_header(file.path)
        rows = json_rows(file.path, {})
        return list(dict.fromkeys(whole(name) for _, values, _ in rows for name in values))


def _csv_header(path: Path) -> list[str]:
    with closing(read_rows(path, _open_binary)) as rows:
        _, header = next(rows, (1, []))
    check_header_text(header, path)
    return header


@contextmanager
def _open_binary(path: Path) -> Iterator[BinaryIO]:
    """A file's bytes, decompressed as they are read."""
    compression = COMPRESSIONS.get(path.suffix.lower())
    with io.BufferedReader(pa.input_stream(str(path), compression=compression)) as file:
        yield file


def conform_column(value: object, kind: pl.DataType, name: str, repaired: list[str]) -> object:
    """A raw value as a column's type wants it.

    Where a list is wanted, a text is read as JSON; where a text is wanted, a whole number becomes one (ids).

    Args:
        value: Of a CSV, of JSON or of a Parquet.
        kind: Text, number, or lists and structs of these.
        name: Of the column, for messages.
        repaired: Gets the names of the texts in which half of a surrogate pair is replaced.

    Raises:
        BadRowError: It is of another type, or no JSON.
    """
    if isinstance(kind, pl.List) and isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise BadRowError("malformed JSON", f"{name}: {error}; found {value[:60]!r}") from error
        if value is None:
            raise BadRowError("wrong type", f"{name} is 'null', expected {kind}")
    elif kind == pl.String and isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    return _conform(value, kind, name, repaired)


def _conform(value: object, kind: pl.DataType, name: str, repaired: list[str]) -> object:
    if value is None:
        return None
    if isinstance(kind, pl.List) and isinstance(value, list):
        return [_conform(part, kind.inner, f"{name}[{i}]", repaired) for i, part in enumerate(value)]
    if isinstance(kind, pl.Struct) and isinstance(value, dict):
        fields = {field.name: field.dtype for field in kind.fields}
        if absent := [field for field in fields if field not in value]:
            found = ", ".join(map(str, value)) or "nothing"
            raise BadRowError("missing field", f"{name} has {found[:60]}, but no {', '.join(absent)}")
        return {
            field: _conform(value[field], of, f"{name}.{field}", repaired) for field, of in fields.items()
        }
    if kind == pl.String and isinstance(value, str):
        text = whole(value)
        repaired += [name] if text != value else []
        return text
    if kind == pl.Float64 and isinstance(value, int | float | Decimal) and abs(value) < MAX_NUMBER:
        return float(value)
    raise BadRowError("wrong type", f"{name} is {str(value)[:60]!r}, expected {kind}")


def whole(text: str) -> str:
    """Half a surrogate pair fits into no Parquet."""
    return LONE_SURROGATE.sub("\N{REPLACEMENT CHARACTER}", text)
