"""Packed bits sorted by group, in place within each, and back; and what each class counts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import final

import numpy as np
from numpy.typing import NDArray

from fedmask_flwr import jit
from fedmask_flwr.jit import compiled

from .bits import Bits, nbytes, pack_bits, unpack_bits

CLASSES = 256
_CHUNK = 1 << 16  # positions whose 64-bit places are in memory at a time

Classes = NDArray[np.uint8]


def tally(delta: Bits | None, classes: Classes) -> NDArray[np.int64]:
    """Positions and ones of each class, (2, 256); no ones where delta is None."""
    found = np.zeros((2, CLASSES), np.int64)
    if jit.pays(classes.size):
        _tally(np.zeros(nbytes(classes.size), np.uint8) if delta is None else delta, classes, found)
        return found
    for a in range(0, classes.size, _CHUNK):
        part = classes[a : a + _CHUNK]
        found[0] += np.bincount(part, minlength=CLASSES)
        if delta is not None:
            flags = unpack_bits(delta[a >> 3 : nbytes(a + part.size)], part.size)
            found[1] += np.bincount(part[flags], minlength=CLASSES)
    return found


@final
@dataclass(frozen=True, slots=True)
class Order:
    """Positions sorted by ``row[classes]``, their groups; ``sizes`` of the groups in positions."""

    classes: Classes
    row: NDArray[np.uint8]
    sizes: tuple[int, ...]

    def sort(self, bits: Bits) -> Bits:
        """Bring packed bits by position into the order of the groups."""
        if len(self.sizes) < 2:
            return bits
        if jit.pays(self.classes.size):
            out = np.zeros_like(bits)
            _sort(bits, self.classes, self.row, self._starts(), out)
            return out
        flags, sorted_ = unpack_bits(bits, self.classes.size), np.empty(self.classes.size, np.bool_)
        for chunk, order, pieces in self._chunks():
            part, at = flags[chunk][order], 0
            for piece in pieces:
                n = piece.stop - piece.start
                sorted_[piece] = part[at : at + n]
                at += n
        return pack_bits(sorted_)

    def restore(self, bits: Bits) -> Bits:
        """The inverse of `sort`."""
        if len(self.sizes) < 2:
            return bits
        if jit.pays(self.classes.size):
            out = np.empty_like(bits)
            _restore(bits, self.classes, self.row, self._starts(), out)
            return out
        sorted_, flags = unpack_bits(bits, self.classes.size), np.empty(self.classes.size, np.bool_)
        for chunk, order, pieces in self._chunks():
            flags[chunk][order] = np.concatenate([sorted_[piece] for piece in pieces])
        return pack_bits(flags)

    def _starts(self) -> NDArray[np.int64]:
        starts = np.zeros(CLASSES, np.int64)
        starts[1 : len(self.sizes)] = np.cumsum(self.sizes)[:-1]
        return starts

    def _chunks(self) -> Iterator[tuple[slice, NDArray[np.intp], list[slice]]]:
        """A chunk of positions, its order by group, and the piece of each group that it is."""
        done = self._starts()[: len(self.sizes)]
        for a in range(0, self.classes.size, _CHUNK):
            part = self.row[self.classes[a : a + _CHUNK]]
            upto = done + np.bincount(part, minlength=done.size)
            pieces = [slice(*ends) for ends in zip(done.tolist(), upto.tolist(), strict=True)]
            yield slice(a, a + part.size), np.argsort(part, kind="stable"), pieces
            done = upto


@compiled()
def _tally(bits: Bits, classes: Classes, found: NDArray[np.int64]) -> None:
    tables = np.zeros((8, 2, 256), np.int64)  # one a place in the byte: equal neighbours need not wait
    for byte in range(bits.size):
        at = 8 * byte
        for i in range(min(8, classes.size - at)):
            tables[i, bits[byte] >> np.uint8(i) & 1, classes[at + i]] += 1
    for i in range(8):
        for c in range(256):
            found[0, c] += tables[i, 0, c] + tables[i, 1, c]
            found[1, c] += tables[i, 1, c]


@compiled()
def _sort(bits: Bits, classes: Classes, row: NDArray[np.uint8], at: NDArray[np.int64], out: Bits) -> None:
    for byte in range(bits.size):
        value, first = bits[byte], 8 * byte
        for i in range(min(8, classes.size - first)):
            group = row[classes[first + i]]
            place = at[group]
            at[group] = place + 1
            if value >> np.uint8(i) & 1:
                out[place >> 3] |= np.uint8(1) << np.uint8(place & 7)


@compiled()
def _restore(bits: Bits, classes: Classes, row: NDArray[np.uint8], at: NDArray[np.int64], out: Bits) -> None:
    for byte in range(bits.size):
        value, first = np.uint8(0), 8 * byte
        for i in range(min(8, classes.size - first)):
            group = row[classes[first + i]]
            place = at[group]
            at[group] = place + 1
            value |= (bits[place >> 3] >> np.uint8(place & 7) & 1) << np.uint8(i)
        out[byte] = value
