"""A mask by its number in a list that both ends can draw: minimal random coding.

Havasi, Peharz, Hernandez-Lobato, "Minimal Random Code Learning", ICLR 2019, arXiv 1810.00440; for masks in
federated learning: Isik et al., arXiv 2306.12625 (KLMS).

Both ends know theta_g. The positions fall into blocks; of every block, N candidate masks are drawn from
Bern(theta_g) with keyed uniforms. The client picks one with probability proportional to
Bern(theta_k)(m) / Bern(theta_g)(m) and sends its number, log2 N bits: about a sample of theta_k where log N is well
above the block's KL(theta_k || theta_g). It says little of any single weight, so it costs the square of the change,
where flips cost the change itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedmask_flwr.jit import available

from .keyed import CHUNK, Key, Scratch, check_range, derive, hash_, mix_, thresholds, words

_CACHED = 1 << 15  # positions that are hashed at a time: what that takes stays in a core's L2
_JUDGED = 4096  # blocks that the scale of the log weights is found on

__all__ = ["Draws", "divergence", "pick", "replay"]


@dataclass(frozen=True, slots=True)
class Draws:
    """How the candidates are drawn: ``size`` candidates of each of ``blocks`` blocks, named by ``key``."""

    key: Key
    blocks: int
    size: int

    def __post_init__(self) -> None:
        if not 1 <= self.blocks < 2**31 or self.size < 1:
            raise ValueError(f"one block and one candidate at least, got {self.blocks} blocks of {self.size}")

    def block_of(self, d: int) -> NDArray[np.int32]:
        """Block of each position, (d,): by lot, so that blocks are alike whatever the layers' shapes."""
        check_range(d, 0)
        out, scratch, key = np.empty(d, np.int32), Scratch(d), derive(*self.key, "block")
        for a in range(0, d, CHUNK):
            n = min(CHUNK, d - a)
            lot = scratch.words(key, n, a).view(np.uint32).astype(np.uint64)
            out[a : a + n] = lot * np.uint64(self.blocks) >> np.uint64(32)
        return out

    def candidates(self) -> tuple[int, NDArray[np.int32]]:
        """k0, which all candidates share, and k1 of each, all different: the keys of their words.

        What `keyed.hash_` does before k1 comes in is so done once a position, not once a candidate.
        """
        return derive(*self.key, "place").k0, words(derive(*self.key, "candidate"), self.size)


def _inner(theta: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.clip(theta, 1e-12, 1.0 - 1e-12)


def divergence(theta_k: NDArray[np.float64], theta_g: NDArray[np.float64]) -> NDArray[np.float64]:
    """KL(Bern(theta_k) || Bern(theta_g)) in bits, elementwise; both count as in [1e-12, 1 - 1e-12]."""
    k, g = _inner(theta_k), _inner(theta_g)
    found: NDArray[np.float64] = k * np.log2(k / g) + (1.0 - k) * np.log2((1.0 - k) / (1.0 - g))
    return found


def pick(
    draws: Draws,
    theta_g: NDArray[np.float64],
    theta_k: NDArray[np.float64],
    chance: Key,
    rest: float = 0.0,
) -> NDArray[np.uint32]:
    """Choose a candidate for every block: (blocks,) uint32.

    ``theta_g`` and ``theta_k`` are (d,) in [0, 1]; ``chance`` is the client's own. Among few candidates, those
    chosen by weight move less than theta_k asks for; the log weights are therefore scaled until the expected log
    weight is that of a sample of theta_k. The change so keeps its size at any number of blocks that can carry it,
    and shrinks below. Positions where nothing changed cost nothing; the others ``size`` hashes each. Of these, the
    ones that changed least and together hold a share ``rest`` of the divergence are left to chance: at 1e-3 that
    is half the work and nothing of the change (measured on FedPM's theta of rounds 8 and 16).
    """
    scores, wanted = _scores(draws, theta_g, theta_k, rest)
    scores *= np.float32(_scale(scores, wanted))
    for c in range(draws.size):
        scores[c] += _gumbel(chance, draws.blocks, c * draws.blocks)
    chosen: NDArray[np.uint32] = np.argmax(scores, axis=0).astype(np.uint32)
    return chosen


@dataclass(frozen=True, slots=True)
class Weighed:
    """What changed: places (n,) sorted by block, the cut of theta_g there, and the log weight of a one over a zero.

    Log weights are whole numbers of ``unit`` nats: their sums are the same in any order, so a kernel may choose its
    own. ``present`` are the blocks that anything changed in, which begin at ``starts``; ``wanted`` (blocks,) is the
    mean under theta_k of a block's log weight, but for a constant.
    """

    places: NDArray[np.int32]
    cuts: NDArray[np.int32]
    weights: NDArray[np.int32]
    unit: float
    present: NDArray[np.intp]
    starts: NDArray[np.intp]
    wanted: NDArray[np.float32]


def weigh(draws: Draws, theta_g: NDArray[np.float64], theta_k: NDArray[np.float64], rest: float) -> Weighed:
    """Find what changed, but for what changed least and has a share ``rest`` of the divergence (see `pick`)."""
    k, g = _inner(theta_k), _inner(theta_g)
    gain = np.log(k / g) - np.log((1.0 - k) / (1.0 - g))  # of a one over a zero
    block = draws.block_of(theta_g.size)
    moved = np.flatnonzero(gain)
    if rest > 0.0:
        moved = moved[_most(divergence(theta_k[moved], theta_g[moved]), rest)]
    wanted = np.bincount(block[moved], (gain * k)[moved], minlength=draws.blocks).astype(np.float32)
    moved = moved[np.argsort(block[moved], kind="stable")]
    present, starts = np.unique(block[moved], return_index=True)
    most = float(np.add.reduceat(np.abs(gain[moved]), starts).max()) if moved.size else 1.0
    unit = 2.0 ** (math.frexp(most)[1] - 29)
    return Weighed(
        moved.astype(np.uint32).view(np.int32), thresholds(theta_g[moved]),
        np.rint(gain[moved] / unit).astype(np.int32), unit, present.astype(np.intp), starts, wanted,
    )  # fmt: skip


def tallies(draws: Draws, weighed: Weighed, first: int, stop: int) -> NDArray[np.int32]:
    """Log weight of each candidate in each of the blocks ``first .. stop-1``: (stop - first, size), in units."""
    found = np.zeros((stop - first, draws.size), np.int32)
    low, high = np.searchsorted(weighed.present, (first, stop))
    if low < high:
        a = weighed.starts[low]
        b = weighed.starts[high] if high < weighed.starts.size else weighed.places.size
        count = _compiled() or _count
        found[weighed.present[low:high] - first] = count(
            weighed.places[a:b], weighed.cuts[a:b], weighed.weights[a:b], weighed.starts[low:high] - a,
            *draws.candidates(),
        ).T  # fmt: skip
    return found


def _scores(
    draws: Draws, theta_g: NDArray[np.float64], theta_k: NDArray[np.float64], rest: float
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Log weight of each candidate, (size, blocks), and its mean under theta_k, (blocks,), but for a constant."""
    weighed = weigh(draws, theta_g, theta_k, rest)
    nats = tallies(draws, weighed, 0, draws.blocks).T * np.float64(weighed.unit)
    return nats.astype(np.float32), weighed.wanted


def _compiled() -> Callable[..., NDArray[np.int32]] | None:
    if not available():
        return None
    from .hashed import count

    return count


def _count(
    places: NDArray[np.int32],
    cuts: NDArray[np.int32],
    weights: NDArray[np.int32],
    starts: NDArray[np.intp],
    k0: int,
    keys: NDArray[np.int32],
) -> NDArray[np.int32]:
    """Sum the weights of each candidate's ones in each block: (candidates, blocks), which begin at ``starts``."""
    tally = np.empty((keys.size, starts.size), np.int32)
    stride = max(1, _CACHED * starts.size // places.size)
    for first in range(0, starts.size, stride):
        edge = starts[first + stride] if first + stride < starts.size else places.size
        here, at = slice(starts[first], edge), starts[first : first + stride] - starts[first]
        place, cut, weight = places[here] ^ np.int32(k0), cuts[here], weights[here]
        x, scratch, value = np.empty_like(place), np.empty_like(place), np.empty_like(place)
        mix_(place, scratch)
        for c, k1 in enumerate(keys.tolist()):
            np.bitwise_xor(place, k1, out=x)
            mix_(x, scratch)
            np.less(x, cut, out=value, casting="unsafe")
            value *= weight
            tally[c, first : first + stride] = np.add.reduceat(value, at, dtype=np.int32)
    return tally


def _most(shares: NDArray[np.float64], rest: float) -> NDArray[np.intp]:
    """Where all but the smallest lie, which together are ``rest`` of the sum."""
    order = np.argsort(shares)
    upto = np.cumsum(shares[order])
    return order[int(np.searchsorted(upto, rest * upto[-1], side="right")) :] if order.size else order


def _scale(scores: NDArray[np.float32], wanted: NDArray[np.float32]) -> float:
    """The factor with which a choice by weight has the expected log weight ``wanted``, on the whole; at most 64."""
    rows, target = scores[:, :_JUDGED], float(wanted[:_JUDGED].sum(dtype=np.float64))
    low, high = 0.0, 6.0  # log2
    for _ in range(16):
        middle = (low + high) / 2
        weight = rows * np.float32(2.0**middle)
        np.exp(weight - weight.max(axis=0), out=weight)
        reached = float(((weight * rows).sum(axis=0) / weight.sum(axis=0)).sum(dtype=np.float64))
        low, high = (middle, high) if reached < target else (low, middle)
    return float(2.0**high)


def _gumbel(key: Key, n: int, start: int) -> NDArray[np.float32]:
    """Standard Gumbel variables, (n,): the largest of log weight + Gumbel is a draw by weight."""
    u = (words(key, n, start).astype(np.float64) + (2.0**31 + 0.5)) * 2.0**-32
    return (-np.log(-np.log(u))).astype(np.float32)


def replay(draws: Draws, cuts: NDArray[np.int32], chosen: NDArray[np.uint32]) -> NDArray[np.bool_]:
    """The mask that ``chosen`` (blocks,) stands for: (d,) bool, the same bits on every machine.

    ``cuts`` (d,) are the `keyed.thresholds` of theta_g.

    Raises
    ------
    ValueError
        `chosen` is not a number of a candidate for every block.
    """
    if chosen.shape != (draws.blocks,) or int(chosen.max()) >= draws.size:
        raise ValueError(f"{draws.blocks} blocks need a number below {draws.size} each, got {chosen.shape} numbers")
    check_range(cuts.size, 0)
    k0, keys = draws.candidates()
    k1 = keys[chosen]
    if available():
        from .hashed import redraw

        return redraw(cuts, derive(*draws.key, "block"), k0, k1)
    block, d = draws.block_of(cuts.size), cuts.size
    out = np.empty(d, np.bool_)
    base, scratch = np.arange(min(d, CHUNK), dtype=np.int32), np.empty(min(d, CHUNK), np.int32)
    for a in range(0, d, CHUNK):
        of = block[a : a + CHUNK]
        x = base[: of.size] + np.uint32(a).view(np.int32)
        hash_(x, scratch[: of.size], (k0, k1[of]))
        np.less(x, cuts[a : a + CHUNK], out=out[a : a + CHUNK])
    return out
