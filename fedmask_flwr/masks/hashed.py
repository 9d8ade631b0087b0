"""Compiled loops over keyed words, the same bits as the numpy that calls them; they need numba."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fedmask_flwr.jit import compiled

Pair = tuple[int, int]  # the two words of a `keyed.Key`

_A, _B = np.uint32(0x7FEB352D), np.uint32(0x846CA68B)
_15, _16, _32 = np.uint32(15), np.uint32(16), np.uint64(32)


@compiled()
def _mix(x: np.uint32) -> np.uint32:
    x = np.uint32(np.uint32(x ^ np.uint32(x >> _16)) * _A)
    x = np.uint32(np.uint32(x ^ np.uint32(x >> _15)) * _B)
    return np.uint32(x ^ np.uint32(x >> _16))


@compiled()
def _count(
    places: NDArray[np.uint32],
    cuts: NDArray[np.int32],
    weights: NDArray[np.int32],
    starts: NDArray[np.intp],
    k0: np.uint32,
    keys: NDArray[np.uint32],
    tally: NDArray[np.int32],
) -> None:
    """Candidates are the inner loop, so that one instruction serves many of them: `keyed.hash_`, word for word."""
    size = keys.size
    for block in range(starts.size):
        row = tally[block]
        stop = starts[block + 1] if block + 1 < starts.size else places.size
        for i in range(starts[block], stop):
            place = _mix(np.uint32(places[i] ^ k0))
            cut, weight = cuts[i], weights[i]
            for c in range(size):
                x = _mix(np.uint32(place ^ keys[c]))
                row[c] += weight if np.int32(x) < cut else np.int32(0)


def count(
    places: NDArray[np.int32],
    cuts: NDArray[np.int32],
    weights: NDArray[np.int32],
    starts: NDArray[np.intp],
    k0: int,
    keys: NDArray[np.int32],
) -> NDArray[np.int32]:
    """Sum the weights of each candidate's ones in each block: (blocks, candidates), which begin at ``starts``."""
    tally = np.zeros((starts.size, keys.size), np.int32)
    _count(places.view(np.uint32), cuts, weights, starts, np.uint32(k0 % 2**32), keys.view(np.uint32), tally)
    return tally


@compiled()
def _redraw(
    cuts: NDArray[np.int32],
    lot0: np.uint32,
    lot1: np.uint32,
    k0: np.uint32,
    k1: NDArray[np.uint32],
    out: NDArray[np.bool_],
) -> None:
    blocks = np.uint64(k1.size)
    for i in range(cuts.size):
        lot = _mix(np.uint32(_mix(np.uint32(np.uint32(i) ^ lot0)) ^ lot1))
        key = k1[np.int64((np.uint64(lot) * blocks) >> _32)]
        out[i] = np.int32(_mix(np.uint32(_mix(np.uint32(np.uint32(i) ^ k0)) ^ key))) < cuts[i]


def redraw(cuts: NDArray[np.int32], lots: Pair, k0: int, k1: NDArray[np.int32]) -> NDArray[np.bool_]:
    """The mask whose position i is drawn under ``k1`` of its block: (d,) bool; ``lots`` deals out the blocks."""
    out = np.empty(cuts.size, np.bool_)
    lot0, lot1, first = (np.uint32(word % 2**32) for word in (*lots, k0))
    _redraw(cuts, lot0, lot1, first, k1.view(np.uint32), out)
    return out


@compiled()
def _bits(cuts: NDArray[np.int32], k0: np.uint32, k1: np.uint32, start: np.uint32, out: NDArray[np.bool_]) -> None:
    for i in range(cuts.size):
        word = _mix(np.uint32(_mix(np.uint32(np.uint32(start + np.uint32(i)) ^ k0)) ^ k1))
        out[i] = np.int32(word) < cuts[i]


def bits(cuts: NDArray[np.int32], key: Pair, start: int) -> NDArray[np.bool_]:
    """`keyed.bernoulli`: (d,) bool."""
    out = np.empty(cuts.size, np.bool_)
    k0, k1, first = (np.uint32(word % 2**32) for word in (*key, start))
    _bits(cuts, k0, k1, first, out)
    return out


@compiled()
def _classes(
    theta: NDArray[np.float64],
    k0: np.uint32,
    k1: np.uint32,
    start: np.uint32,
    least: float,
    offset: int,
    last: int,
    out: NDArray[np.uint8],
) -> None:
    most, one = 1.0 - least, np.float64(1.0).view(np.int64)
    for i in range(theta.size):
        word = _mix(np.uint32(_mix(np.uint32(np.uint32(start + np.uint32(i)) ^ k0)) ^ k1))
        p = theta[i]
        p = least if p < least else p
        p = most if p > most else p
        u = (np.float64(np.int32(word)) + (2.0**31 + 0.5)) * 2.0**-32
        odds = u * (1.0 - p) / ((1.0 - u) * p)
        back = 1.0 / odds
        away = np.float64((odds if odds > back else back) - 1.0)
        step = ((away.view(np.int64) - one) >> 51) + offset
        out[i] = np.uint8(min(max(int(step), 0), last))


def classes(
    theta: NDArray[np.float64], key: Pair, start: int, least: float, offset: int, last: int
) -> NDArray[np.uint8]:
    """`closeness.closeness`: (d,) uint8 from 0 to ``last``; ``offset`` is added to the half octaves."""
    out = np.empty(theta.size, np.uint8)
    k0, k1, first = (np.uint32(word % 2**32) for word in (*key, start))
    _classes(theta, k0, k1, first, least, offset, last, out)
    return out
