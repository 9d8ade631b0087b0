"""Packed bit vectors: d bits in ceil(d/8) bytes, little bit order, trailing pad bits zero."""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

Bits: TypeAlias = NDArray[np.uint8]

_LUT = np.array([bin(i).count("1") for i in range(256)], dtype=np.uint8)
_bitwise_count = getattr(np, "bitwise_count", None)  # numpy >= 2.0
_DENSE = 16  # one 1 in this many bits: below it the byte-per-bit route is cheaper than per-one work


def nbytes(numel: int) -> int:
    """Bytes of a packed vector of `numel` bits."""
    return (numel + 7) >> 3


def check_bits(bits: Bits, numel: int) -> Bits:
    """Return `bits` if it is a valid packed vector of `numel` bits.

    Raises
    ------
    ValueError
        Wrong dtype, shape, length, or a trailing pad bit that is set.
    """
    if not isinstance(bits, np.ndarray) or bits.dtype != np.uint8 or bits.ndim != 1:
        raise ValueError("packed bits must be a 1-D numpy uint8 array; make them with pack_bits(bool_array)")
    if bits.size != nbytes(numel):
        raise ValueError(f"{numel} bits take {nbytes(numel)} bytes, got {bits.size}; pack with pack_bits")
    if numel & 7 and bits[-1] >> (numel & 7):
        raise ValueError("the trailing pad bits of a packed vector must be zero; pack with pack_bits")
    return bits


def pack_bits(flags: NDArray[np.bool_]) -> Bits:
    """Pack a bool vector of shape (d,) into ceil(d/8) bytes, bit i at byte i//8, place i%8."""
    flags = np.asarray(flags)
    if flags.ndim != 1 or flags.dtype != np.bool_:
        raise ValueError(f"pack_bits takes a 1-D bool array, got {flags.dtype} of shape {flags.shape}")
    return np.packbits(flags, bitorder="little")


def unpack_bits(bits: Bits, numel: int) -> NDArray[np.bool_]:
    """Bool vector of shape (numel,), the inverse of `pack_bits`."""
    if bits.size != nbytes(numel):
        raise ValueError(f"{numel} bits take {nbytes(numel)} bytes, got {bits.size}")
    return np.unpackbits(bits, count=numel, bitorder="little").view(np.bool_)


def popcount(bits: Bits) -> int:
    """Count the ones."""
    ones = _LUT[bits] if _bitwise_count is None else _bitwise_count(bits)
    return int(ones.sum(dtype=np.int64))


def positions(bits: Bits, numel: int) -> NDArray[np.int64]:
    """Sorted int64 indices of the ones; for sparse vectors the cost grows with the ones, not with d."""
    if bits.size != nbytes(numel):
        raise ValueError(f"{numel} bits take {nbytes(numel)} bytes, got {bits.size}")
    if popcount(bits) * _DENSE >= numel:
        return np.flatnonzero(unpack_bits(bits, numel))
    bits = np.ascontiguousarray(bits)
    whole = bits.size & ~7
    words = np.flatnonzero(bits[:whole].view(np.uint64))
    index = (words[:, None] * 8 + np.arange(8)).reshape(-1)
    index = np.concatenate([index, np.arange(whole, bits.size)])
    index = index[bits[index] != 0]
    at = np.flatnonzero(np.unpackbits(bits[index], bitorder="little").view(np.bool_))
    found: NDArray[np.int64] = index[at >> 3] * 8 + (at & 7)
    return found


def from_positions(pos: NDArray[np.int64], numel: int) -> Bits:
    """Packed vector of `numel` bits with ones at the strictly increasing indices `pos`.

    Raises
    ------
    ValueError
        An index outside 0..numel-1, or indices that are not strictly increasing.
    """
    out = np.zeros(nbytes(numel), np.uint8)
    if not pos.size:
        return out
    if pos[0] < 0 or pos[-1] >= numel or not (pos[1:] > pos[:-1]).all():
        raise ValueError(f"positions must be strictly increasing and within 0..{numel - 1}")
    if pos.size * _DENSE >= numel:
        flags = np.zeros(numel, np.bool_)
        flags[pos] = True
        return pack_bits(flags)
    byte = pos >> 3
    ones = np.left_shift(np.uint8(1), (pos & 7).astype(np.uint8))
    first = np.flatnonzero(np.concatenate([[True], byte[1:] != byte[:-1]]))
    out[byte[first]] = np.bitwise_or.reduceat(ones, first)
    return out


def slice_bits(bits: Bits, start: int, stop: int) -> Bits:
    """Copy bits start..stop-1 as a packed vector of their own."""
    n, shift, first = stop - start, start & 7, start >> 3
    out = np.zeros(nbytes(n), np.uint8)
    if not n:
        return out
    src = bits[first : nbytes(stop)]
    np.right_shift(src[: out.size], np.uint8(shift), out=out)
    if shift:
        carry = src[1 : out.size + 1]
        out[: carry.size] |= carry << np.uint8(8 - shift)
    if n & 7:
        out[-1] &= np.uint8((1 << (n & 7)) - 1)
    return out


def paste_bits(out: Bits, start: int, chunk: Bits) -> None:
    """OR the packed vector `chunk` into `out` from bit `start` on, in place."""
    shift, first = start & 7, start >> 3
    out[first : first + chunk.size] |= chunk << np.uint8(shift)
    if shift:
        dest = out[first + 1 : first + 1 + chunk.size]
        dest |= (chunk >> np.uint8(8 - shift))[: dest.size]


def flip_range(bits: Bits, start: int, stop: int) -> None:
    """Invert bits start..stop-1 in place."""
    if start >= stop:
        return
    first, last = start >> 3, (stop - 1) >> 3
    head, tail = (0xFF << (start & 7)) & 0xFF, 0xFF >> (7 - ((stop - 1) & 7))
    if first == last:
        bits[first] ^= np.uint8(head & tail)
        return
    bits[first] ^= np.uint8(head)
    bits[first + 1 : last] ^= np.uint8(0xFF)
    bits[last] ^= np.uint8(tail)


def ones_per_layer(bits: Bits, sizes: tuple[int, ...]) -> tuple[int, ...]:
    """Count the ones in each of the consecutive layers of `sizes` bits."""
    ones, start = [], 0
    for size in sizes:
        ones.append(popcount(slice_bits(bits, start, start + size)))
        start += size
    return tuple(ones)
