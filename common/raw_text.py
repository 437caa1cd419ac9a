"""Text files, row by row: CSV and JSON lines, plain, gzip or zstd; a bad row is an answer, not an end."""

import csv
import io
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import polars as pl
import pyarrow as pa

from common.competition_csv import LONE_SURROGATE, MAX_FIELD_CHARACTERS, BadRowError

NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)
MAX_NUMBER = 1e300
"""Scores and labels are finite; JSON as Python reads it also has NaN, Infinity and endless integers."""


def whole(text: str) -> str:
    """Half a surrogate pair fits into no Parquet."""
    return LONE_SURROGATE.sub("\N{REPLACEMENT CHARACTER}", text)


def conform(value: object, kind: pl.DataType, name: str) -> tuple[object, bool]:
    """A JSON value as a column's type wants it, and whether half of a surrogate pair was replaced.

    Raises:
        BadRowError: It is of another type.
    """
    if value is None:
        return None, False
    if isinstance(kind, pl.List):
        if isinstance(value, list):
            parts = [conform(part, kind.inner, f"{name}[{i}]") for i, part in enumerate(value)]
            return [part for part, _ in parts], any(fixed for _, fixed in parts)
    elif isinstance(kind, pl.Struct):
        if isinstance(value, dict):
            parts = {f.name: conform(value.get(f.name), f.dtype, f"{name}.{f.name}") for f in kind.fields}
            return {n: part for n, (part, _) in parts.items()}, any(fixed for _, fixed in parts.values())
    elif kind == pl.String:
        if isinstance(value, str):
            repaired = whole(value)
            return repaired, repaired != value
        is_column = "." not in name and not name.endswith("]")
        if is_column and isinstance(value, int) and not isinstance(value, bool):  # an id
            return str(value), False
    elif isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < MAX_NUMBER:
        return float(value), False
    raise BadRowError("wrong type", f"{name} is {str(value)[:60]!r}, expected {kind}")


def json_rows(path: Path, schema: Mapping[str, pl.DataType]) -> Iterator[tuple[int, dict | BadRowError]]:
    """(line, values by field, or what is wrong) of each line that is not blank."""
    with _open_binary(path) as file:
        for line, data in enumerate(file, start=1):
            if not data.strip():
                continue
            try:
                values = json.loads(data.decode("utf-8-sig" if line == 1 else "utf-8"))
            except UnicodeDecodeError as error:
                yield line, BadRowError("not UTF-8", f"byte 0x{data[error.start]:02x} at {error.start}")
                continue
            except (ValueError, RecursionError) as error:
                hint = "" if data.endswith(b"\n") else "; is the file cut off here?"
                yield line, BadRowError("malformed JSON", f"{error}{hint}")
                continue
            if not isinstance(values, dict):
                yield line, BadRowError("no JSON object", f"found {str(values)[:60]!r}")
                continue
            absent = [name for name in schema if not name.endswith("?") and name not in values]
            if absent:
                yield line, BadRowError("missing field", f"{', '.join(absent)}; found {', '.join(values)}")
                continue
            yield line, values


def csv_rows(path: Path, schema: Mapping[str, pl.DataType]) -> Iterator[tuple[int, dict | BadRowError]]:
    """(first line, values by column, or what is wrong) of each row that is not blank."""
    kinds = {name.removesuffix("?"): kind for name, kind in schema.items()}
    with open_csv(path) as reader:
        header = next(reader, [])
        repeated = sorted({name for name in header if header.count(name) > 1 and name in kinds})
        if repeated:
            raise ValueError(f"{path}: the header has {', '.join(repeated)} more than once; name each once")
        absent = [name for name in schema if not name.endswith("?") and name not in header]
        if absent:
            raise ValueError(
                f"{path} lacks the column{'s' * (len(absent) > 1)} {', '.join(absent)}; "
                f"found {', '.join(header) or 'no header'}"
            )
        line = reader.line_num + 1
        for cells in reader:
            if cells:
                yield line, _csv_values(header, cells, kinds)
            line = reader.line_num + 1


def _csv_values(
    header: Sequence[str], cells: Sequence[str], kinds: Mapping[str, pl.DataType]
) -> dict | BadRowError:
    if len(cells) != len(header):
        hint = "; is the file cut off here?" if len(cells) < len(header) else ""
        return BadRowError("wrong number of cells", f"found {len(cells)}, expected {len(header)}{hint}")
    values: dict[str, object] = dict(zip(header, cells, strict=True))
    for name, kind in kinds.items():
        cell = str(values.get(name, ""))
        if isinstance(kind, pl.List) and name in values:
            try:
                values[name] = json.loads(cell)
            except (ValueError, RecursionError) as error:
                return BadRowError("malformed JSON", f"{name}: {error}; found {cell[:60]!r}")
        elif kind != pl.String and NUMBER.fullmatch(cell):
            values[name] = float(cell)
        elif kind != pl.String and not cell:
            values[name] = None
    return values


@contextmanager
def open_csv(path: Path) -> Iterator["csv.Reader"]:
    """Rows of cells; ValueError that names the line where the text or its quotes are broken."""
    limit = csv.field_size_limit(MAX_FIELD_CHARACTERS)  # the default stops at 131,072 characters a cell
    reader = None
    try:
        with _open_binary(path) as binary:
            reader = csv.reader(io.TextIOWrapper(binary, encoding="utf-8-sig", newline=""), strict=True)
            yield reader
    except UnicodeDecodeError as error:
        line = reader.line_num + 1
        raise ValueError(
            f"{path} is not UTF-8, soon after line {line}: {error.reason}, byte "
            f"0x{error.object[error.start]:02x}; save it again as UTF-8"
        ) from error
    except csv.Error as error:
        raise ValueError(
            f"{path}: the row up to line {reader.line_num} is broken ({error}): a quote does not close "
            "or something follows a closing quote. Is the file cut off? Get it again"
        ) from error
    finally:
        csv.field_size_limit(limit)


@contextmanager
def _open_binary(path: Path) -> Iterator[BinaryIO]:
    """A file's bytes, decompressed as they are read; ValueError where the archive is broken."""
    compression = {".gz": "gzip", ".zst": "zstd"}.get(path.suffix)
    try:
        with io.BufferedReader(pa.input_stream(str(path), compression=compression)) as file:
            yield file
    except (OSError, pa.ArrowException) as error:
        raise ValueError(f"{path} cannot be read: {error}; is it cut off? Get it again") from error
