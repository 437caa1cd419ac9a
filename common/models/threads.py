"""How many threads torch computes with, where the user has not said."""

import os
from contextlib import suppress
from pathlib import Path

import torch

CGROUPS = Path("/sys/fs/cgroup")
QUOTAS = (("cpu.max",), ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us"))  # version 2, version 1


def use_threads() -> str:
    """Sets torch's threads, unless OMP_NUM_THREADS has.

    Half of the cores, shared by the processes of this machine: all threads wait for the one whose core is
    busy. Stage 1 of tiny-gemma on two cores: 25 steps/s with 1 thread and 6 with 2 while one core had other
    work, 5 and 0.6 while both had.

    Returns:
        How many, in words.
    """
    if "OMP_NUM_THREADS" not in os.environ:
        num_processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        torch.set_num_threads(max(1, num_cores() // (2 * num_processes)))
    number = torch.get_num_threads()
    return f"{number} thread{'s' * (number > 1)}"


def num_cores() -> int:
    """Logical cores that this process may use: those of its affinity, or fewer by a container's quota."""
    affinity = getattr(os, "sched_getaffinity", lambda _: range(os.cpu_count() or 1))
    cores = len(affinity(0))
    for names in QUOTAS:
        with suppress(OSError, ValueError):  # no such file, or "max": no quota
            quota, period = map(int, " ".join((CGROUPS / name).read_text() for name in names).split())
            cores = min(cores, quota // period) if quota > 0 else cores
    return cores
