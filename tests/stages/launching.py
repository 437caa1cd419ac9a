"""How the tests start stages: alone, as connected CPU processes, or under FSDP2 through the shim."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

from helpers import ROOT

BASE = {"OMP_NUM_THREADS": "1", "COLUMNS": "120", "PYTHONPATH": str(ROOT)}


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def command(launch: str, *arguments: object) -> tuple[list[str], dict[str, str]]:
    """Command line and environment of a launch.

    Args:
        launch: "1" a plain process, "2" two connected CPU processes, or "NAME.yaml:N" for N processes under
            that accelerate configuration (several of them through the shim).
    """
    words = [str(argument) for argument in arguments]
    if launch == "1":
        return [sys.executable, *words], BASE
    if launch.isdigit():
        torchrun = [
            "-m",
            "torch.distributed.run",
            "--nproc-per-node",
            launch,
            "--master-port",
            str(free_port()),
        ]
        return [sys.executable, *torchrun, *words], BASE | {"ACCELERATE_USE_CPU": "true"}
    config, processes = launch.split(":")
    accelerate = ["-m", "common.train.launcher", "--config_file", f"accelerate_configs/{config}"]
    shape = ["--num_processes", processes, "--num_machines", "1", "--main_process_port", str(free_port())]
    if "multinode" in config:
        shape += ["--parallelism_config_dp_replicate_size", "2"]
        shape += ["--parallelism_config_dp_shard_size", str(int(processes) // 2)]
    shim = ["tests/shim.py"] if int(processes) > 1 else []
    return [sys.executable, *accelerate, *shape, *shim, *words], BASE | {"ACCELERATE_TORCH_DEVICE": "cpu"}


def launch(
    how: str, *arguments: object, timeout: int = 240, check: bool = True
) -> subprocess.CompletedProcess:
    """Runs a stage; its output is text, and a failure shows it."""
    words, environment = command(how, *arguments)
    found = subprocess.run(
        words,
        cwd=ROOT,
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout,
    )
    if check and found.returncode:
        raise AssertionError(f"{' '.join(words)}\nstatus {found.returncode}\n{found.stdout[-6000:]}")
    return found


def launch_many(how: str, scripts: list[list[object]]) -> subprocess.CompletedProcess:
    """Runs several stages in one launch, one after the other."""
    return launch(
        how, "tests/stages/many.py", json.dumps([[str(word) for word in words] for words in scripts])
    )


def stage1(world: Path, output: Path, family: str = "gemma", **flags: object) -> list[object]:
    """Arguments of a stage 1 run of 20 steps on the small world, much dropout."""
    values = {
        "checkpoint": world / family,
        "votes": world / "votes.parquet",
        "artifacts": output.parent / "artifacts",
        "output": output,
        "tracker": "none",
        "conversation-tokens": 128,
        "comparisons-per-step": 6,
        "head-dropout": 0.3,
        "lr": 3e-3,
        **flags,
    }
    words = [word for name, value in values.items() for word in (f"--{name}", *_words(value))]
    return ["stages/stage1.py", f"tiny-{family}", *words]


def _words(value: object) -> list[object]:
    if value is True:
        return []
    return list(value) if isinstance(value, tuple) else [value]
