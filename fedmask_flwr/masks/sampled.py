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

from fedmask_flwr import jit

from .change import Change
from .keyed import CHUNK, Key, check_range, derive, hash_, mix_, words

_CACHED = 1 << 15  # positions that are hashed at a time: what that takes stays in a core's L2
_SCORES = 1 << 20  # log weights that are in memory at a time; those of the first blocks tell the scale
_WORDS = 64  # hashed words that count for a position where machine code may pay

__all__ = ["Draws", "pick", "replay"]


@dataclass(frozen=True, slots=True)
class Draws:
    """How the candidates are drawn: ``size`` candidates of each of ``blocks`` blocks, named by ``key``."""

    key: Key
    blocks: int
    size: int

    def __post_init__(self) -> None:
        if not 1 <= self.blocks < 2**31 or self.size < 1:
            raise ValueError(f"one block and one candidate at least, got {self.blocks} blocks of {self.size}")

    def block_of(self, places: NDArray[np.int32]) -> NDArray[np.int32]:
        """Block of each of some positions, (n,): by lot, so that blocks are alike whatever the layers' shapes."""
        out, key, blocks = np.empty_like(places), derive(*self.key, "block"), np.uint64(self.blocks)
        scratch = np.empty(min(CHUNK, places.size), np.int32)
        for a in range(0, places.size, CHUNK):
            lot = places[a : a + CHUNK].copy()
            hash_(lot, scratch[: lot.size], key)
            out[a : a + CHUNK] = lot.view(np.uint32).astype(np.uint64) * blocks >> np.uint64(32)
        return out

    def candidates(self) -> tuple[int, NDArray[np.int32]]:
        """k0, which all candidates share, and k1 of each, all different: the keys of their words.

        What `keyed.hash_` does before k1 comes in is so done once a position, not once a candidate.
        """
        return derive(*self.key, "place").k0, words(derive(*self.key, "candidate"), self.size)


def pick(draws: Draws, change: Change, chance: Key) -> NDArray[np.uint32]:
    """Choose a candidate for every block: (blocks,) uint32.

    Among few candidates, those chosen by weight move less than theta_k asks for; the log weights are therefore
    scaled until the expected log weight is that of a sample of theta_k. The change so keeps its size at any number
    of blocks that can carry it, and shrinks below. A position costs ``size`` hashes, or nothing if it is the same.
    """
    weighed, stage = weigh(draws, change), max(1, _SCORES // draws.size)
    chosen, scale = np.empty(draws.blocks, np.uint32), 0.0
    for first in range(0, draws.blocks, stage):
        stop = min(first + stage, draws.blocks)
        scores = _scores(draws, weighed, first, stop)
        scale = scale or _scale(scores, weighed.wanted[first:stop])
        scores *= np.float32(scale)
        for c in range(draws.size):
            scores[c] += _gumbel(chance, stop - first, c * draws.blocks + first)
        chosen[first:stop] = np.argmax(scores, axis=0)
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


def weigh(draws: Draws, change: Change) -> Weighed:
    """Deal what changed to the blocks."""
    block = draws.block_of(change.places)
    wanted = np.bincount(block, change.gain * change.theta, minlength=draws.blocks).astype(np.float32)
    sizes = np.bincount(block, minlength=draws.blocks)
    order = np.argsort(block, kind="stable")
    del block
    present = np.flatnonzero(sizes)
    starts = np.cumsum(sizes[present]) - sizes[present]
    gain = change.gain[order]
    most = float(np.add.reduceat(np.abs(gain), starts).max()) if order.size else 1.0
    unit = 2.0 ** (math.frexp(most)[1] - 29)
    weights = np.rint(gain * np.float32(1.0 / unit)).astype(np.int32)
    return Weighed(change.places[order], change.cuts[order], weights, unit, present, starts, wanted)


def tallies(draws: Draws, weighed: Weighed, first: int, stop: int) -> NDArray[np.int32]:
    """Log weight of each candidate in each of the blocks ``first .. stop-1``: (stop - first, size), in units."""
    found = np.zeros((stop - first, draws.size), np.int32)
    low, high = np.searchsorted(weighed.present, (first, stop))
    if low < high:
        a = weighed.starts[low]
        b = weighed.starts[high] if high < weighed.starts.size else weighed.places.size
        count = _counter((b - a) * draws.size)
        found[weighed.present[low:high] - first] = count(
            weighed.places[a:b], weighed.cuts[a:b], weighed.weights[a:b], weighed.starts[low:high] - a,
            *draws.candidates(),
        )  # fmt: skip
    return found


def _scores(draws: Draws, weighed: Weighed, first: int, stop: int) -> NDArray[np.float32]:
    """Log weight of each candidate, (size, stop - first), in nats, but for a constant of the block."""
    return (tallies(draws, weighed, first, stop).T * np.float64(weighed.unit)).astype(np.float32)


def _counter(hashes: int) -> Callable[..., NDArray[np.int32]]:
    if not jit.pays(hashes // _WORDS):
        return _count
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
    """Sum the weights of each candidate's ones in each block: (blocks, candidates), which begin at ``starts``."""
    tally = np.empty((starts.size, keys.size), np.int32)
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
            tally[first : first + stride, c] = np.add.reduceat(value, at, dtype=np.int32)
    return tally


def _scale(scores: NDArray[np.float32], wanted: NDArray[np.float32]) -> float:
    """The factor with which a choice by weight has the expected log weight ``wanted``, on the whole; at most 64."""
    rows, target = scores, float(wanted.sum(dtype=np.float64))
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
    if jit.pays(cuts.size):
        from .hashed import redraw

        return redraw(cuts, derive(*draws.key, "block"), k0, k1)
    d = cuts.size
    out = np.empty(d, np.bool_)
    base, scratch = np.arange(min(d, CHUNK), dtype=np.int32), np.empty(min(d, CHUNK), np.int32)
    for a in range(0, d, CHUNK):
        x = base[: d - a] + np.uint32(a).view(np.int32)
        hash_(x, scratch[: x.size], (k0, k1[draws.block_of(x)]))
        np.less(x, cuts[a : a + CHUNK], out=out[a : a + CHUNK])
    return out
