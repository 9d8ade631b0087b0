"""Sparse packed vectors (a bit per position and the kept values) and their count sketches."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

Packed = NDArray[np.uint8]
Floats = NDArray[np.float32]


def sparsify(values: NDArray[Any], tau: float = 0.0) -> tuple[Packed, Floats]:
    """Keep what is larger than ``tau`` in magnitude: (ceil(n/8),) little-endian bits and the kept values, in order.

    Raises
    ------
    ValueError
        When ``values`` is not (n,) or not finite.
    """
    values = np.asarray(values, np.float32)
    if values.ndim != 1 or not np.isfinite(values).all():
        raise ValueError(f"need a finite vector, got one of shape {values.shape}: train with a lower learning rate")
    keep = np.abs(values) > tau
    return np.packbits(keep, bitorder="little"), values[keep]


def densify(where: Packed, values: Floats, n: int) -> Floats:
    """The vector (n,) that ``sparsify`` took apart; zero where no bit is set.

    Raises
    ------
    ValueError
        When the bits are not (ceil(n/8),) uint8, point behind n, or do not number ``values``.
    """
    if where.dtype != np.uint8 or where.shape != (-(-n // 8),):
        raise ValueError(f"need {-(-n // 8)} bytes of bits for {n} positions, got {where.dtype} {where.shape}")
    bits = np.unpackbits(where, bitorder="little")
    if bits[n:].any():
        raise ValueError(f"a bit is set behind the last of {n} positions")
    if values.shape != (np.count_nonzero(bits),):
        raise ValueError(f"{np.count_nonzero(bits)} bits are set, but the values have shape {values.shape}")
    out = np.zeros(n, np.float32)
    out[bits[:n].view(np.bool_)] = values
    return out


@lru_cache(maxsize=4)
def _tables(n: int, size: int, seed: int) -> tuple[NDArray[np.intp], Floats]:
    """Bucket and sign of each position; raw Philox words, so that no release of numpy changes them."""
    words = np.random.Philox(key=seed).random_raw(n)
    buckets = ((words >> np.uint64(1)) % np.uint64(size)).astype(np.intp)
    signs = np.where(words & np.uint64(1), np.float32(1), np.float32(-1))
    buckets.flags.writeable = signs.flags.writeable = False
    return buckets, signs


def sketch(values: NDArray[Any], size: int, seed: int) -> Floats:
    """Count sketch (size,) of a vector (n,): linear, and cosines stay within about 1/sqrt(size).

    The same on every machine up to the last bit of a float. ``seed`` is in [0, 2^64). [Charikar, Chen,
    Farach-Colton 2002]
    """
    buckets, signs = _tables(values.size, size, seed)
    return np.bincount(buckets, weights=values * signs, minlength=size).astype(np.float32)


def cosine(a: NDArray[Any], b: NDArray[Any]) -> float:
    """cos(a, b) of two vectors (n,), summed in double; two zero vectors are alike, one is like nothing."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    norm = float(np.sqrt((a @ a) * (b @ b)))
    return float(a @ b) / norm if norm else float(not a.any() and not b.any())


def centred(rows: NDArray[Any], mean: NDArray[np.float64] | None) -> NDArray[np.float64]:
    """Rows (N, S) less the mean (S,), each of length 1; what is (but for rounding) the mean itself becomes 0."""
    raw = rows.astype(np.float64)
    less = raw if mean is None else raw - mean
    norms = np.sqrt((less * less).sum(axis=1, keepdims=True))
    tiny = norms <= 1e-6 * np.sqrt((raw * raw).sum(axis=1, keepdims=True))
    return np.where(tiny, 0.0, less / np.where(tiny, 1.0, norms))
