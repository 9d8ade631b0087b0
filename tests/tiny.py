"""A data set and a network small enough for a round in milliseconds, named by dotted path as a user's own are."""

from __future__ import annotations

import math
import tomllib
from pathlib import Path

import numpy as np
import torch
from torch import nn

ROOT = Path(__file__).parents[1]


def blobs(split, data_dir):
    """Three Gaussian clouds in eight dimensions; (n, 8) float32 and labels."""
    rng = np.random.Generator(np.random.Philox(key=5 if split == "train" else 6))
    centres = np.random.Generator(np.random.Philox(key=4)).normal(0, 2, (3, 8))
    y = np.arange(150 if split == "train" else 90) % 3
    return (centres[y] + rng.normal(0, 1, (len(y), 8))).astype(np.float32), y.astype(np.int64)


def net(in_shape=(8,), num_classes=3):
    """A plain two-layer perceptron."""
    return nn.Sequential(nn.Flatten(), nn.Linear(math.prod(in_shape), 32), nn.ReLU(), nn.Linear(32, num_classes))


def dropout_net(in_shape=(8,), num_classes=3):
    """One that draws from torch's generator while it trains."""
    return nn.Sequential(
        nn.Flatten(), nn.Linear(math.prod(in_shape), 32), nn.Dropout(0.5), nn.Linear(32, num_classes)
    )


def norm_net(in_shape=(8,), num_classes=3):
    """One that cannot be given a batch of one."""
    return nn.Sequential(
        nn.Flatten(), nn.Linear(math.prod(in_shape), 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, num_classes)
    )


def declared_config():
    """The run config that pyproject.toml declares."""
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["flwr"]["app"]["config"]


def run_config(**changes):
    """The declared run config, pointed at the tiny task."""
    small = {"data": "tiny:blobs", "model": "tiny:net", "num-server-rounds": 5, "batch-size": 16, "eval-samples": 2}
    return declared_config() | small | {k.replace("_", "-"): v for k, v in changes.items()}


def equal(a, b):
    """Bitwise equality of two frozen dataclasses of arrays and numbers."""
    return all(
        np.array_equal(getattr(a, name), getattr(b, name))
        and np.asarray(getattr(a, name)).dtype == np.asarray(getattr(b, name)).dtype
        for name in a.__slots__
    )


def one_thread():
    """Keep the suite honest on two cores."""
    torch.set_num_threads(1)
