"""Counters kept as bit planes: bit k of every count lies in plane k, so a word operation counts 64 positions.

Full adders (carry-save) reduce a batch of 16 rows to one row of weight 16, which ripples into the planes above.
Words are uint64 made of the bytes of packed masks: their order does not matter to any of it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from fedmask_flwr.jit import compiled

BATCH = 16
"""Rows that `add_batch` takes at a time."""
_BLOCK = 8192  # words at a time in numpy: a copy of the batch's part, which the adders use up, stays in L2
_STEP = 1 << 16  # positions of votes at a time in numpy
_EACH = 512  # words at a time in machine code, between the adders and the ripple
LANES = np.unpackbits(np.arange(256, dtype=np.uint8), bitorder="little").view(np.uint64)  # a bit a byte

Words = NDArray[np.uint64]
"""Packed masks, (rows, words) or (words,)."""
Votes = NDArray[np.uint32]


def rows_of(rows: int, numel: int) -> Words:
    """Zeros, (rows, ceil(numel / 64)): aligned, and an odd number of cache lines apart so that they share no set.

    The memory is the system's fresh zero pages: a row takes none before it is written.
    """
    words = (numel + 63) >> 6
    stride = 8 * ((words + 7) >> 3 | 1)
    raw = np.zeros(rows * stride + 7, np.uint64)
    skip = -raw.ctypes.data % 64 >> 3
    return raw[skip : skip + rows * stride].reshape(rows, stride)[:, :words]


def _add(one: Words, a: Words, b: Words, odd: Words, both: Words) -> None:
    """One += a + b, and a becomes the carry."""
    np.bitwise_xor(a, b, out=odd)
    np.bitwise_and(a, b, out=a)
    np.bitwise_and(one, odd, out=both)
    np.bitwise_or(a, both, out=a)
    np.bitwise_xor(one, odd, out=one)


def add_batch(planes: Words, rows: Sequence[Words]) -> None:
    """Add 16 rows (W,) to the counts in planes (P, W), P >= 4; no count may pass 2^P - 1."""
    scratch = np.empty((BATCH + 2, min(_BLOCK, planes.shape[1])), np.uint64)
    for start in range(0, planes.shape[1], _BLOCK):
        plane = planes[:, start : start + _BLOCK]
        room = scratch[:, : plane.shape[1]]
        live, odd, both = room[:BATCH], room[BATCH], room[BATCH + 1]
        for own, row in zip(live, rows, strict=True):
            own[:] = row[start : start + _BLOCK]
        for one in plane[:4]:
            for i in range(0, len(live), 2):
                _add(one, live[i], live[i + 1], odd, both)
            live = live[::2]
        carry = live[0]
        for one in plane[4:]:
            np.bitwise_and(one, carry, out=both)
            np.bitwise_xor(one, carry, out=one)
            carry, both = both, carry


def expand(planes: Words, votes: Votes) -> None:
    """Write the counts of planes (P, W) to votes (numel,)."""
    for start in range(0, votes.size, _STEP):
        out = votes[start : start + _STEP]
        out[:] = 0
        plane = planes[:, start >> 6 : (start + out.size + 63) >> 6].copy().view(np.uint8)
        for first in range(0, len(plane), 8):
            low = np.zeros(out.size, np.uint8)
            for k, row in enumerate(plane[first : first + 8]):
                bits = np.unpackbits(row, count=out.size, bitorder="little")
                low |= np.left_shift(bits, np.uint8(k), out=bits)
            out |= low.astype(np.uint32) << np.uint32(first)


@compiled()
def _full(a: np.uint64, b: np.uint64, c: np.uint64) -> tuple[np.uint64, np.uint64]:
    """Sum and carry of each bit."""
    odd = b ^ c
    return a ^ odd, (b & c) | (a & odd)


@compiled()
def add_batch_compiled(planes: Words, rows: tuple[Words, ...]) -> None:
    """`add_batch` as machine code."""
    carry = np.empty(_EACH, np.uint64)
    p0, p1, p2, p3 = planes[0], planes[1], planes[2], planes[3]
    r0, r1, r2, r3, r4, r5, r6, r7, r8, r9, r10, r11, r12, r13, r14, r15 = rows
    for start in range(0, planes.shape[1], _EACH):
        n = min(_EACH, planes.shape[1] - start)
        for j in range(n):
            i = start + j
            x, a = _full(p0[i], r0[i], r1[i])
            x, b = _full(x, r2[i], r3[i])
            y, c = _full(p1[i], a, b)
            x, a = _full(x, r4[i], r5[i])
            x, b = _full(x, r6[i], r7[i])
            y, d = _full(y, a, b)
            z, e = _full(p2[i], c, d)
            x, a = _full(x, r8[i], r9[i])
            x, b = _full(x, r10[i], r11[i])
            y, c = _full(y, a, b)
            x, a = _full(x, r12[i], r13[i])
            p0[i], b = _full(x, r14[i], r15[i])
            p1[i], d = _full(y, a, b)
            p2[i], f = _full(z, c, d)
            p3[i], carry[j] = _full(p3[i], e, f)
        for k in range(4, planes.shape[0]):
            plane = planes[k, start : start + n]
            for j in range(n):
                here, more = plane[j], carry[j]
                plane[j] = here ^ more
                carry[j] = here & more


@compiled()
def expand_compiled(planes: NDArray[np.uint8], lanes: Words, votes: Votes) -> None:
    """`expand` as machine code, of planes as bytes; ``lanes`` is `LANES`."""
    low = np.empty(_EACH, np.uint64)
    flat = low.view(np.uint8)
    for start in range(0, (votes.size + 7) >> 3, _EACH):
        out = votes[8 * start : 8 * (start + _EACH)]
        n = (out.size + 7) >> 3
        for first in range(0, planes.shape[0], 8):
            low[:] = 0
            for k in range(first, min(first + 8, planes.shape[0])):
                row, shift = planes[k, start : start + n], np.uint64(k - first)
                for j in range(n):
                    low[j] |= lanes[row[j]] << shift
            if first:
                for i in range(out.size):
                    out[i] |= np.uint32(flat[i]) << np.uint32(first)
            else:
                for i in range(out.size):
                    out[i] = flat[i]
