"""The doctor: what is asked (crashes, hangs and damage become answers), judged, and said about it."""

import json
import os
import runpy
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

from stages import doctor
from stages.doctor import CORE, DRIVER, EXTRAS, ROOT, Args, Line

ZOO = runpy.run_path(str(ROOT / "common/models/zoo.py"))["ZOO"]
GB = 1e9
A100 = {"name": "NVIDIA A100-SXM4-80GB", "gb": 85.9, "capability": [8, 0], "failure": ""}
T4 = {"name": "Tesla T4", "gb": 16.1, "capability": [7, 5], "failure": ""}
BUILD = "2.13.0+cu130, CUDA 13.0"
PLAIN = "attention torch, rotary torch"
OLD = "The NVIDIA driver on your system is too old (found version 12040)"
NVIDIA_SMI = """#!/bin/sh
printf '{rows}'
exit {status}
"""


def machine(*gpus, **answers):
    """Answers of a machine with these GPUs where nothing is missing, but for `answers`."""
    names = [gpu.get("name", "a GPU") for gpu in gpus]
    found = dict.fromkeys((CORE, *EXTRAS), ({}, ""))
    found["driver"] = ({"gpus": names, "version": "580.1"}, "") if gpus else ({}, "")
    found["torch"] = ({"build": BUILD, "gpus": list(gpus), "backends": PLAIN}, "")
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
    put_nvidia_smi(tmp_path, monkeypatch, "NVIDIA A100, 80GB, 580.1\\nTesla T4, 580.1\\n")
    assert list(doctor.tell_driver()) == [{"gpus": ["NVIDIA A100, 80GB", "Tesla T4"], "version": "580.1"}]


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


def test_a_driver_without_gpus_hanging_or_not_to_be_started(tmp_path, monkeypatch):
    put_nvidia_smi(tmp_path, monkeypatch, "No devices were found\\n", 6)
    assert list(doctor.tell_driver()) == [{"gpus": [], "version": ""}]
    put_nvidia_smi(tmp_path, monkeypatch, script="#!/bin/sh\nexec sleep 20\n")
    with pytest.raises(subprocess.TimeoutExpired, match="timed out"):
        list(doctor.tell_driver(timeout_s=0.3))
    put_nvidia_smi(tmp_path, monkeypatch, script="#!/no/such/shell\n")
    with pytest.raises(OSError, match="No such file"):
        list(doctor.tell_driver())


def test_a_gpu_tells_what_it_is_even_if_it_does_not_compute(monkeypatch):
    gpu = SimpleNamespace(name="NVIDIA A100-SXM4-80GB", total_memory=85_900_000_000, major=8, minor=0)

    def describe(index):
        if index:
            raise RuntimeError(f"{OLD}.\nMore")
        return gpu

    def compute(*size, device):
        raise RuntimeError("CUDA error: out of memory\nMore")

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", describe)
    monkeypatch.setattr(torch, "ones", compute)
    facts = {key: value for told in doctor.tell_torch() for key, value in told.items()}
    assert facts["gpus"] == [A100 | {"failure": "CUDA error: out of memory"}, {"failure": f"{OLD}."}]
    assert facts["build"].startswith(torch.__version__) and facts["backends"].startswith("attention ")


@pytest.mark.parametrize(
    ("kind", "status", "access"),
    [
        (None, 200, "open"),
        (errors.GatedRepoError, 403, doctor.REFUSED),
        (errors.RepositoryNotFoundError, 401, doctor.REFUSED),
        (errors.HfHubHTTPError, 503, "the hub answers 503"),
        (ConnectionError, 0, "no network (ConnectionError)"),
    ],
)
def test_access_and_login_follow_from_the_hubs_answer(monkeypatch, kind, status, access):
    def reply(url="", timeout=0):
        assert not url or (url.endswith("google/gemma-2-9b-it/resolve/main/config.json") and 0 < timeout <= 5)
        if kind is ConnectionError:
            raise ConnectionError("unreachable")
        if kind:
            raise kind("no", response=SimpleNamespace(status_code=status, headers={}, request=None))
        return {"name": "ada"}

    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", reply)
    monkeypatch.setattr(huggingface_hub, "whoami", reply)
    assert doctor.ask_hub("google/gemma-2-9b-it") == access
    assert doctor.ask_hub() == ("as ada" if access == "open" else access)


def ask_about_weights(*models):
    facts = {}
    for told in doctor.tell_hub("offline", *models):
        facts |= json.loads(json.dumps(told))
    return facts


def test_weights_in_the_cache_are_found_whole_or_cut(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--google--gemma-2-9b-it"
    snapshot = repository / "snapshots/abc"
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text("abc")
    index = {
        "weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors", "c": "model-2.safetensors"}
    }
    (snapshot / "model.safetensors.index.json").write_text(json.dumps(index))
    for name in ("config.json", "tokenizer_config.json", "model-1.safetensors"):
        (snapshot / name).write_text("{}")
    facts = ask_about_weights("gemma9b", "armorm8b")
    assert facts["gemma9b"] == ["google/gemma-2-9b-it", 3, 4] and facts["armorm8b"][1:] == [0, 0]
    assert facts["local"] == [] and facts["access"] == {"gemma9b": "offline", "armorm8b": "offline"}
    (snapshot / "model-2.safetensors").write_text("{}")
    facts = ask_about_weights("gemma9b")
    assert facts["local"] == ["gemma9b"]
    assert by_check(doctor.check_weights, machine(hub=(facts, "")))["gemma9b"].is_fine


# Python


def python(tmp_path, monkeypatch, project="", pins="", **answers):
    (tmp_path / "pyproject.toml").write_text(f'[project]\nrequires-python = ">=3"\n{project}\n')
    (tmp_path / "constraints.txt").write_text(f"# exact\n{pins}\n")
    monkeypatch.setattr(doctor, "ROOT", tmp_path)
    return by_check(doctor.check_python, machine(**answers))


def test_this_environment_is_fine():
    lines = by_check(doctor.check_python)
    assert all(lines[check].is_fine for check in ("Python", "packages", "imports"))


def test_python_and_packages_too_old_or_absent(tmp_path, monkeypatch):
    needs = 'dependencies = ["torch>=99", "numpy>=1", "no-such-thing>=1"]'
    line = python(tmp_path, monkeypatch, needs)["packages"]
    assert line.is_fine is False and "constraints.txt" in line.mend and "numpy" not in line.found
    assert "torch>=99 (here: 2." in line.found and "no-such-thing>=1 (here: none)" in line.found
    monkeypatch.setattr(doctor.sys, "version_info", (2, 9, 9))
    assert python(tmp_path, monkeypatch, needs)["Python"].is_fine is False


def test_pins_count_for_the_projects_own_packages_only(tmp_path, monkeypatch):
    needs = 'dependencies = ["torch>=2"]'
    here = doctor.version_of("torch").partition("+")[0]  # +cpu is the same version
    line = python(tmp_path, monkeypatch, needs, f"torch=={here}")["exact versions"]
    assert line.is_fine and line.found == "none of 1 differs"
    line = python(tmp_path, monkeypatch, needs, f"torch=={here}\nfilelock==0.1")["exact versions"]
    assert line.is_fine and "1 of 2 differ: filelock" in line.found
    line = python(tmp_path, monkeypatch, needs, "torch==0.1\nfilelock==0.1\nno-such-thing==1")[
        "exact versions"
    ]
    assert line.is_fine is False and "2 of 3 differ: torch" in line.found and "pinned 0.1" in line.found


def test_imports_that_fail_are_named():
    answers = machine(torch=({}, "crashes (SIGSEGV)"), **{CORE: ({}, "ImportError: x")})
    line = by_check(doctor.check_python, answers)["imports"]
    assert line.is_fine is False and line.purpose == "the demo" and "--force-reinstall" in line.mend
    assert line.found == f"torch: crashes (SIGSEGV); {CORE}: ImportError: x"


# GPUs


def test_a_machine_for_training():
    lines = by_check(doctor.check_gpu, machine(A100, A100, A100, A100), model="all")
    assert {line.is_fine for line in lines.values()} == {True}
    assert lines["GPUs"].found == "4 x NVIDIA A100-SXM4-80GB, 86 GB, capability 8.0"
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
        (
            {"build": "2.13.0, CPU build", "gpus": []},
            "though NVIDIA GPUs are here: 2",
            "pip uninstall -y torch",
        ),
        ({"gpus": [{"failure": OLD}, {"failure": OLD}]}, f"GPU 1: {OLD}", "pytorch.org/get-started"),
        ({"gpus": [A100]}, "sees 1 of 2", "just gpus=1"),
        ({"gpus": []}, "sees 0 of 2", "unset CUDA_VISIBLE_DEVICES"),
        ({"gpus": [A100, A100 | {"failure": "out of memory"}]}, "GPU 1: out of memory", "nvidia-smi"),
        ({}, "looking at the GPUs: crashes (SIGSEGV)", DRIVER),
    ],
)
def test_a_build_that_does_not_compute(facts, found, mend):
    answers = machine(A100, A100, torch=({"build": BUILD} | facts, "crashes (SIGSEGV)"))
    lines = by_check(doctor.check_gpu, answers)
    line = lines["torch build"]
    assert line.is_fine is False and found in line.found and mend in line.mend
    if not any("gb" in gpu for gpu in facts.get("gpus", [])):
        assert lines["GPUs"].found.startswith("2 x NVIDIA A100-SXM4-80GB; bf16 and memory are known once")
        assert "bf16" not in lines


def test_no_driver_and_a_broken_one():
    lines = by_check(doctor.check_gpu, machine(torch=({"build": "2.13.0, CPU build", "gpus": []}, "")))
    assert [lines[check].is_fine for check in ("driver", "torch build", "GPUs")] == [False, True, False]
    lines = by_check(doctor.check_gpu, machine(driver=({}, "version mismatch")))
    assert lines["driver"] == Line("driver", False, "version mismatch", f"restart the machine, or {DRIVER}")
    lines = by_check(doctor.check_gpu, machine(driver=({"gpus": [], "version": ""}, "")))
    assert lines["driver"].is_fine and lines["driver"].found == "present, but no GPU"


# Ops


def ops(failure, *gpus, **answers):
    extras = dict.fromkeys(EXTRAS, ({}, failure))
    return by_check(doctor.check_ops, machine(*(gpus or [A100]), **extras, **answers))


def test_extras_present_absent_broken(monkeypatch):
    assert "importable; every op uses torch" in ops("")["flash-attn"].found
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
    lines = ops("", torch=({"backends": "attention flash, rotary torch"}, ""))
    assert not any("every op" in line.found for line in lines.values())
    line = ops("", torch=({}, "crashes"))["backends"]
    assert line.is_fine is False and line.purpose == "the demo" and "crashes" in line.found


# Weights and disk


def hub(**facts):
    known = {"gemma9b": [ZOO["gemma9b"], 0, 0], "local": [], "cache": "/", "has_token": True}
    known |= {"login": "as ada"}
    return machine(hub=(known | facts, "no answer"))


def access(answer):
    return {"access": {"gemma9b": answer}}


@pytest.mark.parametrize(
    ("facts", "login", "weights"),
    [
        (access("open"), (True, "as ada"), (True, "to be had")),
        (access(doctor.REFUSED), (True, "as ada"), (False, "refuses access")),
        (
            access(doctor.REFUSED) | {"login": doctor.REFUSED},
            (False, "a token is there; the hub refuses"),
            (False, "refuses access"),
        ),
        (access(doctor.REFUSED) | {"has_token": False}, (False, "no token"), (False, "refuses")),
        (access("open") | {"has_token": False}, (None, "need none"), (True, "to be had")),
        ({"login": "no network (X)"}, (True, "no network"), (False, "cannot be known: no network")),
        (access("offline") | {"has_token": False}, (False, "no token"), (False, "cannot be known: offline")),
        (
            {"gemma9b": ["google/gemma-2-9b-it", 6, 6], "local": ["gemma9b"], "has_token": False},
            (None, "need none"),
            (True, "all 6 files"),
        ),
        (
            {"gemma9b": ["google/gemma-2-9b-it", 2, 6]},
            (True, "as ada"),
            (False, "2 of 6 files on this machine"),
        ),
    ],
)
def test_login_and_weights(facts, login, weights):
    lines = by_check(doctor.check_weights, hub(**facts))
    for check, (is_fine, text) in (("login", login), ("gemma9b", weights)):
        assert lines[check].is_fine is is_fine and text in lines[check].found, lines[check]
    assert "google/gemma-2-9b-it" in lines["gemma9b"].found
    if "refuses" in lines["gemma9b"].found:
        assert "licence at https://huggingface.co/google/gemma-2-9b-it" in lines["gemma9b"].mend


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
    assert disk(tmp_path, monkeypatch, 100, local=["gemma9b"])["gemma9b"].is_fine


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="needs a second file system")
def test_the_hubs_cache_on_another_disk_is_looked_at_too(tmp_path, monkeypatch):
    lines = disk(tmp_path, monkeypatch, 100, cache="/proc")
    assert lines["gemma9b"].is_fine and "download" not in lines["gemma9b"].found
    assert lines["hub cache"].is_fine
    assert disk(tmp_path, monkeypatch, 10, cache="/proc")["hub cache"].mend.startswith("export HF_HOME")


def test_a_folder_that_cannot_be_written(tmp_path, monkeypatch):
    monkeypatch.setattr(doctor.os, "access", lambda path, mode: False)
    (line,) = disk(tmp_path, monkeypatch, 1000).values()
    assert line.is_fine is False and "cannot be written" in line.found and str(tmp_path) in line.mend


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
    for name, rows in (("test.parquet", 3), ("mine.parquet", 5)):
        pl.DataFrame({"id": range(rows)}).write_parquet(tmp_path / "my artifacts/data" / name)
    lines = data(tmp_path)
    assert (lines["train.csv"].is_fine, lines["train.csv"].found) == (True, "1,234 rows")
    assert lines["arena55k.parquet"].is_fine is False
    assert (lines["test.parquet"].found, lines["mine.parquet"].found) == ("3 rows", "5 rows")
    assert lines["test.csv"].is_fine is None and "test.parquet" in lines["test.csv"].found


@pytest.mark.parametrize(
    "content",
    [
        b'id,prompt\n1,a\n2,"cut he',
        b"id,prompt\n1,a\n2",
        b"id,prompt\n1,a\n2,",
        b"id,prompt\n1,\xff\xfe\n",
        b"id,prompt\n",
        b"",
    ],
)
def test_a_damaged_csv(tmp_path, content):
    data(tmp_path)
    (tmp_path / "my data/train.csv").write_bytes(content)
    line = data(tmp_path)["train.csv"]
    assert line.is_fine is False and "cut off or damaged" in line.found
    assert line.mend.startswith("rm -r '") and "# then: kaggle competitions" in line.mend


def test_data_that_cannot_be_read(tmp_path, monkeypatch):
    data(tmp_path)
    (tmp_path / "my data/test.csv").mkdir()
    pl.DataFrame({"id": range(7)}).write_parquet(tmp_path / "whole.parquet")
    cut = (tmp_path / "whole.parquet").read_bytes()[:-9]
    (tmp_path / "my artifacts/data/arena55k.parquet").write_bytes(cut)
    lines = data(tmp_path)
    assert "Is a directory" in lines["test.csv"].found
    line = lines["arena55k.parquet"]
    assert "cut off or damaged" in line.found and line.mend.endswith(" --overwrite")

    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(doctor, "count_rows", refuse)
    line = data(tmp_path)["arena55k.parquet"]
    assert line.found == "no permission to read it" and line.mend.startswith("chmod u+r '")


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
    path = tmp_path / ".kaggle/kaggle.json"
    for text, is_fine in (("{", False), ("3", False), ('{"username": "ada", "key": "k"}', True)):
        path.write_text(text)
        assert look().is_fine is is_fine, text
    assert "ada" not in look().found
    (tmp_path / "other").mkdir()
    (tmp_path / "other/access_token").write_text("")
    assert look(KAGGLE_CONFIG_DIR=str(tmp_path / "other")).is_fine is False


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
    assert "RuntimeError: surprise" in lines[1].found


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
        return (
            {"build": "2.13.0, CPU build", "gpus": [], "backends": PLAIN} if words[-1] == "torch" else {}
        ), ""

    def missing(**words):
        topics = doctor.look(Args(data=tmp_path, artifacts=tmp_path, **words))
        return {
            topic: [line.check for line in found if line.is_fine is False] for topic, found in topics.items()
        }

    monkeypatch.setattr(doctor, "ask", tell)
    found = missing()
    assert not any(found[topic] for topic in ("GPU", "Ops", "Weights", "Disk")) and found["Data"]
    assert "GPUs" in missing(model="armorm8b")["GPU"]
    assert not any(checks for topic, checks in missing(model="tiny-gemma").items() if topic != "Python")


def doctor_says(modules, *words, cwd, **environment):
    """The doctor's answer, where `modules` (name -> text) stand before the installed ones."""
    for name, text in modules.items():
        (cwd / name).parent.mkdir(exist_ok=True)
        (cwd / name).write_text(text)
    environment |= {"HF_HUB_OFFLINE": "1", "COLUMNS": "100", "HOME": str(cwd)}
    environment |= {"PYTHONPATH": f"{cwd}{os.pathsep}{ROOT}"}
    command = [sys.executable, str(ROOT / "stages/doctor.py"), *words]
    found = subprocess.run(
        command, cwd=cwd, env=os.environ | environment, capture_output=True, encoding="utf-8"
    )
    assert "Traceback" not in found.stdout + found.stderr, found.stderr
    return found


def test_a_broken_gpu_machine_gets_a_table_and_commands(tmp_path, monkeypatch):
    put_nvidia_smi(tmp_path / "bin", monkeypatch, "NVIDIA A100-SXM4-80GB, 580.1\\n")
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


def test_a_broken_torch_stops_the_demo_and_not_the_doctor(tmp_path):
    found = doctor_says({"torch.py": "raise OSError('libcudart.so: cannot open')"}, cwd=tmp_path)
    assert found.returncode == 1 and "the demo cannot run yet" in found.stdout
    assert "libcudart.so: cannot open" in found.stdout
