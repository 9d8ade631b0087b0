"""The compiled twin of the count that minimal random coding spends its time on; needs numba."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fedmask_flwr.jit import compiled

_A, _B = np.uint32(0x7FEB352D), np.uint32(0x846CA68B)


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
            place = np.uint32(places[i] ^ k0)
            place = np.uint32(place ^ (place >> np.uint32(16)))
            place = np.uint32(place * _A)
            place = np.uint32(place ^ (place >> np.uint32(15)))
            place = np.uint32(place * _B)
            place = np.uint32(place ^ (place >> np.uint32(16)))
            cut, weight = cuts[i], weights[i]
            for c in range(size):
                x = np.uint32(place ^ keys[c])
                x = np.uint32(x ^ (x >> np.uint32(16)))
                x = np.uint32(x * _A)
                x = np.uint32(x ^ (x >> np.uint32(15)))
                x = np.uint32(x * _B)
                x = np.uint32(x ^ (x >> np.uint32(16)))
                row[c] += weight if np.int32(x) < cut else np.int32(0)


def count(
    places: NDArray[np.int32],
    cuts: NDArray[np.int32],
    weights: NDArray[np.int32],
    starts: NDArray[np.intp],
    k0: int,
    keys: NDArray[np.int32],
) -> NDArray[np.int32]:
    """Sum the weights of each candidate's ones in each block: (candidates, blocks), which begin at ``starts``."""
    tally = np.zeros((starts.size, keys.size), np.int32)
    _count(places.view(np.uint32), cuts, weights, starts, np.uint32(k0 % 2**32), keys.view(np.uint32), tally)
    return tally.T
