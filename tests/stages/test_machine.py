"""What a machine is asked: crashes, hangs and damage become answers."""

import os
import time
from types import SimpleNamespace

import huggingface_hub
import polars as pl
import pytest
from huggingface_hub import errors

from common.doctor import machine
from common.doctor.machine import Answers, Gpu
from common.ops import OPS

TABLE = """#!/bin/sh
case "$*" in
  *query-gpu*) printf '{rows}'; exit {status};;
  *) echo '| NVIDIA-SMI 580.1   Driver Version: 580.1   CUDA Version: 13.0   |';;
esac
"""


def put_nvidia_smi(folder, monkeypatch, rows, status=0, script=None):
    folder.mkdir(exist_ok=True)
    path = folder / "nvidia-smi"
    path.write_text(script or TABLE.format(rows=rows, status=status))
    path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")


def put_module(folder, name, text, monkeypatch):
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.py").write_text(text)
    monkeypatch.setenv("PYTHONPATH", str(folder))


def test_a_module_that_raises_is_an_answer(tmp_path, monkeypatch):
    put_module(tmp_path, "broken_extension", "raise OSError('undefined symbol: x\\nmore')", monkeypatch)
    answers = machine.ask("import", "json", "broken_extension", timeout_s=20)
    assert answers == Answers({"json": "", "broken_extension": "OSError: undefined symbol: x"}, "")


def test_a_crash_is_named_and_earlier_answers_stay(tmp_path, monkeypatch):
    put_module(tmp_path, "crashing", "import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)", monkeypatch)
    answers = machine.ask("import", "json", "crashing", timeout_s=20)
    assert answers == Answers({"json": ""}, "crashes (SIGSEGV)")


def test_a_hang_ends(tmp_path, monkeypatch):
    text = "import subprocess, time\nsubprocess.Popen(['sleep', '6'])\ntime.sleep(60)"
    put_module(tmp_path, "hanging", text, monkeypatch)
    began = time.monotonic()
    answers = machine.ask("import", "json", "hanging", timeout_s=1)
    assert answers == Answers({"json": ""}, "no answer within 1 s")
    assert time.monotonic() - began < 5, "waited for a process that the hung one left behind"


def test_an_exit_at_import_is_no_answer(tmp_path, monkeypatch):
    put_module(tmp_path, "leaving", "import sys\nsys.exit('no licence')", monkeypatch)
    assert machine.ask("import", "leaving", timeout_s=20) == Answers({}, "no licence")


def test_the_ops_are_asked_themselves():
    assert machine.ask("torch", timeout_s=60).facts["ops"] == {op: list(table) for op, table in OPS.items()}


def test_no_nvidia_smi_is_no_driver(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert machine.query_driver() is None


def test_gpus_are_read(tmp_path, monkeypatch):
    rows = "NVIDIA A100-SXM4-80GB, 81920, 8.0, 580.1\\nTesla T4, [N/A], [N/A], 580.1\\n"
    put_nvidia_smi(tmp_path, monkeypatch, rows)
    driver = machine.query_driver()
    assert (driver.version, driver.cuda, driver.failure) == ("580.1", "13.0", "")
    assert driver.gpus[0].capability == (8, 0) and driver.gpus[0].memory_gb == pytest.approx(85.899, abs=1e-3)
    assert driver.gpus[1] == Gpu("Tesla T4", None, None)


@pytest.mark.parametrize(
    ("rows", "status", "failure"),
    [
        (
            "Failed to initialize NVML: Driver/library version mismatch\\n",
            18,
            "Failed to initialize NVML: Dri",
        ),
        ("", 9, "nvidia-smi: status 9"),
        ("No devices were found\\n", 6, ""),
    ],
)
def test_a_driver_without_gpus(tmp_path, monkeypatch, rows, status, failure):
    put_nvidia_smi(tmp_path, monkeypatch, rows, status)
    driver = machine.query_driver()
    assert driver.gpus == () and driver.failure.startswith(failure) and bool(driver.failure) == bool(failure)


def test_a_driver_that_hangs_or_cannot_start(tmp_path, monkeypatch):
    put_nvidia_smi(tmp_path, monkeypatch, "", script="#!/bin/sh\nexec sleep 20\n")
    assert "timed out" in machine.query_driver(timeout_s=0.3).failure
    put_nvidia_smi(tmp_path, monkeypatch, "", script="#!/no/such/shell\n")
    assert "No such file" in machine.query_driver().failure


def test_rows_are_records_not_lines(tmp_path):
    path = tmp_path / "train.csv"
    path.write_text('id,prompt\n1,"two\nlines, ""quoted"""\n2,b\n')
    assert machine.count_rows(path) == 2


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'id,prompt\n1,a\n2,"cut he', "after 1 rows"),
        (b"id,prompt\n1,a\n2", "the last of 2 rows has 1 cells, the header 2"),
        (b"id,prompt\n1,\xff\xfe\n", "damaged"),
        (b"id,prompt\n", "no rows"),
        (b"", "no rows"),
    ],
)
def test_a_damaged_csv(tmp_path, content, message):
    path = tmp_path / "train.csv"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        machine.count_rows(path)


def test_a_parquet_file_whole_and_cut(tmp_path):
    path = tmp_path / "a.parquet"
    pl.DataFrame({"id": range(7)}).write_parquet(path)
    assert machine.count_rows(path) == 7
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match="not a whole Parquet file"):
        machine.count_rows(path)


# The hub


@pytest.mark.parametrize(
    ("kind", "status", "access"),
    [
        (None, 200, "open"),
        (errors.GatedRepoError, 403, "gated"),
        (errors.RepositoryNotFoundError, 401, "refused"),
        (errors.HfHubHTTPError, 503, "the hub answers 503"),
        (ConnectionError, 0, "no network (ConnectionError)"),
    ],
)
def test_access_follows_from_the_hubs_answer(monkeypatch, kind, status, access):
    def reply(url, timeout):
        assert url.endswith("google/gemma-2-9b-it/resolve/main/config.json") and timeout <= 5
        if kind is ConnectionError:
            raise ConnectionError("unreachable")
        if kind:
            raise kind("no", response=SimpleNamespace(status_code=status, headers={}, request=None))

    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", reply)
    assert machine._ask_access("google/gemma-2-9b-it") == access


@pytest.mark.parametrize(("status", "name"), [(200, "ada"), (401, ""), (500, None)])
def test_the_name_follows_from_the_hubs_answer(monkeypatch, status, name):
    answer = SimpleNamespace(status_code=status, json=lambda: {"name": "ada"})
    session = SimpleNamespace(get=lambda url, headers, timeout: answer)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "hf_x")
    monkeypatch.setattr(huggingface_hub.utils, "get_session", lambda: session)
    assert machine._ask_name() == name
