"""The doctor: what is asked (crashes, hangs and damage become answers), judged, and said about it."""

import json
import os
import runpy
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import polars as pl
import pytest
import torch
from huggingface_hub import constants, errors
from safetensors.torch import save_file

from stages import doctor
from stages.doctor import CORE, DRIVER, EXTRAS, HERE, REFUSED, ROOT, UNREACHED, Args, Line

ZOO = runpy.run_path(str(ROOT / "common/models/zoo.py"))["ZOO"]
GB = 1e9
A100 = ("NVIDIA A100-SXM4-80GB", 85.9, 8.0)
T4 = ("Tesla T4", 16.1, 7.5)
BUILD = {"torch": "2.13.0+cu130", "cuda": "13.0"}
CPU_BUILD = {"torch": "2.13.0", "cuda": None}
PLAIN = "attention torch, rotary torch"
OLD = "The NVIDIA driver on your system is too old (found version 12040)"
NVIDIA_SMI = """#!/bin/sh
printf '{rows}'
exit {status}
"""


def machine(*gpus, **answers):
    """Answers of a machine with these GPUs where nothing is missing, but for `answers`."""
    found = dict.fromkeys((CORE, *EXTRAS), ({}, ""))
    found["driver"] = ({"gpus": gpus, "version": "580.1"}, "") if gpus else ({}, "")
    found["build"] = (BUILD | {"num_gpus": len(gpus), "failure": "", "backends": PLAIN}, "")
    return found | answers


def by_check(check, answers=None, **args):
    """check -> line; the later of two with one name."""
    return {line.check: line for line in check(Args(**({"model": "gemma9b"} | args)), answers or machine())}


def put_nvidia_smi(folder, monkeypatch, rows="", status=0, script=None):
    folder.mkdir(exist_ok=True)
    (folder / "nvidia-smi").write_text(script or NVIDIA_SMI.format(rows=rows, status=status))
    (folder / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")


# Asking


@pytest.mark.parametrize(
    ("code", "failure"),
    [
        ("raise OSError('undefined symbol: x')", "OSError: undefined symbol: x"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "crashes (SIGSEGV)"),
        ("import sys; sys.exit('no licence')", "no licence"),
        ("import sys; sys.exit(3)", "ends with status 3"),
        ("", ""),
    ],
)
def test_a_failure_is_named_and_earlier_answers_stay(code, failure):
    begin = (
        'print("a library says hello"); print(\'{"a": 1}\', flush=True); print(\'{"b": 2}\', flush=True); '
    )
    assert doctor.ask("-c", begin + code) == ({"a": 1, "b": 2}, failure)


def test_a_hang_ends():
    code = "print('{\"a\": 1}', flush=True); import subprocess, time; "
    code += "subprocess.Popen(['sleep', '6']); time.sleep(60)"
    began = time.monotonic()
    assert doctor.ask("-c", code, timeout_s=1) == ({"a": 1}, "no answer within 1 s")
    assert time.monotonic() - began < 5, "waited for a process that the hung one left behind"


def test_no_nvidia_smi_is_no_driver(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert list(doctor.tell_driver()) == []


def test_gpus_are_read(tmp_path, monkeypatch):
    put_nvidia_smi(
        tmp_path, monkeypatch, "NVIDIA A100, 80GB, 81920, 8.0, 580.1\\nTesla T4, 15360, 7.5, 580.1\\n"
    )
    (facts,) = doctor.tell_driver()
    assert facts == {
        "gpus": [("NVIDIA A100, 80GB", 81920 * 2**20 / 1e9, 8.0), ("Tesla T4", 15360 * 2**20 / 1e9, 7.5)],
        "version": "580.1",
    }


def test_a_gpu_whose_memory_is_not_told_is_neither_enough_nor_missing(tmp_path, monkeypatch):
    """What nvidia-smi says of GPUs that share the machine's memory."""
    put_nvidia_smi(
        tmp_path, monkeypatch, "NVIDIA GB10, [N/A], 12.1, 580.1\\nNVIDIA A100, 81920, 8.0, 580.1\\n"
    )
    (facts,) = doctor.tell_driver()
    assert [gb for _, gb, _ in facts["gpus"]] == [None, 81920 * 2**20 / 1e9]
    for gpus in (facts["gpus"], facts["gpus"][:1]):
        lines = by_check(doctor.check_gpu, machine(driver=({"gpus": gpus, "version": "580.1"}, "")))
        assert "1 x NVIDIA GB10, a memory that nvidia-smi does not tell" in lines["GPUs"].found
        assert lines["memory for gemma9b"].is_fine is None and "not tell" in lines["memory for gemma9b"].found


@pytest.mark.parametrize(
    ("rows", "status", "failure"),
    [
        ("Failed to initialize NVML: Driver/library version mismatch\\nmore\\n", 18, "^Failed .* mismatch$"),
        ("", 9, "^nvidia-smi: status 9$"),
    ],
)
def test_a_broken_driver_says_why(tmp_path, monkeypatch, rows, status, failure):
    put_nvidia_smi(tmp_path, monkeypatch, rows, status)
    with pytest.raises(SystemExit, match=failure):
        list(doctor.tell_driver())


def test_a_driver_without_gpus_or_not_to_be_started(tmp_path, monkeypatch):
    put_nvidia_smi(tmp_path, monkeypatch, "No devices were found\\n", 6)
    assert list(doctor.tell_driver()) == [{"gpus": [], "version": ""}]
    put_nvidia_smi(tmp_path, monkeypatch, script="#!/no/such/shell\n")
    with pytest.raises(OSError, match="No such file"):
        list(doctor.tell_driver())


def test_the_first_gpu_that_does_not_compute_is_named(monkeypatch):
    def compute(*size, device):
        if device == "cuda:1":
            raise RuntimeError("CUDA error: out of memory\nMore")
        return torch.full(size, 1)

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch, "ones", compute)
    facts = {key: value for told in doctor.tell_build() for key, value in told.items()}
    assert (facts["num_gpus"], facts["failure"]) == (3, "GPU 1: CUDA error: out of memory")
    assert facts["torch"] == torch.__version__ and facts["backends"].startswith("attention ")


@pytest.mark.parametrize(
    ("kind", "status", "found"),
    [
        (None, 200, "to be had from the hub"),
        (errors.GatedRepoError, 403, REFUSED),
        (errors.RepositoryNotFoundError, 401, REFUSED),
        (errors.HfHubHTTPError, 503, UNREACHED),
        (ConnectionError, 0, UNREACHED),
    ],
)
def test_access_follows_from_the_hubs_answer(tmp_path, monkeypatch, kind, status, found):
    def reply(url, timeout):
        assert url.endswith("google/gemma-2-9b-it/resolve/main/config.json") and 0 < timeout <= 5
        if kind is ConnectionError:
            raise ConnectionError("unreachable")
        if kind:
            raise kind("no", response=SimpleNamespace(status_code=status, headers={}, request=None))

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", reply)
    *_, told = doctor.tell_hub("gemma9b")
    assert told == {"gemma9b": found}


def test_weights_in_the_cache_are_found_once_they_are_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", lambda *words, **named: None)
    repository = tmp_path / "models--google--gemma-2-9b-it"
    snapshot = repository / "snapshots/abc"
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text("abc")
    (snapshot / "config.json").write_text("{}")
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (snapshot / "model.safetensors.index.json").write_text(json.dumps(index))
    save_file({"a": torch.zeros(1)}, snapshot / "model-1.safetensors")
    assert doctor.find_weights("google/gemma-2-9b-it") == "to be had from the hub"
    save_file({"b": torch.zeros(1)}, snapshot / "model-2.safetensors")
    assert doctor.find_weights("google/gemma-2-9b-it") == HERE


# Python


def python(tmp_path, monkeypatch, project="", pins="", **answers):
    (tmp_path / "pyproject.toml").write_text(f"[project]\n{project}\n")
    (tmp_path / "constraints.txt").write_text(f"# exact\n{pins}\n")
    monkeypatch.setattr(doctor, "ROOT", tmp_path)
    return by_check(doctor.check_python, machine(**answers))


def test_this_environment_is_fine():
    lines = by_check(doctor.check_python)
    assert all(lines[check].is_fine for check in ("Python", "packages", "imports"))


def test_packages_too_old_or_absent(tmp_path, monkeypatch):
    needs = 'dependencies = ["torch>=99", "numpy>=1", "no-such-thing>=1"]'
    line = python(tmp_path, monkeypatch, needs)["packages"]
    assert line.is_fine is False and "constraints.txt" in line.mend and "numpy" not in line.found
    assert "torch>=99 (here: 2." in line.found and "no-such-thing>=1 (here: none)" in line.found


def test_pins_count_for_the_projects_own_packages_only(tmp_path, monkeypatch):
    needs = 'dependencies = ["torch>=2"]'
    here = doctor.version_of("torch").partition("+")[0]  # +cpu is the same version
    line = python(tmp_path, monkeypatch, needs, f"torch=={here}\nfilelock==0.1")["exact versions"]
    assert line.is_fine and line.found == "all 1"
    line = python(tmp_path, monkeypatch, needs, "torch==0.1\nfilelock==0.1")["exact versions"]
    assert line.is_fine is False and line.found == f"torch==0.1 (here: {doctor.version_of('torch')})"


def test_imports_that_fail_are_named():
    line = by_check(doctor.check_python, machine(**{CORE: ({}, "ImportError: x")}))["imports"]
    assert line.is_fine is False and line.purpose == "the demo" and "--force-reinstall" in line.mend
    assert line.found == "ImportError: x"


# GPUs


def test_a_machine_for_training():
    lines = by_check(doctor.check_gpu, machine(A100, A100, A100, A100), model="all")
    assert {line.is_fine for line in lines.values()} == {True}
    assert lines["GPUs"].found == "4 x NVIDIA A100-SXM4-80GB, 86 GB, capability 8.0"
    assert lines["torch build"].found.startswith("2.13.0+cu130, CUDA 13.0; ")
    assert "computes on 4 of 4" in lines["torch build"].found and "memory for gemma27b" in lines
    assert lines["driver"].found == "580.1"


def test_too_little_memory_says_how_many_would_do():
    line = by_check(doctor.check_gpu, machine(A100))["memory for gemma9b"]
    assert line.is_fine is False and "about 135 GB on each of 1, 86 GB there" in line.found
    assert line.mend.startswith("2 GPUs of 86 GB")
    assert "larger" in by_check(doctor.check_gpu, machine(T4))["memory for gemma9b"].mend


def test_memory_counts_a_shard_and_what_stays_whole():
    needs = doctor.Needs(0, 0, state_gb=80, sums_gb=16, whole_weights_gb=16, activations_gb=2)
    assert needs.gb_per_gpu(1) == 98
    assert needs.gb_per_gpu(4) == 24 + 12 + 2


def test_bf16_goes_by_capability():
    for gpus in ([T4], [A100, T4]):
        line = by_check(doctor.check_gpu, machine(*gpus))["bf16"]
        assert line.is_fine is False and "Tesla T4" in line.found


@pytest.mark.parametrize(
    ("facts", "found", "mend"),
    [
        (CPU_BUILD | {"num_gpus": 0}, "CUDA none; computes on 0 of 2 GPUs", "pip uninstall -y torch"),
        ({"num_gpus": 2, "failure": f"GPU 0: {OLD}"}, f"GPU 0: {OLD}", "pytorch.org/get-started"),
        ({"num_gpus": 1, "failure": ""}, "computes on 1 of 2", "unset CUDA_VISIBLE_DEVICES"),
        ({"num_gpus": 2, "failure": "GPU 1: out of memory"}, "GPU 1: out of memory", "nvidia-smi"),
        ({}, "crashes (SIGSEGV)", "nvidia-smi"),
    ],
)
def test_a_build_that_does_not_compute(facts, found, mend):
    answers = machine(A100, A100, build=(BUILD | facts, "" if facts else "crashes (SIGSEGV)"))
    lines = by_check(doctor.check_gpu, answers)
    assert lines["torch build"].is_fine is False
    assert found in lines["torch build"].found and mend in lines["torch build"].mend
    assert lines["GPUs"].found.startswith("2 x NVIDIA A100-SXM4-80GB, 86 GB") and lines["bf16"].is_fine


def test_no_driver_and_a_broken_one():
    lines = by_check(doctor.check_gpu, machine(build=(CPU_BUILD, "")))
    assert [lines[check].is_fine for check in ("driver", "torch build", "GPUs")] == [False, True, False]
    lines = by_check(doctor.check_gpu, machine(driver=({}, "version mismatch")))
    assert lines["driver"] == Line("driver", False, "version mismatch", DRIVER)
    lines = by_check(doctor.check_gpu, machine(driver=({"gpus": [], "version": ""}, "")))
    assert lines["driver"].is_fine and lines["driver"].found == "present, but no GPU"
    assert "torch build" not in by_check(doctor.check_gpu, machine(A100, build=({}, "OSError: x")))


# Ops


def ops(failure, *gpus, **answers):
    extras = dict.fromkeys(EXTRAS, ({}, failure))
    return by_check(doctor.check_ops, machine(*(gpus or [A100]), **extras, **answers))


def test_extras_present_absent_broken(monkeypatch):
    assert "importable" in ops("")["flash-attn"].found and ops("")["flash-attn"].is_fine
    absent = ops("ModuleNotFoundError: No module named 'x'")
    assert (absent["flash-attn"].is_fine, absent["flash-attn"].mend) == (False, "just setup gpu")
    assert absent["triton"].mend == "python3 -m pip install triton" and absent["triton"].purpose == "speed"
    monkeypatch.setattr(doctor, "version_of", lambda name: "2.8")
    broken = ops("ImportError: undefined symbol")
    assert broken["flash-attn"].is_fine is False and "--force-reinstall" in broken["flash-attn"].mend
    assert broken["flash-attn"].found == "2.8, import fails: ImportError: undefined symbol"
    assert broken["transformer-engine"].mend.endswith(" transformer-engine-torch")


def test_flash_attention_needs_nvcc_only_where_it_is_built(monkeypatch):
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    assert "needs nvcc" in ops("absent")["flash-attn"].found
    assert "needs nvcc" not in ops("absent")["triton"].found


def test_flash_attention_is_not_for_old_gpus():
    lines = ops("ModuleNotFoundError", T4, T4)
    assert lines["flash-attn"].is_fine is lines["transformer-engine"].is_fine is None
    assert lines["triton"].is_fine is False


def test_the_backends_are_those_of_the_ops():
    assert ops("")["backends"] == Line("backends", True, PLAIN, doctor.INSTALL, "the demo")
    line = ops("", build=({}, "crashes"))["backends"]
    assert line.is_fine is False and line.purpose == "the demo" and "crashes" in line.found


# Weights and disk


def hub(**facts):
    return machine(hub=({"zoo": ZOO, "cache": "/", "token": True} | facts, "no answer"))


@pytest.mark.parametrize(
    ("token", "weights", "login", "is_fine", "mend"),
    [
        (True, HERE, True, True, ""),
        (False, HERE, None, True, ""),
        (False, "to be had from the hub", None, True, ""),
        (True, REFUSED, True, False, "accept the licence at https://huggingface.co/google/gemma-2-9b-it"),
        (False, REFUSED, False, False, "hf auth login"),
        (False, UNREACHED, False, False, "hf download google/gemma-2-9b-it"),
    ],
)
def test_login_and_weights(token, weights, login, is_fine, mend):
    lines = by_check(doctor.check_weights, hub(token=token, gemma9b=weights))
    assert lines["login"].is_fine is login and lines["gemma9b"].is_fine is is_fine
    assert lines["gemma9b"].found == f"google/gemma-2-9b-it: {weights}" and mend in lines["gemma9b"].mend


def test_a_hub_that_did_not_answer_in_time_is_not_reached():
    assert by_check(doctor.check_weights, hub())["gemma9b"].found.endswith(UNREACHED)


def test_a_broken_hub_library_is_a_line():
    line = by_check(doctor.check_weights, machine(hub=({}, "ImportError: x")))["hub"]
    assert line.is_fine is False and "ImportError: x" in line.found


def disk(folder, monkeypatch, free_gb, **facts):
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: SimpleNamespace(free=free_gb * GB))
    facts = {"cache": str(folder)} | facts
    return by_check(doctor.check_disk, hub(**facts), artifacts=folder / "not/yet/there")


def test_disk_holds_weights_a_state_and_the_download(tmp_path, monkeypatch):
    assert disk(tmp_path, monkeypatch, 110.5)["gemma9b"].is_fine
    line = disk(tmp_path, monkeypatch, 100)["gemma9b"]
    assert line.is_fine is False and "needs about 110" in line.found and "free 10 GB" in line.mend
    assert disk(tmp_path, monkeypatch, 100, gemma9b=HERE)["gemma9b"].is_fine


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="needs a second file system")
def test_a_download_to_another_disk_does_not_count(tmp_path, monkeypatch):
    line = disk(tmp_path, monkeypatch, 100, cache="/proc")["gemma9b"]
    assert line.is_fine and "download" not in line.found


def test_a_folder_that_cannot_be_written(tmp_path, monkeypatch):
    assert disk(tmp_path, monkeypatch, 1000)["artifacts"].is_fine
    monkeypatch.setattr(doctor.os, "access", lambda path, mode: False)
    line = disk(tmp_path, monkeypatch, 1000)["artifacts"]
    assert line.is_fine is False and f"chown -R $USER {tmp_path}" in line.mend


# Data


def data(tmp_path):
    (tmp_path / "my data").mkdir(exist_ok=True)
    (tmp_path / "my artifacts/data").mkdir(parents=True, exist_ok=True)
    return by_check(doctor.check_data, data=tmp_path / "my data", artifacts=tmp_path / "my artifacts")


def test_data_that_is_not_there(tmp_path):
    lines = data(tmp_path)
    assert {line.is_fine for line in lines.values()} == {False} and all(line.mend for line in lines.values())
    assert "kaggle competitions download" in lines["train.csv"].mend and "my data'" in lines["train.csv"].mend
    assert lines["arena33k.parquet"].mend.startswith("just prep --data '")
    assert lines["lmsys1m_pairs.parquet"].mend.endswith(" --hub")
    assert lines["test.csv"].purpose == "a submission" and lines["train.csv"].purpose == "training"
    assert by_check(doctor.check_data)["arena33k.parquet"].mend == "just prep"


def test_data_with_rows(tmp_path):
    data(tmp_path)
    (tmp_path / "my data/train.csv").write_text("id,prompt\n" + '1,"two\nlines, ""quoted"""\n' * 1234)
    pl.DataFrame({"id": range(3)}).write_parquet(tmp_path / "my artifacts/data/test.parquet")
    lines = data(tmp_path)
    assert (lines["train.csv"].is_fine, lines["train.csv"].found) == (True, "1,234 rows")
    assert lines["arena55k.parquet"].is_fine is False and lines["test.parquet"].found == "3 rows"
    assert lines["test.csv"].is_fine is None and "test.parquet" in lines["test.csv"].found


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (b'id,prompt\n1,a\n2,"cut he', "could not parse"),
        (b"id,prompt\n1,\xff\xfe\n", "invalid utf-8"),
        (b"id,prompt\n", "0 rows"),
        (b"", "empty"),
    ],
)
def test_a_damaged_csv(tmp_path, content, found):
    data(tmp_path)
    (tmp_path / "my data/train.csv").write_bytes(content)
    line = data(tmp_path)["train.csv"]
    assert line.is_fine is False and found in line.found
    assert line.mend.startswith("rm -r '") and "# then: kaggle competitions" in line.mend


def test_data_that_cannot_be_read(tmp_path, monkeypatch):
    data(tmp_path)
    (tmp_path / "my data/test.csv").mkdir()
    pl.DataFrame({"id": range(7)}).write_parquet(tmp_path / "whole.parquet")
    cut = (tmp_path / "whole.parquet").read_bytes()[:-9]
    (tmp_path / "my artifacts/data/arena55k.parquet").write_bytes(cut)
    lines = data(tmp_path)
    assert lines["test.csv"].found.startswith("cannot be read: ")
    line = lines["arena55k.parquet"]
    assert line.found.startswith("cannot be read: ") and line.mend.endswith(" --overwrite")

    def refuse(path, **_):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(pl, "scan_parquet", refuse)
    line = data(tmp_path)["arena55k.parquet"]
    assert "Permission denied" in line.found and line.mend.startswith("chmod u+r '")


# Submission


def test_tokens_of_kaggle(tmp_path, monkeypatch):
    def look(**environment):
        with monkeypatch.context() as patch:
            for name in ("KAGGLE_API_TOKEN", "KAGGLE_USERNAME", "KAGGLE_KEY", "KAGGLE_CONFIG_DIR"):
                patch.delenv(name, raising=False)
            for name, value in ({"HOME": str(tmp_path)} | environment).items():
                patch.setenv(name, value)
            return by_check(doctor.check_kaggle)["kaggle token"]

    assert look().is_fine is False and look().purpose == "a submission"
    assert look(KAGGLE_USERNAME="ada").is_fine is False
    assert look(KAGGLE_USERNAME="ada", KAGGLE_KEY="k").is_fine
    assert look(KAGGLE_API_TOKEN="t").is_fine
    (tmp_path / ".kaggle").mkdir()
    (tmp_path / ".kaggle/kaggle.json").write_text("{}")
    assert look().is_fine and look().found == "~/.kaggle/kaggle.json"
    (tmp_path / ".kaggle/kaggle.json").rename(tmp_path / "access_token")
    assert not look().is_fine and look(KAGGLE_CONFIG_DIR=str(tmp_path)).is_fine


def test_the_client_of_kaggle(monkeypatch):
    for version in (None, "1.7"):
        monkeypatch.setattr(doctor, "version_of", lambda name, version=version: version)
        assert by_check(doctor.check_kaggle)["kaggle"].is_fine is (version is not None)


# The whole


def test_a_check_that_fails_keeps_its_lines_and_says_so():
    def odd(args, answers):
        yield Line("a", True, "x")
        raise RuntimeError("surprise")

    lines = doctor.judge(odd, Args(), {}, True)
    assert lines[0].check == "a" and (lines[1].check, lines[1].is_fine) == ("odd", False)
    assert "RuntimeError('surprise')" in lines[1].found


def test_only_the_demo_is_needed_everywhere():
    lines = [Line("a", False, ""), Line("b", False, "", purpose="the demo"), Line("c", True, "")]
    judged = doctor.judge(lambda args, answers: iter(lines), Args(), {}, False)
    assert [line.is_fine for line in judged] == [None, False, True]
    assert doctor.judge(lambda args, answers: iter(lines), Args(), {}, True) == lines


@pytest.mark.parametrize(
    ("purpose", "status", "strict_status"),
    [("the demo", 1, 1), ("training", 0, 1), ("speed", 0, 0), ("a submission", 0, 0)],
)
def test_the_status_follows_from_the_purpose(capsys, purpose, status, strict_status):
    topics = {"T": [Line("a", False, "f", "mend me", purpose), Line("b", True, "f", "not me")]}
    assert doctor.report(topics, strict=False) == status
    assert doctor.report(topics, strict=True) == strict_status
    out = capsys.readouterr().out
    assert f"1 missing (1 for {purpose})" in out and "mend me" in out and "not me" not in out


def test_the_models_are_those_of_the_zoo():
    names = Args.__annotations__["model"].__args__
    assert set(names) == {"all", *ZOO} and set(doctor.NEEDS) == {m for m in ZOO if not m.startswith("tiny")}


def test_without_a_gpu_only_a_named_model_needs_one(monkeypatch, tmp_path):
    def tell(*words, timeout_s=60):
        return (CPU_BUILD | {"backends": PLAIN} if words[-1] == "build" else {}), ""

    def missing(**words):
        topics = doctor.look(Args(data=tmp_path, artifacts=tmp_path, **words))
        return {
            topic: [line.check for line in lines if line.is_fine is False] for topic, lines in topics.items()
        }

    monkeypatch.setattr(doctor, "ask", tell)
    found = missing()
    idle = ("check_gpu", "check_ops", "check_weights", "check_disk")
    assert not any(found[topic] for topic in idle) and found["check_data"]
    assert "GPUs" in missing(model="armorm8b")["check_gpu"]
    assert not any(checks for topic, checks in missing(model="tiny-gemma").items() if topic != "check_python")


def doctor_says(modules, *words, cwd, **environment):
    """The doctor's answer, where `modules` (name -> text) stand before the installed ones."""
    for name, text in modules.items():
        (cwd / name).parent.mkdir(exist_ok=True)
        (cwd / name).write_text(text)
    environment = {"HF_HUB_OFFLINE": "1", "COLUMNS": "100", "HOME": str(cwd)} | environment
    environment |= {"PYTHONPATH": f"{cwd}{os.pathsep}{ROOT}"}
    command = [sys.executable, str(ROOT / "stages/doctor.py"), *words]
    found = subprocess.run(
        command, cwd=cwd, env=os.environ | environment, capture_output=True, encoding="utf-8"
    )
    assert "Traceback" not in found.stdout + found.stderr, found.stderr
    return found


def test_a_broken_gpu_machine_gets_a_table_and_commands(tmp_path, monkeypatch):
    put_nvidia_smi(tmp_path / "bin", monkeypatch, "NVIDIA A100-SXM4-80GB, 81920, 8.0, 580.1\\n")
    modules = {
        "flash_attn.py": "raise ImportError('undefined symbol')",
        "flash_attn-2.8.dist-info/METADATA": "Metadata-Version: 2.1\nName: flash-attn\nVersion: 2.8\n",
        "triton.py": "import os\nos.abort()",
        "triton-3.9.dist-info/METADATA": "Metadata-Version: 2.1\nName: triton\nVersion: 3.9\n",
    }
    found = doctor_says(modules, "--model", "gemma9b", "--strict", cwd=tmp_path, PYTHONIOENCODING="ascii")
    assert found.returncode == 1 and "? missing" in found.stdout  # an ASCII terminal gets the words
    for text in ("undefined symbol", "SIGABRT", "1 x NVIDIA A100-SXM4-80GB", "? fine", "the demo runs here"):
        assert text in found.stdout, text
    assert "attention torch" in found.stdout, "the ops were not asked themselves"


def test_an_environment_without_the_packages_is_told_what_to_do(tmp_path):
    found = doctor_says({"rich.py": "raise ImportError('no rich', name='rich')"}, cwd=tmp_path)
    assert found.returncode == 1 and "cannot import rich" in found.stderr and "just setup" in found.stderr


def test_a_broken_torch_stops_the_demo_and_not_the_doctor_and_offline_means_no_connection(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as hub:
        hub.setblocking(False)
        found = doctor_says(
            {"torch.py": "raise OSError('libcudart.so: cannot open')"},
            *("--model", "gemma9b", "--offline"),
            cwd=tmp_path,
            HF_HUB_OFFLINE="0",
            HF_HUB_CACHE=str(tmp_path),
            HF_ENDPOINT=f"http://127.0.0.1:{hub.getsockname()[1]}",
        )
        with pytest.raises(BlockingIOError):
            hub.accept()
    assert found.returncode == 1 and "the demo cannot run yet" in found.stdout
    assert "libcudart.so: cannot open" in found.stdout
    assert f"hf download {ZOO['gemma9b']}" in found.stdout
