"""Codec ``counts``: integers 0..top, low bits as raw planes and the rest by static rANS.

Body: varint top; one byte mode. CONSTANT: varint value, end. Else one byte s; the table (HISTOGRAM: one,
LAYERS: one a layer); s bit planes of the values; the rANS stream of ``values >> s``, absent if top >> s is 0.
Table: five planes of the bit lengths of the frequencies, then the bits below each leading one.
"""

from __future__ import annotations

from typing import final

import numpy as np
from numpy.typing import NDArray

from .base import Body, CountCodec
from .bits import nbytes
from .errors import WireError
from .payload import Counts
from .rans import TOTAL, Tables, decode, encode
from .sideinfo import SideInfo
from .varint import get_varint, put_varint

CONSTANT, UNIFORM, HISTOGRAM, LAYERS = range(4)
_MAX_ALPHABET = 4096
_BLOCK = 1 << 20  # values that are there as 64-bit numbers at a time
LAYER_VALUES = 8192  # a table a layer only from this mean layer size on: bounds table memory by the values'


def _uniform(alphabet: int) -> Tables:
    edges = np.arange(alphabet + 1, dtype=np.int64) * TOTAL // alphabet
    return np.diff(edges).astype(np.uint32).reshape(1, -1)


def _quantise(histogram: NDArray[np.int64]) -> NDArray[np.uint32]:
    """Integer frequencies that sum to TOTAL, at least 1 where the histogram is not 0."""
    freqs = np.zeros(histogram.size, np.int64)
    if not histogram.any():
        freqs[0] = TOTAL
        return freqs.astype(np.uint32)
    rare = np.zeros(histogram.size, np.bool_)
    while True:
        common = (histogram > 0) & ~rare
        n, room = histogram[common].sum(), TOTAL - int(rare.sum())
        freqs[common] = histogram[common] * room // n
        again = common & (freqs == 0)
        if not again.any():
            break
        rare |= again
    freqs[rare] = 1
    freqs[np.argmax(freqs)] += TOTAL - freqs.sum()
    return freqs.astype(np.uint32)


def _write_table(freqs: NDArray[np.uint32]) -> bytes:
    lengths = np.frexp(freqs.astype(np.float64))[1].astype(np.int64)
    planes = b"".join(np.packbits(lengths >> b & 1 != 0, bitorder="little").tobytes() for b in range(5))
    low = np.maximum(lengths - 1, 0)
    at = np.cumsum(low) - low
    flags = np.zeros(int(low.sum()), np.bool_)
    for b in range(int(low.max())):
        has = low > b
        flags[at[has] + b] = freqs[has] >> b & 1
    return planes + np.packbits(flags, bitorder="little").tobytes()


def _read_table(body: Body, at: int, n: int) -> tuple[NDArray[np.uint32], int]:
    if len(body) - at < 5 * nbytes(n):
        raise WireError("the frequency table is truncated")
    lengths = np.zeros(n, np.int64)
    for b in range(5):
        plane = np.frombuffer(body, np.uint8, nbytes(n), at)
        lengths |= np.unpackbits(plane, count=n, bitorder="little").astype(np.int64) << b
        at += plane.size
    if lengths.max() > TOTAL.bit_length():
        raise WireError("a frequency is too large")
    low = np.maximum(lengths - 1, 0)
    offset, total = np.cumsum(low) - low, int(low.sum())
    if len(body) - at < nbytes(total):
        raise WireError("the frequency table is truncated")
    flags = np.unpackbits(np.frombuffer(body, np.uint8, nbytes(total), at), count=total, bitorder="little")
    freqs = (lengths > 0).astype(np.int64) << low
    for b in range(int(low.max())):
        has = low > b
        freqs[has] |= flags[offset[has] + b].astype(np.int64) << b
    return freqs.astype(np.uint32), at + nbytes(total)


def _bits(histogram: NDArray[np.int64], tables: Tables) -> float:
    live = histogram > 0
    return float((histogram[live] * (16 - np.log2(tables.reshape(histogram.shape)[live]))).sum())


def occurrences(values: NDArray[np.unsignedinteger], shift: int, size: int) -> NDArray[np.int64]:
    """How often each of 0..size-1 is a value, less its lowest ``shift`` bits."""
    found = np.zeros(size, np.int64)
    for start in range(0, values.size, _BLOCK):
        found += np.bincount(values[start : start + _BLOCK] >> shift, minlength=size)
    return found


def _plane(values: NDArray[np.uint32], b: int) -> bytes:
    """Bit b of each value, packed."""
    blocks = (values[start : start + _BLOCK] for start in range(0, values.size, _BLOCK))
    return b"".join(np.packbits(block >> b & 1 != 0, bitorder="little").tobytes() for block in blocks)


def _fold(histogram: NDArray[np.int64], shift: int) -> NDArray[np.int64]:
    padded = np.pad(histogram, (0, -histogram.size % (1 << shift)))
    folded: NDArray[np.int64] = padded.reshape(-1, 1 << shift).sum(axis=1)
    return folded


def _per_layer(sizes: tuple[int, ...], numel: int) -> bool:
    return 1 < len(sizes) <= numel // LAYER_VALUES


def _plan(values: NDArray[np.uint32], top: int, sizes: tuple[int, ...]) -> tuple[int, int, Tables]:
    """Mode, number of low planes and tables with the fewest bits, from histograms alone."""
    least = max(0, top.bit_length() - _MAX_ALPHABET.bit_length() + 1)
    histogram = occurrences(values, least, (top >> least) + 1)
    best, bits = (UNIFORM, top.bit_length(), _uniform(1)), float(values.size * top.bit_length())
    for s in range(least, top.bit_length()):
        folded = _fold(histogram, s - least)
        raw, fitted, even = values.size * s, _quantise(folded), _uniform(folded.size)
        if (cost := raw + _bits(folded, even) + 40) < bits:
            best, bits = (UNIFORM, s, even), cost
        if (cost := raw + _bits(folded, fitted) + 8 * len(_write_table(fitted)) + 40) < bits:
            best, bits = (HISTOGRAM, s, fitted.reshape(1, -1)), cost
    s = best[1]
    if _per_layer(sizes, values.size) and best[0] == HISTOGRAM:
        layers = np.split(values, np.cumsum(sizes)[:-1])
        counted = np.stack([occurrences(v, s, (top >> s) + 1) for v in layers])
        tables = np.stack([_quantise(row) for row in counted])
        if values.size * s + _bits(counted, tables) + 8 * len(_write_table(tables.reshape(-1))) + 40 < bits:
            best = (LAYERS, s, tables)
    return best


def _contexts(mode: int, sizes: tuple[int, ...]) -> NDArray[np.uint16] | None:
    return np.repeat(np.arange(len(sizes), dtype=np.uint16), sizes) if mode == LAYERS else None


@final
class CountsCodec(CountCodec):
    """Never above log2(top+1) bits a value by more than 1 % and 64 bytes; O(1) bytes if all are equal."""

    id = 16
    name = "counts"

    def encode(self, counts: Counts, known: SideInfo) -> bytes:
        """Write the values with the cheapest of the modes."""
        values, top, n = counts.values, counts.top, counts.values.size
        if n != known.numel:
            raise ValueError(f"{n} counts, but the layers hold {known.numel}")
        head = put_varint(top)
        if not n or values.min() == values.max():
            return head + bytes([CONSTANT]) + put_varint(int(values[0]) if n else 0)
        mode, s, tables = _plan(values, top, known.sizes)
        parts = [head, bytes([mode, s])]
        if mode != UNIFORM:
            parts.append(_write_table(tables.reshape(-1)))
        parts += [_plane(values, b) for b in range(s)]
        if top >> s:
            symbols = np.empty(n, np.uint16)
            np.right_shift(values, s, out=symbols, casting="unsafe")
            parts.append(encode(symbols, _contexts(mode, known.sizes), tables))
        return b"".join(parts)

    def decode(self, body: Body, known: SideInfo) -> Counts:
        """Read the values; WireError if the body is not valid or a value is above its top."""
        n, sizes = known.numel, known.sizes
        top, at = get_varint(body, 0, 2**32 - 1)
        mode, at = get_varint(body, at, LAYERS)
        if mode == CONSTANT:
            value, at = get_varint(body, at, top)
            if at != len(body):
                raise WireError("counts body is longer than its one value")
            return Counts(np.full(n, value, np.uint32), top)
        s, at = get_varint(body, at, top.bit_length())
        alphabet = (top >> s) + 1
        if not n or alphabet > _MAX_ALPHABET or (mode == LAYERS and not _per_layer(sizes, n)):
            raise WireError("the counts mode does not fit this field")
        tables = _uniform(alphabet)
        if mode != UNIFORM:
            rows = len(sizes) if mode == LAYERS else 1
            flat, at = _read_table(body, at, rows * alphabet)
            tables = flat.reshape(rows, alphabet)
            if (tables.sum(axis=1, dtype=np.uint64) != TOTAL).any():
                raise WireError("a frequency table does not sum to its total")
        stream_at = at + s * nbytes(n)
        if stream_at > len(body):
            raise WireError("counts body is truncated within its planes")
        values = np.zeros(n, np.uint32)
        if alphabet > 1:
            values[:] = decode(body, stream_at, n, _contexts(mode, sizes), tables)
            values <<= s
        elif stream_at != len(body):
            raise WireError("counts body is longer than its planes")
        for b in range(s):
            plane = np.frombuffer(body, np.uint8, nbytes(n), at)
            at += plane.size
            values |= np.unpackbits(plane, count=n, bitorder="little").astype(np.uint32) << b
        if int(values.max()) > top:
            raise WireError(f"a count of {int(values.max())} is above its top of {top}")
        return Counts(values, top)

    def max_body(self, numel: int, layers: int) -> int:
        """Five bytes a value and the fixed parts."""
        return 5 * numel + 256
