"""The competition's CSV form, row by row: what data preparation and the notebook both read.

UTF-8 with a header; every text column is a JSON list with one string or null a turn.
"""

import csv
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from common.pairs import LABELS, TEXTS

REQUIRED = ("id", *TEXTS)
MAX_FIELD_CHARACTERS = 2**30
LONE_SURROGATE = re.compile(r"[\ud800-\udfff]")


class BadRowError(ValueError):
    """A row that cannot become a comparison: (reason, detail)."""


def read_rows(path: Path) -> Iterator[tuple[int, list[str]]]:
    """(first line, cells) of each row that is not blank, the header too."""
    if not path.is_file():
        raise ValueError(
            f"{path} {'is not a file' if path.exists() else 'does not exist'}; "
            "expected the competition's CSV: put it there, or name it with --input"
        )
    line = 1
    limit = csv.field_size_limit(MAX_FIELD_CHARACTERS)  # the default stops at 131,072 characters a cell
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, strict=True)
            for cells in reader:
                if cells:
                    yield line, cells
                line = reader.line_num + 1
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8: {_find_undecodable(path)}; save it again as UTF-8") from error
    except csv.Error as error:
        raise ValueError(
            f"{path} line {line}: the row that begins here is broken ({error}): a quote does not close, "
            "or something follows a closing quote. Is the file cut off? Get it again."
        ) from error
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}") from error
    finally:
        csv.field_size_limit(limit)


def _find_undecodable(path: Path) -> str:
    """Where the first byte is that is not UTF-8 (a stream's error counts from its last chunk only)."""
    data = path.read_bytes()
    try:
        data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        return f"byte 0x{data[error.start]:02x} at offset {error.start:,} (line {line:,}), {error.reason}"
    raise AssertionError(f"{path} changed while it was read")


def check_header(header: Sequence[str], path: Path) -> None:
    """ValueError where a header lacks a column, names one twice, or has some of the three labels only."""
    if not header:
        raise ValueError(f"{path} is empty; expected a CSV with the columns {', '.join(REQUIRED)}")
    repeated = sorted({name for name in header if header.count(name) > 1})
    if repeated:
        raise ValueError(
            f"{path}: the header has {', '.join(repeated)} more than once; found {', '.join(header)}"
        )
    given = [name for name in LABELS if name in header]
    missing = [name for name in (*REQUIRED, *(LABELS if given else ())) if name not in header]
    if missing:
        raise ValueError(
            f"{path} lacks the column{'s' * (len(missing) > 1)} {', '.join(missing)}; "
            f"found {', '.join(header)}; expected {', '.join(REQUIRED)}, and {', '.join(LABELS)} if voted on"
        )


def parse_texts(header: Sequence[str], cells: Sequence[str]) -> tuple[dict[str, list[str | None]], bool]:
    """(turns of `TEXTS` by column, was a lone surrogate replaced) of one row.

    Raises:
        BadRowError: The number of cells is not the header's, or a text is no JSON list of strings and nulls.
    """
    if len(cells) != len(header):
        hint = "; is the file cut off here?" if len(cells) < len(header) else ""
        raise BadRowError("wrong number of cells", f"found {len(cells)}, expected {len(header)}{hint}")
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
