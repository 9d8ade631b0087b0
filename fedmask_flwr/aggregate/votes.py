"""Count the votes of packed masks, one mask at a time."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from fedmask_flwr import jit

from .planes import BATCH, LANES, add_batch, add_batch_compiled, expand, expand_compiled, rows_of

Packed = npt.NDArray[np.uint8]


class VoteCounter:
    """M_i = sum_k m_k,i over a stream of masks of ``numel`` bits.

    Holds on to the last masks until it adds 16 at once, two bytes a position, and keeps one bit a position for each
    binary digit of the number of masks: 1.3 bytes for a thousand masks, with room for 2. Room doubles with a copy,
    at 256 and 65 536 masks. ``votes`` lets the masks go before it takes 4 bytes a position for its result.
    """

    def __init__(self, numel: int) -> None:
        self.numel = numel
        self.masks = 0
        self._compiled = jit.pays(numel)  # the votes are the same
        self._waiting: list[Packed] = []
        self._planes = rows_of(8, numel)

    def add(self, bits: Packed) -> None:
        """Add one packed mask: ceil(numel / 8) bytes, little bit order.

        It is the counter's from now on, not copied: whoever writes to it later changes the votes.

        Raises
        ------
        ValueError
            When the mask has another length.
        """
        size = (self.numel + 7) // 8
        if bits.dtype != np.uint8 or bits.shape != (size,):
            raise ValueError(f"a packed mask of {self.numel} bits is {size} uint8, got {bits.shape} {bits.dtype}")
        flags = bits.flags
        # Machine code is made for one kind of array.
        plain = flags.c_contiguous and flags.writeable and bits.ctypes.data % 8 == 0
        self._waiting.append(bits if plain else bits.copy())
        self.masks += 1
        if len(self._waiting) == BATCH:
            self._flush()

    def votes(self) -> npt.NDArray[np.uint32]:
        """Return M, shape (numel,), values 0..masks; the caller's own."""
        if self._waiting:
            nothing = np.zeros((self.numel + 7) // 8, np.uint8)
            self._waiting += [nothing] * (BATCH - len(self._waiting))
            self._flush()
        votes = np.empty(self.numel, np.uint32)
        planes = self._planes[: max(1, self.masks.bit_length())]
        if self._compiled:
            expand_compiled(planes.view(np.uint8), LANES, votes)
        else:
            expand(planes, votes)
        return votes

    def _flush(self) -> None:
        digits = max(4, self.masks.bit_length())
        if digits > len(self._planes):
            more = rows_of(2 * len(self._planes), self.numel)
            more[: len(self._planes)] = self._planes
            self._planes = more
        planes, whole = self._planes[:digits], (self.numel + 7) // 8 // 8
        rows = tuple(bits[: 8 * whole].view(np.uint64) for bits in self._waiting)
        (add_batch_compiled if self._compiled else add_batch)(planes[:, :whole], rows)
        if whole < planes.shape[1]:  # the last word, whose bytes are not all there
            ends = np.zeros((BATCH, 8), np.uint8)
            for end, bits in zip(ends, self._waiting, strict=True):
                end[: bits.size - 8 * whole] = bits[8 * whole :]
            add_batch(planes[:, whole:], list(ends.view(np.uint64)))
        self._waiting = []
