"""What training changed: the positions whose probability is another one, and what a bit there weighs.

Taken in part by part, so that a device needs neither theta_g nor theta_k as a vector of float64.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from .keyed import thresholds

_PART = 1 << 16  # positions that are float64 at a time
_EDGE = 1e-12

Theta: TypeAlias = NDArray[np.float64]

__all__ = ["Change", "divergence"]


def _inner(theta: Theta) -> Theta:
    return np.clip(theta, _EDGE, 1.0 - _EDGE)


def divergence(theta_k: Theta, theta_g: Theta) -> Theta:
    """KL(Bern(theta_k) || Bern(theta_g)) in bits, elementwise; both count as in [1e-12, 1 - 1e-12]."""
    k, g = _inner(theta_k), _inner(theta_g)
    found: Theta = k * np.log2(k / g) + (1.0 - k) * np.log2((1.0 - k) / (1.0 - g))
    return found


@dataclass(frozen=True, slots=True)
class Change:
    """Where theta_k differs from theta_g: n of ``numel`` positions, ascending.

    Attributes
    ----------
    bits
        KL(theta_k || theta_g) over all positions.
    places
        (n,) int32 that hold uint32.
    cuts
        (n,) the `keyed.thresholds` of theta_g.
    theta
        (n,) float32, theta_k.
    gain
        (n,) float32, the log weight of a one over that of a zero: logit theta_k - logit theta_g, in nats.
    """

    numel: int
    bits: float
    places: NDArray[np.int32]
    cuts: NDArray[np.int32]
    theta: NDArray[np.float32]
    gain: NDArray[np.float32]

    @classmethod
    def between(cls, theta_g: Theta, theta_k: Theta, rest: float = 0.0) -> Change:
        """Compare two vectors (d,) in [0, 1]; see `of`."""
        return cls.of(theta_g.size, [(0, theta_g, theta_k)], rest)

    @classmethod
    def of(cls, numel: int, parts: Iterable[tuple[int, Theta, Theta]], rest: float = 0.0) -> Change:
        """Compare part by part: (first position, theta_g, theta_k).

        The positions that changed least, and together hold a share ``rest`` of the divergence, count as not
        changed: at 1e-3 half of them (measured on FedPM's theta of rounds 8 and 16).
        """
        # As long as all positions; of the system's memory they take what is written.
        places, cuts = np.empty(numel, np.int32), np.empty(numel, np.int32)
        theta, gains, shares = (np.empty(numel, np.float32) for _ in range(3))
        n, bits = 0, 0.0
        for first, g, k in _small(parts):
            share, inner_k, inner_g = divergence(k, g), _inner(k), _inner(g)
            bits += float(share.sum())
            gain = (np.log(inner_k / inner_g) - np.log((1.0 - inner_k) / (1.0 - inner_g))).astype(np.float32)
            at = np.flatnonzero(gain)
            here, n = slice(n, n + at.size), n + at.size
            places[here] = (at + first).astype(np.uint32).view(np.int32)
            cuts[here], theta[here], gains[here] = thresholds(g[at]), k[at], gain[at]
            shares[here] = np.maximum(share[at], 0.0)  # which rounding can miss
        live = _most(shares[:n], rest) if rest > 0.0 else slice(None)
        del shares
        return cls(numel, bits, places[:n][live], cuts[:n][live], theta[:n][live], gains[:n][live])


def _small(parts: Iterable[tuple[int, Theta, Theta]]) -> Iterator[tuple[int, Theta, Theta]]:
    for first, g, k in parts:
        for a in range(0, g.size, _PART):
            yield first + a, g[a : a + _PART], k[a : a + _PART]


def _most(shares: NDArray[np.float32], rest: float) -> NDArray[np.bool_]:
    """Where all but the smallest lie, which together are at most a share ``rest`` of the sum.

    Positive floats order as their bits do. Those that agree in the first 16, so differ by less than a 128th, stay
    together, and nothing is sorted.
    """
    classes, sums = shares.view(np.uint32) >> np.uint32(16), np.zeros(1 << 16)
    for a in range(0, shares.size, _PART):
        part = slice(a, a + _PART)
        sums += np.bincount(classes[part], shares[part], minlength=sums.size)
    upto = np.cumsum(sums)
    return np.asarray(classes >= np.searchsorted(upto, rest * upto[-1], side="right"))
