"""Count the votes of packed masks, one mask at a time."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from fedmask_flwr import jit

from .planes import BATCH, LANES, Words, add_batch, add_batch_compiled, expand, expand_compiled, rows_of


class VoteCounter:
    """M_i = sum_k m_k,i over a stream of masks of ``numel`` bits.

    Keeps two bytes a position for the last 16 masks, and one bit a position for each binary digit of the number of
    masks: 3.3 bytes for a thousand masks, with room for 4. Room doubles with a copy, at 256 and 65 536 masks.
    ``votes`` gives the batch back before it takes 4 bytes a position for its result.
    """

    def __init__(self, numel: int) -> None:
        self.numel = numel
        self.masks = 0
        self._compiled = jit.pays(numel)  # the votes are the same
        self._waiting = 0  # rows of the batch in use
        self._batch: Words | None = None
        self._planes = rows_of(8, numel)

    def add(self, bits: npt.NDArray[np.uint8]) -> None:
        """Add one packed mask: ceil(numel / 8) bytes, little bit order. It is copied.

        Raises
        ------
        ValueError
            When the mask has another length.
        """
        size = (self.numel + 7) // 8
        if bits.dtype != np.uint8 or bits.shape != (size,):
            raise ValueError(f"a packed mask of {self.numel} bits is {size} uint8, got {bits.shape} {bits.dtype}")
        if self._batch is None:
            self._batch = rows_of(BATCH, self.numel)
        if size:  # the last word's other bytes stay zero
            self._batch[self._waiting].view(np.uint8)[:size] = bits
        self._waiting += 1
        self.masks += 1
        if self._waiting == BATCH:
            self._flush(self._batch)

    def votes(self) -> npt.NDArray[np.uint32]:
        """Return M, shape (numel,), values 0..masks; the caller's own."""
        if self._batch is not None:
            self._batch[self._waiting :] = 0
            self._flush(self._batch)
            self._batch = None
        votes = np.empty(self.numel, np.uint32)
        planes = self._planes[: max(1, self.masks.bit_length())]
        if self._compiled:
            expand_compiled(planes.view(np.uint8), LANES, votes)
        else:
            expand(planes, votes)
        return votes

    def _flush(self, batch: Words) -> None:
        digits = max(4, self.masks.bit_length())
        if digits > len(self._planes):
            more = rows_of(2 * len(self._planes), self.numel)
            more[: len(self._planes)] = self._planes
            self._planes = more
        (add_batch_compiled if self._compiled else add_batch)(self._planes[:digits], batch)
        self._waiting = 0
