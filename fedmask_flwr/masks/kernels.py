"""The elementwise work of a mask step, in place and outside autograd.

Equal inputs give equal bits on every machine and device: each formula is a fixed sequence of float32 operations
that IEEE 754 rounds correctly (+ - * / and the square root) and of operations on bits, with no library's
exponential and no fused multiply-add. It is written once here, for numpy arrays on a CPU and for torch tensors on
an accelerator, and once more in `fused`, which is compiled.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple, TypeVar, final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .keyed import Key, check_range
from .tiled import Tiles, tiled_torch

CPU_SLICE = 1 << 16  # half a dozen float32 slices stay in a core's L2
DEVICE_SLICE = 1 << 22  # an accelerator's scratch is as small as launches allow

Flat = TypeVar("Flat", NDArray[np.float32], Tensor)


def single(x: float) -> float:
    """`x` rounded to float32 once, so that no library rounds it its own way."""
    return float(np.float32(x))


# sigmoid(s) = 1 / (1 + 2**n * exp(r)), n = round(-s / ln 2), |r| <= ln(2)/2, and exp(r) = (t + r) / (t - r) with
# t = r / tanh(r/2) = 2 + z*(T1 + z*T2) to within 5e-10 of exp's logarithm, z = r*r.
INVERSE = single(-1 / np.log(2))
MAGIC = 1.5 * 2.0**23  # adding it rounds to an integer, which then lies in the lowest bits
LN2_HIGH = 0.693145751953125  # 15 bits: times n it is exact
LN2_LOW = single(np.log(2) - LN2_HIGH)
T1 = float.fromhex("0x1.555514p-3")
T2 = float.fromhex("-0x1.6a8a58p-9")


def slices(d: int, device: torch.device) -> Iterator[slice]:
    """Cut ``0 .. d-1`` into slices that fit a cache on a CPU, into larger ones elsewhere."""
    stride = slice_length(d, device)
    for a in range(0, d, stride):
        yield slice(a, min(a + stride, d))


def slice_length(d: int, device: torch.device) -> int:
    """Length of the first of these slices."""
    return min(d, CPU_SLICE if device.type == "cpu" else DEVICE_SLICE)


def native(x: Tensor) -> Any:
    """What the formulas work on: a numpy view of a tensor on a CPU, the tensor itself elsewhere."""
    return x.numpy() if x.device.type == "cpu" else x


def _library(x: NDArray[np.float32] | Tensor) -> tuple[Any, Any]:
    """The library that works on `x`, and its 32-bit integers."""
    return (np, np.uint32) if isinstance(x, np.ndarray) else (torch, torch.int32)


def _root(v: Any, out: Any) -> None:
    if isinstance(v, Tensor) and v.device.type == "cpu":
        v, out = v.numpy(), out.numpy()  # torch's root is MKL's there, which is one place off now and then
    _library(v)[0].sqrt(v, out=out)


def sigmoid_(s: Flat, out: Flat, scratch: Flat) -> Flat:
    """Theta = sigmoid(s) into `out`, which may be `s`; all (n,) float32, `scratch` (3, n).

    Needs |s| <= 16.2; then 0 < theta < 1. Within 2.5 units in the last place; exactly 1/2 at s = 0.
    """
    x, integers = _library(s)
    k, q, z = scratch[0], scratch[1], scratch[2]
    x.multiply(s, INVERSE, out=k)
    k += MAGIC
    x.subtract(k, MAGIC, out=z)
    x.multiply(z, LN2_HIGH, out=q)
    q += s
    z *= LN2_LOW
    q += z
    x.multiply(q, q, out=z)
    x.multiply(z, T2, out=out)
    out += T1
    out *= z
    out += 2.0
    x.subtract(out, q, out=z)
    q += out
    exponent, scaled = k.view(integers), z.view(integers)
    exponent <<= 23
    scaled += exponent
    z += q
    return x.divide(q, z, out=out)  # type: ignore[no-any-return]


def probabilities(scores: Tensor) -> Tensor:
    """Theta = sigmoid(s): (d,) float32 on the device of `scores`, exactly the theta that is sampled."""
    out = torch.empty_like(scores)
    s, theta = native(scores), native(out)
    scratch = native(scores.new_empty(3, slice_length(len(scores), scores.device)))
    for part in slices(len(scores), scores.device):
        n = part.stop - part.start
        sigmoid_(s[part], theta[part], scratch[:, :n])
    return out


@final
class Room:
    """What `sample_` works in on a CPU, for slices of `n`: half of its time is to make it."""

    __slots__ = ("bits", "cuts", "floats", "words")

    def __init__(self, n: int) -> None:
        self.words, self.floats = Tiles(n), np.empty((4, n), np.float32)
        self.cuts, self.bits = np.empty(n, np.uint32), np.empty(n, np.bool_)


def sample_(scores: Tensor, key: Key, out: Tensor, start: int = 0, room: Room | None = None) -> None:
    """Draw ``m ~ Bernoulli(sigmoid(s))`` into `out` as float32 zeros and ones, both (d,).

    Equal to ``tiled(key, d, start) < thresholds(probabilities(scores))``; needs |s| <= 16.2, so that theta < 1.

    Raises
    ------
    ValueError
        d passes 2**32.
    """
    d = len(scores)
    check_range(d, start)
    if scores.device.type != "cpu":
        sample_torch_(scores, key, out, start)
        return
    s, m = scores.numpy(), out.numpy()
    room = Room(slice_length(d, scores.device)) if room is None else room
    for part in slices(d, scores.device):
        n = part.stop - part.start
        # floor(theta * 2**32) - 2**31 in single precision: scaling by a power of two is exact, and
        # flipping the top bit of the unsigned cut subtracts 2**31.
        p, c = sigmoid_(s[part], room.floats[3, :n], room.floats[:3, :n]), room.cuts[:n]
        p *= np.float32(2.0**32)
        c[:] = p
        c ^= np.uint32(1 << 31)
        np.less(room.words.words(key, n, start + part.start), c.view(np.int32), out=room.bits[:n])
        m[part] = room.bits[:n]


def sample_torch_(scores: Tensor, key: Key, out: Tensor, start: int = 0, room: Room | None = None) -> None:
    """`sample_` in torch operations, for accelerators; on a CPU it gives the same bits."""
    del room
    d = len(scores)
    rows = scores.new_empty(4, min(d, DEVICE_SLICE))
    for a in range(0, d, DEVICE_SLICE):
        s, m = scores[a : a + DEVICE_SLICE], out[a : a + DEVICE_SLICE]
        n = len(s)
        theta = sigmoid_(s, rows[3, :n], rows[:3, :n])
        cuts = theta.mul_(2.0**32).to(torch.int64).sub_(1 << 31).to(torch.int32)
        torch.lt(tiled_torch(key, n, scores.device, start + a), cuts, out=m)


def score_gradient_(g: Flat, s: Flat, scratch: Flat, *, power: bool, penalty: float) -> None:
    """Turn ``g = G*w`` into dL/ds in place: ``g*p*(1-p)``, or ``g*p*p*(1-p)`` if `power`.

    `penalty` is lambda/d, the gradient of ``lambda * mean(sigmoid(s))`` with respect to one theta.
    `scratch` is (4, n).
    """
    x, _ = _library(g)
    p = sigmoid_(s, scratch[3], scratch[:3])
    if power:
        g *= p
    if penalty:
        g += single(penalty)
    g *= p
    g *= x.subtract(1.0, p, out=scratch[0]) if x is np else torch.rsub(p, 1.0)


@final
class AdamRates(NamedTuple):
    """Numbers of one Adam update (Kingma & Ba, algorithm 1), each rounded to float32 once."""

    b1: float
    c1: float  # 1 - b1
    b2: float
    c2: float  # 1 - b2
    root: float  # 1 / sqrt(1 - b2**step)
    eps: float
    rate: float  # lr / (1 - b1**step)


@final
class SgdRates(NamedTuple):
    """Numbers of one SGD update, each rounded to float32 once."""

    momentum: float
    rate: float


def adam_rates(lr: float, betas: tuple[float, float], eps: float, step: int) -> AdamRates:
    """Rates of update number `step`, from 1 on."""
    b1, b2 = betas
    root, rate = (1 - b2**step) ** -0.5, lr / (1 - b1**step)
    return AdamRates(*(single(x) for x in (b1, 1 - b1, b2, 1 - b2, root, eps, rate)))


def adam_(s: Flat, g: Flat, m: Flat, v: Flat, scratch: Flat, rates: AdamRates) -> None:
    """One Adam update of the scores `s` in place; `g` and `scratch` (n,) are used up."""
    x, _ = _library(s)
    m *= rates.b1
    m += x.multiply(g, rates.c1, out=scratch)
    v *= rates.b2
    x.multiply(g, rates.c2, out=scratch)
    scratch *= g
    v += scratch
    _root(v, scratch)
    scratch *= rates.root
    scratch += rates.eps
    x.multiply(m, rates.rate, out=g)
    g /= scratch
    s -= g


def sgd_(s: Flat, g: Flat, velocity: Flat | None, rates: SgdRates) -> None:
    """One SGD update of the scores `s` in place, heavy-ball if there is a velocity; `g` is used up."""
    x, _ = _library(s)
    if velocity is None:
        g *= rates.rate
    else:
        velocity *= rates.momentum
        velocity += g
        x.multiply(velocity, rates.rate, out=g)
    s -= g
