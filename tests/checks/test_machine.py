"""Limits of a cgroup, memory and threads."""

from __future__ import annotations

import math

import pytest
from findings import told

from fedmask_flwr import cgroup
from fedmask_flwr.checks import Asked, machine


def files(root, **texts):
    for path, text in texts.items():
        file = root / path.replace("__", "/").replace("_dot_", ".")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)


def test_cgroup_2(tmp_path):
    (tmp_path / "own").write_text("0::/a/b\n")
    files(
        tmp_path / "fs", memory_dot_max="max\n", a__memory_dot_max="1000\n", a__memory_dot_current="900\n",
        a__b__memory_dot_max="2000\n", a__b__memory_dot_current="100\n", a__b__cpu_dot_max="50000 100000\n",
        a__cpu_dot_max="max 100000\n",
    )  # fmt: skip
    (tmp_path / "fs/a/memory.stat").write_text("anon 5\ninactive_file 300\n")
    assert cgroup.limits(tmp_path / "fs", tmp_path / "own") == cgroup.Limits(1000, 400, 0.5)


def test_cgroup_1(tmp_path):
    (tmp_path / "own").write_text("4:memory:/docker/x\n3:cpu,cpuacct:/docker/x\n0::/\n")
    memory, cpu = tmp_path / "fs/memory/docker/x", tmp_path / "fs/cpu,cpuacct/docker/x"
    for folder in (memory, cpu):
        folder.mkdir(parents=True)
    (memory.parents[1] / "memory.limit_in_bytes").write_text("9223372036854771712")
    (memory / "memory.limit_in_bytes").write_text("5000")
    (memory / "memory.usage_in_bytes").write_text("4000")
    (cpu / "cpu.cfs_quota_us").write_text("25000")
    (cpu / "cpu.cfs_period_us").write_text("100000")
    (cpu.parent / "cpu.cfs_quota_us").write_text("-1")
    assert cgroup.limits(tmp_path / "fs", tmp_path / "own") == cgroup.Limits(5000, 1000, 0.25)


def test_cgroup_of_a_container_and_none(tmp_path):
    """Inside a container the path of the outside is told, and only the root is there."""
    (tmp_path / "own").write_text("4:memory:/docker/x\n")
    (tmp_path / "fs/memory").mkdir(parents=True)
    (tmp_path / "fs/memory/memory.limit_in_bytes").write_text("7000")
    assert cgroup.limits(tmp_path / "fs", tmp_path / "own").memory == 7000
    assert cgroup.limits(tmp_path / "none", tmp_path / "none") == cgroup.Limits()


def test_free_memory(tmp_path):
    (tmp_path / "m").write_text("MemTotal: 9 kB\nMemAvailable:   2 kB\n")
    assert cgroup.free_memory(tmp_path / "m") == 2048
    assert cgroup.free_memory(tmp_path / "none") == math.inf
    assert 0 < cgroup.free_memory() < math.inf


@pytest.mark.parametrize(("left", "status"), [(500e6, "ok"), (400e6, "warn"), (340e6, "fail")])
def test_memory(monkeypatch, stages, left, status):
    monkeypatch.setattr(machine.cgroup, "limits", lambda: cgroup.Limits(512e6, left, math.inf))
    told(machine.memory(Asked()), status, "of a limit of 512 MB", "2000000 parameters 140 MB", "about 348 MB")


def test_memory_of_a_machine_and_of_a_killed_process(monkeypatch, stages):
    monkeypatch.setattr(machine.cgroup, "limits", cgroup.Limits)
    monkeypatch.setattr(machine.cgroup, "free_memory", lambda: 100e6)
    told(machine.memory(Asked()), "fail", "100 MB left;")
    stages["network"] = stages["client"] = {"error": "the process ended here (signal 9)"}
    told(machine.memory(Asked()), "fail", "signal 9", "700 MB")


@pytest.mark.parametrize(
    ("asked", "quota", "omp", "status", "words"),
    [
        ({}, math.inf, None, "ok", "1 thread a client"),
        ({"threads": 4}, 0.5, "1", "warn", "set threads to 1"),
        ({}, 0.5, "4", "warn", "OMP_NUM_THREADS=1"),
        ({}, 0.5, None, "warn", "start a thread for each of 4 processors"),
        ({"threads": 4, "device": "auto"}, math.inf, "4", "ok", "OMP_NUM_THREADS 4"),
        ({"device": "cuda"}, math.inf, None, "fail", "device is cuda"),
    ],
)
def test_threads(monkeypatch, stages, asked, quota, omp, status, words):
    monkeypatch.setattr(machine.cgroup, "limits", lambda: cgroup.Limits(processors=quota))
    monkeypatch.setattr(machine.cgroup, "cores", lambda: 4)
    monkeypatch.setattr(machine.os, "cpu_count", lambda: 4)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if omp:
        monkeypatch.setenv("OMP_NUM_THREADS", omp)
    told(machine.threads(Asked(told=tuple(asked.items()))), status, words)


def test_a_torch_that_dies(stages):
    stages["torch"] = {"error": "the process ended here (signal 4)"}
    told(machine.threads(Asked()), "fail", "signal 4", "arm64")
