"""How much of a change travels: what a budget pays for, and how that changes over a run."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from fedmask_flwr.wire import Bits, SideInfo, coded_bytes, expected_bytes, pack_bits

from .base import Turn

FRAME = 64
"""Bytes that a budget sets aside for a reply's frame around its body."""


def affordable(
    mask: npt.NDArray[np.bool_], flips: npt.NDArray[np.int64], known: SideInfo, target_bpp: float
) -> int:
    """How many of the flips of ``mask`` (d,), from the first on, ``target_bpp`` bits a parameter pay for."""
    budget = target_bpp * mask.size / 8 - FRAME

    def flipped(keep: int) -> Bits:
        tried = mask.copy()
        tried[flips[:keep]] ^= True
        return pack_bits(tried)

    everything = expected_bytes(flipped(flips.size), known) <= budget
    low, high = (flips.size if everything else 0), flips.size + 1
    while high - low > max(1, low // 64):
        middle = (low + high) // 2
        low, high = (middle, high) if expected_bytes(flipped(middle), known) <= budget else (low, middle)
    while low and (spent := coded_bytes(flipped(low), known)) > budget:  # expectation has its limits
        low = min(low - 1, max(0, math.floor(low * budget / spent)))
    return low


def cosine(first: float, last: float, turn: Turn) -> float:
    """Go to ``last``: last + (first - last)(1 + cos(pi t/T))/2 with t = round - 1, T = rounds - 1."""
    if turn.rounds <= 1:
        return first
    angle = math.pi * (turn.round - 1) / (turn.rounds - 1)
    return last + (first - last) * (1.0 + math.cos(angle)) / 2.0
