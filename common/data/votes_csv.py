"""The competition's CSV form, row by row, as the notebook reads it; its rows serve data preparation too.

UTF-8 with a header; every text column is a JSON list with one string or null a turn.
"""

import csv
import io
import json
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import BinaryIO

from common.data.table import TEXTS

REQUIRED = ("id", *TEXTS)
MAX_FIELD_CHARACTERS = 2**30
LONE_SURROGATE = re.compile(r"[\ud800-\udfff]")
"""Half a character; in a cell as read, a byte that is not UTF-8 (0xDC00 + byte)."""


class BadRowError(ValueError):
    """A row that cannot become a comparison: (reason, detail)."""


def open_plain(path: Path) -> BinaryIO:
    """The bytes of a file.

    Raises:
        ValueError: It is not there, or cannot be read.
    """
    if not path.is_file():
        raise ValueError(
            f"{path} {'is not a file' if path.exists() else 'does not exist'}; "
            "expected the competition's CSV: put it there, or name it with --input"
        )
    try:
        return path.open("rb")
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}") from error


def read_rows(
    path: Path, opened: Callable[[Path], AbstractContextManager[BinaryIO]] = open_plain
) -> Iterator[tuple[int, list[str] | BadRowError]]:
    """(first line, cells, or what is wrong) of each row that is not blank, the header too.

    Bytes that are not UTF-8 stay in the cells as lone surrogates, for `check_cells`. After a row with broken
    quotes the next one begins in the next line: one that is left open takes all the rest with it.

    Args:
        path: A CSV.
        opened: Gives its bytes, decompressed if need be.
    """
    line = 1
    limit = csv.field_size_limit(MAX_FIELD_CHARACTERS)  # the default stops at 131,072 characters a cell
    try:
        with opened(path) as binary:
            text = io.TextIOWrapper(binary, encoding="utf-8-sig", errors="surrogateescape", newline="")
            reader = csv.reader(text, strict=True)
            while True:
                try:
                    cells = next(reader, None)
                except csv.Error as error:
                    cells = BadRowError("broken quotes", _describe_broken(error, line, reader.line_num))
                if cells is None:
                    return
                if cells:
                    yield line, cells
                line = reader.line_num + 1
    finally:
        csv.field_size_limit(limit)


def _describe_broken(error: csv.Error, first_line: int, last_line: int) -> str:
    where = f", up to line {last_line}" if last_line > first_line else ""
    return f"{error}{where}: a quote does not close, or something follows one. Is the file cut off?"


def check_cells(header: Sequence[str], cells: Sequence[str] | BadRowError) -> None:
    """BadRowError where a row is broken, is not UTF-8, or has another number of cells than the header."""
    if isinstance(cells, BadRowError):
        raise cells
    if found := _find_undecodable(cells):
        raise BadRowError("not UTF-8", f"found {found}; save the file as UTF-8")
    if len(cells) != len(header):
        hint = "; is the file cut off here?" if len(cells) < len(header) else ""
        raise BadRowError("wrong number of cells", f"found {len(cells)}, expected {len(header)}{hint}")


def _find_undecodable(cells: Sequence[str]) -> str | None:
    """The first byte that is not UTF-8 and what stands before it; None where all is well."""
    for cell in cells:
        if not cell.isascii() and (found := LONE_SURROGATE.search(cell)):
            before = cell[: found.start()][-20:]
            return f"the byte 0x{ord(found[0]) - 0xDC00:02x} after {before!r}"
    return None


def check_header(header: Sequence[str] | BadRowError, path: Path) -> None:
    """ValueError where a header is broken, lacks a column or names one twice."""
    check_header_text(header, path)
    if not header:
        raise ValueError(f"{path} is empty; expected a CSV with the columns {', '.join(REQUIRED)}")
    repeated = sorted({name for name in header if header.count(name) > 1})
    if repeated:
        raise ValueError(
            f"{path}: the header has {', '.join(repeated)} more than once; found {', '.join(header)}"
        )
    missing = [name for name in REQUIRED if name not in header]
    if missing:
        raise ValueError(
            f"{path} lacks the column{'s' * (len(missing) > 1)} {', '.join(missing)}; "
            f"found {', '.join(header)}; expected {', '.join(REQUIRED)}"
        )


def check_header_text(header: Sequence[str] | BadRowError, path: Path) -> None:
    """ValueError where a header is broken or not UTF-8."""
    if isinstance(header, BadRowError):
        raise ValueError(f"{path} line 1: {': '.join(header.args)}")
    if found := _find_undecodable(header):
        raise ValueError(f"{path} is not UTF-8: its header has {found}; save it again as UTF-8")


def parse_texts(
    header: Sequence[str], cells: Sequence[str] | BadRowError
) -> tuple[dict[str, list[str | None]], bool]:
    """(turns of `TEXTS` by column, was a lone surrogate replaced) of one row.

    Raises:
        BadRowError: As of `check_cells`, or a text is no JSON list of strings and nulls.
    """
    check_cells(header, cells)
    texts = {name: _parse_turns(name, cells[header.index(name)]) for name in TEXTS}
    return {name: turns for name, (turns, _) in texts.items()}, any(fixed for _, fixed in texts.values())


def _parse_turns(name: str, text: str) -> tuple[list[str | None], bool]:
    """(turns, was a lone surrogate replaced): no Parquet, no tokenizer can hold half a character."""
    try:
        turns = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadRowError("malformed JSON", f"{name}: {error}; found {text[:60]!r}") from error
    if not isinstance(turns, list) or not all(turn is None or isinstance(turn, str) for turn in turns):
        raise BadRowError(
            "no list of texts", f"{name} is {text[:60]!r}, expected a JSON list of strings or nulls"
        )
    repaired = [turn and LONE_SURROGATE.sub("\N{REPLACEMENT CHARACTER}", turn) for turn in turns]
    return repaired, repaired != turns
