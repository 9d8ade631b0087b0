from __future__ import annotations

import gzip
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torchvision
from hypothesis import given
from hypothesis import strategies as st

from fedmask_flwr import data
from fedmask_flwr.data import DataError, Dataset, epoch_batches, keyed_rng, load
from fedmask_flwr.partition import partition

MNIST = Path(__file__).resolve().parents[1].parent / "shared" / "data" / "mnist"


def idx(array):
    return bytes((0, 0, 8, array.ndim)) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def write_mnist(root, *, gz, n=7, stem="train"):
    rng = keyed_rng("test", stem)
    x, y = rng.integers(0, 256, (n, 28, 28), np.uint8), rng.integers(0, 10, n, np.uint8)
    root.mkdir(parents=True, exist_ok=True)
    for name, a in ((f"{stem}-images-idx3-ubyte", x), (f"{stem}-labels-idx1-ubyte", y)):
        if gz:
            (root / f"{name}.gz").write_bytes(gzip.compress(idx(a)))
        else:
            (root / name).write_bytes(idx(a))
    return x, y


def test_digits_split_is_fixed_and_disjoint():
    train, test = load("digits", "train"), load("digits", "test")
    assert (train.in_shape, len(train), len(test)) == ((1, 8, 8), 1400, 397)
    assert train.num_classes == test.num_classes == 10
    assert train.x.dtype == np.float32
    assert train.y.dtype == np.int64
    assert 0 <= train.x.min() < train.x.max() == 1
    assert train.y[:12].tolist() == [8, 1, 1, 6, 2, 1, 7, 3, 1, 4, 2, 8]
    assert load("digits", "train") is train


@pytest.mark.parametrize("gz", [False, True])
@pytest.mark.parametrize("layout", [".", "MNIST/raw"])
def test_idx_files(tmp_path, gz, layout):
    x, y = write_mnist(tmp_path / layout, gz=gz)
    got = load("mnist", "train", str(tmp_path))
    assert got.in_shape == (1, 28, 28)
    np.testing.assert_array_equal(got.y, y)
    np.testing.assert_allclose(got.x[:, 0], x / 255, rtol=0, atol=1e-6)


def test_fashion_mnist_layout(tmp_path):
    _, y = write_mnist(tmp_path / "FashionMNIST" / "raw", gz=True, stem="t10k")
    np.testing.assert_array_equal(load("fashion-mnist", "test", str(tmp_path)).y, y)


@pytest.mark.skipif(not MNIST.is_dir(), reason="the real files are not here")
def test_real_mnist():
    test = load("mnist", "test", str(MNIST))
    assert len(test) == 10_000
    assert test.y[:5].tolist() == [7, 2, 1, 0, 4]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda b: b[:-1], "holds 5487"),
        (lambda b: b + b"\0", "holds more"),
        (lambda b: b"\0\0\x0d\x03" + b[4:], "not an idx file"),
        (lambda b: b[:4] + b"\xff" * 12 + b[16:], "no MNIST"),
        (lambda b: b[:9], "not an idx file"),
        (lambda b: b"", "not an idx file"),
    ],
)
def test_bad_idx(tmp_path, damage, message):
    write_mnist(tmp_path, gz=False)
    path = tmp_path / "train-images-idx3-ubyte"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DataError, match=message):
        load("mnist", "train", str(tmp_path))


@pytest.mark.parametrize(
    "damage", [lambda b: b[:-9], lambda b: b"x" + b[1:], lambda b: b[:40] + b"\xff" * 40 + b[80:]]
)
def test_bad_gzip(tmp_path, damage):
    write_mnist(tmp_path, gz=True)
    path = tmp_path / "train-images-idx3-ubyte.gz"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DataError, match="damaged"):
        load("mnist", "train", str(tmp_path))


@pytest.mark.parametrize(("name", "klass"), [("mnist", "MNIST"), ("cifar10", "CIFAR10")])
def test_download_fails_clearly(tmp_path, monkeypatch, name, klass):
    def refuse(*_args, **kwargs):
        assert kwargs["download"]
        raise OSError("no network")

    monkeypatch.setattr(torchvision.datasets, klass, refuse)
    with pytest.raises(DataError, match=r"no network.*--data-dir"):
        load(name, "train", str(tmp_path))


def test_cifar10(tmp_path, monkeypatch):
    class Fake:
        def __init__(self, root, train, download):
            assert (root, train, download) == (str(tmp_path), False, False)
            self.data = np.arange(2 * 32 * 32 * 3, dtype=np.int64).reshape(2, 32, 32, 3).astype(np.uint8)
            self.targets = [4, 9]

    (tmp_path / "cifar-10-batches-py").mkdir()
    monkeypatch.setattr(torchvision.datasets, "CIFAR10", Fake)
    got = load("cifar10", "test", str(tmp_path))
    assert got.in_shape == (3, 32, 32)
    np.testing.assert_allclose(got.x[0, :, 0, 0], (np.array([0, 1, 2]) / 255 - 0.5) / 0.5, atol=1e-6)


def test_npz(tmp_path):
    x, y = np.ones((3, 2), np.float64), np.array([0, 1, 1], np.int8)
    np.savez(tmp_path / "train.npz", x=x, y=y)
    np.savez(tmp_path / "test.npz", x=x, y=y, num_classes=5)
    got = load("npz", "train", str(tmp_path))
    assert (got.x.dtype, got.y.dtype, got.num_classes) == (np.float32, np.int64, 2)
    assert load("npz", "test", str(tmp_path)).num_classes == 5


X, Y = np.ones((3, 2), np.float32), np.array([0, 1, 2])


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"x": X}, "no array named y"),
        ({"x": X[:2], "y": Y}, "shape"),
        ({"x": X[:, 0], "y": Y}, "shape"),
        ({"x": X.astype(np.uint8), "y": Y}, "scale it"),
        ({"x": X, "y": Y.astype(float)}, "integers"),
        ({"x": X * np.nan, "y": Y}, "NaN"),
        ({"x": X, "y": Y - 1}, "labels run from -1"),
        ({"x": X, "y": Y, "num_classes": 2}, "labels run from 0 to 2; expected 0 to 1"),
        ({"x": X, "y": Y, "num_classes": [3]}, "one integer"),
        ({"x": X[:0], "y": Y[:0]}, "no examples"),
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
        "def bad(split, data_dir):\n"
        "    return 3\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert load("own_data_mod:pair", "train", "abcd").num_classes == 5
    assert load("own_data_mod:full", "test").num_classes == 7
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
        "import sys, fedmask_flwr.data, fedmask_flwr.partition;"
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


LABELS = keyed_rng("labels").integers(0, 10, 600)


@pytest.mark.flower
@pytest.mark.parametrize("scheme", ["iid", "dirichlet", "classes"])
@pytest.mark.parametrize("k", [1, 10, 50])
def test_partition_covers_and_repeats(scheme, k):
    classes = 10 if k == 1 else 2
    got = partition(LABELS, k, scheme, classes_per_client=classes, seed=3)
    assert len(got) == k
    assert all(len(p) for p in got)
    assert sorted(np.concatenate(got).tolist()) == list(range(len(LABELS)))
    partition.__globals__["_partition"].cache_clear()
    again = partition(LABELS, k, scheme, classes_per_client=classes, seed=3)
    assert all((a == b).all() for a, b in zip(got, again, strict=True))
    other = partition(LABELS, k, scheme, classes_per_client=classes, seed=4)
    assert any(a.tolist() != b.tolist() for a, b in zip(got, other, strict=True))


@pytest.mark.flower
def test_iid_is_shuffled_and_even():
    labels = np.sort(LABELS)
    got = partition(labels, 7, "iid", seed=0)
    assert {len(p) for p in got} <= {85, 86}
    assert all(len(np.unique(labels[p])) == 10 for p in got)


@pytest.mark.flower
def test_classes_holds_exactly_that_many():
    got = partition(LABELS, 20, "classes", classes_per_client=3, seed=0)
    assert {len(np.unique(LABELS[p])) for p in got} == {3}


@pytest.mark.flower
def test_dirichlet_alpha_sets_how_uneven():
    def classes_held(alpha):
        return np.mean([len(np.unique(LABELS[p])) for p in partition(LABELS, 10, "dirichlet", alpha=alpha, seed=0)])

    assert classes_held(0.05) < 4 < 9 < classes_held(100.0)


@pytest.mark.flower
def test_partition_refuses():
    with pytest.raises(DataError, match="601 partitions of 600 rows"):
        partition(LABELS, 601, "iid", seed=0)
    with pytest.raises(DataError, match="1 or more"):
        partition(LABELS, 0, "iid", seed=0)
    with pytest.raises(DataError, match="iid, dirichlet, classes"):
        partition(LABELS, 2, "idd", seed=0)
    with pytest.raises(DataError, match="alpha"):
        partition(LABELS, 2, "dirichlet", alpha=0.0, seed=0)
    with pytest.raises(DataError, match="classes-per-client"):
        partition(LABELS, 2, "classes", classes_per_client=11, seed=0)
    with pytest.raises(DataError, match="fewer classes each"):
        partition(LABELS, 590, "classes", classes_per_client=5, seed=0)
    with pytest.raises(DataError, match="raise alpha"):
        partition(LABELS, 600, "dirichlet", alpha=0.5, seed=0)


def test_dataset_is_plain():
    d = Dataset(X, Y, 3)
    assert (len(d), d.in_shape) == (3, (2,))
    assert set(data.NAMES) == {"digits", "mnist", "fashion-mnist", "cifar10", "npz"}


@pytest.mark.parametrize(("rows", "parts"), [(1400, 10), (1403, 10), (7, 7), (97, 3)])
def test_iid_is_flower_datasets_iid(rows, parts):
    from fedmask_flwr.partition import _imports

    datasets, partitioners = _imports()
    theirs = partitioners.IidPartitioner(num_partitions=parts)
    order = keyed_rng("partition", 5).permutation(rows)
    theirs.dataset = datasets.Dataset.from_dict({"row": order})
    ours = partition(np.zeros(rows, np.int64), parts, "iid", seed=5)
    for k in range(parts):
        assert ours[k].tolist() == list(theirs.load_partition(k)["row"])
