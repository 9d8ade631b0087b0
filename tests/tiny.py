"""A data set and a network small enough for a round in milliseconds, named by dotted path as a user's own are."""

from __future__ import annotations

import json
import math
import tomllib
from dataclasses import is_dataclass
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


def sources(split, data_dir):
    """Four binary sources of eight correlated bits, very unlike each other; (n, 8) float32 and whose it is."""
    rng = np.random.Generator(np.random.Philox(key=8 if split == "train" else 9))
    y = np.arange(720 if split == "train" else 240) % 4
    coin = rng.integers(0, 2, (len(y), 2))
    bits = coin[:, [0, 0, 1, 1, 0, 1, 0, 1]]  # two coins, seen four times each
    bits[:, 4:] |= y[:, None] & 1  # half of the sources hold the last four at 1
    bits[:, :4] ^= np.array([[0, 0, 0, 0], [0, 1, 0, 1], [1, 1, 0, 1], [0, 1, 1, 0]])[y]
    bits[:, 4:] ^= (y >> 1)[:, None]
    return (bits ^ (rng.random(bits.shape) < 0.05)).astype(np.float32), y.astype(np.int64)


def table(path, *rows, data="tiny:sources", **keys):
    """Write a scenario: a row a client, its tasks as words such as ``"0 1"``; returns its path."""
    cells = [[f"{data}[{word}]" for word in row.split()] for row in rows]
    lines = [f"clients = {json.dumps(cells)}", *(f"{k} = {json.dumps(v)}" for k, v in keys.items())]
    path.write_text("\n".join(lines))
    return str(path)


def net(in_shape=(8,), num_classes=3):
    """A plain two-layer perceptron."""
    return nn.Sequential(nn.Flatten(), nn.Linear(math.prod(in_shape), 32), nn.ReLU(), nn.Linear(32, num_classes))


class Structured(nn.Sequential):
    """A perceptron with weights that can never matter, as a MADE's: two of three inputs to each unit."""

    def __init__(self, inputs, classes):
        super().__init__(nn.Flatten(), nn.Linear(inputs, 32), nn.ReLU(), nn.Linear(32, classes))
        for i in (1, 3):
            out, inside = self[i].weight.shape
            keep = (torch.arange(out)[:, None] + torch.arange(inside)) % 3 > 0
            self.register_buffer(f"keep{i}", keep, persistent=False)
        self.mask_id = "structured"

    def forward(self, x):
        for i, module in enumerate(self):
            if i in (1, 3):
                x = nn.functional.linear(x, module.weight * self.get_buffer(f"keep{i}"), module.bias)
            else:
                x = module(x)
        return x

    def structure(self):
        """Where weights matter."""
        return {f"{i}.weight": self.get_buffer(f"keep{i}") for i in (1, 3)}


def structured_net(in_shape=(8,), num_classes=3):
    """One with structural masks."""
    return Structured(math.prod(in_shape), num_classes)


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
    """Bitwise equality of two frozen dataclasses of arrays, numbers and dataclasses of these."""
    return all(same(getattr(a, name), getattr(b, name)) for name in a.__slots__)


def same(a, b):
    if is_dataclass(a):
        return equal(a, b)
    return np.array_equal(a, b) and np.asarray(a).dtype == np.asarray(b).dtype


def one_thread():
    """Keep the suite honest on two cores."""
    torch.set_num_threads(1)
