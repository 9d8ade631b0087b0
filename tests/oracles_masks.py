"""Slow, readable twins of fedmask_flwr.masks."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call

M32 = (1 << 32) - 1


def _mix(x: int) -> int:
    x ^= x >> 16
    x = x * 0x7FEB352D & M32
    x ^= x >> 15
    x = x * 0x846CA68B & M32
    return x ^ x >> 16


def _signed(x: int) -> int:
    return x - (1 << 32) if x >> 31 else x


def word(k0: int, k1: int, i: int) -> int:
    """Word i of a stream as a signed 32-bit integer, with Python's unbounded integers."""
    return _signed(_mix(_mix((i ^ k0) & M32) ^ (k1 & M32)))


def step_word(k0: int, k1: int, i: int) -> int:
    """Word i of a training step: lane and tile, mixed once more."""
    return _signed(_mix((word(k0, k1, i % 2048) ^ word(k0, k1, 2**31 + i // 2048)) & M32))


def ste_gradient(
    model: nn.Module,
    frozen: dict[str, Tensor],
    scores: dict[str, Tensor],
    mask: dict[str, Tensor],
    loss: Callable[[Callable[..., Tensor]], Tensor],
    ste: str = "identity",
    sparsity: float = 0.0,
) -> dict[str, Tensor]:
    """dL/ds by autograd through an explicit straight-through mask; scores broadcast over weights."""
    leaves = {n: s.clone().requires_grad_() for n, s in scores.items()}
    weights = {}
    for n, s in leaves.items():
        theta = torch.sigmoid(s)
        slope = theta.detach() if ste == "p" else 1.0
        weights[n] = frozen[n] * (mask[n] + slope * (theta - theta.detach()))
    penalty = sparsity * torch.cat([torch.sigmoid(s).reshape(-1) for s in leaves.values()]).mean()
    total = loss(lambda *a, **k: functional_call(model, weights, a, k)) + penalty
    return dict(zip(leaves, torch.autograd.grad(total, list(leaves.values())), strict=True))


def threshold_bit(s: float, tau: float, kept: bool = True) -> bool:
    """1[sigmoid(s) >= tau], pruned positions 0."""
    return kept and 1 / (1 + math.exp(-s)) >= tau


def train_positions(
    scores: Sequence[float],
    dloss: Sequence[float],
    support: Sequence[bool],
    steps: int,
    *,
    lr: float,
    adam: bool = False,
    momentum: float = 0.0,
    ste: str = "identity",
    sparsity: float = 0.0,
    bound: float = math.inf,
) -> list[float]:
    """Scores after `steps` updates with the constant dL/dm `dloss`, a position at a time."""
    out = []
    for s0, g, kept in zip(scores, dloss, support, strict=True):
        s, m, v = s0, 0.0, 0.0
        for t in range(1, steps + 1):
            if not kept:
                break
            theta = 1 / (1 + math.exp(-s))
            slope = theta if ste == "p" else 1.0
            ds = (g * slope + sparsity / len(scores)) * theta * (1 - theta)
            if adam:
                m, v = 0.9 * m + 0.1 * ds, 0.999 * v + 0.001 * ds * ds
                s -= lr * m / (1 - 0.9**t) / (math.sqrt(v / (1 - 0.999**t)) + 1e-8)
            else:
                m = momentum * m + ds
                s -= lr * m
            s = min(max(s, -bound), bound)
        out.append(s)
    return out
