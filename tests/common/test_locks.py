"""One writer at a time, and a kill at any moment that leaves a whole result, old or new."""

import errno
import itertools
import os
import signal
import sys
from pathlib import Path

import pytest
from helpers import HELD, held_elsewhere

import bundle
import submit
import verify
from common import locks
from common.files import replacing
from common.locks import hold, leftovers, lock, release, replacing_folder
from common.train.recipe import by_flags

CHANGES = {"os.rename", "os.remove", "os.rmdir", "os.mkdir"}
"""Audited changes of the disk; os.replace is an os.rename there."""


def in_child(function, *, kill_at: int | None = None) -> int:
    """Exit status of a forked process that runs `function`, and ends at a change of the disk.

    Neither a handler nor a `finally` sees that end, as it is with SIGKILL.
    """
    if pid := os.fork():
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    numbers = itertools.count()

    def end(event, _):
        if event in CHANGES and next(numbers) == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    try:
        sys.addaudithook(end)
        function()
        os._exit(0)
    except BaseException:
        os._exit(1)


def refused_in_child(path: Path) -> bool:
    def take():
        with pytest.raises(ValueError, match=f"is being written by process {os.getppid()} on .*started 20"):
            hold(path)

    return in_child(take) == 0


# One writer


def test_the_second_process_is_refused_until_the_first_lets_go(tmp_path):
    path = tmp_path / "deep" / "x"
    with lock(path):
        assert refused_in_child(path)
        with lock(path):  # as a function below another one does
            pass
        (tmp_path / "link").symlink_to(tmp_path / "deep")
        assert refused_in_child(tmp_path / "link" / "x"), "the same folder by another name"
        assert refused_in_child(path), "neither the inner one nor a refused start gave it back"
    assert [one.name for one in tmp_path.iterdir()] == ["link"], "nothing was written, nothing stays"
    assert in_child(lambda: hold(path)) == 0


def test_a_killed_process_holds_nothing(tmp_path):
    def die():
        hold(tmp_path / "x")
        os.kill(os.getpid(), signal.SIGKILL)

    assert in_child(die) == -signal.SIGKILL
    assert (tmp_path / ".x.lock").exists()
    with lock(tmp_path / "x"):
        assert refused_in_child(tmp_path / "x")


def test_a_forked_child_neither_holds_nor_gives_back(tmp_path):
    with lock(tmp_path / "x"):
        assert in_child(release) == 0
        assert (tmp_path / ".x.lock").exists() and refused_in_child(tmp_path / "x")


@pytest.mark.parametrize("fails", ["open", "flock"])
def test_where_no_lock_is_possible_that_is_said_and_the_work_goes_on(tmp_path, monkeypatch, capsys, fails):
    open_file = os.open

    def fail(path, *arguments, **flags):
        if fails == "flock" or str(path).endswith(".lock"):
            raise OSError(errno.ENOLCK, "No locks available")
        return open_file(path, *arguments, **flags)

    monkeypatch.setattr(*((os, "open") if fails == "open" else (locks.fcntl, "flock")), fail)
    with replacing_folder(tmp_path / "x") as folder:
        (folder / "a").touch()
    assert (tmp_path / "x/a").exists()
    [line] = capsys.readouterr().err.splitlines()
    reason = "no lock beside it is possible (No locks available)"
    assert line == f"{tmp_path / 'x'}: {reason}; start nothing else that writes it meanwhile"


@pytest.mark.parametrize("script", [bundle, verify, submit])
def test_a_bundle_has_one_writer(tmp_path, script):
    from tyro import cli

    kind = bundle.Args if script is bundle else by_flags(script.Args)
    with held_elsewhere(tmp_path / "bundle"), pytest.raises(ValueError, match=HELD):
        script.main(cli(kind, args=["--artifacts", str(tmp_path)]))
    assert [path.name for path in tmp_path.iterdir()] == [".bundle.lock"]


# A kill


def write_folder(path: Path, text: str) -> None:
    with replacing_folder(path) as folder:
        for name in ("a", "b"):
            (folder / name).write_text(text)


def write_file(path: Path, text: str) -> None:
    with lock(path), replacing(path) as temporary:
        temporary.write_text(text)


def write_by_submit(path: Path, text: str) -> None:
    """`submit.main`, where building and proving are nothing."""
    args = submit.Args(build=bundle.Args(output=path), proof=verify.Proof())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bundle, "describe", lambda _: {})
        patch.setattr(bundle, "is_same", lambda *_: False)
        patch.setattr(bundle, "build", lambda manifest, args, folder, earlier: write_folder(folder, text))
        patch.setattr(verify, "verify", lambda *_: None)
        submit.main(args)


def content(path: Path) -> set[str]:
    return {one.read_text() for one in ((path / "a", path / "b") if path.is_dir() else (path,))}


@pytest.mark.parametrize("write", [write_folder, write_file, write_by_submit])
def test_a_kill_at_any_change_of_the_disk_leaves_one_whole_result(tmp_path, write):
    path, statuses = tmp_path / "x", []
    write(path, "old")
    for number in itertools.count():
        statuses.append(in_child(lambda: write(path, "new"), kill_at=number))
        with lock(path):
            assert content(path) in ({"old"}, {"new"}), f"killed at change {number}"
        write(path, "old")
        assert content(path) == {"old"} and [one.name for one in tmp_path.iterdir()] == ["x"]
        if statuses[-1] != -signal.SIGKILL:
            break
    assert statuses[-1] == 0 and len(statuses) > (2 if write is write_file else 6)


def test_a_new_folder_that_cannot_take_the_name_leaves_the_old_one(tmp_path, monkeypatch):
    write_folder(tmp_path / "x", "old")
    replace = os.replace

    def fail(source, target):
        if str(source).endswith(".tmp"):
            raise OSError(errno.EIO, "Input/output error")
        replace(source, target)

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(ValueError, match=r"cannot write .*Input/output error; nothing was changed"):
        write_folder(tmp_path / "x", "new")
    assert content(tmp_path / "x") == {"old"} and [one.name for one in tmp_path.iterdir()] == ["x"]


def test_leftovers_are_ours_by_their_whole_name(tmp_path):
    ours = {".x.tmp", ".x.tmp-12", ".x.old", ".x.old-7"}
    others = {".x.tmp.lock", ".xy.tmp", ".x.tmpfs", ".y.x.tmp", "x.tmp", ".x.old.zip"}
    for name in ours | others:
        (tmp_path / name).mkdir()
    (tmp_path / ".x.abcd0_12.tmp").touch()
    for name in (".x.parquet.abcd0_12.tmp", ".x.tmp-13", ".x.notes.tmp"):
        (tmp_path / name).touch()
    assert {path.name for path in leftovers(tmp_path, "x")} == ours | {".x.abcd0_12.tmp"}
    with lock(tmp_path / "x"):
        left = {path.name for path in tmp_path.iterdir()}
    assert left == others | {".x.parquet.abcd0_12.tmp", ".x.tmp-13", ".x.notes.tmp", "x", ".x.lock"}
