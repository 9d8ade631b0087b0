"""benchmarks/compare/prepare.py, on a made-up data folder."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import numpy as np
import pytest

from fedmask_flwr import data
from fedmask_flwr.share import share

SCRIPT = Path(__file__).parents[1] / "benchmarks/compare/prepare.py"
LOAD = """
import numpy as np

def hapt(window, step, classes):
    # Two users, 10 windows of each activity; a window holds its own number in time.
    user, label, t = (a.ravel() for a in np.meshgrid([4, 9], np.arange(classes), np.arange(10), indexing="ij"))
    x = np.random.default_rng(1).normal(3, 5, (len(t), window, 6)).astype(np.float32)
    x[:, 0, 0] = 100 * label + t
    return x, label, user

def cifar10(split):
    x = np.zeros((20, 32, 32, 3), np.uint8)
    x[:, :, :, 2] = 255
    return x, np.arange(20, dtype=np.uint8) % 10
"""


def prepare(tmp_path, monkeypatch, load=LOAD):
    (tmp_path / "in").mkdir()
    (tmp_path / "in/load.py").write_text(load)
    monkeypatch.setattr(sys, "argv", ["prepare", "--data", str(tmp_path / "in"), "--out", str(tmp_path / "out")])
    monkeypatch.setattr(sys, "dont_write_bytecode", sys.dont_write_bytecode)
    runpy.run_path(str(SCRIPT), run_name="__main__")
    return [p.name for p in (tmp_path / "in").iterdir()]


def test_folders_are_npz_data_sets(tmp_path, monkeypatch, capsys):
    assert prepare(tmp_path, monkeypatch) == ["load.py"]
    train, test = (data.load("npz", split, str(tmp_path / "out/hapt")) for split in ("train", "test"))
    assert (train.in_shape, train.num_classes, test.num_classes) == ((6, 128), 6, 6)
    assert (len(train), len(test)) == (2 * 6 * 7, 2 * 6 * 2)
    np.testing.assert_allclose(train.x.mean(axis=(0, 2)), 0, atol=1e-4)
    np.testing.assert_allclose(train.x.std(axis=(0, 2)), 1, atol=1e-4)
    for user in (4, 9):
        for label in range(6):
            time, later = (d.x[(d.group == user) & (d.y == label), 0, 0] for d in (train, test))
            step = np.diff(time).mean()
            assert step > 0
            np.testing.assert_allclose(np.diff(time), step, rtol=1e-3)
            # Windows 0 to 6 train, 7 is dropped, 8 and 9 test.
            np.testing.assert_allclose((later - time[-1]) / step, [2, 3], rtol=1e-3)
    assert (train.group[share(train, test, "train", 1, 2, "group", seed=0)] == 9).all()
    images = data.load("npz", "test", str(tmp_path / "out/cifar10"))
    assert (images.in_shape, images.num_classes, images.group) == ((3, 32, 32), 10, None)
    assert [images.x[:, c].mean() for c in range(3)] == [0, 0, 1]
    assert "2 users of 42 to 42" in capsys.readouterr().out


def test_a_user_with_too_little_is_named(tmp_path, monkeypatch):
    with pytest.raises(SystemExit, match="user 4 has 3 windows of activity 0"):
        prepare(tmp_path, monkeypatch, LOAD.replace("np.arange(10), indexing", "np.arange(3), indexing"))
