"""FedMask's mean over the owners of each position, by streamed counting."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .votes import Packed, VoteCounter


class OverlapMean:
    """Counts owners and ones of d positions over packed supports and masks, one device at a time."""

    def __init__(self, numel: int) -> None:
        self._owners, self._ones = VoteCounter(numel), VoteCounter(numel)

    def add(self, support: Packed, mask: Packed) -> None:
        """Count a device that owns ``support`` and has ``mask``; ones off the support do not count."""
        self._owners.add(support)
        self._ones.add(mask & support)

    def means(self, levels: int) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """round(levels * ones / owners), (d,), ties to even, and where at least two own the position, (d,).

        A mean that is not 0, 1/2 or 1 never rounds to one of these, so a majority stays one (levels even, at
        least 4).
        """
        owners = self._owners.votes().astype(np.int64)
        ones = self._ones.votes().astype(np.int64)
        means = np.rint(levels * ones / np.maximum(owners, 1)).astype(np.int64)
        half = levels // 2
        means = np.where(2 * ones < owners, means.clip(1, half - 1), means.clip(half + 1, levels - 1))
        means[2 * ones == owners] = half
        means[ones == owners] = levels
        means[ones == 0] = 0
        return means, owners >= 2
