"""What one message carries, decoded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from .bits import Bits

Dense: TypeAlias = NDArray[np.float32]
Scalar: TypeAlias = int | float | str


@dataclass(frozen=True, slots=True, eq=False)
class Counts:
    """Integers 0..top, one a position: `values` is uint32 of shape (d,)."""

    values: NDArray[np.uint32]
    top: int

    def __post_init__(self) -> None:
        if self.values.dtype != np.uint32 or self.values.ndim != 1:
            raise ValueError(
                f"counts must be a 1-D uint32 array, got {self.values.dtype} of shape {self.values.shape}; "
                "convert with .astype(np.uint32)"
            )
        if not 0 <= self.top < 2**32:
            raise ValueError(f"top must be within 0..2**32-1, got {self.top}")
        if self.values.size and int(self.values.max()) > self.top:
            raise ValueError(f"a count of {int(self.values.max())} is above top={self.top}")


@dataclass(frozen=True, slots=True, eq=False)
class Payload:
    """Named fields of one message. A name is used once over all three kinds."""

    bits: Mapping[str, Bits] = field(default_factory=dict)
    counts: Mapping[str, Counts] = field(default_factory=dict)
    dense: Mapping[str, Dense] = field(default_factory=dict)
    meta: Mapping[str, Scalar] = field(default_factory=dict)
