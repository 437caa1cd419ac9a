"""Files that appear whole or not at all, and their fingerprints. Standard library only."""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


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
        raise ValueError(
            f"cannot write {path}: {_reason(error)}; nothing was changed. "
            "Free some space or choose a folder that you may write to."
        ) from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


@contextmanager
def replacing_folder(path: Path | str) -> Iterator[Path]:
    """Yields an empty temporary folder beside `path` that takes the name `path` when the block succeeds.

    An existing `path` is removed only after the new folder is whole.

    Raises:
        ValueError: The parent folder cannot be written or the disk is full. The old folder stays.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    old = path.with_name(f".{path.name}.old-{os.getpid()}")
    try:
        shutil.rmtree(temporary, ignore_errors=True)  # of a killed process whose number has come round again
        temporary.mkdir(parents=True)
        yield temporary
        if path.exists():
            path.replace(old)
        temporary.replace(path)
    except OSError as error:
        raise ValueError(
            f"cannot write {path}: {_reason(error)}; nothing was changed. "
            "Free some space or choose a folder that you may write to."
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def _reason(error: OSError) -> str:
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


def file_hash(path: Path | str) -> str:
    """sha256 of a file's bytes, as 64 hexadecimal digits."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def text_hash(*texts: str) -> str:
    """sha256 over texts, each closed by its length, so that ("ab", "c") and ("a", "bc") differ."""
    digest = hashlib.sha256()
    for text in texts:
        data = text.encode("utf-8", "surrogatepass")
        digest.update(data + len(data).to_bytes(8, "little"))
    return digest.hexdigest()
