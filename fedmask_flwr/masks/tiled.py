"""Words for the mask of a training step: one mixing round each, where a word of `keyed` takes two.

A step draws a word a weight, and that is a large part of what it costs. Here position i, lane ``j = i % TILE`` of
tile ``t = i // TILE``, has the word ``mix(row[j] ^ column[t])``: `row` are the first TILE words of the key's own
stream, `column` those from 2**31 on. What two ends draw (seeded masks, candidates, weights) takes `keyed.words`.
"""

from __future__ import annotations

from typing import final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .keyed import Key, check_range, derive, mix_, words, words_torch

TILE = 2048
COLUMN = 1 << 31
"""Counter of the first tile's word in the key's stream; the lanes' are ``0 .. TILE-1``."""
AHEAD = 32
"""Keys made at a time: after a backward pass no cache holds what makes one."""


@final
class StepKeys:
    """``derive(*key, "step", t)``, the key of an optimiser's step t."""

    __slots__ = ("_ahead", "_first", "_key")

    def __init__(self) -> None:
        self._key: Key | None = None
        self._first, self._ahead = 0, list[Key]()

    def of(self, key: Key, step: int) -> Key:
        """The key of this step; the next ones are at hand then."""
        if key != self._key or not 0 <= step - self._first < AHEAD:
            self._key, self._first = key, step
            self._ahead = [derive(*key, "step", step + i) for i in range(AHEAD)]
        return self._ahead[step - self._first]


def _tiles(n: int, start: int) -> tuple[int, int, int]:
    """First tile of ``start .. start+n-1``, how many there are, and where in the first it starts."""
    first = start // TILE
    return first, -(-(start + n) // TILE) - first, start - first * TILE


@final
class Tiles:
    """What `tiled` works in, for up to `n` words at a time: half of its time is to make it."""

    __slots__ = ("_key", "_row", "_t", "_x")

    def __init__(self, n: int) -> None:
        size = (n // TILE + 2) * TILE  # the first and the last may be cut
        self._x, self._t = np.empty(size, np.int32), np.empty(n, np.int32)
        self._key: Key | None = None

    def words(self, key: Key, n: int, start: int) -> NDArray[np.int32]:
        """Words ``start .. start+n-1``; valid until the next call."""
        if key != self._key:
            self._key, self._row = key, words(key, TILE)
        first, count, lane = _tiles(n, start)
        both = self._x[: count * TILE]
        np.bitwise_xor(words(key, count, COLUMN + first)[:, None], self._row, out=both.reshape(count, TILE))
        x = both[lane : lane + n]
        mix_(x, self._t[:n])
        return x


def tiled(key: Key, n: int, start: int = 0) -> NDArray[np.int32]:
    """Words ``start .. start+n-1`` of a step, (n,) int32, uniform on all 32-bit values.

    Raises
    ------
    ValueError
        `n` or `start` is negative, or the range passes counter 2**32.
    """
    check_range(n, start)
    return Tiles(n).words(key, n, start)


def tiled_torch(key: Key, n: int, device: torch.device | str, start: int = 0) -> Tensor:
    """`tiled` as an int32 tensor computed on `device`; the same bits.

    Raises
    ------
    ValueError
        As `tiled`.
    """
    check_range(n, start)
    first, count, lane = _tiles(n, start)
    row, column = words_torch(key, TILE, device), words_torch(key, count, device, COLUMN + first)
    x = (column[:, None] ^ row).view(-1)[lane : lane + n]
    mix_(x, torch.empty_like(x))
    return x
