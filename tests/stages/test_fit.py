"""The training loop as a whole script: the same numbers however it is cut, launched, or interrupted."""

import os
import re
import shutil
import subprocess
import time
from unittest.mock import Mock

import psutil
import pytest
import torch
from calling import call
from helpers import ROOT, read_losses
from launching import command, launch, launch_many, stage1
from safetensors.torch import load_file

from common.files import read_json
from common.models import PreferenceModel
from common.ops import cannot_compile
from common.train.fit import draw_kept
from common.train.memory import Budget, Memory

STEPS = 20


@pytest.fixture(scope="module")
def trained(world, tmp_path_factory):
    """Trains once for each way of launching, all of `WAYS` that share a launch together; the run's folder."""
    folder = tmp_path_factory.mktemp("trained")
    runs = {}

    def run(how, family="gemma", **flags):
        key = (how, family, *flags.items())
        if key not in runs:
            together = [(f, fl) for h, f, fl in WAYS if h == how and (how, f, *fl.items()) not in runs]
            together = [(family, flags), *(one for one in together if one != (family, flags))]
            scripts = []
            for one, its_flags in together if how != "1" else together[:1]:
                output = runs[how, one, *its_flags.items()] = folder / str(len(runs)) / "run"
                scripts.append(stage1(world, output, one, **its_flags))
            if how == "1":
                call("stage1", scripts[0][1:])
            else:
                launch_many(how, scripts)
        return runs[key]

    return run


def assert_same_losses(found, expected):
    losses, reference = read_losses(found), read_losses(expected)
    assert len(losses) == len(reference) == STEPS
    assert losses == pytest.approx(reference, rel=1e-5)
    norms, reference = (read_losses(run, "grad_norm") for run in (found, expected))
    assert norms == pytest.approx(reference, rel=1e-4)  # which AdamW's steps hardly depend on


EXECUTION = ("max-tokens-per-micro-batch", "recompute", "compile")

WAYS = [
    ("2", "gemma", {}),
    ("1", "gemma", {"max-tokens-per-micro-batch": 300}),
    ("1", "gemma", {"max-tokens-per-micro-batch": 1, "recompute": 1}),
    ("2", "gemma", {"max-tokens-per-micro-batch": 300}),
    ("fsdp_27b.yaml:2", "gemma", {"max-tokens-per-micro-batch": 300, "recompute": "all"}),
    ("1", "gemma", {"compile": "on"}),
    ("1", "llama", {"compile": "on", "recompute": 1}),
    ("fsdp_27b.yaml:2", "gemma", {"compile": "on"}),
    ("fsdp_9b.yaml:2", "gemma", {}),
    ("fsdp_27b_multinode.yaml:4", "gemma", {"max-tokens-per-micro-batch": 300}),
    ("ddp.yaml:2", "gemma", {}),
    ("single_gpu.yaml:1", "gemma", {}),
    ("cpu.yaml:1", "gemma", {}),
    ("fsdp_27b.yaml:2", "llama", {"optimizer": "stable_adamw", "formats": ("PAB", "PAPB")}),
]


@pytest.mark.parametrize(("how", "family", "flags"), WAYS)
def test_losses_do_not_depend_on_launch_or_micro_batches(trained, how, family, flags):
    """Every shipped accelerate configuration drives a connected run; fp32, with dropout, 20 steps."""
    if "compile" in flags and (reason := cannot_compile(torch.device("cpu"))):
        pytest.skip(reason)
    recipe = {name: value for name, value in flags.items() if name not in EXECUTION}
    reference = trained("1", family, **recipe)
    assert_same_losses(trained(how, family, **flags), reference)


def test_the_comparison_can_fail(trained):
    """Another seed gives other losses: the equality above is no accident of flat losses."""
    with pytest.raises(AssertionError):
        assert_same_losses(trained("1", seed=4), trained("1"))


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


def kill_thrice(how, arguments, folder):
    """A run that is killed, goes on, and is killed again."""
    kills = sum(kill_when(how, arguments, folder, num_lines) for num_lines in (2, 8, 14))
    assert kills >= 2, "the run was over before it could be killed"


def assert_same_run(found, expected):
    """Losses and weights to the last bit."""
    assert read_losses(found) == read_losses(expected)
    weights, whole = (load_file(folder / "model.safetensors") for folder in (found, expected))
    assert all(torch.equal(weights[name], whole[name]) for name in whole)
    assert not (found / "state").exists()


def test_a_killed_run_goes_on_as_if_nothing_happened(world, trained, tmp_path):
    """With dropout: the masks are drawn again."""
    flags = {"max-tokens-per-micro-batch": 300}
    arguments = stage1(world, tmp_path / "run", **flags, **{"state-interval-steps": 3})
    kill_thrice("1", arguments, tmp_path / "run")
    assert "continuing after step" in call("stage1", arguments[1:]).stdout
    assert_same_run(tmp_path / "run", trained("1", **flags))


def test_out_of_memory_is_told_and_the_saved_state_kept(world, trained, tmp_path, monkeypatch):
    failures, forward = [], PreferenceModel.forward

    def fails_in_the_third_step(*arguments, **named):
        if not failures and (tmp_path / "run" / "state" / "step-00000002").exists():
            failures.append(1)
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return forward(*arguments, **named)

    monkeypatch.setattr(PreferenceModel, "forward", fails_in_the_third_step)
    flags = {"max-tokens-per-micro-batch": 300, "recompute": 1, "dtype": "bf16"}
    flags |= {"accumulation": "stochastic"}  # whose noise is drawn again
    words = stage1(world, tmp_path / "run", **flags, **{"state-interval-steps": 2})[1:]
    failed = call("stage1", words, check=False)
    assert failed.status == 1 and not (tmp_path / "run" / "model.safetensors").exists()
    expected = (
        r"error: out of memory in step 3 on process 0, in a micro-batch of [\d,]+ tokens \(the longest "
    )
    expected += r"sequence \d+, the budget 300\) with 1 of 2 layers recomputed\. Ways out: "
    expected += r"--max-tokens-per-micro-batch \d+; --recompute 2; .*\. The state after step 2 is kept"
    assert re.search(expected, failed.stderr)
    assert "continuing after step 2" in call("stage1", words).stdout
    assert_same_run(tmp_path / "run", trained("1", **flags))


@pytest.mark.parametrize(
    ("maker", "told"),
    [
        ("common.models.load_model", "for the weights"),
        ("common.train.fit.KahanOptimizer", "for gradient sums and optimiser states"),
    ],
)
def test_out_of_memory_before_the_first_step(world, tmp_path, monkeypatch, maker, told):
    monkeypatch.setattr(maker, Mock(side_effect=torch.OutOfMemoryError("CUDA out of memory.")))
    failed = call("stage1", stage1(world, tmp_path / "run")[1:], check=False)
    assert failed.status == 1 and f"error: out of memory {told}. Ways out: more GPUs" in failed.stderr


def test_each_micro_batch_recomputes_what_it_needs_and_draws_its_dropout(
    world, trained, tmp_path, monkeypatch
):
    """As on a GPU that has room for 220 tokens, and for 314 with both layers recomputed."""
    memory = Memory(room=220.0, kept=(0.0, 1.0), recomputed=(0.0, 0.7), num_layers=2)
    find = Mock(return_value=Budget(tokens=300, layers=None, memory=memory))
    draw, passes, forward = Mock(wraps=draw_kept), set(), PreferenceModel.forward

    def recording(model, packed, **options):
        if "recompute" in options:
            passes.add((len(packed.input_ids_T), options["recompute"]))
        return forward(model, packed, **options)

    monkeypatch.setattr("common.train.fit.find_budget", find)
    monkeypatch.setattr("common.train.fit.draw_kept", draw)
    monkeypatch.setattr(PreferenceModel, "forward", recording)
    call("stage1", stage1(world, tmp_path / "run")[1:])
    assert all(layers == memory.fewest_layers(tokens) for tokens, layers in passes)
    assert {layers for _, layers in passes} == {0, 1, 2}
    assert_same_losses(tmp_path / "run", trained("1"))
    drawn = {(one.kwargs["step"], one.kwargs["seed"]) for one in draw.call_args_list}
    assert drawn == {(step, 3) for step in range(STEPS)}
    assert draw.call_args.args[0].dropout == 0.3
    assert find.call_args.kwargs["longest"] == read_json(tmp_path / "run/sequences.json")["length_edges"][-1]


@pytest.mark.parametrize("is_sharded", [False, True])
def test_a_budget_knows_whether_weights_are_sharded(world, tmp_path, monkeypatch, is_sharded):
    find = Mock(side_effect=ValueError("seen enough"))
    monkeypatch.setattr("common.train.fit.find_budget", find)
    monkeypatch.setattr("common.train.fit.is_fsdp", lambda accelerator: is_sharded)
    failed = call("stage1", stage1(world, tmp_path / "run")[1:], check=False)
    assert "seen enough" in failed.stderr and find.call_args.kwargs["is_sharded"] is is_sharded


def test_killed_shards_go_on_as_shards_and_as_a_whole(world, trained, tmp_path):
    how, flags = "fsdp_27b.yaml:2", {"max-tokens-per-micro-batch": 300, "recompute": "all"}
    runs = {name: tmp_path / name for name in ("sharded", "whole")}
    arguments = {
        name: stage1(world, run, **flags, **{"state-interval-steps": 3}) for name, run in runs.items()
    }
    kill_thrice(how, arguments["sharded"], runs["sharded"])
    shutil.copytree(runs["sharded"], runs["whole"])
    assert "continuing after step" in launch(how, *arguments["sharded"]).stdout
    assert_same_run(runs["sharded"], trained(how, **flags))
    other_cut = ["--max-tokens-per-micro-batch", 100, "--recompute", 1]
    assert "continuing after step" in call("stage1", arguments["whole"][1:], other_cut).stdout
    assert_same_losses(runs["whole"], trained(how, **flags))
    assert not (runs["whole"] / "state").exists()
