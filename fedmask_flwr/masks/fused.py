"""The whole step of a mask in compiled loops: the formulas of `kernels` and the words of `keyed`, the same bits.

One pass over a layer: gradient, moments, scores, the next mask and the weights that carry it, a block at a time, so
that what one loop leaves the next one finds in the first cache. Three loops, since with fewer vectors in each LLVM
can tell that they do not overlap, and uses the processor's vector instructions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.autograd.graph import increment_version

from ..jit import available, compiled
from .draw import DrawRule
from .kernels import INVERSE, LN2_HIGH, LN2_LOW, MAGIC, T1, T2
from .keyed import Key
from .pieces import LARGEST, Layers

BLOCK = 2048
_F, _U = np.float32, np.uint32  # a plain literal would widen what it meets
_INVERSE, _MAGIC, _HIGH, _LOW, _T1, _T2 = (np.float32(x) for x in (INVERSE, MAGIC, LN2_HIGH, LN2_LOW, T1, T2))
_ZERO, _ONE, _TWO, _RANGE = (np.float32(x) for x in (0, 1, 2, 2.0**32))
_A, _B = np.uint32(0x7FEB352D), np.uint32(0x846CA68B)
_15, _16, _23 = np.uint32(15), np.uint32(16), np.uint32(23)
_TOP, _SIZE = np.uint32(1 << 31), np.uint32((1 << 31) - 1)


@compiled()
def _sigmoid(s: Any) -> Any:
    k = _F(s * _INVERSE + _MAGIC)
    n = k - _MAGIC
    q = n * _HIGH + s
    q = q + n * _LOW
    z = q * q
    t = _TWO + z * (z * _T2 + _T1)
    a = t + q
    b = _F(t - q)
    b = _U(b.view(_U) + _U(k.view(_U) << _23)).view(_F)
    return a / (b + a)


@compiled()
def _mix(x: Any) -> Any:
    x = _U(_U(x ^ _U(x >> _16)) * _A)
    x = _U(_U(x ^ _U(x >> _15)) * _B)
    return _U(x ^ _U(x >> _16))


@compiled()
def largest(grad: NDArray[np.float32]) -> Any:
    """Largest magnitude as bits, which order as the numbers do: infinity is above all, and NaN above it."""
    top = _U(0)
    for i in range(len(grad)):
        top = max(top, _U(_F(grad[i]).view(_U) & _SIZE))
    return top


@compiled()
def _gradient(u: Any, grad: Any, w: Any, s: Any, power: Any, penalty: Any, pruned: Any) -> None:
    for i in range(len(u)):
        p = _sigmoid(s[i])
        g = grad[i] * w[i]
        g = g * p if power else g  # where nothing is added, a negative zero stays one
        g = g + penalty if penalty != _ZERO else g
        g = g * p
        g = g * (_ONE - p)
        if pruned is not None:
            g = _ZERO if pruned[i] else g
        u[i] = g


@compiled()
def _change(u: Any, m: Any, v: Any, rates: Any) -> None:
    """Turn the gradient in `u` into what the scores lose: Adam with two moments, SGD with one or none."""
    if v is not None:
        b1, c1, b2, c2, root, eps, rate = rates[0], rates[1], rates[2], rates[3], rates[4], rates[5], rates[6]
        for i in range(len(u)):
            g = u[i]
            mean = m[i] * b1 + g * c1
            square = v[i] * b2 + g * c2 * g
            m[i] = mean
            v[i] = square
            u[i] = mean * rate / (np.sqrt(square) * root + eps)
    elif m is not None:
        momentum, rate = rates[0], rates[1]
        for i in range(len(u)):
            velocity = m[i] * momentum + u[i]
            m[i] = velocity
            u[i] = velocity * rate
    else:
        rate = rates[1]
        for i in range(len(u)):
            u[i] = u[i] * rate


@compiled()
def _draw(u: Any, w: Any, s: Any, p: Any, bound: Any, cut: Any, k0: Any, k1: Any, first: Any, pruned: Any) -> None:
    for i in range(len(u)):
        x = s[i] - u[i]
        x = -bound if x < -bound else x
        x = bound if x > bound else x
        s[i] = x
        if cut is not None:
            m = _ONE if x >= cut[0] else _ZERO
        else:
            word = _U(_mix(_U(_mix(_U(_U(first + _U(i)) ^ k0)) ^ k1)) ^ _TOP)
            m = _ONE if word < _U(_sigmoid(x) * _RANGE) else _ZERO
        if pruned is not None:
            m = _ZERO if pruned[i] else m
        p[i] = w[i] * m


@compiled()
def step(
    grad: NDArray[np.float32],
    w: NDArray[np.float32],
    s: NDArray[np.float32],
    m: NDArray[np.float32] | None,
    v: NDArray[np.float32] | None,
    p: NDArray[np.float32],
    u: NDArray[np.float32],
    rates: NDArray[np.float32],
    key: NDArray[np.uint32],
    start: int,
    power: bool,
    cut: NDArray[np.float32] | None,
    pruned: NDArray[np.bool_] | None,
) -> None:
    """Update the scores of one layer, and its moments, and write its next mask: ``p = w*m``; all (n,).

    Parameters
    ----------
    u
        Scratch, (BLOCK,).
    rates
        The largest score, the penalty, then the numbers of `AdamRates` or `SgdRates`.
    key, start
        Of the words: this layer's are ``start .. start+n-1``.
    power
        As in `score_gradient_`.
    cut
        As in `DrawRule`, an array of one number; None draws.
    """
    bound, penalty, k0, k1 = rates[0], rates[1], key[0], key[1]
    for a in range(0, len(s), BLOCK):
        b = min(a + BLOCK, len(s))
        change = u[: b - a]
        gone = None if pruned is None else pruned[a:b]
        _gradient(change, grad[a:b], w[a:b], s[a:b], power, penalty, gone)
        _change(change, None if m is None else m[a:b], None if v is None else v[a:b], rates[2:])
        _draw(change, w[a:b], s[a:b], p[a:b], bound, cut, k0, k1, _U(start + a), gone)


def usable(layers: Layers) -> bool:
    """Whether `finite` and `learn` work here: compiled, on a CPU, a bit a weight."""
    return layers.on_cpu and not layers.whole and available()


def finite(layers: Layers, grads: Sequence[Tensor | None]) -> bool:
    """Whether every element of ``G*w`` is sure to be, from the largest of both: one pass over G alone."""
    tops = (largest(g.numpy()) for _, _, _, g in layers.each(grads))
    sizes = (float(np.uint32(top).view(np.float32)) for top in tops)
    return all(g * w <= LARGEST for g, w in zip(sizes, layers.peaks(), strict=True))


def learn(
    layers: Layers,
    grads: Sequence[Tensor | None],
    scores: Tensor,
    moments: Sequence[Tensor],
    key: Key,
    rule: DrawRule,
    *,
    rates: Sequence[float],
    bound: float,
    power: bool,
    penalty: float,
) -> None:
    """Update the scores and moments of all layers and write the mask of `key` into the parameters.

    `rates` are `AdamRates` with two moments, else `SgdRates`; scores stay in [-bound, bound].
    """
    s, (m, v) = scores.numpy(), ([x.numpy() for x in moments] + [None, None])[:2]
    gone = None if rule.pruned is None else rule.pruned.numpy()
    flat = np.array([bound, penalty, *rates], np.float32)
    words, scratch = np.array(key, np.int32).view(np.uint32), np.empty(BLOCK, np.float32)
    cut = np.array([rule.cut], np.float32) if rule.draw == "threshold" else None
    for start, p, w, grad in layers.each(grads):
        here = slice(start, start + w.numel())
        # A parameter in another memory format or type has no flat view.
        own = p.is_contiguous() and p.dtype == torch.float32
        out = p.detach().view(-1) if own else torch.empty_like(w)
        step(
            grad.numpy(), w.numpy(), s[here], None if m is None else m[here], None if v is None else v[here],
            out.numpy(), scratch, flat, words, start, power, cut, None if gone is None else gone[here],
        )  # fmt: skip
        if own:
            increment_version(p)  # what torch does for its own writes, so that a stale graph is refused
        else:
            p.copy_(out.view(p.shape))
