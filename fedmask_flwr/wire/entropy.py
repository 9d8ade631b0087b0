"""Codec ``entropy``: the delta's bytes by static rANS, one ones-probability a layer.

Body: per layer u16 p (65536 = 1; 0: no ones, 65535: all ones, neither codes anything), then one rANS stream
of all other layers, each padded to a byte. A byte with k ones has frequency p^k (1-p)^(8-k), in integers.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import final

import numpy as np
from numpy.typing import NDArray

from .base import BitCodec, Body
from .bits import Bits, flip_range, nbytes, ones_per_layer, paste_bits, slice_bits
from .errors import WireError
from .rans import TOTAL, decode, encode, lane_count
from .sideinfo import SideInfo

_ALL_ONES = TOTAL - 1
_LEVEL_BITS = 5  # significant bits kept of p: costs < 0.1 % and lets layers share tables
_BYTES_OF = np.array([k.bit_count() for k in range(256)])


def _level(p: int) -> int:
    rare = min(p, TOTAL - p)
    shift = max(0, rare.bit_length() - _LEVEL_BITS)
    rare = (rare + (1 << shift >> 1)) >> shift << shift
    return rare if 2 * p <= TOTAL else TOTAL - max(rare, 2)  # 65535 is taken


def quantise(ones: int, size: int) -> int:
    """Give the u16 of a layer: its share of ones in 1/65536, to five significant bits of the rarer side."""
    if not ones:
        return 0
    if ones == size:
        return _ALL_ONES
    return _level(max(1, min((ones * TOTAL + size // 2) // size, TOTAL - 2)))


@lru_cache(maxsize=1024)
def _class_freqs(p: int) -> tuple[int, ...]:
    """Frequency of one byte with k ones, k = 0..8, for a level p; exact integer arithmetic."""
    return tuple(max(1, (p**k * (TOTAL - p) ** (8 - k)) >> 112) for k in range(9))


def _table(p: int) -> NDArray[np.uint32]:
    freqs = np.array(_class_freqs(p), np.int64)[_BYTES_OF]
    freqs[0 if 2 * p <= TOTAL else 255] += TOTAL - freqs.sum()
    table: NDArray[np.uint32] = freqs.astype(np.uint32)
    return table


@lru_cache(maxsize=1024)
def _class_bits(p: int) -> tuple[float, ...]:
    """Bits that a byte with k ones takes under level p."""
    freqs = _table(p)
    return tuple(16 - math.log2(freqs[(1 << k) - 1]) for k in range(9))


def _layer_bits(ones: int, size: int) -> float:
    if ones in (0, size):
        return 0.0
    q, bits = ones / size, _class_bits(quantise(ones, size))
    return nbytes(size) * sum(math.comb(8, k) * q**k * (1 - q) ** (8 - k) * bits[k] for k in range(9))


def _tables(levels: list[int]) -> NDArray[np.uint32]:
    return np.stack([_table(p) for p in levels])


@final
class EntropyCodec(BitCodec):
    """Within 1 % of the sum over the layers of d*H(p) for p of 5..50 %."""

    id = 3
    name = "entropy"

    def encode(self, bits: Bits, known: SideInfo) -> bytes:
        """Write the level of each layer and the rANS stream."""
        delta = known.delta(bits)
        ps = [quantise(n, size) for n, size in zip(ones_per_layer(delta, known.sizes), known.sizes, strict=True)]
        head = np.array(ps, "<u2").tobytes()
        levels = sorted({p for p in ps if p not in (0, _ALL_ONES)})
        if not levels:
            return head
        symbols, start = [], 0
        for p, size in zip(ps, known.sizes, strict=True):
            if p not in (0, _ALL_ONES):
                symbols.append(slice_bits(delta, start, start + size))
            start += size
        return head + encode(np.concatenate(symbols), _contexts(ps, levels, known.sizes), _tables(levels))

    def decode(self, body: Body, known: SideInfo) -> Bits:
        """Read it back; WireError if the levels or the stream are not valid."""
        sizes, at = known.sizes, 2 * len(known.sizes)
        if len(body) < at:
            raise WireError("entropy body is truncated within its layer headers")
        ps = [int(p) for p in np.frombuffer(body, "<u2", len(sizes))]
        levels = sorted({p for p in ps if p not in (0, _ALL_ONES)})
        if any(_level(p) != p for p in levels) or any(p and not size for p, size in zip(ps, sizes, strict=True)):
            raise WireError("a layer probability of the entropy body is not one an encoder writes")
        symbols = np.empty(0, np.uint8)
        if levels:
            n = sum(nbytes(size) for p, size in zip(ps, sizes, strict=True) if p in levels)
            symbols = decode(body, at, n, _contexts(ps, levels, sizes), _tables(levels)).astype(np.uint8)
        elif len(body) != at:
            raise WireError("entropy body is longer than its layer headers")
        out = np.zeros(nbytes(known.numel), np.uint8)
        start = read = 0
        for p, size in zip(ps, sizes, strict=True):
            if p == _ALL_ONES:
                flip_range(out, start, start + size)
            elif p:
                chunk = symbols[read : read + nbytes(size)]
                read += chunk.size
                if size & 7 and chunk[-1] >> (size & 7):
                    raise WireError("a pad bit of an entropy layer is set")
                paste_bits(out, start, chunk)
            start += size
        if known.reference is not None:
            out ^= known.reference
        return out

    def size(self, ones: tuple[int, ...], known: SideInfo) -> float:
        """Cross entropy under the quantised tables, the layer headers and the lanes."""
        bits = sum(_layer_bits(n, size) for n, size in zip(ones, known.sizes, strict=True))
        lanes = lane_count(nbytes(known.numel), bits / 8) if bits else 0
        return 2 * len(known.sizes) + bits / 8 + 2.5 * lanes + 3

    def max_body(self, numel: int, layers: int) -> int:
        """Sixteen bits a byte of the delta, headers and lanes."""
        return 2 * (nbytes(numel) + layers) + 2 * layers + 8 * (nbytes(numel) // 300 + 16)


def _contexts(ps: list[int], levels: list[int], sizes: tuple[int, ...]) -> NDArray[np.uint16] | None:
    if len(levels) == 1:
        return None
    coded = [(levels.index(p), nbytes(size)) for p, size in zip(ps, sizes, strict=True) if p in levels]
    rows, repeats = zip(*coded, strict=True)
    return np.repeat(np.array(rows, np.uint16), repeats)
