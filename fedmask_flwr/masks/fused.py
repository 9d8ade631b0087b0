"""The whole step of a mask in compiled loops: the formulas of `kernels` and the words of `tiled`, the same bits.

One pass over a layer: gradient, moments, scores, the next mask and the weights that carry it, a tile of words at a
time, so that what one loop leaves the next one finds in the first cache. Three loops, since with fewer vectors in
each LLVM can tell that they do not overlap, and uses the processor's vector instructions. (To keep theta's slope
for the next gradient would save half of the sigmoids and gain nothing: a step waits for its memory.)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.autograd.graph import increment_version

from ..jit import available, compiled
from .draw import DrawRule
from .kernels import INVERSE, LN2_HIGH, LN2_LOW, MAGIC, T1, T2
from .keyed import Key
from .pieces import LARGEST, Layers
from .tiled import COLUMN, TILE

_F, _U = np.float32, np.uint32  # a plain literal would widen what it meets
_INVERSE, _MAGIC, _HIGH, _LOW, _T1, _T2 = (np.float32(x) for x in (INVERSE, MAGIC, LN2_HIGH, LN2_LOW, T1, T2))
_ZERO, _ONE, _TWO, _RANGE = (np.float32(x) for x in (0, 1, 2, 2.0**32))
_A, _B = np.uint32(0x7FEB352D), np.uint32(0x846CA68B)
_15, _16, _23 = np.uint32(15), np.uint32(16), np.uint32(23)
_TOP, _SIZE = np.uint32(1 << 31), np.uint32((1 << 31) - 1)
_COLUMN = np.uint32(COLUMN)


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
def _word(i: Any, key: Any) -> Any:
    return _mix(_U(_mix(_U(i ^ key[0])) ^ key[1]))


@compiled()
def largest(grad: NDArray[np.float32]) -> Any:
    """Largest magnitude: infinity is above all, and NaN above it, since their bits order as the numbers do."""
    top = _U(0)
    for i in range(len(grad)):
        top = max(top, _U(_F(grad[i]).view(_U) & _SIZE))
    return _U(top).view(_F)


@compiled()
def _lanes(key: Any, row: Any) -> None:
    """The words that all tiles of a step share."""
    for i in range(len(row)):
        row[i] = _word(_U(i), key)


@compiled()
def _gradient(u: Any, grad: Any, w: Any, c: Any, s: Any, power: Any, penalty: Any, pruned: Any) -> None:
    for i in range(len(u)):
        p = _sigmoid(s[i])
        g = grad[i] * (w[i] if c is None else _F(w[i]) * c)
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
def _draw(u: Any, w: Any, c: Any, s: Any, p: Any, bound: Any, cut: Any, row: Any, column: Any, pruned: Any) -> None:
    for i in range(len(u)):
        x = s[i] - u[i]
        x = -bound if x < -bound else x
        x = bound if x > bound else x
        s[i] = x
        if cut is not None:
            m = _ONE if x >= cut[0] else _ZERO
        else:
            m = _ONE if _U(_mix(_U(row[i] ^ column)) ^ _TOP) < _U(_sigmoid(x) * _RANGE) else _ZERO
        if pruned is not None:
            m = _ZERO if pruned[i] else m
        p[i] = (w[i] if c is None else _F(w[i]) * c) * m


@compiled()
def step(
    grad: NDArray[np.float32],
    w: NDArray[np.float32] | NDArray[np.int8],
    c: np.float32 | None,
    s: NDArray[np.float32],
    m: NDArray[np.float32] | None,
    v: NDArray[np.float32] | None,
    p: NDArray[np.float32],
    u: NDArray[np.float32],
    row: NDArray[np.uint32],
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
    w, c
        The frozen weights; or their signs, and the constant that all are.
    u
        Scratch, (TILE,).
    row
        What is drawn once a step, (TILE,): filled with the layer that starts at 0.
    rates
        The largest score, the penalty, then the numbers of `AdamRates` or `SgdRates`.
    key, start
        Of the words: this layer's are ``start .. start+n-1``.
    power
        As in `score_gradient_`.
    cut
        As in `DrawRule`, an array of one number; None draws.
    """
    bound, penalty = rates[0], rates[1]
    if cut is None and start == 0:
        _lanes(key, row)
    a = 0
    while a < len(s):
        tile, lane = (start + a) // TILE, (start + a) % TILE
        b = min(a + TILE - lane, len(s))
        change = u[: b - a]
        gone = None if pruned is None else pruned[a:b]
        _gradient(change, grad[a:b], w[a:b], c, s[a:b], power, penalty, gone)
        _change(change, None if m is None else m[a:b], None if v is None else v[a:b], rates[2:])
        column = _word(_U(_COLUMN + _U(tile)), key)
        _draw(change, w[a:b], c, s[a:b], p[a:b], bound, cut, row[lane:], column, gone)
        a = b


def usable(layers: Layers) -> bool:
    """Whether a `Step` works here: compiled, on a CPU, a bit a weight."""
    return layers.on_cpu and not layers.whole and available()


class _Arrays(NamedTuple):
    """A layer's part of what a step works on; None for what there is not."""

    start: int
    w: NDArray[np.float32] | NDArray[np.int8]
    c: np.float32 | None
    s: NDArray[np.float32]
    m: NDArray[np.float32] | None
    v: NDArray[np.float32] | None
    pruned: NDArray[np.bool_] | None


@final
class Step:
    """The compiled step of a network. Its arrays are made once: in a small network that takes as long as the work.

    `scores` (d,) and `moments`, none, one or two (d,), are updated in place.
    """

    def __init__(self, layers: Layers, scores: Tensor, moments: Sequence[Tensor], rule: DrawRule) -> None:
        self._layers = layers
        self._cut = np.array([rule.cut], np.float32) if rule.draw == "threshold" else None
        self._change, self._row = np.empty(TILE, np.float32), np.empty(TILE, np.uint32)
        pruned = None if rule.pruned is None else rule.pruned.numpy()
        s, (m, v) = scores.numpy(), ([x.numpy() for x in moments] + [None, None])[:2]
        self._arrays = []
        for layer, (start, stop) in enumerate(layers.starts()):
            w, scales = layers.frozen.held(layer).numpy(), layers.frozen.scales
            c = None if scales is None else np.float32(scales[layer])
            rest: Iterator[Any] = (None if x is None else x[start:stop] for x in (m, v, pruned))
            self._arrays.append(_Arrays(start, w, c, s[start:stop], *rest))
        self._outs: list[tuple[int, NDArray[np.float32]] | None] = [None] * len(self._arrays)

    def gradients(self) -> list[NDArray[np.float32]]:
        """G of each layer, flat float32; zeros for none."""
        found = []
        for arrays, p in zip(self._arrays, self._layers.params, strict=True):
            g = p.grad
            if g is None:
                found.append(np.zeros(arrays.w.size, np.float32))
                continue
            g = g if g.layout is torch.strided else g.to_dense()
            found.append((g if g.dtype is torch.float32 else g.float()).numpy().reshape(-1))
        return found

    def finite(self, grads: Sequence[NDArray[np.float32]]) -> bool:
        """Whether every element of ``G*w`` is sure to be, from the largest of both: one pass over G alone."""
        return all(float(largest(g)) * w <= LARGEST for g, w in zip(grads, self._layers.peaks(), strict=True))

    def __call__(
        self, grads: Sequence[NDArray[np.float32]], key: Key, *, rates: Sequence[float], bound: float, power: bool,
        penalty: float,
    ) -> None:  # fmt: skip
        """Update the scores and moments of all layers and write the mask of `key` into the parameters.

        `rates` are `AdamRates` with two moments, else `SgdRates`; scores stay in [-bound, bound].
        """
        flat, words = np.array([bound, penalty, *rates], np.float32), np.array(key, np.int32).view(np.uint32)
        for i, (arrays, p, grad) in enumerate(zip(self._arrays, self._layers.params, grads, strict=True)):
            start, w, c, s, m, v, pruned = arrays
            out = self._out(i, p)
            values = np.empty(w.size, np.float32) if out is None else out
            step(grad, w, c, s, m, v, values, self._change, self._row, flat, words, start, power, self._cut, pruned)
            if out is None:
                p.copy_(torch.from_numpy(values).view(p.shape))
            else:
                increment_version(p)  # what torch does for its own writes, so that a stale graph is refused

    def _out(self, i: int, p: nn.Parameter) -> NDArray[np.float32] | None:
        """A flat view of the parameter; None if its memory format or type has none. Its storage may be replaced."""
        if not (p.is_contiguous() and p.dtype == torch.float32):
            return None
        kept, place = self._outs[i], p.data_ptr()
        if kept is None or kept[0] != place:
            kept = self._outs[i] = place, p.detach().view(-1).numpy()
        return kept[1]
