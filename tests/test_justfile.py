"""The justfile picks the launch that fits machine and model."""

import os
import re
import shutil
import subprocess

import pytest
from accelerate.commands.launch import launch_command_parser
from helpers import ROOT

pytestmark = pytest.mark.skipif(shutil.which("just") is None, reason="just is not on the PATH")


def dry(*arguments, **environment):
    """The command lines that just would run, words only."""
    found = subprocess.run(
        ["just", "--dry-run", *arguments],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )
    assert found.returncode == 0, found.stderr
    return found.stderr


@pytest.mark.parametrize(
    ("gpus", "model", "config"),
    [
        ("8", "gemma27b", "fsdp_27b.yaml"),
        ("4", "gemma9b", "fsdp_9b.yaml"),
        ("4", "armorm8b", "fsdp_9b.yaml"),
        ("2", "tiny-gemma", "ddp.yaml"),
    ],
)
def test_several_gpus_take_the_models_configuration(gpus, model, config):
    assert f"accelerate_configs/{config}" in dry(f"gpus={gpus}", "_train", "stage1", model)


LAUNCHED = [
    *(
        ("_train", stage, model)
        for stage in ("stage1", "stage2", "stage3")
        for model in ("gemma9b", "tiny-llama")
    ),
    ("_train", "stage1", "gemma27b"),
    ("pseudo-label",),
    ("evaluate",),
]
"""Every job that several processes do together."""


@pytest.mark.parametrize("gpus", ["0", "1"])
@pytest.mark.parametrize("job", LAUNCHED)
def test_one_process_needs_no_launcher(gpus, job):
    [line] = [line for line in dry(f"gpus={gpus}", *job).splitlines() if "stages/" in line]
    assert line.startswith(("python3 stages/", 'python3 "stages/'))


@pytest.mark.parametrize("job", LAUNCHED)
def test_every_job_on_several_machines_meets_the_others_or_refuses(job):
    several = {"MACHINES": "2", "MACHINE_RANK": "1", "MAIN_IP": "10.0.0.1"}
    meeting = "--num_machines 2 --machine_rank 1 --main_process_ip 10.0.0.1 --main_process_port 29500"
    assert meeting in dry("gpus=8", *job, **several) and "--num_machines" not in dry("gpus=8", *job)
    assert "error: MACHINES=2, but no GPU here" in dry("gpus=0", *job, **several)


def test_a_refusal_runs_nothing():
    found = subprocess.run(
        ["just", "gpus=0", "_train", "stage1", "tiny-gemma"],
        cwd=ROOT,
        env=os.environ | {"MACHINES": "2"},
        capture_output=True,
        text=True,
    )
    assert found.returncode == 1 and len(found.stderr.splitlines()) == 1 and not found.stdout


def test_several_machines_shard_within_and_replicate_over():
    found = dry("gpus=8", "_train", "stage1", "gemma27b", MACHINES="2")
    assert "fsdp_27b_multinode.yaml" in found
    assert (
        "--parallelism_config_dp_replicate_size 2 --parallelism_config_dp_shard_size 8 --num_machines"
        in found
    )


def test_labelling_and_evaluation_hold_replicas():
    for recipe in ("pseudo-label", "evaluate"):
        assert "accelerate_configs/ddp.yaml" in dry("gpus=4", recipe)


@pytest.mark.parametrize(
    ("recipe", "script"),
    [("submit", "kaggle/submit.py"), ("report", "stages/report.py"), ("doctor", "stages/doctor.py")],
)
def test_flags_reach_the_script(recipe, script):
    found = dry(recipe, "--artifacts", "elsewhere")
    assert f"python3 {script} " in found


@pytest.mark.parametrize("path", sorted((ROOT / "accelerate_configs").glob("*.yaml")), ids=lambda p: p.name)
def test_comments_of_a_configuration_name_what_there_is(path):
    """In backticks or snake_case: keys, the justfile's variables, flags of accelerate, what a model has."""
    text = path.read_text(encoding="utf-8")
    there = set(re.findall(r"^ *(\w+):", text, re.MULTILINE))
    there |= set(re.findall(r"^(\w+) :=", (ROOT / "justfile").read_text(encoding="utf-8"), re.MULTILINE))
    there |= vars(launch_command_parser().parse_args(["x"])).keys()
    model = (ROOT / "common/models/preference.py").read_text(encoding="utf-8")
    there |= set(re.findall(r"self\.(\w+) =", model))
    comments = " ".join(re.findall(r"#(.*)", text))
    named = set(re.findall(r"`(\w+)`|\b(\w*[a-z]_\w+|_\w+)", comments))
    assert {one or other for one, other in named} <= there


def test_the_doctor_needs_no_set_up():
    assert "pip install" not in dry("doctor") and "pip install" in dry("report")
