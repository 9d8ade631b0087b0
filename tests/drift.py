"""Probabilities before and after training, as far apart as a test asks for."""

from __future__ import annotations

import numpy as np

from fedmask_flwr.masks import divergence


def drifted(d, bits, seed=0):
    """theta_g and theta_k with a divergence of about so many bits, half of the positions moved."""
    rng = np.random.default_rng(seed)
    logit = rng.normal(0, 2, d)
    drift, low, high = rng.normal(0, 1, d) * (rng.random(d) < 0.5), 0.0, 4.0
    theta_g = np.clip(1 / (1 + np.exp(-logit)), 0.01, 0.99)

    def moved(scale):
        odds = theta_g / (1 - theta_g) * np.exp(scale * drift)
        return np.clip(odds / (1 + odds), 0.005, 0.995)

    for _ in range(30):
        middle = (low + high) / 2
        low, high = (middle, high) if divergence(moved(middle), theta_g).sum() < bits else (low, middle)
    return theta_g, moved(high)
