"""Processes that fail: one message, the status of the one that failed, and nothing of the launcher's own."""

import re
import signal
import sys

import pytest
from helpers import ROOT, run_script
from launching import free_port
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from common.train import launcher

CONNECTED = """
import os, sys
import torch
from common.console import clear_errors

with clear_errors():
    torch.distributed.init_process_group("gloo")
    if os.environ["RANK"] == "1":
        exec(sys.argv[1])
    torch.distributed.all_reduce(torch.ones(1))
"""


def failed(rank, exitcode):
    failure = ProcessFailure(local_rank=rank, pid=1, exitcode=exitcode, error_file="<N/A>")
    return ChildFailedError("stages/stage1.py", {rank: failure})


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (failed(0, 1), 1, ""),
        (failed(1, 2), 2, ""),
        (failed(1, -signal.SIGKILL), 137, "error: process 1 was ended by SIGKILL, perhaps because .* memory"),
        (failed(0, -signal.SIGSEGV), 139, "error: process 0 was ended by SIGSEGV$"),
        (SignalException("ended", signal.SIGINT), 130, ""),
        (ValueError("no such configuration"), 1, "error: no such configuration"),
    ],
)
def test_every_end_of_a_launch_is_a_status_and_at_most_one_line(monkeypatch, capsys, error, status, said):
    def launch(args):
        raise error

    monkeypatch.setenv("LOGLEVEL", "ERROR")  # nothing of this process is silenced
    monkeypatch.setattr(sys, "argv", ["launcher", "stages/stage1.py"])
    monkeypatch.setattr(launcher, "launch_command", launch)
    with pytest.raises(SystemExit) as end:
        launcher.main()
    assert end.value.code == status
    found = capsys.readouterr().err
    assert re.search(said, found) and len(found.splitlines()) == bool(said)


@pytest.mark.parametrize(
    ("code", "status", "said"),
    [
        ("1 / 0", 1, "ZeroDivisionError: division by zero"),
        ("os.kill(os.getpid(), 9)", 137, "error: process 1 was ended by SIGKILL"),
    ],
)
def test_what_happens_to_another_process_alone_is_seen(tmp_path, code, status, said):
    """The first one loses the connection to it, and does not speak of that."""
    (tmp_path / "connected.py").write_text(CONNECTED)
    flags = ("--config_file", "accelerate_configs/ddp.yaml", "--num_processes", 2)
    words = ("common.train.launcher", *flags, "--main_process_port", free_port())
    found = run_script(
        "-m", *words, tmp_path / "connected.py", code, environment={"PYTHONPATH": str(ROOT)}, timeout=120
    )
    assert found.returncode == status and said in found.stderr.splitlines()[-1], found.stderr
    assert found.stderr.count("Error") == found.stderr.count("Traceback") == (status == 1), found.stderr
