"""MPFL's consensus: which channels a unit loses, from the keep-votes of N nodes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Votes = NDArray[np.uint32]
Flags = NDArray[np.bool_]
STEPS = tuple(i / 10 for i in range(10, 0, -1))  # the released code's thresholds


def cubic(target: float, done: int, rounds: int) -> float:
    """Share pruned after ``done`` of ``rounds`` searches: target * (1 - (1 - t/T)^3)."""
    return target * (1.0 - (1.0 - min(done, rounds) / rounds) ** 3)


def targets(sizes: Sequence[int], share: float, keep_min: int) -> list[int]:
    """Channels that each unit is to have lost: round(share * n), but ``keep_min`` (or all, if fewer) stay."""
    return [min(round(share * n), n - min(n, max(keep_min, 1))) for n in sizes]


def lowest(ranks: Sequence[NDArray[np.generic]], keep: Flags, sizes: Sequence[int], lost: Sequence[int]) -> Flags:
    """Keep (d,) after the lowest-ranked kept channels of each unit go, until it has lost ``lost`` in all.

    ``ranks`` are arrays (d,), the first decides, the next break its ties; then the first channels go.
    """
    out, start = keep.copy(), 0
    for size, goal in zip(sizes, lost, strict=True):
        here = slice(start, start + size)
        left = np.flatnonzero(keep[here])
        order = np.lexsort([left, *(r[here][left] for r in reversed(ranks))])
        out[start + left[order[: max(goal - (size - left.size), 0)]]] = False
        start += size
    return out


def quota(votes: Votes, history: Votes, keep: Flags, sizes: Sequence[int], lost: Sequence[int]) -> Flags:
    """The quota rule: exactly the target goes, by this round's keep-votes, then by those of all rounds.

    A minority cannot decide: it moves a channel's rank by as many votes as it has.
    """
    return lowest((votes, history), keep, sizes, lost)


def threshold(
    votes: Votes, voters: int, keep: Flags, sizes: Sequence[int], keep_min: int, least: float = 0.5
) -> Flags:
    """Keep what at least the share ``least`` of the voters keeps; the sparsity floats, ``keep_min`` stay."""
    return _floor(keep & (votes / voters >= least), votes, keep, sizes, keep_min)


def released(
    votes: Votes, voters: int, keep: Flags, sizes: Sequence[int], lost: Sequence[int], keep_min: int
) -> Flags:
    """The paper's released code: from unanimity downwards, the first threshold that prunes at least the target.

    The union of all prune-votes if that is enough, else hardly more than what all agree on: a single node decides.
    It is here to be compared with.
    """
    out, start = keep.copy(), 0
    for size, goal in zip(sizes, lost, strict=True):
        here = slice(start, start + size)
        for step in STEPS:
            out[here] = keep[here] & (votes[here] / voters >= step)
            if size - out[here].sum() >= goal:
                break
        start += size
    return _floor(out, votes, keep, sizes, keep_min)


def _floor(wanted: Flags, votes: Votes, keep: Flags, sizes: Sequence[int], keep_min: int) -> Flags:
    """Put the channels with the most votes back where a unit would fall below ``keep_min``."""
    out, start = wanted.copy(), 0
    for size in sizes:
        here = slice(start, start + size)
        left = np.flatnonzero(keep[here])
        missing = min(left.size, max(keep_min, 1)) - int(out[here].sum())
        if missing > 0:
            gone = left[~out[here][left]]
            order = np.lexsort([gone, -votes[here][gone].astype(np.int64)])
            out[start + gone[order[:missing]]] = True
        start += size
    return out
