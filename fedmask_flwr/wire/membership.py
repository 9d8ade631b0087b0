"""Which of many consecutive keys a binary fuse filter holds: in numpy, and as machine code."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedmask_flwr import jit
from fedmask_flwr.jit import compiled

from .bits import Bits, nbytes

_CHUNK = 1 << 16  # keys a pass: the scratch stays in cache
_EACH = 1024  # keys a pass of the machine code, between the hashes and the look-ups
_M32 = np.uint64(0xFFFFFFFF)
_MIX1, _MIX2 = np.uint64(0xFF51AFD7ED558CCD), np.uint64(0xC4CEB9FE1A85EC53)
_18, _32, _33 = np.uint64(18), np.uint64(32), np.uint64(33)


@dataclass(frozen=True, slots=True, eq=False)
class Filter:
    """A validated filter: seed, segment length and count, fingerprints of shape ((count + 2) * length,)."""

    seed: int
    segment: int
    segments: int
    fingerprints: NDArray[np.uint8] | NDArray[np.uint16]

    @property
    def span(self) -> int:
        """Slots of all segments but the last two, below 2^32."""
        return self.segment * self.segments


def query(fuse: Filter, numel: int, first: int = 0) -> Bits:
    """Packed membership of keys first..first+numel-1, the same as the C ``contain`` of each; scratch 2 MiB."""
    out = np.empty(nbytes(numel), np.uint8)
    _ask(fuse, first, numel, out, jit.pays(numel))
    return out


def query_ranges(ranges: Sequence[tuple[int, int, Filter]], numel: int) -> Bits:
    """`query` of keys 0..numel-1; each filter is asked for its range: first key, a multiple of 8, and keys."""
    out = np.zeros(nbytes(numel), np.uint8)
    by_machine = jit.pays(numel)  # the ranges may be short each
    for first, n, fuse in ranges:
        _ask(fuse, first, n, out[first >> 3 : nbytes(first + n)], by_machine)
    return out


def _ask(fuse: Filter, first: int, numel: int, out: Bits, by_machine: bool) -> None:
    if by_machine:
        own = fuse.fingerprints.copy()  # aligned, whatever the body's offset in its frame
        numbers = np.array([fuse.seed, fuse.segment, fuse.span], np.uint64)
        query_compiled(own, numbers, first, numel, out)
    else:
        query_numpy(fuse, first, numel, out)


def query_numpy(fuse: Filter, first: int, numel: int, out: Bits) -> None:
    """Write `query` to out."""
    fp, length = fuse.fingerprints, np.uint64(fuse.segment)
    mask, span = np.uint64(fuse.segment - 1), np.uint64(fuse.span)
    n = min(_CHUNK, numel)
    base = np.arange(n, dtype=np.uint64)
    h_, t_, i_ = (np.empty(n, np.uint64) for _ in range(3))
    f_, g_ = (np.empty(n, fp.dtype) for _ in range(2))
    for start in range(0, numel, _CHUNK):
        n = min(_CHUNK, numel - start)
        h, t, i, f, g = h_[:n], t_[:n], i_[:n], f_[:n], g_[:n]
        slot = i.view(np.int64)  # indices are below 2^33, and take wants signed ones
        np.add(base[:n], np.uint64((first + start + fuse.seed) % 2**64), out=h)
        for mix in (_MIX1, _MIX2, None):
            np.right_shift(h, 33, out=t)
            np.bitwise_xor(h, t, out=h)
            if mix is not None:
                np.multiply(h, mix, out=h)
        np.right_shift(h, 32, out=t)
        np.bitwise_xor(h, t, out=i)
        f[:] = i  # the low bits: the key's own fingerprint
        # high word of h * span, exact because span < 2^32
        np.bitwise_and(h, _M32, out=i)
        np.multiply(i, span, out=i)
        np.right_shift(i, 32, out=i)
        np.multiply(t, span, out=t)
        np.add(i, t, out=i)
        np.right_shift(i, 32, out=i)
        np.take(fp, slot, out=g, mode="clip")  # clip only spares numpy a copy: slots are in range by geometry
        np.bitwise_xor(f, g, out=f)
        base0 = i + length
        np.right_shift(h, 18, out=t)
        np.bitwise_and(t, mask, out=t)
        np.bitwise_xor(base0, t, out=i)
        np.take(fp, slot, out=g, mode="clip")
        np.bitwise_xor(f, g, out=f)
        np.add(base0, length, out=base0)
        np.bitwise_and(h, mask, out=t)
        np.bitwise_xor(base0, t, out=i)
        np.take(fp, slot, out=g, mode="clip")
        out[start >> 3 : (start >> 3) + nbytes(n)] = np.packbits(f == g, bitorder="little")


@compiled()
def query_compiled(
    fingerprints: NDArray[np.unsignedinteger], numbers: NDArray[np.uint64], first: int, numel: int, out: Bits
) -> None:
    """`query_numpy` as machine code; ``numbers`` are seed, segment and span. Slots are in range by geometry.

    Two loops: the hashes are vectorised, and the look-ups do not wait for them.
    """
    one, two, three = np.empty(_EACH, np.uint32), np.empty(_EACH, np.uint32), np.empty(_EACH, np.uint32)
    own, hit = np.empty(_EACH, fingerprints.dtype), np.empty(_EACH, np.uint8)
    seed, segment, span = numbers[0], numbers[1], numbers[2]
    mask = segment - np.uint64(1)
    for start in range(0, numel, _EACH):
        base = seed + np.uint64(first + start)
        for j in range(_EACH):
            h = base + np.uint64(j)
            h = (h ^ (h >> _33)) * _MIX1
            h = (h ^ (h >> _33)) * _MIX2
            h ^= h >> _33
            high = h >> _32
            a = (high * span + (((h & _M32) * span) >> _32)) >> _32  # high word of h * span, as span < 2^32
            b = a + segment
            one[j] = a
            two[j] = b ^ ((h >> _18) & mask)
            three[j] = (b + segment) ^ (h & mask)
            own[j] = h ^ high
        for j in range(_EACH):
            hit[j] = own[j] ^ fingerprints[one[j]] ^ fingerprints[two[j]] ^ fingerprints[three[j]] == 0
        at, size = start >> 3, min(_EACH >> 3, (numel - start + 7) >> 3)
        for k in range(size):
            byte = hit[8 * k]
            for i in range(1, 8):
                byte |= hit[8 * k + i] << np.uint8(i)
            out[at + k] = byte
    if numel & 7:
        out[numel >> 3] &= np.uint8((1 << (numel & 7)) - 1)
