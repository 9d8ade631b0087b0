from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedmask_flwr import data
from fedmask_flwr.data import DataError, Dataset, epoch_batches, keyed_rng, load


def test_digits_split_is_fixed_and_disjoint():
    train, test = load("digits", "train"), load("digits", "test")
    assert (train.in_shape, len(train), len(test)) == ((1, 8, 8), 1400, 397)
    assert train.num_classes == test.num_classes == 10
    assert train.x.dtype == np.float32
    assert train.y.dtype == np.int64
    assert 0 <= train.x.min() < train.x.max() == 1
    assert train.y[:12].tolist() == [8, 1, 1, 6, 2, 1, 7, 3, 1, 4, 2, 8]
    assert load("digits", "train") is train


def test_npz(tmp_path):
    x, y = np.ones((3, 2), np.float64), np.array([0, 1, 1], np.int8)
    np.savez(tmp_path / "train.npz", x=x, y=y)
    np.savez(tmp_path / "test.npz", x=x, y=y, num_classes=5)
    got = load("npz", "train", str(tmp_path))
    assert (got.x.dtype, got.y.dtype, got.num_classes) == (np.float32, np.int64, 2)
    assert load("npz", "test", str(tmp_path)).num_classes == 5


def test_npz_group(tmp_path):
    np.savez(tmp_path / "train.npz", x=X, y=Y, group=np.array([30, 0, 2], np.uint8))
    np.savez(tmp_path / "test.npz", x=X, y=Y)
    got = load("npz", "train", str(tmp_path)).group
    assert (got.dtype, got.tolist()) == (np.int64, [30, 0, 2])
    assert load("npz", "test", str(tmp_path)).group is None


def test_bytes_are_pixels_and_black_stays_zero(tmp_path):
    x = np.arange(256, dtype=np.uint8).reshape(4, 8, 8)
    np.savez(tmp_path / "train.npz", x=x, y=np.zeros(4, int))
    got = load("npz", "train", str(tmp_path)).x
    assert (got.dtype, got[0, 0, 0], got[-1, -1, -1]) == (np.float32, 0, 1)
    np.testing.assert_array_equal(got, x.astype(np.float32) / np.float32(255))


X, Y = np.ones((3, 2), np.float32), np.array([0, 1, 2])


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"x": X}, "no array named y"),
        ({"x": X[:2], "y": Y}, "shape"),
        ({"x": X[:, 0], "y": Y}, "shape"),
        ({"x": X.astype(np.int16), "y": Y}, "x is int16; scale it"),
        ({"x": X, "y": Y.astype(float)}, "integers"),
        ({"x": X * np.nan, "y": Y}, "NaN"),
        ({"x": X, "y": Y - 1}, "labels run from -1"),
        ({"x": X, "y": Y, "num_classes": 2}, "labels run from 0 to 2; expected 0 to 1"),
        ({"x": X, "y": Y, "num_classes": [3]}, "one integer"),
        ({"x": X[:0], "y": Y[:0]}, "no examples"),
        ({"x": X, "y": Y, "group": Y.astype(float)}, "group is float64"),
        ({"x": X, "y": Y, "group": Y[:2]}, r"group is int64 of shape \(2,\); expected integers \(3,\)"),
        ({"x": X, "y": Y, "group": Y[:, None]}, "shape"),
        ({"x": X, "y": Y, "group": Y - 1}, "groups run from -1"),
        (
            {"x": X, "y": Y, "group": Y.astype(np.uint64) + np.uint64(1 << 63)},
            "groups run from 9223372036854775808",
        ),
        ({"x": np.array([{}, {}, {}]), "y": Y}, "plain arrays"),
    ],
)
def test_bad_npz(tmp_path, arrays, message):
    np.savez(tmp_path / "train.npz", **arrays)
    with pytest.raises(DataError, match=message):
        load("npz", "train", str(tmp_path))


def test_npz_missing_or_not_npz(tmp_path):
    with pytest.raises(DataError, match="--data-dir"):
        load("npz", "train")
    with pytest.raises(DataError, match="does not exist"):
        load("npz", "train", str(tmp_path))
    (tmp_path / "train.npz").write_bytes(b"PK\x03\x04 nonsense")
    with pytest.raises(DataError, match="not an"):
        load("npz", "train", str(tmp_path))


def test_own_function(tmp_path, monkeypatch):
    (tmp_path / "own_data_mod.py").write_text(
        "import numpy as np\n"
        "from fedmask_flwr.data import Dataset\n"
        "def pair(split, data_dir):\n"
        "    return np.ones((2, 3), np.float32), np.array([0, len(data_dir)])\n"
        "def full(split, data_dir):\n"
        "    return Dataset(np.ones((2, 3), np.float32), np.array([0, 1]), 7)\n"
        "def whose(split, data_dir):\n"
        "    return Dataset(np.full((2, 3), 255, np.uint8), np.array([0, 1]), 7, np.array([5, 4], np.int8))\n"
        "def nobody(split, data_dir):\n"
        "    return Dataset(np.ones((2, 3), np.float32), np.array([0, 1]), 7, np.array([5, -4]))\n"
        "def bad(split, data_dir):\n"
        "    return 3\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert load("own_data_mod:pair", "train", "abcd").num_classes == 5
    assert load("own_data_mod:full", "test").num_classes == 7
    assert load("own_data_mod:full", "test").group is None
    got = load("own_data_mod:whose", "train")
    assert (got.group.dtype, got.group.tolist()) == (np.int64, [5, 4])
    assert (got.x.dtype, got.x.min()) == (np.float32, 1)
    with pytest.raises(DataError, match="own_data_mod:nobody: groups run from -4"):
        load("own_data_mod:nobody", "train")
    with pytest.raises(DataError, match="returned int"):
        load("own_data_mod:bad", "train")
    with pytest.raises(DataError, match="PYTHONPATH"):
        load("own_data_mod:nothing", "train")
    with pytest.raises(DataError, match="PYTHONPATH"):
        load("no_such_module_here:f", "train")


def test_unknown_names():
    with pytest.raises(DataError, match="digits, mnist"):
        load("minst", "train")
    with pytest.raises(DataError, match="'train' or 'test'"):
        load("digits", "valid")


def test_import_is_light():
    code = (
        "import sys, fedmask_flwr.data, fedmask_flwr.share;"
        "print(sorted({'torch', 'sklearn', 'datasets', 'flwr'} & set(sys.modules)))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


@given(st.integers(0, 200), st.integers(1, 50), st.lists(st.integers(0, 2**63), max_size=4))
def test_epoch_batches(n, batch_size, parts):
    got = list(epoch_batches(n, batch_size, parts))
    sizes = [min(batch_size, n - s) for s in range(0, n, batch_size)]
    if len(sizes) > 1 and batch_size > 1 and sizes[-1] == 1:
        sizes[-2:] = [batch_size + 1]
    assert [len(b) for b in got] == sizes
    rows = np.concatenate([*got, np.empty(0, np.int64)])
    assert sorted(rows.tolist()) == list(range(n))
    assert rows.dtype == np.int64
    again = np.concatenate([*epoch_batches(n, batch_size, parts), np.empty(0, np.int64)])
    np.testing.assert_array_equal(rows, again)


def test_epoch_batches_order_is_pinned_and_keyed():
    assert np.concatenate(list(epoch_batches(8, 3, (1, 2, 3)))).tolist() == [0, 1, 5, 7, 4, 6, 2, 3]
    assert keyed_rng(1, 23).integers(1 << 60) != keyed_rng(12, 3).integers(1 << 60)
    with pytest.raises(ValueError, match="batch_size"):
        list(epoch_batches(8, 0, ()))


def test_dataset_is_plain():
    d = Dataset(X, Y, 3)
    assert (len(d), d.in_shape, d.group) == (3, (2,), None)
    assert all(hasattr(data, name) for name in data.__all__)
    assert set(data.NAMES) == {"digits", "mnist", "fashion-mnist", "cifar10", "npz"}
