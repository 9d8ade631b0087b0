"""A data set: arrays that were checked once, and the order in which they are read."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

__all__ = ["DataError", "Dataset", "Split", "checked", "epoch_batches", "keyed_rng"]

Split = Literal["train", "test"]


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
    group : int64 array, shape (n,), or None
        Whose example it is (a user, a device), 0 or above; the partition ``group`` shares by it.
    valid : int or None
        Leading inputs of a (flattened) example that mean something; those after it are zero padding. None: all.
    labels : tuple of int, or None
        The classes that these examples may have, ascending. None: all of ``num_classes``.
    """

    x: NDArray[np.float32]
    y: NDArray[np.int64]
    num_classes: int
    group: NDArray[np.int64] | None = None
    valid: int | None = None
    labels: tuple[int, ...] | None = None

    @property
    def in_shape(self) -> tuple[int, ...]:
        """Shape of one example."""
        return tuple(self.x.shape[1:])

    def __len__(self) -> int:
        return len(self.y)


def checked(
    x: Any,
    y: Any,
    num_classes: int | None,
    where: str,
    group: Any = None,
    *,
    valid: int | None = None,
    labels: Sequence[int] | None = None,
) -> Dataset:
    """Make a `Dataset` of what somebody provides.

    Parameters
    ----------
    x : array of floats, or of uint8 (scaled by 1/255: black stays 0), shape (n, ...)
    y : array of integers, shape (n,)
    num_classes : int or None
        None: the highest label and one.
    where : str
        Names the source in errors.
    group : array of integers, shape (n,), or None
    valid : int or None
    labels : sequence of int, or None

    Raises
    ------
    DataError
        A type, a shape or a value is wrong.
    """
    x, y = np.asarray(x), np.asarray(y)
    if x.dtype == np.uint8:
        x = np.divide(x, np.float32(255), dtype=np.float32)
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
    whose = None if group is None else _checked_group(np.asarray(group), len(y), where)
    if valid is not None and not 1 <= valid <= x[0].size:
        raise DataError(f"{where}: valid is {valid}; use 1 to {x[0].size}, the inputs of an example")
    named = None if labels is None else tuple(sorted({int(c) for c in labels}))
    if named is not None and not set(np.unique(y).tolist()) <= set(named) <= set(range(classes)):
        raise DataError(f"{where}: labels {named} must be in [0, {classes}) and cover every y")
    return Dataset(x, np.ascontiguousarray(y, np.int64), classes, whose, valid, named)


def _checked_group(group: NDArray[Any], n: int, where: str) -> NDArray[np.int64]:
    if not np.issubdtype(group.dtype, np.integer) or group.shape != (n,):
        raise DataError(f"{where}: group is {group.dtype} of shape {group.shape}; expected integers ({n},)")
    low, high = int(group.min()), int(group.max())
    if low < 0 or high >= 1 << 63:
        raise DataError(f"{where}: groups run from {low} to {high}; number them from 0")
    return np.ascontiguousarray(group, np.int64)


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
