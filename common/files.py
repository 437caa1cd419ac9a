"""Files that appear whole or not at all, and their fingerprints. Standard library only."""

import hashlib
import json
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

LARGE = 10**8
"""Bytes from which the hash of a file is worth remembering."""
_known: dict[tuple[int, ...], str] = {}

Rule = tuple[Callable[[Any], bool], str]
"""Whether a value of a JSON file fits, and in words what fits."""
TEXT: Rule = (lambda value: isinstance(value, str) and value != "", "a text")
SHA256: Rule = (
    lambda value: isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) is not None,
    "a sha256 of 64 hexadecimal digits",
)


@contextmanager
def replacing(path: Path | str) -> Iterator[Path]:
    """Yields a temporary path beside `path`; what was written there becomes `path` when the block succeeds.

    Args:
        path: File to create or replace; missing parent folders are made.

    Raises:
        ValueError: The folder cannot be written or the disk is full. The old file stays.
    """
    path = Path(path)
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
        os.close(handle)
        temporary = Path(name)
        yield temporary
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        temporary.chmod(0o644)
        temporary.replace(path)
    except OSError as error:
        raise cannot_write(path, error) from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def cannot_write(path: Path, error: OSError) -> ValueError:
    """The error that says so."""
    return ValueError(
        f"cannot write {path}: {reason_of(error)}; nothing was changed. "
        "Free some space or choose a folder that you may write to."
    )


def reason_of(error: OSError) -> str:
    """What the system said, in clearer words where they are misleading ("File exists")."""
    if isinstance(error, FileExistsError | NotADirectoryError):
        return "a file stands where that path needs a folder"
    return error.strerror or str(error)


def write_json(path: Path | str, value: object) -> None:
    """Writes `value` as indented JSON, atomically."""
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def read_json(path: Path | str) -> dict:
    """Reads a JSON object.

    Raises:
        ValueError: The file is absent or is not a JSON object.
    """
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a JSON {type(value).__name__}, expected an object")
    return value


def number(least: float, most: float, *, whole: bool = False) -> Rule:
    """A number between two, both included; NaN is in no range, and True is no number."""
    types, words = ((int,), "a whole number") if whole else ((int, float), "a number")
    return lambda value: type(value) in types and least <= value <= most, f"{words} from {least} to {most}"


def or_null(rule: Rule) -> Rule:
    """What the rule allows, or null."""
    return lambda value: value is None or rule[0](value), f"{rule[1]}, or null"


def list_of(rule: Rule, length: object = None) -> Rule:
    """A list with an entry or more that all fit the rule; `length` of them where that is given."""
    return (
        lambda value: (
            isinstance(value, list)
            and len(value) == (len(value) or 1 if length is None else length)
            and all(map(rule[0], value))
        ),
        f"a list of {'' if length is None else f'{length} entries, each '}{rule[1]}",
    )


def check_fields(path: Path | str, found: dict, rules: Mapping[str, Rule], *, way_out: str) -> None:
    """Compares what a JSON file holds with what is expected of it; further fields may be there.

    Args:
        path: The file.
        found: What it holds.
        rules: By field; "a.b" is the field b of the object a.
        way_out: What to do about it.

    Raises:
        ValueError: A field is absent or does not fit; the first one is named.
    """
    for name, (fits, expected) in rules.items():
        value: Any = found
        for key in name.split("."):
            value = value.get(key, ...) if isinstance(value, dict) else ...
        if value is ... or not fits(value):
            told = "is absent" if value is ... else f"is {value!r:.80}"
            raise ValueError(f"{path}: {name} {told}, expected {expected}; {way_out}")


def confined(folder: Path | str, name: str) -> Path:
    """The regular file of a plain relative name below a folder, looked at before it is opened.

    A link must stay in the folder. Where the folder is a snapshot of the Hugging Face hub's cache
    (models--X--Y/snapshots/REVISION), it may also lead to a blob of the same repository.

    Raises:
        ValueError: The name leads elsewhere, or what stands there is absent or no regular file (a pipe, say).
    """
    parts = name.split("/")
    if not all(parts) or not {".", ".."}.isdisjoint(parts) or "\\" in name or "\0" in name:
        raise ValueError(f"{folder}: {name!r} is no plain name of a file below that folder: do not use it")
    path, root = Path(folder, name), Path(folder).resolve()
    try:
        target = path.resolve(strict=True)
    except (OSError, RuntimeError) as error:  # RuntimeError: links in a circle
        raise ValueError(
            f"{path} cannot be read: {error}. It is missing; fetch or copy it again from where it came"
        ) from error
    repository = root.parent.parent
    is_snapshot = root.parent.name == "snapshots" and repository.name.startswith("models--")
    if not target.is_relative_to(root) and not (is_snapshot and target.parent == repository / "blobs"):
        raise ValueError(
            f"{path} leads to {target}, outside of {folder}; if that file is meant, put a copy in its place"
        )
    if not target.is_file():
        raise ValueError(f"{path} is no regular file (a folder, pipe or device); put the file in its place")
    return path


def file_hash(path: Path | str) -> str:
    """sha256 of a file's bytes, as 64 hexadecimal digits."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def known_hash(path: Path) -> str:
    """`file_hash`; of a large file that did not change since, what this process has found before."""
    stat = path.stat()
    if stat.st_size < LARGE:
        return file_hash(path)
    key = (stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)
    if key not in _known:
        _known[key] = file_hash(path)
    return _known[key]


def text_hash(*texts: str) -> str:
    """sha256 over texts, each closed by its length, so that ("ab", "c") and ("a", "bc") differ."""
    digest = hashlib.sha256()
    for text in texts:
        data = text.encode("utf-8", "surrogatepass")
        digest.update(data + len(data).to_bytes(8, "little"))
    return digest.hexdigest()
