"""What sender and receiver both know before a message is written."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .bits import Bits, check_bits


@dataclass(frozen=True, slots=True, eq=False)
class SideInfo:
    """Layer sizes in bits, in order, and the packed mask both ends hold (None means all zeros).

    ``classes``, called only where it is used, gives (d,) uint8: equal numbers where, as far as both ends know, a
    value is equally likely, and neighbouring numbers where it is nearly so.
    """

    sizes: tuple[int, ...]
    reference: Bits | None = None
    classes: Callable[[], NDArray[np.uint8]] | None = None

    def __post_init__(self) -> None:
        if any(size < 0 for size in self.sizes):
            raise ValueError(f"layer sizes must not be negative, got {self.sizes}")
        if self.reference is not None:
            check_bits(self.reference, self.numel)

    @property
    def numel(self) -> int:
        """Number of bits d."""
        return sum(self.sizes)

    def delta(self, bits: Bits) -> Bits:
        """Return ``bits XOR reference``; a copy only where there is a reference, its own inverse.

        Raises
        ------
        ValueError
            `bits` is not a packed vector of `numel` bits.
        """
        check_bits(bits, self.numel)
        return bits if self.reference is None else np.bitwise_xor(bits, self.reference)

    def checked_classes(self) -> NDArray[np.uint8]:
        """Call ``classes``: (d,) uint8, all 0 where there are none.

        Raises
        ------
        ValueError
            It gave something else.
        """
        if self.classes is None:
            return np.zeros(self.numel, np.uint8)
        classes = self.classes()
        if classes.dtype != np.uint8 or classes.shape != (self.numel,):
            raise ValueError(f"classes are ({self.numel},) uint8, got {classes.shape} {classes.dtype}")
        return classes
