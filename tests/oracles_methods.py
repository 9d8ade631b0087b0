"""Slow, readable twins of the methods' server halves, written from the papers' pseudocode."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np

from fedmask_flwr.wire import Counts, Payload


def beta(method, rounds):
    """FedPM's and DeltaMask's posterior, one position at a time; ``rounds`` holds lists of updates.

    Returns theta as a list, or theta0 before the first vote.
    """
    config = method.config
    window = config.reset or int(np.ceil(1 / method.fraction))
    alpha, beta_, votes, flips, age = [config.prior] * method.numel, [config.prior] * method.numel, 0, 0.0, 0
    for updates in rounds:
        if not updates:
            continue
        if age >= window:
            alpha, beta_ = [config.prior] * method.numel, [config.prior] * method.numel
            votes, flips, age = 0, 0.0, 0
        age += 1
        for update in updates:
            votes += 1
            flips += update.flip_rate
            for i in range(method.numel):
                bit = int(update.payload.bits["mask"][i // 8]) >> (i % 8) & 1
                alpha[i] += bit
                beta_[i] += 1 - bit
    if not votes:
        return [config.theta0] * method.numel
    f, theta = flips / votes, []
    for a, b in zip(alpha, beta_, strict=True):
        p = a / (a + b) if config.estimator == "mean" else (a - 1) / (a + b - 2)
        p = (p - f) / (1 - 2 * f)
        theta.append(min(max(p, config.epsilon), 1 - config.epsilon))
    return theta


def deltastep(method, rounds):
    """Theta, position by position: it moves by the flips between guess and mask."""
    return stepped(method, rounds, lambda bits, theta: bits["mask"] - bits["guess"])


def drawstep(method, rounds):
    """Theta, position by position: it moves by what the masks have more than it."""
    return stepped(method, rounds, lambda bits, theta: bits["mask"] - theta)


def stepped(method, rounds, change):
    """On a grid of 2520 steps; ``rounds`` holds lists of updates, ``change`` is of one reply at one position."""
    grid = 2520
    low, theta = math.ceil(method.config.epsilon * grid), [round(method.config.theta0 * grid)] * method.numel
    for updates in filter(None, rounds):
        step = Fraction(updates[0].payload.meta["step"])
        for i in range(method.numel):
            bits = [{name: int(b[i // 8]) >> (i % 8) & 1 for name, b in u.payload.bits.items()} for u in updates]
            mean = sum(Fraction(change(b, Fraction(theta[i], grid))) for b in bits) / len(updates)
            theta[i] = min(max(round(theta[i] + step * grid * mean), low), grid - low)
    return [t / grid for t in theta]


def fedavg(method, rounds):
    """The weighted mean of the last round that brought anything."""
    found = method.start
    for updates in rounds:
        if updates:
            total = sum(u.weight for u in updates)
            found = [
                sum(u.weight * float(u.payload.dense["weights"][i]) for u in updates) / total
                for i in range(method.floats)
            ]
    return found


def standalone(method, rounds):
    """The server never learns anything."""
    return method.start


def klms_reply(method, state, client, rng):
    """Any candidate of each of a few blocks."""
    top = (1 << method.each) - 1
    return Payload(counts={"index": Counts(rng.integers(0, top + 1, 3 + client).astype(np.uint32), top)})
