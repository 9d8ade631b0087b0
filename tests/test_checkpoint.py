"""Checkpoints: atomic, exact, and clear about damage."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest

from fedmask_flwr.checkpoint import CheckpointError, load_state, save_state, write_atomic


@dataclass(frozen=True, slots=True)
class State:
    ones: np.ndarray
    total: int
    rate: float


def test_numbers_come_back_exactly(tmp_path):
    state = State(np.arange(5, dtype=np.uint32), 2**60, 0.1 + 0.2)
    save_state(tmp_path / "s", state, {"round": 4})
    back, meta = load_state(tmp_path / "s", State)
    assert np.array_equal(back.ones, state.ones)
    assert (back.total, back.rate, meta) == (2**60, 0.1 + 0.2, {"round": 4})


def test_equal_states_are_equal_files(tmp_path):
    for name in "ab":
        save_state(tmp_path / name, State(np.zeros(3), 1, 2.0), {"round": 1, "digest": "x"})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "s"
    write_atomic(path, b"old")
    monkeypatch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space"):
        write_atomic(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("damage", [b"", b"junk", b"\xff" * 64])
def test_damage_is_named_with_its_fix(tmp_path, damage):
    (tmp_path / "s").write_bytes(damage)
    with pytest.raises(CheckpointError, match="--overwrite"):
        load_state(tmp_path / "s", State)


def test_another_state_is_refused(tmp_path):
    @dataclass(frozen=True, slots=True)
    class Other:
        weights: np.ndarray

    save_state(tmp_path / "s", Other(np.zeros(2)), {})
    with pytest.raises(CheckpointError, match="not a checkpoint of State"):
        load_state(tmp_path / "s", State)
