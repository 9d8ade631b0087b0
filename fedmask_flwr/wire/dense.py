"""Codecs ``float32`` and ``float16``: raw little-endian floats, 32 or 16 bits a value."""

from __future__ import annotations

from abc import ABC
from typing import ClassVar, final

import numpy as np

from .base import Body, DenseCodec
from .errors import WireError
from .payload import Dense


class RawCodec(DenseCodec, ABC):
    """``width`` bytes a value; NaN and infinities are refused at both ends."""

    width: ClassVar[int]

    @final
    def encode(self, values: Dense) -> bytes:
        """Write the values; ValueError unless they are a finite 1-D float32 array within the type's range."""
        if values.dtype != np.float32 or values.ndim != 1:
            raise ValueError(f"dense fields are 1-D float32, got {values.dtype} of shape {values.shape}")
        if not np.isfinite(values).all():
            raise ValueError("a dense field holds NaN or infinity; check the training (learning rate, loss)")
        with np.errstate(over="ignore"):
            raw = values.astype(f"<f{self.width}", copy=False)
        if raw.dtype != values.dtype and not np.isfinite(raw).all():
            raise ValueError(f"a dense field holds values beyond the range of {self.name}; use float32")
        return raw.tobytes()

    @final
    def decode(self, body: Body, numel: int) -> Dense:
        """Read the values; WireError on a wrong length, NaN or infinity."""
        if len(body) != self.width * numel:
            raise WireError(f"{numel} {self.name} values take {self.width * numel} bytes, the body has {len(body)}")
        values = np.frombuffer(body, f"<f{self.width}").astype(np.float32)
        if not np.isfinite(values).all():
            raise WireError("a dense field holds NaN or infinity")
        return values

    @final
    def max_body(self, numel: int, layers: int) -> int:
        """As many bytes as there are."""
        return self.width * numel


@final
class Float32Codec(RawCodec):
    """4 d bytes."""

    id = 32
    name = "float32"
    width = 4


@final
class Float16Codec(RawCodec):
    """2 d bytes: the nearest IEEE half, a relative error of at most 2^-11 from 6e-5 to 65504."""

    id = 33
    name = "float16"
    lossless = False
    width = 2
