"""Slow, readable twins of fedmask_flwr.masks.closeness and .sampled: a position and a candidate at a time."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from fractions import Fraction

from oracles_masks import M32, word

from fedmask_flwr.masks import Draws, Key, derive


def uniform(key: Key, i: int) -> Fraction:
    """The middle of the interval of [0, 1) that word i stands for."""
    return Fraction(2 * word(*key, i) + 2**32 + 1, 2**33)


def apart(theta: float, u: Fraction) -> Fraction:
    """Exact r - 1, r >= 1 the factor between the odds of theta and of u."""
    p = min(max(Fraction(theta), Fraction(1, 2**40)), 1 - Fraction(1, 2**40))
    odds = u * (1 - p) / ((1 - u) * p)
    return max(odds, 1 / odds) - 1


EDGES = [Fraction(2) ** e * half for e in range(-8, 12) for half in (Fraction(1), Fraction(3, 2))]


def closeness_class(away: Fraction) -> int:
    """Half octaves of r - 1 (that begin at 2^e and at 1.5 * 2^e) from 2^-8 on, at most 39."""
    return max(0, bisect_right(EDGES, away) - 1)


def cut(theta: float) -> int:
    return min(int(theta * 2**32), 2**32 - 1) - 2**31


def block(draws: Draws, i: int) -> int:
    return (word(*derive(*draws.key, "block"), i) & M32) * draws.blocks >> 32


def bit(draws: Draws, candidate: int, i: int, theta: float) -> bool:
    """Position i of a candidate mask."""
    k0 = derive(*draws.key, "place").k0
    k1 = word(*derive(*draws.key, "candidate"), candidate)
    return word(k0, k1, i) < cut(theta)


def replay(draws: Draws, theta_g: Sequence[float], chosen: Sequence[int]) -> list[bool]:
    return [bit(draws, chosen[block(draws, i)], i, p) for i, p in enumerate(theta_g)]


def log_weight(mask: Sequence[bool], theta_g: Sequence[float], theta_k: Sequence[float]) -> float:
    """Natural log of Bern(theta_k)(mask) / Bern(theta_g)(mask)."""
    ratios = ((k / g if m else (1 - k) / (1 - g)) for m, g, k in zip(mask, theta_g, theta_k, strict=True))
    return math.fsum(map(math.log, ratios))


def gumbel(chance: Key, draws: Draws, candidate: int, of: int) -> float:
    u = float(uniform(chance, candidate * draws.blocks + of))
    return -math.log(-math.log(u))


def path_candidates(bits: Sequence[int], b: int) -> list[int]:
    """The register after each bit: its last b bits, the newest one lowest."""
    return [sum(bits[t - age] << age for age in range(min(b, t + 1))) for t in range(len(bits))]


def path_mask(draws: Draws, theta_g: Sequence[float], bits: Sequence[int]) -> list[bool]:
    """The mask that a path of bits stands for."""
    return replay(draws, theta_g, path_candidates(bits, draws.size.bit_length() - 1))
