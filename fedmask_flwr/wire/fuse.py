"""Codecs ``fuse8`` and ``fuse16``: 3-wise binary fuse filters over the delta's positions (DeltaMask).

Lossy: a zero of the delta decodes as one with probability 2^-8 or 2^-16; a one is never lost.
Body: nothing for an empty delta; else a filter: seed u64, size, segment length, segment count, segment count
length and array length as u32, and the fingerprints, all little-endian. Above `_KEYS` ones, several filters, each
of a range of positions: their number u64, 0 u32 (where a single filter has its size), the position at which each
range ends u64, and the filters. Built by pyfusefilter's C core, read by `query_ranges`.
T. M. Graf, D. Lemire 2022 (arXiv 2201.01174).
"""

from __future__ import annotations

import math
import struct
from itertools import pairwise
from typing import Any, ClassVar, final

import numpy as np
from numpy.typing import NDArray

from .base import BitCodec, Body
from .bits import Bits, positions
from .errors import FilterBuildError, WireError
from .membership import Filter, query_ranges
from .sideinfo import SideInfo

_HEAD = struct.Struct("<QIIIII")
_SPLIT = struct.Struct("<QI")
_MAX_SEGMENT = 1 << 18
_KEYS = 1 << 18  # at most, of a filter that stays in cache while it is asked
_RANGE = 1 << 16  # positions at least, of one of several filters: bounds the work of a hostile body


def parse(body: Body, width: int, numel: int) -> Filter:
    """Check every header field against the body before anything is indexed; WireError if one is off."""
    length = _slots(body, 0, numel)[-1]
    if len(body) != _HEAD.size + length * width:
        raise WireError(f"filter of {length} slots takes {_HEAD.size + length * width} bytes, got {len(body)}")
    return _filter(body, 0, width, numel)


def _slots(body: Body, at: int, numel: int) -> tuple[int, int, int, int]:
    """Seed, segment length, segments and slots of the filter at this offset."""
    if len(body) - at < _HEAD.size:
        raise WireError(f"filter body has {len(body) - at} bytes, its header alone {_HEAD.size}")
    seed, size, segment, segments, span, length = _HEAD.unpack_from(body, at)
    if not 0 < size <= numel:
        raise WireError(f"filter claims {size} keys of {numel} positions")
    if not 0 < segment <= _MAX_SEGMENT or segment & (segment - 1):
        raise WireError(f"filter segment length {segment} is not a power of two up to {_MAX_SEGMENT}")
    if not segments or span != segments * segment or length != span + 2 * segment:
        raise WireError("filter geometry does not add up")
    return seed, segment, segments, length


def _filter(body: Body, at: int, width: int, numel: int) -> Filter:
    seed, segment, segments, length = _slots(body, at, numel)
    raw = np.frombuffer(body, f"<u{width}", length, at + _HEAD.size)
    return Filter(seed, segment, segments, raw.astype(f"u{width}", copy=False))


def parse_ranges(body: Body, width: int, numel: int) -> list[tuple[int, int, Filter]]:
    """First position, number of positions and filter of each range; everything is checked before it is used."""
    if len(body) < _HEAD.size or any(body[8:12]):
        return [(0, numel, parse(body, width, numel))]
    count, _ = _SPLIT.unpack_from(body)
    at = _SPLIT.size + 8 * count
    if not 2 <= count <= numel // _RANGE or at > len(body):
        raise WireError(f"{count} filters do not fit {numel} positions in {len(body)} bytes")
    stops = np.frombuffer(body, "<u8", count, _SPLIT.size).tolist()
    found = []
    for start, stop in pairwise((0, *stops)):
        if start % 64 or stop - start < _RANGE or stop > numel:
            raise WireError(f"a filter of positions {start} to {stop} of {numel} is not one an encoder writes")
        size = _HEAD.size + _slots(body, at, stop - start)[-1] * width
        if size > len(body) - at:
            raise WireError("filter body is truncated")
        found.append((start, stop - start, _filter(body, at, width, stop - start)))
        at += size
    if at != len(body) or stops[-1] != numel:
        raise WireError("filters do not end where the body or the positions end")
    return found


def _core() -> tuple[Any, Any]:
    try:
        from pyfusefilter._xorfilter import ffi, lib
    except ImportError as e:  # pragma: no cover
        raise ImportError(
            "encoding 'fuse8'/'fuse16' needs pyfusefilter: pip install pyfusefilter 'xxhash<4'; "
            "where it has no wheel that needs a C compiler (the image: --build-arg BUILD_PYFUSEFILTER=1), or use "
            "the codec 'rice' or 'auto'"
        ) from e
    return ffi, lib


def build(keys: NDArray[np.int64], width: int) -> bytes:
    """Body of the filter of these distinct keys; FilterBuildError if the C core gives up on them."""
    ffi, lib = _core()
    name = f"binary_fuse{8 * width}"
    fuse = ffi.new(f"{name}_t *")
    if not getattr(lib, f"{name}_allocate")(keys.size, fuse):
        raise FilterBuildError(f"no memory for a filter of {keys.size} keys")
    try:
        own = keys.astype(np.uint64)  # a copy: populate sorts it in place
        if not getattr(lib, f"{name}_populate")(ffi.from_buffer("uint64_t[]", own), own.size, fuse):
            raise FilterBuildError(f"no filter found for these {keys.size} keys; use 'rice' or 'auto'")
        head = _HEAD.pack(
            fuse.Seed,
            fuse.Size,
            fuse.SegmentLength,
            fuse.SegmentCount,
            fuse.SegmentCountLength,
            fuse.ArrayLength,
        )
        raw = np.frombuffer(ffi.buffer(fuse.Fingerprints, fuse.ArrayLength * width), f"u{width}")
        return head + raw.astype(f"<u{width}").tobytes()
    finally:
        getattr(lib, f"{name}_free")(fuse)


def build_ranges(keys: NDArray[np.int64], width: int, numel: int) -> bytes:
    """Body of these ascending keys below numel: one filter, or several of equally many keys, `_KEYS` at most."""
    count = -(-keys.size // _KEYS)
    if count < 2:
        return build(keys, width)
    cuts = [keys.size * i // count for i in range(1, count)]
    stops = [*((keys[cuts] + 64) & ~63).tolist(), numel]  # multiples of 64 keep the ranges' bytes apart
    at = [0, *np.searchsorted(keys, stops).tolist()]
    filters = [build(keys[a:b], width) for a, b in pairwise(at)]
    return b"".join([_SPLIT.pack(count, 0), np.array(stops, "<u8").tobytes(), *filters])


def _single(n: int, width: int) -> int:
    """Bytes of one filter of n keys."""
    segment = 1 << min(18, math.floor(math.log(n) / math.log(3.33) + 2.25)) if n > 1 else 4
    factor = max(1.125, 0.875 + 0.25 * math.log(1e6) / math.log(n)) if n > 1 else 0.0
    segments = max(1, math.ceil(round(n * factor) / segment) - 2)
    return _HEAD.size + (segments + 2) * segment * width


class FuseCodec(BitCodec):
    """The two widths share everything but the width."""

    lossless = False
    width: ClassVar[int]

    @final
    def encode(self, bits: Bits, known: SideInfo) -> bytes:
        """Build the filters; FilterBuildError if that fails (rare, most often near 11 500 keys)."""
        keys = positions(known.delta(bits), known.numel)
        return build_ranges(keys, self.width, known.numel) if keys.size else b""

    @final
    def decode(self, body: Body, known: SideInfo) -> Bits:
        """Ask the filters for every position; WireError if a header is not valid."""
        numel = known.numel
        delta = query_ranges(parse_ranges(body, self.width, numel) if len(body) else (), numel)
        if known.reference is not None:
            delta ^= known.reference
        return delta

    @final
    def size(self, ones: tuple[int, ...], known: SideInfo) -> float:
        """Headers and the slots of filters with that many keys."""
        n = sum(ones)
        count = -(-n // _KEYS)
        if count < 2:
            return float(_single(n, self.width)) if n else 0.0
        return float(_SPLIT.size + count * (8 + _single(n // count, self.width)))

    @final
    def max_body(self, numel: int, layers: int) -> int:
        """Two slots a position and a few segments: above every size factor."""
        return _HEAD.size + self.width * (2 * numel + 4096)


@final
class Fuse8Codec(FuseCodec):
    """About 9 bits a key, 0.39 % of the zeros flip."""

    id = 4
    name = "fuse8"
    flip_rate = 2.0**-8
    width = 1


@final
class Fuse16Codec(FuseCodec):
    """About 18 bits a key, 0.0015 % of the zeros flip."""

    id = 5
    name = "fuse16"
    flip_rate = 2.0**-16
    width = 2
