"""Threads: half of the cores, shared by processes, unless the user has said."""

import os

import pytest
import torch

from common.models import threads, use_threads


@pytest.mark.parametrize(
    ("cores", "files", "processes", "said"),
    [
        (1, {}, 1, "1 thread"),
        (2, {}, 1, "1 thread"),
        (3, {}, 1, "1 thread"),
        (16, {}, 1, "8 threads"),
        (16, {}, 4, "2 threads"),
        (16, {}, 64, "1 thread"),
        (64, {"cpu.max": "max 100000\n"}, 1, "32 threads"),
        (64, {"cpu.max": "450000 100000\n"}, 1, "2 threads"),
        (64, {"cpu.max": "50000 100000\n"}, 1, "1 thread"),
        (2, {"cpu.max": "800000 100000\n"}, 1, "1 thread"),
        (64, {"cpu/cpu.cfs_quota_us": "400000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 1, "2 threads"),
        (64, {"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, 1, "32 threads"),
    ],
)
def test_half_of_the_cores_that_are_there(monkeypatch, tmp_path, cores, files, processes, said):
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(cores)))
    monkeypatch.setattr(threads, "CGROUPS", tmp_path)
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    numbers = []
    monkeypatch.setattr(torch, "set_num_threads", numbers.append)
    monkeypatch.setattr(torch, "get_num_threads", lambda: numbers[-1])
    assert use_threads() == said


def test_what_the_user_said_is_kept(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.setattr(torch, "set_num_threads", lambda number: pytest.fail("was set"))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    assert use_threads() == "3 threads"
