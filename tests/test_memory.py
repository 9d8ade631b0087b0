"""What a device remembers: two generations on disk, whatever happens in between."""

from __future__ import annotations

import logging
import os

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedmask_flwr import checkpoint, memory
from fedmask_flwr.memory import DeviceMemory, DeviceMemoryError, default_folder


def disk(folder, client=1, run="ab12"):
    return DeviceMemory(folder, run, client)


def holds(value):
    return {"x": np.array([value], np.int64)}


def value_of(arrays):
    return int(arrays["x"][0])


def files(folder):
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


def test_a_device_that_never_had_a_turn_has_no_memory(tmp_path):
    assert disk(tmp_path).recall(5) == {}
    assert files(tmp_path) == []


def test_the_default_folder_is_where_programs_keep_state(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert default_folder() == tmp_path / "fedmask-flwr"
    for unset in (lambda: monkeypatch.setenv("XDG_STATE_HOME", ""), lambda: monkeypatch.delenv("XDG_STATE_HOME")):
        unset()
        monkeypatch.setenv("HOME", str(tmp_path / "me"))
        assert default_folder() == tmp_path / "me/.local/state/fedmask-flwr"


def test_the_last_two_generations_are_kept(tmp_path):
    for round_ in range(1, 6):
        disk(tmp_path).keep(round_, holds(round_))
        assert value_of(disk(tmp_path).recall(round_ + 1)) == round_
    assert files(tmp_path) == ["1.000004.safetensors", "1.000005.safetensors"]
    assert value_of(disk(tmp_path).recall(6)) == 5
    assert value_of(disk(tmp_path).recall(5)) == 4
    assert value_of(disk(tmp_path).recall(99)) == 5


@given(st.lists(st.booleans(), max_size=12))
def test_a_repeated_round_gets_the_memory_it_had(tmp_path_factory, repeats):
    """Whatever rounds a dying server repeats, each turn begins from the turn before it."""
    own = disk(tmp_path_factory.mktemp("memory"))
    for round_, twice in enumerate(repeats, 1):
        for _ in range(2 if twice else 1):
            assert own.recall(round_) == ({} if round_ == 1 else holds(10 * (round_ - 1)))
            own.keep(round_, holds(10 * round_))


def test_rounds_without_this_device_are_no_gap(tmp_path):
    own = disk(tmp_path)
    own.keep(2, holds(2))
    own.keep(7, holds(7))
    assert value_of(own.recall(7)) == 2
    own.keep(7, holds(70))
    assert value_of(own.recall(7)) == 2
    assert value_of(own.recall(9)) == 70


def test_round_one_begins_anew_and_forgets_the_run_before(tmp_path):
    own = disk(tmp_path)
    for round_ in (1, 2, 3):
        own.keep(round_, holds(round_))
    assert own.recall(1) == {}
    assert len(files(tmp_path)) == 2
    own.keep(1, holds(100))
    assert files(tmp_path) == ["1.000001.safetensors"]
    assert value_of(own.recall(2)) == 100


def test_a_device_whose_first_turn_is_repeated_begins_anew(tmp_path):
    own = disk(tmp_path)
    own.keep(4, holds(4))
    assert own.recall(3) == {}
    assert own.recall(4) == {}


def test_a_damaged_file_is_no_generation(tmp_path):
    own = disk(tmp_path)
    own.keep(4, holds(4))
    (tmp_path / "ab12/1.000006.safetensors").write_bytes(b"junk")
    assert own.recall(4) == {}


def test_a_server_that_went_far_back_is_answered_from_the_oldest(tmp_path, caplog):
    own = disk(tmp_path)
    for round_ in (4, 5, 6):
        own.keep(round_, holds(round_))
    assert value_of(own.recall(3)) == 5
    assert "the server is back at round 3, client 1 at 5" in caplog.text
    own.keep(3, holds(3))
    assert files(tmp_path) == ["1.000003.safetensors"]


def test_rounds_are_numbers_not_names(tmp_path):
    own = disk(tmp_path)
    for round_ in (999_998, 999_999, 1_000_000, 1_000_001):
        own.keep(round_, holds(round_))
    assert value_of(own.recall(1_000_001)) == 1_000_000
    assert value_of(own.recall(1_000_002)) == 1_000_001


def cut(path, share=0.5):
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])


@pytest.mark.parametrize("damage", [cut, lambda p: p.write_bytes(b""), lambda p: p.write_bytes(b"\xff" * 300)])
def test_the_older_generation_stands_in_for_a_damaged_one(damage, tmp_path, caplog):
    own = disk(tmp_path)
    for round_ in (1, 2):
        own.keep(round_, holds(round_))
    newest = tmp_path / "ab12/1.000002.safetensors"
    damage(newest)
    was = newest.read_bytes()
    with caplog.at_level(logging.WARNING):
        assert value_of(own.recall(3)) == 1
    assert str(newest) in caplog.text
    own.keep(3, holds(3))
    assert newest.read_bytes() == was
    assert value_of(own.recall(3)) == 1, "a repeated round must repeat, though the damaged one lies between"
    assert value_of(own.recall(4)) == 3


def test_all_damaged_is_an_error_that_names_the_files_and_the_fix(tmp_path):
    own = disk(tmp_path)
    for round_ in (1, 2):
        own.keep(round_, holds(round_))
    before = files(tmp_path)
    for name in before:
        cut(tmp_path / "ab12" / name)
    with pytest.raises(DeviceMemoryError, match=r"000002.*restore it from a backup, or delete.*000001") as found:
        own.recall(3)
    assert str(tmp_path / "ab12") in str(found.value)
    assert files(tmp_path) == before
    for name in before:
        (tmp_path / "ab12" / name).unlink()
    assert own.recall(3) == {}


@pytest.mark.parametrize("other", [{"client": 2}, {"run": "cd34"}])
def test_another_device_s_or_run_s_file_is_refused(other, tmp_path):
    stranger = disk(tmp_path / "there", **other)
    stranger.keep(1, holds(666))
    (found,) = (tmp_path / "there").rglob("*.safetensors")
    own = tmp_path / "here/ab12/1.000001.safetensors"
    own.parent.mkdir(parents=True)
    own.write_bytes(found.read_bytes())
    with pytest.raises(DeviceMemoryError, match=r"not the memory of client 1 \(it is of client"):
        disk(tmp_path / "here").recall(2)


def test_a_safetensors_file_of_another_program_is_refused(tmp_path):
    from safetensors.numpy import save_file

    (tmp_path / "ab12").mkdir()
    for metadata in (None, {"fedmask": "[]"}, {"fedmask": "null"}, {"fedmask": "{"}, {"other": "1"}):
        save_file(holds(1), tmp_path / "ab12/1.000001.safetensors", metadata=metadata)
        with pytest.raises(DeviceMemoryError, match="client 1"):
            disk(tmp_path).recall(2)


def test_a_full_disk_keeps_the_old_memory(tmp_path, monkeypatch):
    own = disk(tmp_path)
    own.keep(1, holds(1))
    own.keep(2, holds(2))
    before = {name: (tmp_path / "ab12" / name).read_bytes() for name in files(tmp_path)}

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint.os, "fsync", full)
    for round_ in (2, 3):
        with pytest.raises(OSError, match="No space left"):
            own.keep(round_, holds(99))
    assert {name: (tmp_path / "ab12" / name).read_bytes() for name in files(tmp_path)} == before


def test_a_death_while_writing_leaves_the_old_memory(tmp_path, monkeypatch):
    """Killed before the rename: a stray temporary file is no generation."""
    own = disk(tmp_path)
    own.keep(1, holds(1))

    class Dead(BaseException):
        pass

    def die(*_):
        raise Dead

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", die)
        with pytest.raises(Dead):
            own.keep(2, holds(2))
    assert "1.000002.safetensors.tmp" in files(tmp_path)
    assert value_of(own.recall(3)) == 1
    own.keep(3, holds(3))  # the round that was torn did not come again
    assert files(tmp_path) == ["1.000001.safetensors", "1.000003.safetensors"]
    (tmp_path / "ab12/1.000004.safetensors.tmp").write_bytes(b"torn")
    memory.forget(tmp_path)
    assert not tmp_path.exists()


def test_the_file_is_replaced_whole(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(memory, "write_atomic", lambda path, data, mode: seen.append((path.name, mode)))
    disk(tmp_path).keep(1, holds(1))
    assert seen == [("1.000001.safetensors", 0o600)]


def test_arrays_come_back_as_they_were(tmp_path):
    arrays = {
        "bool": np.array([True, False, True]),
        "bytes": np.arange(5, dtype=np.uint8),
        "float": np.array([[1.5, -0.0], [np.inf, 1e-42]], np.float32),
        "wide": np.arange(3.0),
        "big": np.array([2**64 - 1], np.uint64),
        "none": np.zeros(0, np.float32),
        "rows": np.zeros((0, 7), np.uint8),
        "number": np.array(5, np.int32),
        "strided": np.arange(10, dtype=np.int16)[::2],
        "turned": np.arange(6, dtype=np.float32).reshape(2, 3).T,
    }
    disk(tmp_path).keep(1, arrays)
    back = disk(tmp_path).recall(2)
    assert back.keys() == arrays.keys()
    for name, array in arrays.items():
        assert back[name].dtype == array.dtype
        assert back[name].shape == array.shape
        assert back[name].tobytes() == np.ascontiguousarray(array).tobytes()
        back[name][...] = 0  # what is read may be written


def test_what_was_kept_is_not_what_is_changed_later(tmp_path):
    arrays = holds(1)
    disk(tmp_path).keep(1, arrays)
    arrays["x"][0] = 2
    assert value_of(disk(tmp_path).recall(2)) == 1


def test_clients_and_runs_do_not_mix(tmp_path):
    devices = [disk(tmp_path, client, run) for client in (1, 11, 111, 0, 2**64 - 1) for run in ("ab12", "ab123")]
    for round_ in (1, 2, 3):
        for number, own in enumerate(devices):
            own.keep(round_, holds(100 * number + round_))
    for number, own in enumerate(devices):
        assert value_of(own.recall(4)) == 100 * number + 3
        assert value_of(own.recall(3)) == 100 * number + 2
    assert len(files(tmp_path)) == 2 * len(devices)


@pytest.mark.parametrize("client", ["../../evil", "1/../2", "*", "1.000001"])
def test_a_client_that_is_no_number_cannot_leave_the_folder(client, tmp_path):
    own = disk(tmp_path / "memory", client)
    with pytest.raises(ValueError, match="format code"):
        own.keep(1, holds(1))
    with pytest.raises(ValueError, match="format code"):
        own.recall(2)
    assert files(tmp_path) == []


def test_files_with_other_names_are_left_alone(tmp_path):
    own = disk(tmp_path)
    own.keep(1, holds(1))
    strangers = [
        "1.²²².safetensors",
        "1.x.safetensors",
        "1.5.safetensors",
        "1.000009.safetensors.bak",
        "1.safetensors",
    ]
    for name in strangers:
        (tmp_path / "ab12" / name).write_bytes(b"mine")
    own.keep(2, holds(2))
    own.keep(3, holds(3))
    assert value_of(own.recall(4)) == 3
    assert {*strangers} <= {*files(tmp_path)}


def test_what_cannot_be_a_folder_is_an_error(tmp_path):
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(OSError, match="taken"):
        disk(tmp_path / "taken").keep(1, holds(1))


def test_what_a_device_learned_is_its_own(tmp_path):
    """Whatever the umask: a personal mask is no other user's business."""
    before = os.umask(0)
    try:
        disk(tmp_path).keep(1, holds(1))
    finally:
        os.umask(before)
    file = tmp_path / "ab12/1.000001.safetensors"
    assert (file.stat().st_mode & 0o777, file.parent.stat().st_mode & 0o777) == (0o600, 0o700)
