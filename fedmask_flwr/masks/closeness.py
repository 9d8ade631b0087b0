"""How close a keyed uniform lies to its threshold: what both ends know of where a mask bit may flip."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fedmask_flwr import jit

from . import hashed
from .keyed import CHUNK, Key, Scratch, check_range

CLASSES = 40
_NEAREST = -8  # octaves: odds that differ by less than a factor of 1 + 2**-8 are one class
_LEAST = 2.0**-40
_ONE = int(np.float64(1.0).view(np.int64))


def closeness(theta: NDArray[np.float64], key: Key, start: int = 0) -> NDArray[np.uint8]:
    """Class of each position by how far theta must move to flip its bit: (d,) uint8, 0 (near) .. 39 (far).

    m = 1[u < theta] with word ``start + i`` of ``key`` as u. What counts is the factor r >= 1 between the odds of u
    and of theta; a class is half an octave of r - 1, from 2^-8 to 2^12.

    Only + - * / and comparisons of float64 decide, so both ends get the same classes on any IEEE machine. Theta
    counts as in [2^-40, 1 - 2^-40]: u is never nearer than 2^-33 to 0 or 1.
    """
    d = theta.size
    check_range(d, start)
    if jit.pays(d):
        return hashed.classes(theta, key, start, _LEAST, -2 * _NEAREST, CLASSES - 1)
    out, scratch = np.empty(d, np.uint8), Scratch(d)
    for a in range(0, d, CHUNK):
        p = np.clip(theta[a : a + CHUNK], _LEAST, 1.0 - _LEAST)
        u = (scratch.words(key, p.size, start + a).astype(np.float64) + (2.0**31 + 0.5)) * 2.0**-32
        odds = u * (1.0 - p) / ((1.0 - u) * p)
        away = np.maximum(odds, 1.0 / odds) - 1.0
        # The upper bits of a double are its logarithm; 51 bits lower, two steps an octave are left.
        step = ((away.view(np.int64) - _ONE) >> 51) - 2 * _NEAREST
        out[a : a + p.size] = np.clip(step, 0, CLASSES - 1)
    return out
