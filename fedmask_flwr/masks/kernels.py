"""The elementwise work of a mask step, in place and outside autograd.

Updates are written once, in torch, and run on cache-sized slices on a CPU and on whole vectors on an
accelerator. Sampling is numpy on a CPU (it beats torch's serial Bernoulli several times over) and
torch elsewhere.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .keyed import CHUNK, Key, Scratch, check_range, words_torch


def slices(d: int, device: torch.device) -> Iterator[slice]:
    """Cut ``0 .. d-1`` into cache-sized slices on a CPU, into one slice elsewhere."""
    stride = CHUNK if device.type == "cpu" else d
    for a in range(0, d, stride):
        yield slice(a, min(a + stride, d))


def _sigmoid(s: NDArray[np.float32], out: NDArray[np.float32], scale: float = 1.0) -> NDArray[np.float32]:
    np.negative(s, out=out)
    np.exp(out, out=out)
    out += np.float32(1)
    return np.divide(np.float32(scale), out, out=out)


def probabilities(scores: Tensor) -> Tensor:
    """Theta = sigmoid(s): (d,) float32 on the device of `scores`, exactly the theta that is sampled.

    numpy's exponential does not depend on an element's place or on the number of threads, which
    torch's does on a CPU. Devices may differ in the last place of theta.
    """
    if scores.device.type != "cpu":
        return torch.sigmoid(scores)
    out = np.empty(len(scores), np.float32)
    s = scores.numpy()
    for part in slices(len(s), scores.device):
        _sigmoid(s[part], out[part])
    return torch.from_numpy(out)


def sample_(scores: Tensor, key: Key, out: Tensor, start: int = 0) -> None:
    """Draw ``m ~ Bernoulli(sigmoid(s))`` into `out` as float32 zeros and ones, both (d,).

    They take the words from `start` on.

    Equal to ``bernoulli(key, thresholds(probabilities(scores)))``; needs |s| <= 16.2, so that theta < 1.

    Raises
    ------
    ValueError
        d passes 2**32.
    """
    d = len(scores)
    if scores.device.type != "cpu":
        sample_torch_(scores, key, out, start)
        return
    check_range(d, start)
    s, m = scores.numpy(), out.numpy()
    n = min(d, CHUNK)
    scratch, theta = Scratch(n), np.empty(n, np.float32)
    cuts, bits = np.empty(n, np.uint32), np.empty(n, np.bool_)
    for part in slices(d, scores.device):
        n = part.stop - part.start
        # floor(theta * 2**32) - 2**31 in single precision: scaling by a power of two is exact, and
        # flipping the top bit of the unsigned cut subtracts 2**31.
        c = cuts[:n]
        c[:] = _sigmoid(s[part], theta[:n], 2.0**32)
        c ^= np.uint32(1 << 31)
        np.less(scratch.words(key, n, start + part.start), c.view(np.int32), out=bits[:n])
        m[part] = bits[:n]


def sample_torch_(scores: Tensor, key: Key, out: Tensor, start: int = 0) -> None:
    """`sample_` in whole-vector torch operations, for accelerators."""
    cuts = torch.sigmoid(scores).double().mul_(2.0**32).floor_().clamp_(0, 2.0**32 - 1).sub_(2.0**31)
    torch.lt(words_torch(key, len(scores), scores.device, start), cuts.to(torch.int32), out=out)


def score_gradient_(g: Tensor, s: Tensor, p: Tensor, *, power: bool, penalty: float) -> None:
    """Turn ``g = G*w`` into dL/ds in place: ``g*p(1-p)``, or ``g*p*p(1-p)`` if `power`.

    `penalty` is lambda/d, the gradient of ``lambda * mean(sigmoid(s))`` with respect to one theta.
    `p` is scratch.
    """
    torch.sigmoid(s, out=p)
    if power:
        g.mul_(p)
    if penalty:
        g.add_(penalty)
    torch.ops.aten.sigmoid_backward.grad_input(g, p, grad_input=g)


def adam_(
    s: Tensor,
    g: Tensor,
    m: Tensor,
    v: Tensor,
    t: Tensor,
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    step: int,
) -> None:
    """One Adam update of the scores `s` in place (Kingma & Ba, algorithm 1); `t` is scratch."""
    b1, b2 = betas
    m.lerp_(g, 1 - b1)
    v.mul_(b2).addcmul_(g, g, value=1 - b2)
    torch.sqrt(v, out=t)
    t.div_((1 - b2**step) ** 0.5).add_(eps)
    s.addcdiv_(m, t, value=-lr / (1 - b1**step))


def sgd_(s: Tensor, g: Tensor, velocity: Tensor | None, *, lr: float, momentum: float) -> None:
    """One SGD update of the scores `s` in place, heavy-ball if there is a velocity."""
    if velocity is not None:
        g = velocity.mul_(momentum).add_(g)
    s.add_(g, alpha=-lr)
