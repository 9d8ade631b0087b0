"""Where published data sets lie: idx files, torchvision's layouts, downloads."""

from __future__ import annotations

import contextlib
import gzip
import importlib
import math
import os
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from .dataset import DataError, Split

__all__ = ["OFFLINE", "cache_dir", "download", "need", "read_mnist"]

OFFLINE = "FEDMASK_OFFLINE"  # set and not empty: nothing is fetched
_IDX_UINT8 = 0x08
_MAX_IDX_BYTES = 1 << 31


def read_mnist(klass: str, split: Split, data_dir: str) -> tuple[NDArray[np.uint8], NDArray[np.uint8], Path]:
    """Read a set in MNIST's format, fetched when it is missing.

    Parameters
    ----------
    klass : str
        Torchvision's name of it, which is also its folder.
    split : "train" or "test"
    data_dir : str
        Empty: `cache_dir`.

    Returns
    -------
    images : uint8 array, shape (n, height, width)
    labels : uint8 array, shape (n,)
    folder : Path

    Raises
    ------
    DataError
        The files are missing and cannot be fetched, or are damaged.
    """
    stem = "train" if split == "train" else "t10k"
    root = Path(data_dir) if data_dir else cache_dir()
    names = f"{stem}-images-idx3-ubyte", f"{stem}-labels-idx1-ubyte"
    if _find_idx(root, klass, names) is None:
        download(klass, split, root)
    found = _find_idx(root, klass, names)
    if found is None:
        raise DataError(f"no {names[0]} under {root}; point --data-dir at the folder that holds the idx files")
    return _read_idx(found[0], 3), _read_idx(found[1], 1), found[0].parent


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


def cache_dir() -> Path:
    """Where downloads go when no folder is given."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fedmask-flwr"


def download(klass: str, split: Split, root: Path) -> None:
    """Have torchvision fetch its set `klass` to `root`; raises `DataError` when it cannot, or `OFFLINE` is set."""
    if os.environ.get(OFFLINE):
        raise DataError(f"{klass} is not in {root}: put its files there, or give the folder that has them")
    datasets = need("torchvision.datasets", klass)
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


def need(module: str, what: str) -> Any:
    """Import a module that data set `what` cannot do without, or raise `DataError`."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        extra = "vision" if package == "torchvision" else "sim"
        raise DataError(f"data set {what} needs {package}: pip install 'fedmask-flwr[{extra}]'") from error
