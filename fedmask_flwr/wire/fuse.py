"""Codecs ``fuse8`` and ``fuse16``: 3-wise binary fuse filters over the delta's positions (DeltaMask).

Lossy: a zero of the delta decodes as one with probability 2^-8 or 2^-16; a one is never lost.
Body: nothing for an empty delta; else seed u64, size, segment length, segment count, segment count length and
array length as u32, and the fingerprints, all little-endian. Built by pyfusefilter's C core, read by `query`.
T. M. Graf, D. Lemire 2022 (arXiv 2201.01174).
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from typing import Any, ClassVar, final

import numpy as np
from numpy.typing import NDArray

from .base import BitCodec, Body
from .bits import Bits, nbytes, positions
from .errors import FilterBuildError, WireError
from .sideinfo import SideInfo

_HEAD = struct.Struct("<QIIIII")
_CHUNK = 1 << 16  # keys a pass: the scratch stays in cache
_MAX_SEGMENT = 1 << 18
_M32 = np.uint64(0xFFFFFFFF)
_MIX1, _MIX2 = np.uint64(0xFF51AFD7ED558CCD), np.uint64(0xC4CEB9FE1A85EC53)


@dataclass(frozen=True, slots=True, eq=False)
class Filter:
    """A validated filter: seed, segment length and count, fingerprints of shape ((count + 2) * length,)."""

    seed: int
    segment: int
    segments: int
    fingerprints: NDArray[np.uint8] | NDArray[np.uint16]


def parse(body: Body, width: int, numel: int) -> Filter:
    """Check every header field against the body before anything is indexed; WireError if one is off."""
    if len(body) < _HEAD.size:
        raise WireError(f"filter body has {len(body)} bytes, its header alone {_HEAD.size}")
    seed, size, segment, segments, span, length = _HEAD.unpack_from(body)
    if not 0 < size <= numel:
        raise WireError(f"filter claims {size} keys of {numel} positions")
    if not 0 < segment <= _MAX_SEGMENT or segment & (segment - 1):
        raise WireError(f"filter segment length {segment} is not a power of two up to {_MAX_SEGMENT}")
    if not segments or span != segments * segment or length != span + 2 * segment:
        raise WireError("filter geometry does not add up")
    if len(body) != _HEAD.size + length * width:
        raise WireError(f"filter of {length} slots takes {_HEAD.size + length * width} bytes, got {len(body)}")
    raw = np.frombuffer(body, f"<u{width}", length, _HEAD.size)
    return Filter(seed, segment, segments, raw.astype(f"u{width}", copy=False))


def query(fuse: Filter, numel: int) -> Bits:
    """Packed membership of keys 0..numel-1, the same as the C ``contain`` of each; scratch about 2 MiB."""
    out = np.empty(nbytes(numel), np.uint8)
    fp, length = fuse.fingerprints, np.uint64(fuse.segment)
    mask, span = np.uint64(fuse.segment - 1), np.uint64(fuse.segment * fuse.segments)
    n = min(_CHUNK, numel)
    base = np.arange(n, dtype=np.uint64)
    h_, t_, i_ = (np.empty(n, np.uint64) for _ in range(3))
    f_, g_ = (np.empty(n, fp.dtype) for _ in range(2))
    for start in range(0, numel, _CHUNK):
        n = min(_CHUNK, numel - start)
        h, t, i, f, g = h_[:n], t_[:n], i_[:n], f_[:n], g_[:n]
        slot = i.view(np.int64)  # indices are below 2^33, and take wants signed ones
        np.add(base[:n], np.uint64((start + fuse.seed) % 2**64), out=h)
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
    return out


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


class FuseCodec(BitCodec):
    """The two widths share everything but the width."""

    lossless = False
    width: ClassVar[int]

    @final
    def encode(self, bits: Bits, known: SideInfo) -> bytes:
        """Build the filter; FilterBuildError if that fails (rare, most often near 11 500 keys)."""
        keys = positions(known.delta(bits), known.numel)
        return build(keys, self.width) if keys.size else b""

    @final
    def decode(self, body: Body, known: SideInfo) -> Bits:
        """Ask the filter for every position; WireError if its header is not valid."""
        numel = known.numel
        delta = query(parse(body, self.width, numel), numel) if len(body) else np.zeros(nbytes(numel), np.uint8)
        if known.reference is not None:
            delta ^= known.reference
        return delta

    @final
    def size(self, ones: tuple[int, ...], known: SideInfo) -> float:
        """Header and the slots of a filter with that many keys."""
        n = sum(ones)
        if not n:
            return 0.0
        segment = 1 << min(18, math.floor(math.log(n) / math.log(3.33) + 2.25)) if n > 1 else 4
        factor = max(1.125, 0.875 + 0.25 * math.log(1e6) / math.log(n)) if n > 1 else 0.0
        segments = max(1, math.ceil(round(n * factor) / segment) - 2)
        return float(_HEAD.size + (segments + 2) * segment * self.width)

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
