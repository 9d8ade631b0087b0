"""The data sets by name."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from . import binary
from .dataset import DataError, Dataset, Split, checked, keyed_rng
from .files import cache_dir, download, need, read_mnist

__all__ = ["NAMES", "form", "known", "load", "unknown"]

_DIGITS_TRAIN = 1400


@lru_cache(maxsize=8)
def load(name: str, split: Split, data_dir: str = "") -> Dataset:
    """Load one split of a data set; every caller in this process shares the arrays, so do not write to them.

    Parameters
    ----------
    name : str
        One of `NAMES`, ``"debd/NAME"`` (see `binary_splits`), or ``"package.module:function"``, called as
        ``function(split=..., data_dir=...)`` to return a `Dataset` or a pair ``(x, y)``; x is float, or uint8,
        which is scaled by 1/255.
    split : "train" or "test"
    data_dir : str
        Folder that holds the files, or will after a download. Empty: the user's cache folder.

    Raises
    ------
    DataError
        The name is unknown, or the files are missing or malformed.
    """
    if split not in ("train", "test"):
        raise DataError(f"split is {split!r}; use 'train' or 'test'")
    if name in _LOADERS:
        return _LOADERS[name](split, data_dir)
    if name.startswith(binary.PREFIX):
        return binary.load_binary(name, split, data_dir)
    if ":" in name:
        return _load_own(name, split, data_dir)
    raise DataError(unknown(name))


def form(name: str, split: Split, data_dir: str = "") -> tuple[tuple[int, ...], int]:
    """Shape of one example and number of classes, for a network that both ends build.

    Where a folder of npz holds both splits, what the other one says counts too: one of them may lack a class. Its
    examples are not read.

    Raises
    ------
    DataError
        As `load`, or the splits have other shapes.
    """
    own = load(name, split, data_dir)
    other = Path(data_dir) / ("test.npz" if split == "train" else "train.npz")
    if name != "npz" or not other.exists():
        return own.in_shape, own.num_classes
    in_shape, num_classes = _npz_form(other)
    if in_shape != own.in_shape:
        raise DataError(f"examples of {split}.npz have shape {own.in_shape}, those of {other} {in_shape}")
    return own.in_shape, max(own.num_classes, num_classes)


def _npz_form(path: Path) -> tuple[tuple[int, ...], int]:
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as z:
            labels = [z[name] for name in ("num_classes", "y") if name in z.files]
            with z.zip.open("x.npy") as x:
                read = np.lib.format.read_array_header_1_0, np.lib.format.read_array_header_2_0
                shape = read[np.lib.format.read_magic(x)[0] - 1](x)[0]
        return tuple(shape[1:]), int(labels[0]) if labels[0].ndim == 0 else int(labels[0].max(initial=-1)) + 1
    except (*binary.BAD_NPZ, IndexError) as error:
        raise DataError(f"{path} is not an .npz file of plain arrays x and y: {error}") from error


def known(name: str) -> bool:
    """Whether `load` would look for a set of that name; says nothing of its files."""
    if name.startswith(binary.PREFIX):
        return binary.is_binary(name)
    return name in _LOADERS or ":" in name


def unknown(name: str) -> str:
    """Say which names there are instead."""
    return f"unknown data set {name!r}; use one of {', '.join(NAMES)}, debd/NAME, or 'package.module:function'"


def _load_own(name: str, split: Split, data_dir: str) -> Dataset:
    module, _, attr = name.partition(":")
    try:
        make = getattr(importlib.import_module(module), attr)
    except (ImportError, AttributeError, ValueError) as error:
        raise DataError(
            f"cannot import {name!r} ({error}); is its folder on PYTHONPATH on every machine?"
        ) from error
    got = make(split=split, data_dir=data_dir)
    if isinstance(got, Dataset):
        return checked(got.x, got.y, got.num_classes, name, got.group, valid=got.valid, labels=got.labels)
    if isinstance(got, tuple) and len(got) == 2:
        return checked(got[0], got[1], None, name)
    raise DataError(f"{name} returned {type(got).__name__}; return a fedmask_flwr.data.Dataset or a pair (x, y)")


def _load_npz(split: Split, data_dir: str) -> Dataset:
    if not data_dir:
        raise DataError("data set 'npz' needs --data-dir: the folder that holds train.npz and test.npz")
    path = Path(data_dir) / f"{split}.npz"
    try:
        # np.load leaves the file open when it refuses one.
        with path.open("rb") as f, np.load(f, allow_pickle=False) as z:
            arrays = {name: z[name] for name in ("x", "y", "num_classes", "group") if name in z.files}
    except FileNotFoundError:
        raise DataError(f"{path} does not exist; --data-dir must hold {split}.npz with arrays x and y") from None
    except binary.BAD_NPZ as error:
        raise DataError(f"{path} is not an .npz file of plain arrays: {error}") from error
    missing = {"x", "y"} - set(arrays)
    if missing:
        raise DataError(f"{path}: no array named {' or '.join(sorted(missing))}")
    # A device may hold no example of the last class, so the file may say how many there are.
    classes = arrays.get("num_classes")
    if classes is not None and (classes.shape != () or not np.issubdtype(classes.dtype, np.integer)):
        raise DataError(f"{path}: num_classes must be one integer")
    return checked(
        arrays["x"], arrays["y"], None if classes is None else int(classes), str(path), arrays.get("group")
    )


def _load_digits(split: Split, _data_dir: str) -> Dataset:
    x, y = _digits()
    order = keyed_rng("digits", "split").permutation(len(y))
    rows = order[:_DIGITS_TRAIN] if split == "train" else order[_DIGITS_TRAIN:]
    return checked((x[rows] / 16).reshape(-1, 1, 8, 8), y[rows], 10, "digits")


def _digits() -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Pixels (n, 64) and labels (n,) from scikit-learn's file; importing it costs a device 50 MB and seconds."""
    found = importlib.util.find_spec("sklearn")
    for place in (found.submodule_search_locations or ()) if found else ():
        file = Path(place) / "datasets/data/digits.csv.gz"
        if file.is_file():
            table = np.loadtxt(file, delimiter=",")
            return table[:, :-1], table[:, -1].astype(np.int64)
    x, y = need("sklearn.datasets", "digits").load_digits(return_X_y=True)
    return x, y


def _mnist_like(klass: str, split: Split, data_dir: str) -> Dataset:
    images, labels, folder = read_mnist(klass, split, data_dir)
    # Black stays 0: an empty pixel then gives its weights no gradient, so their bits do not flip for nothing.
    return checked(images[:, None], labels, 10, str(folder))


def _load_cifar10(split: Split, data_dir: str) -> Dataset:
    root = Path(data_dir) if data_dir else cache_dir()
    if not (root / "cifar-10-batches-py").is_dir():
        download("CIFAR10", split, root)
    try:
        raw = need("torchvision.datasets", "cifar10").CIFAR10(str(root), train=split == "train", download=False)
    except RuntimeError as error:
        raise DataError(
            f"{root}/cifar-10-batches-py: {error}; delete it to download it again, or fix --data-dir"
        ) from error
    images = np.ascontiguousarray(raw.data.transpose(0, 3, 1, 2))
    x = (images.astype(np.float32) / np.float32(255) - np.float32(0.5)) / np.float32(0.5)
    return checked(x, np.asarray(raw.targets, np.int64), 10, str(root))


def _mnist(split: Split, data_dir: str) -> Dataset:
    return _mnist_like("MNIST", split, data_dir)


def _fashion_mnist(split: Split, data_dir: str) -> Dataset:
    return _mnist_like("FashionMNIST", split, data_dir)


_LOADERS: dict[str, Callable[[Split, str], Dataset]] = {
    "digits": _load_digits,
    "mnist": _mnist,
    "fashion-mnist": _fashion_mnist,
    "cifar10": _load_cifar10,
    "npz": _load_npz,
}
NAMES = tuple(_LOADERS)
