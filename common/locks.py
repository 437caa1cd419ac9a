"""One writer an output, replacing that loses nothing, and what killed writers left. Standard library only."""

import atexit
import fcntl
import json
import os
import re
import shlex
import shutil
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from socket import gethostname

from common.files import cannot_write, read_json, reason_of

FILE_LEFT = r"\.{}\.[a-z0-9_]{{8}}\.tmp"
FOLDER_LEFT = r"\.{}\.(tmp|old)(-\d+)?"
"""What a killed writer of a name leaves beside it."""

_held: dict[Path, tuple[int | None, list[Path]]] = {}
"""Output -> its locked file, and the folders that were made for that."""


def hold(path: Path | str, *, wait: bool = False) -> None:
    """Takes the right to write `path` until `release` or the end, and mends what killed writers of it left.

    It is a lock of the kernel on a hidden file beside the output, which says who holds it: it ends with the
    process, however that ends. Where no such file can be made or locked (a read-only or an old network file
    system), one line says so and the work goes on. Taken again in the same process, it is the same one.

    Args:
        path: File or folder, which need not be there.
        wait: Wait for another holder, instead of refusing.

    Raises:
        ValueError: Another process holds it; it is named, and when it started.
    """
    real = Path(os.path.realpath(path))
    if real not in _held:
        made = [folder for folder in real.parents if not folder.exists()]
        _held[real] = _take(real, wait), made
    recover(Path(path))


def release(*paths: Path | str) -> None:
    """Gives back what is held: `paths`, or everything."""
    for real in [Path(os.path.realpath(path)) for path in paths] or list(_held):
        fd, made = _held.pop(real)
        if fd is not None:
            remove([_lock_path(real)])
            os.close(fd)
            with suppress(OSError):  # something lies in it
                for folder in made:
                    folder.rmdir()


@contextmanager
def lock(path: Path | str, *, wait: bool = False) -> Iterator[None]:
    """`hold` for a block; what was held before stays so."""
    is_ours = Path(os.path.realpath(path)) in _held
    hold(path, wait=wait)
    try:
        yield
    finally:
        if not is_ours:
            release(path)


def _take(path: Path, wait: bool) -> int | None:
    """The locked file; None where no lock is possible."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        fd = None
        while fd is None:
            try:
                fd = _try(path, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                holder = _holder(path)
                if not wait:
                    raise ValueError(
                        f"{path} is being written by {holder}. Wait for it or end it, or write elsewhere"
                    ) from error
                print(f"waiting for {path}, which is being written by {holder}", file=sys.stderr)
                fd = _try(path, fcntl.LOCK_EX)
    except (FileExistsError, NotADirectoryError) as error:
        raise cannot_write(path, error) from error
    except OSError as error:
        reason = f"no lock beside it is possible ({reason_of(error)})"
        print(f"{path}: {reason}; start nothing else that writes it meanwhile", file=sys.stderr)
        return None
    who = {"host": gethostname(), "process": os.getpid(), "command": shlex.join(sys.argv)}
    who["start"] = datetime.now().astimezone().isoformat(" ", "seconds")
    with suppress(OSError):  # a full disk: the lock holds without a name
        os.ftruncate(fd, 0)
        os.write(fd, json.dumps(who).encode())
    return fd


def _try(path: Path, how: int) -> int | None:
    """The locked file; None where its last holder has removed it meanwhile."""
    fd, is_there = os.open(_lock_path(path), os.O_RDWR | os.O_CREAT, 0o666), False
    try:
        fcntl.flock(fd, how)
        with suppress(OSError):
            is_there = os.path.samestat(os.fstat(fd), _lock_path(path).stat())
    finally:
        if not is_there:
            os.close(fd)
    return fd if is_there else None


def _holder(path: Path) -> str:
    try:
        who = read_json(_lock_path(path))
        started = f"started {who['start']}: {who['command']}"
        return f"process {who['process']} on {who['host']} ({started})"
    except (ValueError, KeyError):  # it is about to write its name
        return "another process"


def _lock_path(path: Path) -> Path:
    return path.with_name(f".{path.name}.lock")


def _forget() -> None:
    """In a forked child (a data loader's worker): the locks are its parent's, and end with that."""
    for fd, _ in _held.values():
        if fd is not None:
            os.close(fd)
    _held.clear()


os.register_at_fork(after_in_child=_forget)
atexit.register(release)


def recover(path: Path) -> None:
    """Puts back an old `path` that lies aside with nothing in its place; removes what else was left of it.

    Call it under the lock of `path`.
    """
    for left in leftovers(path.parent, re.escape(path.name)):
        if left.name.startswith(f".{path.name}.old") and not os.path.lexists(path):
            with suppress(OSError):
                left.replace(path)
        else:
            remove([left])


def leftovers(folder: Path, name: str = ".+") -> list[Path]:
    """What killed writers left in a folder, of all names that fit a regular expression."""
    try:
        entries = sorted(folder.iterdir())
    except OSError:
        return []
    patterns = {is_folder: (FILE_LEFT, FOLDER_LEFT)[is_folder].format(name) for is_folder in (False, True)}
    return [entry for entry in entries if re.fullmatch(patterns[entry.is_dir()], entry.name)]


def remove(paths: Iterable[Path]) -> None:
    """Removes files and whole folders, as far as the system lets us."""
    for path in paths:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            with suppress(OSError):
                path.unlink()


def move_in(new: Path, path: Path) -> None:
    """Gives a whole new folder the name of an old one, under its lock: old aside, new in, old away."""
    try:
        if os.path.lexists(path):
            path.replace(path.with_name(f".{path.name}.old"))
        new.replace(path)
    finally:
        recover(path)


@contextmanager
def replacing_folder(path: Path | str) -> Iterator[Path]:
    """Yields an empty temporary folder beside `path` that takes the name `path` when the block succeeds.

    An existing `path` is removed only after the new folder has its name.

    Raises:
        ValueError: The parent folder cannot be written, the disk is full, or another process writes `path`.
            The old folder stays.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp")
    with lock(path):
        try:
            temporary.mkdir(parents=True)
            yield temporary
            move_in(temporary, path)
        except OSError as error:
            raise cannot_write(path, error) from error
        finally:
            remove([temporary])
