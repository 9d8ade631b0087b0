"""Binary sets for density estimation, as the DEBD collection publishes them, or bit-packed.

``debd/NAME`` is one of either, in the data folder, in ``debd`` below it, or in a folder NAME of these two:

- ``NAME.train.data``, ``NAME.valid.data``, ``NAME.test.data``: one example a line, 0 and 1 between commas;
- ``NAME.npz``: arrays ``train``, ``valid``, ``test`` (or ``test_reconstructed``) of uint8, rows packed to bits
  (`numpy.packbits`), each with its number of columns as ``train_n`` and so on.

A set may lack splits. Both forms are read as data of unknown origin: no pickle, every size checked first.
"""

from __future__ import annotations

import math
import re
import tokenize
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from .dataset import DataError, Dataset, Split, checked, keyed_rng
from .files import cache_dir

__all__ = ["BAD_NPZ", "PREFIX", "binary_splits", "is_binary", "load_binary"]

PREFIX = "debd/"
# What zipfile and numpy raise on damaged archives and headers; numpy tokenizes those that it cannot read.
BAD_NPZ = (
    *(OSError, ValueError, TypeError, KeyError, EOFError, AttributeError, RuntimeError, MemoryError),
    *(SyntaxError, zipfile.BadZipFile, zlib.error, tokenize.TokenError),
)
_NAME = re.compile(r"debd/[A-Za-z0-9_][A-Za-z0-9._-]*")
_SPLITS = ("train", "valid", "test")
_MAX_CELLS = 1 << 28
"""Most rows times columns of a split: 1 GiB as float32, 20 times the largest set of the collection."""
_TEST_PART = 7
"""Where a set has no train or no test split, one row in this many becomes test."""


def is_binary(name: str) -> bool:
    """Whether `name` is written like a binary set's; says nothing of its files."""
    return _NAME.fullmatch(name) is not None


def binary_splits(name: str, data_dir: str = "") -> dict[str, NDArray[np.uint8]]:
    """Give the splits that a binary set's files hold.

    Parameters
    ----------
    name : str
        ``"debd/NAME"``.
    data_dir : str
        Folder of the files. Empty: the user's cache folder. Nothing is downloaded.

    Returns
    -------
    dict of uint8 arrays of 0 and 1, shape (n, D)
        At least one of "train", "valid" and "test", in this order.

    Raises
    ------
    DataError
        The files are missing, damaged or of different widths.
    """
    if not is_binary(name):
        raise DataError(f"{name!r} is no name of a binary set; write debd/NAME, such as debd/adult")
    stem = name.removeprefix(PREFIX)
    root = Path(data_dir) if data_dir else cache_dir()
    splits: dict[str, NDArray[np.uint8]] = {}
    for folder in (root, root / "debd", root / stem, root / "debd" / stem):
        texts = {s: folder / f"{stem}.{s}.data" for s in _SPLITS}
        splits = {s: _read_text(path) for s, path in texts.items() if path.is_file()}
        if not splits and (folder / f"{stem}.npz").is_file():
            splits = _read_packed(folder / f"{stem}.npz")
        if splits:
            break
    else:
        raise DataError(
            f"no {stem}.train.data and no {stem}.npz in {root}, its folder debd or a folder {stem}; "
            "point --data-dir at the folder that holds the binary sets"
        )
    widths = {s: x.shape[1] for s, x in splits.items()}
    if len(set(widths.values())) > 1:
        raise DataError(f"{name} in {folder}: splits of different widths {widths}; fetch it again")
    return splits


def load_binary(name: str, split: Split, data_dir: str = "") -> Dataset:
    """Load one split of a binary set: x (n, D) of 0 and 1, one class.

    Where the files lack a train or a test split, all rows that they hold are pooled and dealt: a keyed
    permutation, 6/7 to train and 1/7 to test, the same on every machine.

    Raises
    ------
    DataError
        As `binary_splits`, or a pool of fewer than two rows.
    """
    splits = binary_splits(name, data_dir)
    if "train" in splits and "test" in splits:
        bits = splits[split]
    else:
        pool = np.concatenate(list(splits.values()))
        if len(pool) < 2:
            raise DataError(f"{name} holds one row; a train and a test split need two")
        order = keyed_rng("binary", name).permutation(len(pool))
        tests = max(1, len(pool) // _TEST_PART)
        bits = pool[np.sort(order[:tests] if split == "test" else order[tests:])]
    return checked(bits.astype(np.float32), np.zeros(len(bits), np.int64), 1, name)


def _read_text(path: Path) -> NDArray[np.uint8]:
    try:
        # Digits and separators: two bytes a cell, three with a space after each comma.
        if path.stat().st_size > 3 * _MAX_CELLS:
            raise DataError(f"{path} has {path.stat().st_size} bytes, which is no binary set")
        text = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error})") from error
    text = text.translate(None, b" \t\r").rstrip(b"\n") + b"\n"
    width = text.index(b"\n") + 1  # of a line, with its end
    raw = np.frombuffer(text, np.uint8)
    if width < 2 or width % 2 or len(raw) % width:
        raise DataError(_wrong_line(path, text))
    cells = raw.reshape(-1, width // 2, 2)
    bits, ends = cells[..., 0] - np.uint8(ord("0")), cells[..., 1]
    if (bits > 1).any() or (ends[:, :-1] != ord(",")).any() or (ends[:, -1] != ord("\n")).any():
        raise DataError(_wrong_line(path, text))
    return bits


def _wrong_line(path: Path, text: bytes) -> str:
    lines = text.splitlines()
    width = len(lines[0])
    good = re.compile(rb"[01](,[01])*")
    wrong = (i for i, line in enumerate(lines, 1) if len(line) != width or not good.fullmatch(line))
    return f"{path}, line {next(wrong, 1)}: expected 0 and 1 between commas, as many as in line 1"


def _read_packed(path: Path) -> dict[str, NDArray[np.uint8]]:
    try:
        with zipfile.ZipFile(path) as z:
            names = set(z.namelist())
            found = {s: s for s in _SPLITS if f"{s}.npy" in names}
            if "test" not in found and "test_reconstructed.npy" in names:
                found["test"] = "test_reconstructed"
            splits = {s: _unpacked(z, key, path) for s, key in found.items()}
    except BAD_NPZ as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path} is not an .npz file of plain arrays: {error}") from error
    if not splits:
        raise DataError(f"{path} holds none of the arrays {', '.join(_SPLITS)}")
    return splits


def _unpacked(z: zipfile.ZipFile, key: str, path: Path) -> NDArray[np.uint8]:
    packed, columns = _array(z, key, path), _array(z, f"{key}_n", path)
    if packed.dtype != np.uint8 or packed.ndim != 2 or not packed.size:
        raise DataError(f"{path}: {key} is {packed.dtype} of shape {packed.shape}; expected packed uint8 rows")
    if columns.ndim or not np.issubdtype(columns.dtype, np.integer):
        raise DataError(f"{path}: {key}_n must be one integer, the columns of {key}")
    n = int(columns)
    if n < 1 or (n + 7) // 8 != packed.shape[1] or len(packed) * n > _MAX_CELLS:
        raise DataError(f"{path}: {key}_n is {n}, and {key} has {packed.shape[1]} bytes a row; pack it again")
    return np.unpackbits(packed, axis=1, count=n)


def _array(z: zipfile.ZipFile, key: str, path: Path) -> NDArray[Any]:
    """Read one array of plain numbers whose header agrees with the bytes that the archive says it has."""
    info = z.getinfo(f"{key}.npy")
    if info.file_size > _MAX_CELLS:
        raise DataError(f"{path}: {key} unpacks to {info.file_size} bytes, which is no binary set")
    with z.open(info) as f:
        read = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}
        version = npy.read_magic(f)
        if version not in read:
            raise DataError(f"{path}: {key} has version {version} of numpy's format; save it again")
        shape, fortran, dtype = read[version](f)
        # An object array is a pickle: it is refused here, unread.
        if dtype.hasobject or dtype.kind not in "iub":
            raise DataError(f"{path}: {key} is {dtype}; expected whole numbers")
        if min(shape, default=0) < 0 or math.prod(shape) * dtype.itemsize != info.file_size - f.tell():
            raise DataError(f"{path}: {key} claims shape {shape}, which is not what it holds")
        return np.frombuffer(f.read(), dtype).reshape(shape, order="F" if fortran else "C")
