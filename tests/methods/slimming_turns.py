"""What the tests of the structured methods share: networks to slim, broadcasts, one turn."""

from __future__ import annotations

import numpy as np
import torch
from federation import network, steps
from torch import nn
from torch.nn import functional as F

from fedmask_flwr.methods import Training, Turn
from fedmask_flwr.wire import Payload, pack_bits

TRAINING = Training("adam", 0.02)


class Residual(nn.Module):
    """A stem and two blocks; what is added shares its channels."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(1, 12, 3, padding=1), nn.BatchNorm2d(12)
        self.a, self.b = nn.Conv2d(12, 16, 3, padding=1), nn.Conv2d(16, 12, 3, padding=1)
        self.c, self.d = nn.Conv2d(12, 20, 3, padding=1, stride=2), nn.Conv2d(12, 20, 1, stride=2)
        self.head = nn.Linear(20, 3)

    def forward(self, x):
        x = F.relu(self.norm(self.stem(x)))
        x = F.relu(x + self.b(F.relu(self.a(x))))
        return self.head(F.relu(self.c(x) + self.d(x)).mean((2, 3)))


def mlp3():
    """Two units and three layers."""
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 3))


def turn_of(round_, client=0):
    return Turn(1, round_, 9, client)


def told(method, keep, searched):
    return Payload(bits={"keep": pack_bits(keep)}, meta={"searched": searched})


def some(method, seed=0, share=0.7):
    rng = np.random.default_rng(seed)
    keep = rng.random(method.spec.numel) < share
    for start in np.cumsum([0, *method.spec.sizes[:-1]]):
        keep[start] = True
    return keep


def images(n=24):
    g = torch.Generator().manual_seed(0)
    return torch.randn(n, 1, 8, 8, generator=g), torch.arange(n) % 3


def take_turn(method, make, got, round_=1, memory=None, x=None, y=None, n=4):
    """A node's turn: its reply and its trained model."""
    model, memory = network(make), {} if memory is None else memory
    optimizer = method.begin(got, model, TRAINING, turn_of(round_), memory)
    steps(model, optimizer, n, x, y)
    return method.finish(got, model, optimizer, turn_of(round_), memory), model
