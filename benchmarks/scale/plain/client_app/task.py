"""Network, data and loops: nothing of fedmask."""

import gzip
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import nn


def build():
    """784-300-100-10, the bundled ``mlp``."""
    return nn.Sequential(
        nn.Flatten(), nn.Linear(784, 300), nn.ReLU(), nn.Linear(300, 100), nn.ReLU(), nn.Linear(100, 10)
    )


@lru_cache(maxsize=2)
def mnist(folder, split):
    """Images in [0, 1] and labels, once a process."""
    name = {"train": "train", "test": "t10k"}[split]
    with gzip.open(Path(folder) / f"{name}-images-idx3-ubyte.gz") as f:
        x = np.frombuffer(f.read(), np.uint8, offset=16).reshape(-1, 1, 28, 28)
    with gzip.open(Path(folder) / f"{name}-labels-idx1-ubyte.gz") as f:
        y = np.frombuffer(f.read(), np.uint8, offset=8).astype(np.int64)
    return (x / np.float32(255)).astype(np.float32), y


def examples(folder, part, parts):
    """One client's images."""
    x, y = mnist(folder, "train")
    rows = np.random.Generator(np.random.Philox(key=7)).permutation(len(y))[part::parts]
    return torch.from_numpy(x[rows]), torch.from_numpy(y[rows])


def train(model, x, y, epochs, batch=32):
    """An ordinary loop; the last loss."""
    model.train()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for _ in range(epochs):
        for rows in torch.randperm(len(y)).split(batch):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x[rows]), y[rows])
            loss.backward()
            optimizer.step()
    return loss.item()


@torch.no_grad()
def accuracy(model, x, y):
    """On all of a split."""
    model.eval()
    return (model(x).argmax(1) == y).float().mean().item()
