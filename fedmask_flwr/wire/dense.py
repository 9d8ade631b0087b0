"""Codec ``float32``: raw little-endian floats, 32 bits a value."""

from __future__ import annotations

from typing import final

import numpy as np

from .base import Body, DenseCodec
from .errors import WireError
from .payload import Dense


@final
class Float32Codec(DenseCodec):
    """4 d bytes; NaN and infinities are refused at both ends."""

    id = 32
    name = "float32"

    def encode(self, values: Dense) -> bytes:
        """Write the values; ValueError unless they are a finite 1-D float32 array."""
        if values.dtype != np.float32 or values.ndim != 1:
            raise ValueError(f"dense fields are 1-D float32, got {values.dtype} of shape {values.shape}")
        if not np.isfinite(values).all():
            raise ValueError("a dense field holds NaN or infinity; check the training (learning rate, loss)")
        return values.astype("<f4", copy=False).tobytes()

    def decode(self, body: Body, numel: int) -> Dense:
        """Read the values; WireError on a wrong length, NaN or infinity."""
        if len(body) != 4 * numel:
            raise WireError(f"{numel} float32 values take {4 * numel} bytes, the body has {len(body)}")
        values = np.frombuffer(body, "<f4").astype(np.float32)
        if not np.isfinite(values).all():
            raise WireError("a dense field holds NaN or infinity")
        return values

    def max_body(self, numel: int, layers: int) -> int:
        """4 d."""
        return 4 * numel
