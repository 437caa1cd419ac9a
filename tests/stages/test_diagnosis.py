"""What was found on a machine, judged: every state of every check."""

import json
import os
from types import SimpleNamespace

import pytest

from common.doctor import diagnosis, machine
from common.doctor.diagnosis import FINE, MISSING, NOT_NEEDED, Line
from common.doctor.machine import Answers, Driver, Gpu
from common.models.zoo import ZOO

A100 = Gpu("NVIDIA A100-SXM4-80GB", 85.9, (8, 0))
T4 = Gpu("Tesla T4", 16.1, (7, 5))
TORCH = {"version": "2.13.0+cu130", "cuda": "13.0", "hip": None}
OPS = {"attention": ["torch"], "rotary": ["torch"]}


def by_check(lines):
    """check -> line; the later of two with one name."""
    return {line.check: line for line in lines}


def python(tmp_path, project="", pins="", core=None, torch=TORCH):
    (tmp_path / "pyproject.toml").write_text(f"[project]\n{project}\n")
    (tmp_path / "constraints.txt").write_text(f"# exact\n{pins}\n")
    core = dict.fromkeys(diagnosis.CORE, "") if core is None else core
    lines = diagnosis.python_lines(Answers(core, "no answer"), Answers(torch, "crashes"), folder=tmp_path)
    return by_check(lines)


def test_this_environment_is_fine():
    lines = by_check(
        diagnosis.python_lines(Answers(dict.fromkeys(diagnosis.CORE, ""), ""), Answers(TORCH, ""))
    )
    assert [lines[check].state for check in ("Python", "packages", "imports")] == [FINE] * 3


def test_python_and_packages_too_old_or_absent(tmp_path):
    project = 'requires-python = ">=99"\ndependencies = ["torch>=99", "numpy>=1", "no-such-thing"]'
    lines = python(tmp_path, project)
    assert lines["Python"].state == lines["packages"].state == MISSING
    assert (
        "torch>=99 (here: 2." in lines["packages"].found
        and "no-such-thing (here: none)" in lines["packages"].found
    )
    assert "numpy" not in lines["packages"].found and "constraints.txt" in lines["packages"].mend


def test_pins_count_for_the_projects_own_packages_only(tmp_path):
    project = 'requires-python = ">=3"\ndependencies = ["torch>=2"]'
    here = diagnosis._version("torch").partition("+")[0]
    assert (
        python(tmp_path, project, f"torch=={here}")["exact versions"].state == FINE
    )  # +cpu is the same version
    line = python(tmp_path, project, f"torch=={here}\nfilelock==0.1")["exact versions"]
    assert line.state == FINE and "1 of 2 differ: filelock" in line.found
    line = python(tmp_path, project, "torch==0.1\nfilelock==0.1\nno-such-thing==1")["exact versions"]
    assert line.state == MISSING and "2 of 3 differ: torch" in line.found and "pinned 0.1" in line.found


def test_imports_that_fail_are_named(tmp_path):
    project = 'requires-python = ">=3"\ndependencies = []'
    line = python(tmp_path, project, core={"accelerate": "ImportError: x"}, torch={})["imports"]
    assert line.state == MISSING and line.purpose == "the demo"
    assert line.found == "torch: crashes; accelerate: ImportError: x; transformers: no answer"


def gpus(*gpus, knows="13.0", models=("gemma9b",), failure="", **facts):
    driver = Driver("580.1", knows, gpus, failure)
    answers = Answers(TORCH | {"gpus": [""] * len(gpus)} | facts, "crashes (SIGSEGV)")
    return by_check(diagnosis.gpu_lines(driver, answers, models))


def test_a_machine_for_training():
    lines = gpus(A100, A100, A100, A100, models=tuple(diagnosis.NEEDS))
    assert {line.state for line in lines.values()} == {FINE}
    assert lines["GPUs"].found == "4 x NVIDIA A100-SXM4-80GB, 86 GB, capability 8.0"
    assert "computes on 4 of 4" in lines["torch build"].found and "memory for gemma27b" in lines


def test_too_little_memory_says_how_many_would_do():
    line = gpus(A100)["memory for gemma9b"]
    assert line.state == MISSING and "about 135 GB on each of 1, 86 GB there" in line.found
    assert line.mend.startswith("2 GPUs of 86 GB")
    assert "larger" in gpus(T4)["memory for gemma9b"].mend


def test_memory_counts_a_shard_and_what_stays_whole():
    needs = diagnosis.Needs(0, 0, state_gb=80, sums_gb=16, whole_weights_gb=16, activations_gb=2)
    assert diagnosis.memory_gb_per_gpu(needs, 1) == 98
    assert diagnosis.memory_gb_per_gpu(needs, 4) == 24 + 12 + 2


def test_bf16_goes_by_capability():
    assert gpus(T4)["bf16"].state == MISSING and "Tesla T4" in gpus(T4)["bf16"].found
    assert gpus(A100, T4)["bf16"].state == MISSING
    assert "does not tell" in gpus(Gpu("x", None, None))["bf16"].found


@pytest.mark.parametrize(
    ("facts", "found", "mend"),
    [
        ({"cuda": None}, "CPU build, though NVIDIA GPUs are here: 2", "pip uninstall -y torch"),
        ({"gpus": []}, "the driver knows CUDA 12.4 only", "pytorch.org/get-started"),
        ({"gpus": [""]}, "sees 1 of 2", "just gpus=1"),
        ({"gpus": ["", "out of memory"]}, "GPU 1: out of memory", "nvidia-smi"),
    ],
)
def test_a_build_that_does_not_compute(facts, found, mend):
    line = gpus(A100, A100, knows="12.4", **facts)["torch build"]
    assert line.state == MISSING and found in line.found and mend in line.mend


def test_an_older_driver_with_which_every_gpu_computes_is_fine():
    assert gpus(A100, knows="12.4")["torch build"].state == FINE


def test_a_crash_while_looking_at_the_gpus():
    driver = Driver("580.1", "13.0", (A100,), "")
    lines = by_check(diagnosis.gpu_lines(driver, Answers(TORCH, "crashes (SIGSEGV)"), ()))
    assert lines["torch build"].state == MISSING and "crashes (SIGSEGV)" in lines["torch build"].found


def test_no_driver_and_a_broken_one():
    lines = by_check(diagnosis.gpu_lines(None, Answers(TORCH | {"cuda": None, "gpus": []}, ""), ()))
    assert [lines[check].state for check in ("driver", "torch build", "GPUs")] == [MISSING, FINE, MISSING]
    assert gpus(failure="version mismatch")["driver"] == Line(
        "driver", MISSING, "version mismatch", f"restart the machine, or {diagnosis.DRIVER}"
    )


def ops(answer, *, gpus=(A100,), tables=OPS):
    extras = {module: Answers({module: answer}, "") for module in diagnosis.EXTRAS}
    return by_check(diagnosis.ops_lines(Answers({"ops": tables} if tables else {}, "no torch"), extras, gpus))


def test_extras_present_absent_broken(monkeypatch):
    assert "importable; no op has another backend than torch" in ops("")["flash-attn"].found
    absent = ops("ModuleNotFoundError: No module named 'x'")
    assert (absent["flash-attn"].state, absent["flash-attn"].mend) == (MISSING, "just setup gpu")
    assert absent["triton"].mend == "python3 -m pip install triton" and absent["triton"].purpose == "speed"
    monkeypatch.setattr(diagnosis.util, "find_spec", lambda name: object())
    broken = ops("ImportError: undefined symbol")["flash-attn"]
    assert (
        broken.state == MISSING and "undefined symbol" in broken.found and "--force-reinstall" in broken.mend
    )


def test_flash_attention_needs_nvcc_only_where_it_is_built(monkeypatch):
    monkeypatch.setattr(diagnosis.shutil, "which", lambda name: None)
    assert "needs nvcc" in ops("absent")["flash-attn"].found
    assert "needs nvcc" not in ops("absent")["triton"].found


def test_flash_attention_is_not_for_old_gpus():
    lines = ops("ModuleNotFoundError", gpus=(T4, T4))
    assert lines["flash-attn"].state == lines["transformer-engine"].state == NOT_NEEDED
    assert lines["triton"].state == MISSING


def test_the_backends_are_those_of_the_tables():
    assert ops("")["backends"].found == "attention, rotary: torch, the only backend"
    tables = {"attention": ["flash", "torch"], "rotary": ["torch"]}
    extras = {module: Answers({}, "no answer") for module in diagnosis.EXTRAS}
    lines = list(diagnosis.ops_lines(Answers({"ops": tables}, ""), extras, ()))
    found = [line.found for line in lines if line.check == "backends"]
    assert found == ["attention: flash; also: torch", "rotary: torch, the only backend"]
    assert not any("no op has" in line.found for line in lines)
    assert ops("", tables=None)["backends"].purpose == "the demo"


def hub(model="gemma9b", failure="", **facts):
    known = {
        "sources": {model: ZOO[model].source},
        "offline": False,
        "token": True,
        "cache": "/",
        "login": "ada",
    }
    facts = {key.replace("__", "/"): value for key, value in facts.items()}
    return by_check(diagnosis.hub_lines(Answers(known | facts, failure), (model,)))


@pytest.mark.parametrize(
    ("facts", "login", "weights"),
    [
        ({"gemma9b__access": "open"}, (FINE, "as ada"), (FINE, "to be had")),
        ({"gemma9b__access": "gated"}, (FINE, "as ada"), (MISSING, "refuses access")),
        (
            {"gemma9b__access": "refused", "login": ""},
            (MISSING, "hub refuses it"),
            (MISSING, "refuses access"),
        ),
        ({"gemma9b__access": "gated", "token": False}, (MISSING, "no token"), (MISSING, "refuses")),
        ({"gemma9b__access": "open", "token": False}, (NOT_NEEDED, "need none"), (FINE, "to be had")),
        ({"login": None}, (FINE, "no network"), (MISSING, "cannot be known: no network")),
        ({"offline": True, "token": False}, (MISSING, "no token"), (MISSING, "cannot be known: offline")),
        ({"gemma9b__local": (6, 6), "token": False}, (NOT_NEEDED, "need none"), (FINE, "all 6 files")),
        ({"gemma9b__local": (2, 6)}, (FINE, "as ada"), (MISSING, "2 of 6 files on this machine")),
    ],
)
def test_login_and_weights(facts, login, weights):
    lines = hub(**facts)
    for check, (state, text) in (("login", login), ("gemma9b", weights)):
        assert lines[check].state == state and text in lines[check].found, lines[check]
    assert "google/gemma-2-9b-it" in lines["gemma9b"].found


def test_gated_weights_name_the_page_of_the_licence():
    assert "https://huggingface.co/google/gemma-2-9b-it" in hub(gemma9b__access="gated")["gemma9b"].mend


def test_a_broken_hub_library_is_a_line():
    lines = by_check(diagnosis.hub_lines(Answers({}, "ImportError: x"), ("gemma9b",)))
    assert lines["hub"].state == MISSING and "ImportError: x" in lines["hub"].found


def test_weights_in_the_cache_are_found_whole_or_cut(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
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
    facts = machine.ask("hub", "offline", "gemma9b", "armorm8b", timeout_s=30).facts
    assert facts["gemma9b/local"] == [3, 4] and facts["armorm8b/local"] == [0, 0] and facts["offline"]
    (snapshot / "model-2.safetensors").write_text("{}")
    answers = machine.ask("hub", "offline", "gemma9b", timeout_s=30)
    assert by_check(diagnosis.hub_lines(answers, ("gemma9b",)))["gemma9b"].state == FINE


def disk(folder, monkeypatch, free_gb, facts=None):
    monkeypatch.setattr(diagnosis.shutil, "disk_usage", lambda path: SimpleNamespace(free=free_gb * 1e9))
    facts = {"cache": str(folder)} | (facts or {})
    return by_check(diagnosis.disk_lines(folder / "not/yet/there", ("gemma9b",), Answers(facts, "")))


def test_disk_holds_weights_a_state_and_the_download(tmp_path, monkeypatch):
    assert disk(tmp_path, monkeypatch, 110.5)["gemma9b"].state == FINE
    line = disk(tmp_path, monkeypatch, 100)["gemma9b"]
    assert line.state == MISSING and "needs about 110" in line.found and "free 10 GB" in line.mend
    assert disk(tmp_path, monkeypatch, 100, {"gemma9b/local": (6, 6)})["gemma9b"].state == FINE


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="needs a second file system")  # noqa: PTH112
def test_the_hubs_cache_on_another_disk_is_looked_at_too(tmp_path, monkeypatch):
    lines = disk(tmp_path, monkeypatch, 100, {"cache": "/proc"})
    assert lines["gemma9b"].state == FINE and "download" not in lines["gemma9b"].found
    assert lines["hub cache"].state == FINE
    assert disk(tmp_path, monkeypatch, 10, {"cache": "/proc"})["hub cache"].mend.startswith("export HF_HOME")


def test_a_folder_that_cannot_be_written(tmp_path, monkeypatch):
    monkeypatch.setattr(diagnosis.os, "access", lambda path, mode: False)
    (line,) = disk(tmp_path, monkeypatch, 1000).values()
    assert line.state == MISSING and "cannot be written" in line.found and str(tmp_path) in line.mend


def kaggle(home, **environment):
    return by_check(diagnosis.kaggle_lines(environment, home))["kaggle token"]


def test_tokens_of_kaggle(tmp_path):
    assert kaggle(tmp_path).state == MISSING and kaggle(tmp_path).purpose == "a submission"
    assert kaggle(tmp_path, KAGGLE_USERNAME="ada").state == MISSING
    assert kaggle(tmp_path, KAGGLE_USERNAME="ada", KAGGLE_KEY="k").state == FINE
    assert kaggle(tmp_path, KAGGLE_API_TOKEN="t").state == FINE
    (tmp_path / ".kaggle").mkdir()
    path = tmp_path / ".kaggle/kaggle.json"
    for text, state in (("{", MISSING), ("3", MISSING), ('{"username": "ada", "key": "k"}', FINE)):
        path.write_text(text)
        assert kaggle(tmp_path).state == state, text
    assert "ada" not in kaggle(tmp_path).found
    (tmp_path / "other").mkdir()
    (tmp_path / "other/access_token").write_text("")
    assert kaggle(tmp_path, KAGGLE_CONFIG_DIR=str(tmp_path / "other")).state == MISSING


def test_the_client_of_kaggle(tmp_path, monkeypatch):
    for version, state in ((None, MISSING), ("1.7", FINE)):
        monkeypatch.setattr(diagnosis, "_version", lambda name, version=version: version)
        assert by_check(diagnosis.kaggle_lines({}, tmp_path))["kaggle"].state == state
