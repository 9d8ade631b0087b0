"""Codec ``bits``: the packed delta as it is, one bit a parameter."""

from __future__ import annotations

from typing import final

import numpy as np

from .base import BitCodec, Body
from .bits import Bits, nbytes
from .errors import WireError
from .sideinfo import SideInfo


@final
class PackedCodec(BitCodec):
    """ceil(d/8) bytes, exactly."""

    id = 1
    name = "bits"

    def encode(self, bits: Bits, known: SideInfo) -> bytes:
        """Write the packed delta."""
        return known.delta(bits).tobytes()

    def decode(self, body: Body, known: SideInfo) -> Bits:
        """Read the packed delta; WireError on a wrong length or a pad bit that is set."""
        numel = known.numel
        if len(body) != nbytes(numel):
            raise WireError(f"{numel} packed bits take {nbytes(numel)} bytes, the body has {len(body)}")
        if numel & 7 and body[-1] >> (numel & 7):
            raise WireError("a trailing pad bit of the packed bits is set")
        delta = np.frombuffer(body, np.uint8)
        return delta.copy() if known.reference is None else np.bitwise_xor(delta, known.reference)

    def size(self, ones: tuple[int, ...], known: SideInfo) -> float:
        """ceil(d/8)."""
        return float(nbytes(known.numel))

    def max_body(self, numel: int, layers: int) -> int:
        """ceil(d/8)."""
        return nbytes(numel)
