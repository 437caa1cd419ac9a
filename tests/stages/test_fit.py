"""The training loop as a whole script: the same numbers however it is cut, launched, or interrupted."""

import os
import subprocess
import time

import psutil
import pytest
import torch
from helpers import ROOT, read_losses
from launching import command, launch, stage1
from safetensors.torch import load_file

STEPS = 20


@pytest.fixture(scope="module")
def trained(world, tmp_path_factory):
    """Trains once for each way of launching; returns the run's folder."""
    folder = tmp_path_factory.mktemp("trained")
    runs = {}

    def run(how, family="gemma", **flags):
        key = (how, family, *flags.items())
        if key not in runs:
            runs[key] = folder / str(len(runs)) / "run"
            launch(how, *stage1(world, runs[key], family, **flags))
        return runs[key]

    return run


def assert_same_losses(found, expected):
    losses, reference = read_losses(found), read_losses(expected)
    assert len(losses) == len(reference) == STEPS
    assert losses == pytest.approx(reference, rel=1e-5)


WAYS = [
    ("2", "gemma", {}),
    ("1", "gemma", {"max-tokens-per-micro-batch": 300}),
    ("1", "gemma", {"max-tokens-per-micro-batch": 1}),
    ("2", "gemma", {"max-tokens-per-micro-batch": 300}),
    ("fsdp_27b.yaml:2", "gemma", {"max-tokens-per-micro-batch": 300}),
    ("fsdp_9b.yaml:2", "gemma", {}),
    ("fsdp_27b_multinode.yaml:4", "gemma", {"max-tokens-per-micro-batch": 300}),
    ("ddp.yaml:2", "gemma", {}),
    ("single_gpu.yaml:1", "gemma", {}),
    ("cpu.yaml:1", "gemma", {}),
    ("fsdp_27b.yaml:2", "llama", {"optimizer": "stable_adamw", "formats": ("PAB", "PAPB")}),
]


@pytest.mark.parametrize(("how", "family", "flags"), WAYS)
def test_losses_do_not_depend_on_launch_or_micro_batches(trained, how, family, flags):
    """Every shipped accelerate configuration drives a connected run; fp32, dropout off, 20 steps."""
    recipe = {name: value for name, value in flags.items() if name != "max-tokens-per-micro-batch"}
    reference = trained("1", family, **recipe)
    assert_same_losses(trained(how, family, **flags), reference)


def test_the_comparison_can_fail(trained):
    """Another seed gives other losses: the equality above is no accident of flat losses."""
    with pytest.raises(AssertionError):
        assert_same_losses(trained("1", seed=4), trained("1"))


def test_activation_checkpointing_changes_nothing(trained):
    assert_same_losses(trained("1", **{"activation-checkpointing": True}), trained("1"))


def kill_when(how, arguments, folder, num_lines):
    """Starts a run and kills -9 all its processes once it has logged `num_lines` steps."""
    words, environment = command(how, *arguments)
    process = subprocess.Popen(
        words,
        cwd=ROOT,
        env=os.environ | environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    path, deadline = folder / "metrics.jsonl", time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        if path.is_file() and path.read_bytes().count(b"\n") >= num_lines:
            break
        time.sleep(0.002)
    was_running = process.poll() is None
    # The workers of a launcher are sessions of their own and would outlive it.
    for one in [*psutil.Process(process.pid).children(recursive=True), process]:
        one.kill()
    process.wait()
    return was_running


@pytest.mark.parametrize(
    ("how", "resumed_as"), [("1", "1"), ("fsdp_27b.yaml:2", "fsdp_27b.yaml:2"), ("fsdp_27b.yaml:2", "1")]
)
def test_killed_runs_go_on_as_if_nothing_happened(world, trained, tmp_path, how, resumed_as):
    flags = {"max-tokens-per-micro-batch": 300}
    arguments = stage1(world, tmp_path / "run", **flags, **{"state-interval-steps": 3})
    kills = 0
    for num_lines in (2, 8, 14):
        kills += kill_when(how, arguments, tmp_path / "run", num_lines)
    assert kills >= 2, "the run was over before it could be killed"
    found = launch(resumed_as, *arguments)
    assert "continuing after step" in found.stdout
    uninterrupted = trained(how, **flags)
    if how == resumed_as:
        assert read_losses(tmp_path / "run") == read_losses(uninterrupted)
        weights, expected = (load_file(f / "model.safetensors") for f in (tmp_path / "run", uninterrupted))
        assert all(torch.equal(weights[name], expected[name]) for name in expected)
    else:
        assert_same_losses(tmp_path / "run", uninterrupted)
    assert not (tmp_path / "run" / "state").exists()


def test_dropout_masks_are_drawn_again_after_a_kill(world, tmp_path):
    flags = {"head-dropout": 0.3, "state-interval-steps": 3}
    arguments = stage1(world, tmp_path / "killed", **flags)
    kill_when("1", arguments, tmp_path / "killed", 10)
    launch("1", *arguments)
    launch("1", *stage1(world, tmp_path / "whole", **flags))
    assert read_losses(tmp_path / "killed") == read_losses(tmp_path / "whole")
