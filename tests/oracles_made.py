"""MADE the slow way: loops over degrees and units in numpy float64, nothing taken from `fedmask_flwr.made`."""

from __future__ import annotations

from itertools import pairwise, product
from math import exp, log

import numpy as np

from fedmask_flwr.masks import derive, words


def uniform(word, low, high):
    """The integer of low..high (both included) that an unsigned 32-bit word falls on."""
    return low + (int(word) % 2**32) * (high - low + 1) // 2**32


def degrees(inputs, hidden, seed, order, connect, r):
    """Lists m_0 .. m_L of mask r."""
    if order == "natural":
        m0 = list(range(1, inputs + 1))
    else:
        key = derive(seed, "order", r if order == "cycle" else 0)
        shuffled = sorted(range(inputs), key=[int(w) for w in words(key, inputs)].__getitem__)
        m0 = [position + 1 for position in shuffled]
    m = [m0]
    for layer, width in enumerate(hidden, 1):
        key = derive(seed, "connect", r if connect == "cycle" else 0, layer)
        m.append([uniform(w, min(m[-1]), inputs - 1) for w in words(key, width)])
    return m


def masks(m):
    """Masks [out, in] of the layers and of the direct weights, entry by entry."""
    out = []
    for before, here in pairwise(m):
        mask = np.zeros((len(here), len(before)))
        for k in range(len(here)):
            for i in range(len(before)):
                mask[k, i] = 1 if before[i] <= here[k] else 0
        out.append(mask)
    last, direct = np.zeros((len(m[0]), len(m[-1]))), np.zeros((len(m[0]), len(m[0])))
    for d in range(len(m[0])):
        for k in range(len(m[-1])):
            last[d, k] = 1 if m[-1][k] < m[0][d] else 0
        for i in range(len(m[0])):
            direct[d, i] = 1 if m[0][i] < m[0][d] else 0
    return [*out, last], direct


def paths(layers, direct=None):
    """How many ways lead from input i to output d: (D, D), [d, i]."""
    total = np.eye(layers[0].shape[1])
    for mask in layers:
        total = mask @ total
    return total if direct is None else total + direct


def logits(x, layers, direct, weights):
    """Logits of one vector `x` by plain sums; `weights` is a state dict of arrays."""
    h = np.asarray(x, float)
    for i, mask in enumerate(layers):
        w, b = weights[f"layers.{i}.weight"], weights[f"layers.{i}.bias"]
        u = weights.get(f"condition.{i}.weight")
        a = np.zeros(len(w))
        for o in range(len(w)):
            a[o] = b[o]
            for j in range(len(h)):
                if mask[o, j]:
                    a[o] += w[o, j] * h[j] + (0 if u is None else u[o, j])
        h = np.maximum(a, 0) if i < len(layers) - 1 else a
    if "direct.weight" in weights:
        h = h + (weights["direct.weight"] * direct) @ np.asarray(x, float)
    return h


def nll(x, z, valid):
    """Nats of the first `valid` bits of one vector."""
    total = 0.0
    for d in range(valid):
        total += log(1 + exp(-z[d])) if x[d] else log(1 + exp(z[d]))
    return total


def vectors(n):
    """All 2**n vectors of n bits."""
    return list(product([0, 1], repeat=n))
