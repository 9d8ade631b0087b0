"""Codec ``rice``: exact Golomb-Rice coding of the gaps between the ones of the delta.

A gap g is coded by m = 2^k or 3*2^k as quotient g // m (that many zeros and a one), third t = (g >> k) % 3
where m = 3*2^k, and k low bits. The half steps keep the excess over d*H(p) below 0.9 % (else 1.9 %).
Body: per layer varint n and one byte (k; bit 6: m = 3*2^k; bit 7: the complement is coded); bit plane 0, 1,
... of the low bits of the layers with k above it; plane t > 0 of the layers with thirds; plane t = 2 of those
with t > 0; one unary stream of all quotients. S. W. Golomb 1966, R. F. Rice 1979.
"""

from __future__ import annotations

from functools import lru_cache
from typing import final

import numpy as np
from numpy.typing import NDArray

from .base import BitCodec, Body
from .bits import Bits, flip_range, from_positions, nbytes, ones_per_layer, popcount, positions
from .errors import WireError
from .sideinfo import SideInfo
from .varint import get_varint, put_varint

_COMPLEMENT, _THIRDS, _K = 0x80, 0x40, 0x3F


@lru_cache(maxsize=4096)
def best(n: int, size: int) -> tuple[float, int]:
    """Give the expected bits of n <= size/2 ones at random among `size`, and the best k (| _THIRDS).

    Only + - * / on doubles, so that every machine picks the same.
    """
    if not n:
        return 0.0, 0
    options = []
    tail = (size - n) / size  # (1-p)^(2^k)
    for k in range(size.bit_length()):
        if tail < 1:
            options.append((n * (k + 1 / (1 - tail)), k))
            thirds = 1 - tail * tail * tail
            options.append((n * (k + 2 + tail / thirds), k | _THIRDS))
        tail *= tail
    return min(options)


def _plane(flags: NDArray[np.bool_]) -> bytes:
    return np.packbits(flags, bitorder="little").tobytes()


@final
class RiceCodec(BitCodec):
    """Within 1 % of d*H(p) for p of 0.1..5 %; time grows with the ones, not with d."""

    id = 2
    name = "rice"

    def encode(self, bits: Bits, known: SideInfo) -> bytes:
        """Write the gaps of the delta, or of its complement in layers with more ones than zeros."""
        delta, sizes = known.delta(bits), known.sizes
        ones = ones_per_layer(delta, sizes)
        starts = np.cumsum((0, *sizes)).tolist()
        inverted = [2 * n > size for n, size in zip(ones, sizes, strict=True)]
        counts = [size - n if flip else n for n, size, flip in zip(ones, sizes, inverted, strict=True)]
        params = [best(n, size)[1] for n, size in zip(counts, sizes, strict=True)]
        head = b"".join(
            put_varint(n) + bytes([param | _COMPLEMENT * flip])
            for n, param, flip in zip(counts, params, inverted, strict=True)
        )
        if not sum(counts):
            return head
        if any(inverted):
            delta = delta.copy()
            for i, flip in enumerate(inverted):
                if flip:
                    flip_range(delta, starts[i], starts[i + 1])
        gaps = positions(delta, known.numel)
        before = np.empty_like(gaps)  # the first position a one could have had
        before[1:] = gaps[:-1] + 1
        edges = np.cumsum((0, *counts)).tolist()
        for i, n in enumerate(counts):
            if n:
                before[edges[i]] = starts[i]
        gaps -= before
        return head + _write_gaps(gaps, counts, params)

    def decode(self, body: Body, known: SideInfo) -> Bits:
        """Read the gaps; WireError if counts, lengths, padding or positions do not fit."""
        at, counts, params, inverted = 0, [], [], []
        for size in known.sizes:
            n, at = get_varint(body, at, size // 2)
            if at >= len(body):
                raise WireError("rice body is truncated within its layer headers")
            param = body[at] & ~_COMPLEMENT
            if (1 << (param & _K)) > max(size, 1) or (param and not n):
                raise WireError(f"rice parameter {param:#x} does not fit {n} ones in {size} bits")
            counts.append(n)
            params.append(param)
            inverted.append(bool(body[at] & _COMPLEMENT))
            at += 1
        pos = _read_gaps(body, at, counts, params, known.sizes)
        start = done = 0
        for n, size in zip(counts, known.sizes, strict=True):
            part = pos[done : done + n]
            if n:
                part += 1
                np.cumsum(part, out=part)
                if part[-1] > size:
                    raise WireError("the rice gaps run past the end of their layer")
                part += start - 1
            start, done = start + size, done + n
        delta = from_positions(pos, known.numel)
        start = 0
        for size, flip in zip(known.sizes, inverted, strict=True):
            if flip:
                flip_range(delta, start, start + size)
            start += size
        if known.reference is not None:
            delta ^= known.reference
        return delta

    def size(self, ones: tuple[int, ...], known: SideInfo) -> float:
        """Golomb-Rice expectation and the layer headers."""
        layers = [(min(n, s - n), s) for n, s in zip(ones, known.sizes, strict=True)]
        return sum(len(put_varint(n)) + 1 + best(n, s)[0] / 8 for n, s in layers)

    def max_body(self, numel: int, layers: int) -> int:
        """Twice the packed bits, and generous headers: no gaps an encoder meets come near it."""
        return 2 * nbytes(numel) + 12 * layers + 64


def _write_gaps(gaps: NDArray[np.int64], counts: list[int], params: list[int]) -> bytes:
    param = np.repeat(np.array(params, np.uint8), counts)
    k = param & _K
    planes = [_plane(gaps[k > b] >> b & 1 != 0) for b in range(int(k.max()))]
    gaps >>= k
    in_thirds = param & _THIRDS != 0
    if in_thirds.any():
        whole = gaps[in_thirds]
        quotient = whole // 3
        third = whole - 3 * quotient
        gaps[in_thirds] = quotient
        planes += [_plane(third > 0), _plane(third[third > 0] == 2)]
    gaps += 1
    stops = np.cumsum(gaps, out=gaps)
    stops -= 1
    return b"".join(planes) + from_positions(stops, int(stops[-1]) + 1).tobytes()


def _read_plane(body: Body, at: int, n: int) -> tuple[NDArray[np.uint8], int]:
    if len(body) - at < nbytes(n):
        raise WireError("rice body is shorter than its remainders")
    plane = np.frombuffer(body, np.uint8, nbytes(n), at) if n else np.empty(0, np.uint8)
    if n & 7 and plane[-1] >> (n & 7):
        raise WireError("a pad bit of the rice remainders is set")
    return np.unpackbits(plane, count=n, bitorder="little"), at + plane.size


def _read_gaps(
    body: Body, at: int, counts: list[int], params: list[int], sizes: tuple[int, ...]
) -> NDArray[np.int64]:
    total = sum(counts)
    if not total:
        if at != len(body):
            raise WireError("rice body is longer than its layer headers")
        return np.empty(0, np.int64)
    if 8 * (len(body) - at) < total:  # each one takes a bit at least; checked before arrays of that size
        raise WireError("rice body is too short for its number of ones")
    param = np.repeat(np.array(params, np.uint8), counts)
    k, in_thirds = param & _K, param & _THIRDS != 0
    low = np.zeros(total, np.int64)
    for b in range(int(k.max())):
        above = k > b
        flags, at = _read_plane(body, at, int(np.count_nonzero(above)))
        low[above] |= flags.astype(np.int64) << b
    third = np.empty(0, np.uint8)
    if in_thirds.any():
        third, at = _read_plane(body, at, int(np.count_nonzero(in_thirds)))
        twos, at = _read_plane(body, at, int(np.count_nonzero(third)))
        third[third > 0] += twos
    unary = np.frombuffer(body, np.uint8, offset=at) if at < len(body) else np.empty(0, np.uint8)
    if popcount(unary) != total or not unary[-1]:
        raise WireError("rice quotients do not match the number of ones")
    gaps = positions(unary, 8 * unary.size)
    gaps[1:] -= gaps[:-1] + 1
    done = 0
    for n, p, size in zip(counts, params, sizes, strict=True):
        if n and int(gaps[done : done + n].max()) > size >> (p & _K):  # before the shift: nothing can overflow
            raise WireError("a rice gap is longer than its layer")
        done += n
    if third.size:
        gaps[in_thirds] = gaps[in_thirds] * 3 + third
    gaps <<= k
    gaps |= low
    return gaps
