"""How the tests call a script without the price of a process: its own command line, in this interpreter."""

import contextlib
import io
import runpy
import sys
from pathlib import Path
from typing import NamedTuple
from unittest import mock

from helpers import ROOT

from common.locks import release


class Called(NamedTuple):
    """What a script did."""

    status: int
    stdout: str
    stderr: str


def call(script: str, *words: object, check: bool = True) -> Called:
    """Runs stages/<script>.py as `__main__` with a command line; what is no user's mistake is raised.

    Args:
        words: Command line; tuples and lists are spread.
        check: A status other than 0 fails the test.
    """
    argv = [script, *(str(word) for word in flatten(words))]
    stdout, stderr = io.StringIO(), io.StringIO()
    status = 0
    with (
        mock.patch.object(sys, "argv", argv),
        contextlib.redirect_stdout(stdout),
        contextlib.redirect_stderr(stderr),
    ):
        try:
            runpy.run_path(str(ROOT / "stages" / f"{script}.py"), run_name="__main__")
        except SystemExit as end:
            status = end.code or 0
        finally:
            release()  # as the end of a process does
    called = Called(status, stdout.getvalue(), stderr.getvalue())
    assert not (check and status), f"{argv}: status {status}\n{called.stderr}\n{called.stdout}"
    return called


def flatten(words: tuple | list) -> list[object]:
    return [part for word in words for part in (flatten(word) if isinstance(word, tuple | list) else [word])]


def snapshot(folder: Path) -> dict[str, tuple[int, int]]:
    """Every file below a folder with its size and time of change: equal when nothing was written."""
    return {
        str(path.relative_to(folder)): (path.stat().st_size, path.stat().st_mtime_ns)
        for path in folder.rglob("*")
        if path.is_file()
    }
