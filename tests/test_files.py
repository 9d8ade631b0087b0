"""Published sets as files: idx, gzip, torchvision's layouts, downloads."""

from __future__ import annotations

import gzip
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
import torchvision

from fedmask_flwr.data import DataError, keyed_rng, load
from fedmask_flwr.data.files import need

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


def test_without_torchvision_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision.datasets", None)
    with pytest.raises(DataError, match=r"cifar10 needs torchvision: pip install 'fedmask-flwr\[vision\]'"):
        (tmp_path / "cifar-10-batches-py").mkdir()
        load("cifar10", "test", str(tmp_path))
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(DataError, match=r"digits needs sklearn: pip install 'fedmask-flwr\[sim\]'"):
        need("sklearn.datasets", "digits")


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
