"""Count the votes of packed masks, one mask at a time."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

BLOCK = 1 << 17  # bytes of packed mask unpacked at a time: 1 MB of scratch, whatever d is


class VoteCounter:
    """M_i = sum_k m_k,i over a stream of masks of ``numel`` bits.

    Keeps one byte a position and widens to uint32 every 255 masks, so memory is one byte a parameter, and from the
    255th mask on 5, however many clients vote.
    """

    def __init__(self, numel: int) -> None:
        self.numel = numel
        self.masks = 0
        self._low = np.zeros(numel, np.uint8)
        self._total: npt.NDArray[np.uint32] | None = None

    def add(self, bits: npt.NDArray[np.uint8]) -> None:
        """Add one packed mask: ceil(numel / 8) bytes, little bit order.

        Raises
        ------
        ValueError
            When the mask has another length.
        """
        if bits.dtype != np.uint8 or bits.shape != ((self.numel + 7) // 8,):
            size = (self.numel + 7) // 8
            raise ValueError(f"a packed mask of {self.numel} bits is {size} uint8, got {bits.shape} {bits.dtype}")
        for start in range(0, bits.size, BLOCK):
            row = np.unpackbits(bits[start : start + BLOCK], bitorder="little")
            low = self._low[8 * start : 8 * start + row.size]
            low += row[: low.size]
        self.masks += 1
        if self.masks % 255 == 0:
            self._flush()

    def votes(self) -> npt.NDArray[np.uint32]:
        """Return M, shape (numel,), values 0..masks; the caller's own."""
        total = self._low.astype(np.uint32)
        if self._total is not None:
            total += self._total
        return total

    def _flush(self) -> None:
        self._total = self.votes()
        self._low[:] = 0
