"""Raw rows, one at a time: CSV, JSON lines, Parquet that holds JSON; a bad row is an answer, not an end."""

import io
import json
import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import closing, contextmanager
from decimal import Decimal
from pathlib import Path
from typing import BinaryIO

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from common.data.votes_csv import LONE_SURROGATE, BadRowError, check_cells, check_header_text, read_rows

NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)
MAX_NUMBER = 1e300
"""Scores and labels are finite; JSON as Python reads it also has NaN, Infinity and endless integers."""


def whole(text: str) -> str:
    """Half a surrogate pair fits into no Parquet."""
    return LONE_SURROGATE.sub("\N{REPLACEMENT CHARACTER}", text)


def conform_column(value: object, kind: pl.DataType, name: str) -> tuple[object, bool]:
    """A raw value as a column's type wants it, and whether half of a surrogate pair was replaced.

    Where a list is wanted, a text is read as JSON; where a text is wanted, a whole number becomes one (ids).

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
        return str(value), False
    return _conform(value, kind, name)


def _conform(value: object, kind: pl.DataType, name: str) -> tuple[object, bool]:
    if value is None:
        return None, False
    if isinstance(kind, pl.List):
        if isinstance(value, list):
            parts = [_conform(part, kind.inner, f"{name}[{i}]") for i, part in enumerate(value)]
            return [part for part, _ in parts], any(fixed for _, fixed in parts)
    elif isinstance(kind, pl.Struct):
        if isinstance(value, dict):
            if absent := [f.name for f in kind.fields if f.name not in value]:
                found = ", ".join(map(str, value)) or "nothing"
                raise BadRowError("missing field", f"{name} has {found[:60]}, but no {', '.join(absent)}")
            parts = {f.name: _conform(value[f.name], f.dtype, f"{name}.{f.name}") for f in kind.fields}
            return {n: part for n, (part, _) in parts.items()}, any(fixed for _, fixed in parts.values())
    elif kind == pl.String:
        if isinstance(value, str):
            repaired = whole(value)
            return repaired, repaired != value
    elif isinstance(value, int | float | Decimal) and not isinstance(value, bool) and abs(value) < MAX_NUMBER:
        return float(value), False
    raise BadRowError("wrong type", f"{name} is {str(value)[:60]!r}, expected {kind}")


Row = tuple[int, dict[str, object], BadRowError | None]
"""Its line or number; its values by column, all that are known; what is wrong with it."""


def json_rows(path: Path, schema: Mapping[str, pl.DataType]) -> Iterator[Row]:
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
                values = json.loads(data.decode("utf-8-sig" if line == 1 else "utf-8"))
            except UnicodeDecodeError as error:
                found = f"found the byte 0x{data[error.start]:02x} at {error.start}; save the file as UTF-8"
                yield line, {}, BadRowError("not UTF-8", found)
                continue
            except (ValueError, RecursionError) as error:
                hint = "" if data.endswith(b"\n") else "; is the file cut off here?"
                yield line, {}, BadRowError("malformed JSON", f"{error}{hint}")
                continue
            if not isinstance(values, dict):
                yield line, {}, BadRowError("no JSON object", f"found {str(values)[:60]!r}")
                continue
            bad = None
            if absent := absent_columns(schema, values):
                bad = BadRowError("missing field", f"{', '.join(absent)}; found {', '.join(values)}")
            yield line, values, bad


def csv_rows(path: Path, schema: Mapping[str, pl.DataType]) -> Iterator[Row]:
    """Each row that is not blank, numbered by its first line: texts, and numbers where those are wanted.

    Raises:
        ValueError: The header is broken, or names a column twice.
    """
    kinds = {name.removesuffix("?"): kind for name, kind in schema.items()}
    with closing(read_rows(path, _open_binary)) as rows:
        _, header = next(rows, (1, []))
        check_header_text(header, path)
        repeated = sorted({name for name in header if header.count(name) > 1 and name in kinds})
        if repeated:
            raise ValueError(f"{path}: the header has {', '.join(repeated)} more than once; name each once")
        for line, cells in rows:
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
    return float(cell) if NUMBER.fullmatch(cell) else cell or None


def csv_header(path: Path) -> list[str]:
    """The columns of a CSV; ValueError where its first line is broken."""
    with closing(read_rows(path, _open_binary)) as rows:
        _, header = next(rows, (1, []))
    check_header_text(header, path)
    return header


def parquet_rows(path: Path, schema: Mapping[str, pl.DataType]) -> Iterator[Row]:
    """Each row, numbered from 0: for columns whose texts hold JSON."""
    wanted = {name.removesuffix("?") for name in schema}
    row = 0
    try:
        file = pq.ParquetFile(path)
        for batch in file.iter_batches(columns=[name for name in file.schema_arrow.names if name in wanted]):
            for values in batch.to_pylist():
                yield row, values, None
                row += 1
    except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read: {error}; is it cut off? Get it again") from error


def absent_columns(schema: Mapping[str, pl.DataType], found: Collection[str]) -> list[str]:
    """Wanted columns that are not there; those whose name ends in "?" need not be."""
    return [name for name in schema if not name.endswith("?") and name not in found]


@contextmanager
def _open_binary(path: Path) -> Iterator[BinaryIO]:
    """A file's bytes, decompressed as they are read; ValueError where the archive is broken."""
    compression = {".gz": "gzip", ".zst": "zstd"}.get(path.suffix)
    try:
        with io.BufferedReader(pa.input_stream(str(path), compression=compression)) as file:
            yield file
    except (OSError, pa.ArrowException) as error:
        raise ValueError(f"{path} cannot be read: {error}; is it cut off? Get it again") from error
