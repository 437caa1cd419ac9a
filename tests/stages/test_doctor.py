"""The doctor as a whole: what is needed where, the status, and no traceback whatever is broken."""

import os
import subprocess
import sys

import polars as pl
import pytest
from helpers import ROOT

from common.doctor import diagnosis
from common.doctor.diagnosis import FINE, MISSING, NOT_NEEDED, Line
from common.models.zoo import ZOO
from stages import doctor

NVIDIA_SMI = """#!/bin/sh
case "$*" in *query-gpu*) echo 'NVIDIA A100-SXM4-80GB, 81920, 8.0, 580.1';; esac
"""


def by_check(lines):
    """check -> line; the later of two with one name."""
    return {line.check: line for line in lines}


def put_module(folder, name, text, monkeypatch):
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.py").write_text(text)
    monkeypatch.setenv("PYTHONPATH", str(folder))


def data(tmp_path):
    return by_check(doctor.data_lines(tmp_path / "my data", tmp_path / "tables"))


def test_data_that_is_not_there(tmp_path):
    lines = data(tmp_path)
    assert {line.state for line in lines.values()} == {MISSING} and all(line.mend for line in lines.values())
    assert "kaggle competitions download" in lines["train.csv"].mend and "my data'" in lines["train.csv"].mend
    assert lines["arena33k.parquet"].mend.startswith("just prep --data '")
    assert lines["lmsys1m_pairs.parquet"].mend.endswith(" --hub")
    assert lines["test.csv"].purpose == "a submission" and lines["train.csv"].purpose == "training"


def test_data_with_rows(tmp_path):
    (tmp_path / "my data").mkdir()
    (tmp_path / "tables").mkdir()
    (tmp_path / "my data/train.csv").write_text("id,prompt\n" + "1,a\n" * 1234)
    for name, rows in (("test.parquet", 3), ("mine.parquet", 5)):
        pl.DataFrame({"id": range(rows)}).write_parquet(tmp_path / "tables" / name)
    lines = data(tmp_path)
    assert (lines["train.csv"].state, lines["train.csv"].found) == (FINE, "1,234 rows")
    assert lines["arena55k.parquet"].state == MISSING
    assert (lines["test.parquet"].found, lines["mine.parquet"].found) == ("3 rows", "5 rows")
    assert lines["test.csv"].state == NOT_NEEDED and "test.parquet" in lines["test.csv"].found


def test_data_that_cannot_be_read(tmp_path, monkeypatch):
    (tmp_path / "my data").mkdir()
    (tmp_path / "tables").mkdir()
    (tmp_path / "my data/train.csv").write_text('id,prompt\n1,"cut')
    (tmp_path / "my data/test.csv").mkdir()
    (tmp_path / "tables/arena55k.parquet").write_text("no table")
    lines = data(tmp_path)
    assert "cut off" in lines["train.csv"].found and lines["train.csv"].mend.startswith("rm -r '")
    assert "Is a directory" in lines["test.csv"].found
    assert lines["arena55k.parquet"].mend.endswith(" --overwrite")

    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(doctor, "count_rows", refuse)
    line = data(tmp_path)["train.csv"]
    assert line.found == "no permission to read it" and line.mend.startswith("chmod u+r '")


def test_a_check_that_fails_keeps_its_lines_and_says_so():
    def odd_lines():
        yield Line("a", FINE, "x")
        raise RuntimeError("surprise")

    lines = doctor.guarded(odd_lines)
    assert lines[0].check == "a" and (lines[1].check, lines[1].state) == ("odd", MISSING)
    assert "RuntimeError: surprise" in lines[1].found


def test_only_the_demo_is_needed_everywhere():
    lines = [Line("a", MISSING, ""), Line("b", MISSING, "", purpose="the demo"), Line("c", FINE, "")]
    assert [line.state for line in doctor.where_needed(False, lines)] == [NOT_NEEDED, MISSING, FINE]
    assert doctor.where_needed(True, lines) == lines


@pytest.mark.parametrize(
    ("purpose", "status", "strict_status"),
    [("the demo", 1, 1), ("training", 0, 1), ("speed", 0, 0), ("a submission", 0, 0)],
)
def test_the_status_follows_from_the_purpose(capsys, purpose, status, strict_status):
    topics = {"T": [Line("a", MISSING, "f", "mend me", purpose), Line("b", FINE, "f", "not me")]}
    assert doctor.report(topics, strict=False) == status
    assert doctor.report(topics, strict=True) == strict_status
    out = capsys.readouterr().out
    assert f"1 missing (1 for {purpose})" in out and "mend me" in out and "not me" not in out


def test_the_models_are_those_of_the_zoo():
    names = doctor.Args.__annotations__["model"].__args__
    assert set(names) == {"all", *ZOO} and set(diagnosis.NEEDS) == {
        m for m in ZOO if not m.startswith("tiny")
    }


def doctor_says(*words, cwd, **environment):
    environment = {"HF_HUB_OFFLINE": "1", "COLUMNS": "100", "HOME": str(cwd)} | environment
    found = subprocess.run(
        [sys.executable, str(ROOT / "stages/doctor.py"), *words],
        cwd=cwd,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        encoding="utf-8",
    )
    assert "Traceback" not in found.stdout + found.stderr, found.stderr
    return found


def looked(**words):
    """What is missing, by topic."""
    topics = doctor.look(doctor.Args(offline=True, **words))
    return {topic: [line.check for line in found if line.state == MISSING] for topic, found in topics.items()}


def test_without_a_gpu_only_a_named_model_needs_one(monkeypatch):
    monkeypatch.setattr(doctor, "query_driver", lambda: None)
    missing = looked()
    assert not any(missing[topic] for topic in ("GPU", "Ops", "Weights", "Disk")) and missing["Data"]
    assert "GPUs" in looked(model="armorm8b")["GPU"]
    missing = looked(model="tiny-gemma")
    assert not any(checks for topic, checks in missing.items() if topic != "Python")


def test_a_broken_gpu_machine_gets_a_table_and_commands(tmp_path, monkeypatch):
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/nvidia-smi").write_text(NVIDIA_SMI)
    (tmp_path / "bin/nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin{os.pathsep}{os.environ['PATH']}")
    put_module(tmp_path / "modules", "flash_attn", "raise ImportError('undefined symbol')", monkeypatch)
    (tmp_path / "modules/triton.py").write_text("import os\nos.abort()")
    found = doctor_says("--model", "gemma9b", "--strict", cwd=tmp_path, PYTHONIOENCODING="ascii")
    assert found.returncode == 1 and "? missing" in found.stdout  # an ASCII terminal gets the words
    for text in ("undefined symbol", "SIGABRT", "1 x NVIDIA A100-SXM4-80GB", "? fine", "the demo runs here"):
        assert text in found.stdout, text
    assert doctor_says("--model", "gemma9b", cwd=tmp_path).returncode == 0


def test_an_environment_without_the_packages_is_told_what_to_do(tmp_path, monkeypatch):
    put_module(tmp_path, "rich", "raise ImportError('no rich', name='rich')", monkeypatch)
    found = doctor_says(cwd=tmp_path)
    assert found.returncode == 1 and "cannot import rich" in found.stderr and "just setup" in found.stderr


def test_a_broken_torch_stops_the_demo_and_not_the_doctor(tmp_path, monkeypatch):
    put_module(tmp_path, "torch", "raise OSError('libcudart.so: cannot open')", monkeypatch)
    found = doctor_says(cwd=tmp_path)
    assert found.returncode == 1 and "the demo cannot run yet" in found.stdout
    assert "libcudart.so: cannot open" in found.stdout
