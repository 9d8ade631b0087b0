"""Unsigned LEB128 integers, shortest form only."""

from __future__ import annotations

from .errors import WireError


def put_varint(value: int) -> bytes:
    """Seven bits a byte, low first; the high bit says that more follow."""
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def get_varint(data: bytes | memoryview, at: int, limit: int) -> tuple[int, int]:
    """Read one varint at offset `at`; return it and the offset behind it.

    Raises
    ------
    WireError
        Truncated, not in shortest form, or above `limit`.
    """
    value = shift = 0
    while True:
        if at >= len(data):
            raise WireError("body is truncated within an integer")
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if value > limit:
            raise WireError(f"an integer of the body is above its limit of {limit}")
        if byte < 0x80:
            if shift and not byte:
                raise WireError("an integer of the body is not in its shortest form")
            return value, at
        shift += 7
        if shift > 63:
            raise WireError("an integer of the body is too long")
