"""Data sets as two arrays, and a small deterministic loader.

A data set is named in the run config: ``digits``, ``mnist``, ``fashion-mnist``, ``cifar10``, ``npz`` (a
device's own folder) or ``package.module:function`` (your own). Anything heavier than numpy is imported only
by the loader that needs it.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import importlib
import math
import os
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np
from numpy.typing import NDArray

__all__ = ["NAMES", "DataError", "Dataset", "epoch_batches", "keyed_rng", "load"]

Split = Literal["train", "test"]

_IDX_UINT8 = 0x08
_MAX_IDX_BYTES = 1 << 31
_DIGITS_TRAIN = 1400


class DataError(ValueError):
    """A data set is missing, unreadable or not what training needs; the message names the fix."""


@dataclass(frozen=True, slots=True)
class Dataset:
    """Examples and their labels.

    Attributes
    ----------
    x : float32 array, shape (n, *in_shape)
    y : int64 array, shape (n,), values in ``[0, num_classes)``
    num_classes : int
    """

    x: NDArray[np.float32]
    y: NDArray[np.int64]
    num_classes: int

    @property
    def in_shape(self) -> tuple[int, ...]:
        """Shape of one example."""
        return tuple(self.x.shape[1:])

    def __len__(self) -> int:
        return len(self.y)


def keyed_rng(*parts: int | str) -> np.random.Generator:
    """Give a counter-based generator that depends on `parts` alone (the same on every machine)."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little")))


def epoch_batches(n: int, batch_size: int, seed_parts: Sequence[int | str]) -> Iterator[NDArray[np.int64]]:
    """Yield the rows of each batch of one shuffled epoch.

    Parameters
    ----------
    n : int
        Rows in the data set.
    batch_size : int
        Rows in a batch; a last, short batch is kept, but a single row is added to the batch before it.
    seed_parts : sequence of int or str
        What this epoch's order depends on, for example ``(seed, round, client, epoch)``.

    Yields
    ------
    int64 array, shape (<= batch_size + 1,)
    """
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; use 1 or more")
    order = keyed_rng("epoch", *(p if isinstance(p, str) else int(p) for p in seed_parts)).permutation(n)
    # A last batch of one joins the one before: batch norm cannot use it.
    starts = list(range(0, n - 1 if n > 1 and batch_size > 1 else n, batch_size))
    for start, end in zip(starts, [*starts[1:], n], strict=False):
        yield order[start:end].astype(np.int64, copy=False)


@lru_cache(maxsize=4)
def load(name: str, split: Split, data_dir: str = "") -> Dataset:
    """Load one split of a data set; every caller in this process shares the arrays, so do not write to them.

    Parameters
    ----------
    name : str
        One of `NAMES`, or ``"package.module:function"``, called as ``function(split=..., data_dir=...)`` to
        return a `Dataset` or a pair ``(x, y)``.
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
    if ":" in name:
        return _load_own(name, split, data_dir)
    raise DataError(f"unknown data set {name!r}; use one of {', '.join(NAMES)}, or 'package.module:function'")


def _checked(x: Any, y: Any, num_classes: int | None, where: str) -> Dataset:
    x, y = np.asarray(x), np.asarray(y)
    if not np.issubdtype(x.dtype, np.floating):
        raise DataError(f"{where}: x is {x.dtype}; scale it yourself and store float32")
    if not np.issubdtype(y.dtype, np.integer):
        raise DataError(f"{where}: y is {y.dtype}; store class numbers as integers")
    if y.ndim != 1 or x.ndim < 2 or len(x) != len(y):
        raise DataError(f"{where}: x has shape {x.shape} and y {y.shape}; expected (n, ...) and (n,)")
    if not len(y):
        raise DataError(f"{where}: no examples")
    x = np.ascontiguousarray(x, np.float32)
    if not np.isfinite(x).all():
        raise DataError(f"{where}: x holds NaN or infinity (as float32); clean it first")
    low, high = int(y.min()), int(y.max())
    classes = high + 1 if num_classes is None else num_classes
    if low < 0 or high >= classes:
        raise DataError(f"{where}: labels run from {low} to {high}; expected 0 to {classes - 1}")
    return Dataset(x, np.ascontiguousarray(y, np.int64), classes)


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
        return _checked(got.x, got.y, got.num_classes, name)
    if isinstance(got, tuple) and len(got) == 2:
        return _checked(got[0], got[1], None, name)
    raise DataError(f"{name} returned {type(got).__name__}; return a fedmask_flwr.data.Dataset or a pair (x, y)")


def _load_npz(split: Split, data_dir: str) -> Dataset:
    if not data_dir:
        raise DataError("data set 'npz' needs --data-dir: the folder that holds train.npz and test.npz")
    path = Path(data_dir) / f"{split}.npz"
    try:
        # np.load leaves the file open when it refuses one.
        with path.open("rb") as f, np.load(f, allow_pickle=False) as z:
            arrays = {name: z[name] for name in ("x", "y", "num_classes") if name in z.files}
    except FileNotFoundError:
        raise DataError(f"{path} does not exist; --data-dir must hold {split}.npz with arrays x and y") from None
    except (OSError, ValueError, TypeError, EOFError, AttributeError, zipfile.BadZipFile) as error:
        raise DataError(f"{path} is not an .npz file of plain arrays: {error}") from error
    missing = {"x", "y"} - set(arrays)
    if missing:
        raise DataError(f"{path}: no array named {' or '.join(sorted(missing))}")
    # A device may hold no example of the last class, so the file may say how many there are.
    classes = arrays.get("num_classes")
    if classes is not None and (classes.shape != () or not np.issubdtype(classes.dtype, np.integer)):
        raise DataError(f"{path}: num_classes must be one integer")
    return _checked(arrays["x"], arrays["y"], None if classes is None else int(classes), str(path))


def _load_digits(split: Split, _data_dir: str) -> Dataset:
    datasets = _need("sklearn.datasets", "digits")
    x, y = datasets.load_digits(return_X_y=True)
    order = keyed_rng("digits", "split").permutation(len(y))
    rows = order[:_DIGITS_TRAIN] if split == "train" else order[_DIGITS_TRAIN:]
    return _checked((x[rows] / 16).reshape(-1, 1, 8, 8), y[rows], 10, "digits")


def _load_idx(klass: str, split: Split, data_dir: str) -> Dataset:
    stem = "train" if split == "train" else "t10k"
    root = Path(data_dir) if data_dir else _cache_dir()
    names = f"{stem}-images-idx3-ubyte", f"{stem}-labels-idx1-ubyte"
    if _find_idx(root, klass, names) is None:
        _download(klass, split, root)
    found = _find_idx(root, klass, names)
    if found is None:
        raise DataError(f"no {names[0]} under {root}; point --data-dir at the folder that holds the idx files")
    images, labels = _read_idx(found[0], 3), _read_idx(found[1], 1)
    # Black stays 0: an empty pixel then gives its weights no gradient, so their bits do not flip for nothing.
    x = images[:, None].astype(np.float32) / np.float32(255)
    return _checked(x, labels, 10, str(found[0].parent))


def _load_cifar10(split: Split, data_dir: str) -> Dataset:
    root = Path(data_dir) if data_dir else _cache_dir()
    if not (root / "cifar-10-batches-py").is_dir():
        _download("CIFAR10", split, root)
    try:
        raw = _need("torchvision.datasets", "cifar10").CIFAR10(str(root), train=split == "train", download=False)
    except RuntimeError as error:
        raise DataError(
            f"{root}/cifar-10-batches-py: {error}; delete it to download it again, or fix --data-dir"
        ) from error
    images = np.ascontiguousarray(raw.data.transpose(0, 3, 1, 2))
    x = (images.astype(np.float32) / np.float32(255) - np.float32(0.5)) / np.float32(0.5)
    return _checked(x, np.asarray(raw.targets, np.int64), 10, str(root))


def _find_idx(root: Path, klass: str, names: tuple[str, str]) -> tuple[Path, Path] | None:
    for folder in (root, root / klass / "raw"):
        found = [
            p
            for n in names
            for p in [next((q for q in (folder / n, folder / f"{n}.gz") if q.is_file()), None)]
            if p
        ]
        if len(found) == len(names):
            return found[0], found[1]
    return None


def _read_idx(path: Path, ndim: int) -> NDArray[np.uint8]:
    opened: Callable[..., Any] = gzip.open if path.suffix == ".gz" else open
    try:
        with opened(path, "rb") as f:
            return _parse_idx(f, path, ndim)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} is damaged ({error}); fetch it again") from error


def _parse_idx(f: IO[bytes], path: Path, ndim: int) -> NDArray[np.uint8]:
    head = f.read(4 + 4 * ndim)
    if len(head) < 4 + 4 * ndim or head[:4] != bytes((0, 0, _IDX_UINT8, ndim)):
        raise DataError(f"{path} is not an idx file of {ndim}-dimensional bytes; fetch it again")
    shape = tuple(int(n) for n in np.frombuffer(head, ">u4", offset=4))
    size = math.prod(shape)
    if size > _MAX_IDX_BYTES:
        raise DataError(f"{path} claims {size} bytes, which is no MNIST; fetch it again")
    body = f.read(size + 1)
    if len(body) != size:
        more = "more" if len(body) > size else f"{len(body)}"
        raise DataError(f"{path} claims {size} bytes and holds {more}; fetch it again")
    return np.frombuffer(body, np.uint8).reshape(shape)


def _cache_dir() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fedmask-flwr"


def _download(klass: str, split: Split, root: Path) -> None:
    datasets = _need("torchvision.datasets", klass)
    try:
        root.mkdir(parents=True, exist_ok=True)
        # Every simulated client may come here at once: one fetches, the others find the files.
        with _locked(root / ".fedmask-download.lock"):
            getattr(datasets, klass)(str(root), train=split == "train", download=True)
    except Exception as error:
        raise DataError(
            f"{klass} is not in {root} and could not be downloaded ({error}); "
            "put its files there, or point --data-dir at a folder that has them"
        ) from error


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    try:
        import fcntl
    except ImportError:
        yield
        return
    with path.open("w") as f:
        fcntl.flock(f, fcntl.LOCK_EX)
        yield


def _need(module: str, what: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise DataError(
            f"data set {what} needs {module.partition('.')[0]}: pip install 'fedmask-flwr[sim]'"
        ) from error


def _mnist(split: Split, data_dir: str) -> Dataset:
    return _load_idx("MNIST", split, data_dir)


def _fashion_mnist(split: Split, data_dir: str) -> Dataset:
    return _load_idx("FashionMNIST", split, data_dir)


_LOADERS: dict[str, Callable[[Split, str], Dataset]] = {
    "digits": _load_digits,
    "mnist": _mnist,
    "fashion-mnist": _fashion_mnist,
    "cifar10": _load_cifar10,
    "npz": _load_npz,
}
NAMES = tuple(_LOADERS)
