"""Envelopes around a codec body: ``+png`` (DeltaMask's greyscale image) and ``+zstd``.

Both cap what they expand to before they expand anything.
"""

from __future__ import annotations

import io
import math
import struct
import zlib
from types import ModuleType

import numpy as np

from .base import Body
from .errors import WireError
from .varint import get_varint, put_varint

NONE, PNG, ZSTD = 0, 1, 2
ENVELOPES = {"png": PNG, "zstd": ZSTD}
_PNG_MAGIC = b"\x89PNG\r\n\x1a\n"
_PNG_MAX = 1 << 26  # pixels; Pillow itself warns of bombs from 89 million on
_GREY8 = bytes([8, 0, 0, 0, 0])  # depth 8, greyscale, deflate, adaptive filters, not interlaced


def _pillow() -> ModuleType:
    try:
        import PIL.Image
    except ImportError as e:  # pragma: no cover
        raise ImportError("the '+png' codecs need Pillow: pip install pillow") from e
    return PIL.Image


def _zstd() -> ModuleType:
    try:
        import zstandard
    except ImportError as e:  # pragma: no cover
        raise ImportError("the '+zstd' codecs need zstandard: pip install zstandard") from e
    return zstandard


def wrap(body: bytes, envelope: int) -> bytes:
    """Put `body` into the envelope; ValueError if it is too large for a PNG."""
    if envelope == PNG:
        return _to_png(body)
    if envelope == ZSTD:
        compressor = _zstd().ZstdCompressor(level=3, write_content_size=True)
        return bytes(compressor.compress(body))
    return body


def unwrap(data: Body, envelope: int, cap: int) -> Body:
    """Take the body out again; WireError if it is damaged or larger than `cap` bytes."""
    if envelope == PNG:
        return _from_png(data, cap)
    if envelope == ZSTD:
        return _from_zstd(data, cap)
    if envelope != NONE:
        raise WireError(f"unknown envelope {envelope}; the sender runs a newer version")
    if len(data) > cap:
        raise WireError(f"a body has {len(data)} bytes, at most {cap} are possible here")
    return data


def _shape(n: int) -> tuple[int, int]:
    width = math.isqrt(n - 1) + 1
    return width, -(-n // width)


def _to_png(body: bytes) -> bytes:
    n = len(body)
    if not n:
        return put_varint(0)
    if n > _PNG_MAX:
        raise ValueError(f"a body of {n} bytes is too large for '+png'; use '+zstd'")
    width, height = _shape(n)
    pixels = np.zeros(width * height, np.uint8)
    pixels[:n] = np.frombuffer(body, np.uint8)
    out = io.BytesIO()
    _pillow().fromarray(pixels.reshape(height, width)).save(out, format="PNG")
    return put_varint(n) + out.getvalue()


def _check_chunks(png: bytes, width: int, height: int) -> None:
    # IHDR, IDAT..., IEND and nothing else: no palettes, text or other places to hide work in
    header = struct.pack(">I4sII", 13, b"IHDR", width, height) + _GREY8
    if not png.startswith(_PNG_MAGIC + header):
        raise WireError(f"the PNG is not the {width} x {height} 8-bit greyscale image it must be")
    at, kinds = len(_PNG_MAGIC), []
    while at < len(png):
        if at + 12 > len(png):
            raise WireError("the PNG is truncated")
        length, kind = struct.unpack_from(">I4s", png, at)
        end = at + 12 + length
        if end > len(png) or zlib.crc32(png[at + 4 : end - 4]) != int.from_bytes(png[end - 4 : end], "big"):
            raise WireError("a PNG chunk is truncated or damaged")
        kinds.append(kind)
        at = end
    if len(kinds) < 3 or kinds[-1] != b"IEND" or set(kinds[1:-1]) != {b"IDAT"}:
        raise WireError("the PNG holds chunks other than IHDR, IDAT and IEND")


def _from_png(data: Body, cap: int) -> bytes:
    n, at = get_varint(data, 0, 1 << 62)
    if n > min(cap, _PNG_MAX):
        raise WireError(f"the PNG claims {n} bytes, at most {min(cap, _PNG_MAX)} are possible here")
    png = bytes(data[at:])
    if not n:
        if png:
            raise WireError("an empty PNG envelope is followed by data")
        return b""
    width, height = _shape(n)
    _check_chunks(png, width, height)
    image = _pillow()
    try:
        with image.open(io.BytesIO(png), formats=["PNG"]) as picture:
            pixels = np.asarray(picture)
    except Exception as e:  # Pillow raises many kinds (OSError, SyntaxError, zlib.error, ...)
        raise WireError(f"the PNG cannot be read: {e}") from e
    if pixels.dtype != np.uint8 or pixels.shape != (height, width):
        raise WireError("the PNG decodes to another shape than its header says")
    flat = pixels.reshape(-1)
    if flat[n:].any():
        raise WireError("the PNG's padding is not zero")
    return flat[:n].tobytes()


def _from_zstd(data: Body, cap: int) -> bytes:
    zstd = _zstd()
    try:
        size = zstd.get_frame_parameters(data).content_size
        if size > cap:  # an unknown size reads as 2**64-1
            raise WireError(f"the zstd frame claims {size} bytes, at most {cap} are possible here")
        body = bytes(zstd.ZstdDecompressor().decompress(data, max_output_size=cap, allow_extra_data=False))
    except zstd.ZstdError as e:
        raise WireError(f"the zstd frame cannot be read: {e}") from e
    if len(body) != size:
        raise WireError("the zstd frame is not of the size it claims")
    if not size and bytes(data) != wrap(b"", ZSTD):  # what follows an empty frame is not looked at
        raise WireError("the zstd frame is empty, and more follows")
    return body
