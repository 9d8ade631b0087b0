"""Disks, and a device's memory on them."""

from __future__ import annotations

import errno
import os

import numpy as np
import pytest
from findings import told

from fedmask_flwr.checks import Asked, disks
from fedmask_flwr.memory import DeviceMemory


def test_disk(tmp_path, monkeypatch):
    told(disks.writable(tmp_path), "ok", "fsync works")
    told(disks.writable(tmp_path / "a/b"), "ok", f"to be made in {tmp_path}")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("")
    told(disks.writable(tmp_path / "file/x"), "fail", "is a file")
    told(disks.run_disk(Asked()), "skip")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert disks.memory_folder(Asked()) == tmp_path / "fedmask-flwr"
    assert disks.memory_folder(Asked(told=(("memory-dir", "x"),))).name == "x"


def test_disk_read_only(tmp_path):
    told(disks.writable(disks.Path("/proc/self")), "fail", "takes no writes", "own the folder")


def test_disk_full(tmp_path, monkeypatch):
    def full(_fd):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(disks.os, "fsync", full)
    told(disks.writable(tmp_path), "fail", "No space left on device", "free the disk")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("megabytes", "inodes", "status", "words"),
    [(10, 9_000, "fail", "checkpoint"), (100, 9_000, "warn", "comfortable"), (10**6, 3, "fail", "inodes")],
)
def test_disk_nearly_full(tmp_path, monkeypatch, megabytes, inodes, status, words):
    free = megabytes * 1000
    state = os.statvfs_result((4096, 1000, 10**9, free, free, 10**6, inodes, inodes, 0, 255))
    monkeypatch.setattr(disks.os, "statvfs", lambda _path: state)
    told(disks.writable(tmp_path), status, words)


def test_device_memory(tmp_path):
    asked = Asked(memory_dir=tmp_path)
    told(disks.remembered(asked), "skip", "no device's memory")
    for client in (0, 1):
        for round_ in (1, 2):
            DeviceMemory(tmp_path, "ab12", client).keep(round_, {"m": np.arange(9)})
    told(disks.remembered(asked), "ok", "4 generations of 2 clients in 1 runs")
    newest, oldest = tmp_path / "ab12/0.000002.safetensors", tmp_path / "ab12/0.000001.safetensors"
    newest.write_bytes(newest.read_bytes()[:-5])
    told(disks.remembered(asked), "warn", "ab12/0.000002", "an older generation stands in")
    oldest.write_bytes((tmp_path / "ab12/1.000001.safetensors").read_bytes())
    told(disks.remembered(asked), "fail", "nothing older", "begins anew")
    assert "client 1" in disks.damage(oldest)
    assert newest.exists()
