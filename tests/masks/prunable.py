"""Networks to prune, with weights and statistics that no pruning leaves without effect."""

from __future__ import annotations

import copy
import math

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from fedmask_flwr.masks import mask_filters, slim_


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """He-scaled weights, and biases, BatchNorm weights and statistics away from 0 and 1."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, t in model.state_dict().items():
            if t.ndim >= 2:
                t.normal_(0, math.sqrt(2 / t[0].numel()), generator=g)
            elif name.endswith(("running_var", "weight")):
                t.uniform_(0.5, 1.5, generator=g)
            elif t.is_floating_point():
                t.normal_(0, 0.4, generator=g)
    return model.eval()


def some(spec, seed: int, share: float = 0.6) -> np.ndarray:
    """A random `keep` with a channel of every unit."""
    rng = np.random.default_rng(seed)
    keep = rng.random(spec.numel) < share
    for start, size in zip(np.cumsum([0, *spec.sizes[:-1]]), spec.sizes, strict=True):
        keep[start + rng.integers(size)] = True
    return keep


@torch.no_grad()
def outputs(model, coupling, spec, keep, shape) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of the full, the masked and the slim network, on the same input."""
    x = torch.randn(2, *shape, generator=torch.Generator().manual_seed(5))
    masked = copy.deepcopy(model)
    mask_filters(masked, coupling, spec, keep)
    slim = slim_(copy.deepcopy(model), coupling, spec, keep)
    return model(x), masked(x), slim(x)


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    a, b = a.detach(), b.detach()
    return a.shape == b.shape and float((a - b).abs().max()) <= 1e-5 * max(1.0, float(b.abs().max()))


def entries(model: nn.Module) -> list[tuple[str, torch.Tensor]]:
    """The floating tensors of the state dict by name: the order of the flat vectors."""
    return [(name, t) for name, t in sorted(model.state_dict().items()) if t.is_floating_point()]


def read(model: nn.Module) -> np.ndarray:
    return np.concatenate([t.numpy().reshape(-1) for _, t in entries(model)])


def write(model: nn.Module, flat: np.ndarray) -> None:
    for _, t in entries(model):
        t.copy_(torch.from_numpy(flat[: t.numel()]).view(t.shape))
        flat = flat[t.numel() :]
    assert not flat.size


class Dense(nn.Module):
    """Concatenations, a normalised one and a flattened one, like DenseNet's."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 5, 3, padding=1)
        self.bn = nn.BatchNorm2d(5)
        self.grow = nn.Conv2d(5, 4, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(9)
        self.depth = nn.Conv2d(9, 9, 3, padding=1, groups=9)
        self.grow2 = nn.Conv2d(9, 3, 1)
        self.head = nn.Linear(12 * 16, 10)

    def forward(self, x):
        x = F.relu(self.bn(self.stem(x)))
        y = torch.cat([x, self.grow(x)], 1)
        y = self.depth(self.bn2(y).relu())
        y = torch.cat((y, self.grow2(y)), dim=-3)
        return self.head(torch.flatten(F.adaptive_avg_pool2d(y, 4), 1))


class Wild(nn.Module):
    """A random stack of operations, some of which tie channels, move them, or make zeros nonzero."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        rng = np.random.default_rng(seed)
        self.steps: list[str] = []
        self.layers = nn.ModuleDict()
        menu = [
            "conv", "conv", "norm", "bare", "relu", "sum", "product", "gate", "cat", "depthwise", "grouped",
            "chunk", "sigmoid", "shift", "scale", "group", "pool", "twice", "roll", "width", "permute",
        ]  # fmt: skip
        c = 4
        self.layers["stem"] = nn.Conv2d(3, c, 3, padding=1)
        for i in range(int(rng.integers(3, 10))):
            step = menu[rng.integers(len(menu))]
            if step in ("norm", "bare"):
                self.layers[str(i)] = nn.BatchNorm2d(c, affine=step == "norm")
            elif step == "conv":
                self.layers[str(i)] = nn.Conv2d(c, c := int(2 * rng.integers(1, 4)), 3, padding=1)
            elif step == "gate":
                squeeze = (nn.AdaptiveAvgPool2d(1), nn.Conv2d(c, c, 1), nn.Hardsigmoid())
                self.layers[str(i)] = nn.Sequential(*squeeze)
            elif step in ("depthwise", "grouped"):
                self.layers[str(i)] = nn.Conv2d(c, c, 3, padding=1, groups=c if step == "depthwise" else 2)
            elif step == "group":
                self.layers[str(i)] = nn.GroupNorm(2, c)
            elif step in ("sum", "product", "cat", "twice"):
                self.layers[str(i)] = nn.Conv2d(c, c, 1)
                c *= 2 if step == "cat" else 1
            self.steps.append(step)
        self.flat = bool(rng.integers(2))
        self.layers["neck"] = nn.Conv2d(c, 5, 3, padding=1)
        self.layers["hidden"] = nn.Linear(180 if self.flat else 5, 6)
        self.layers["norm"] = nn.BatchNorm1d(6)
        self.layers["head"] = nn.Linear(6, 3)

    def step(self, kind: str, i: str, x):
        layer = self.layers[i] if i in self.layers else nn.Identity()
        if kind == "sum":
            return x + layer(x)
        if kind in ("product", "gate"):
            return layer(x) * x
        if kind == "cat":
            return torch.cat([layer(x), x], 1)
        if kind == "chunk":
            return torch.cat(x.chunk(2, 1)[::-1], 1)
        if kind == "twice":
            return layer(F.relu(layer(x)))
        simple = {
            "relu": F.relu,
            "sigmoid": torch.sigmoid,
            "shift": lambda x: 1 - x,
            "scale": lambda x: 2 * x / 3,
            "pool": lambda x: F.max_pool2d(x, 3, 1, 1),
            "roll": lambda x: x.roll(1, 1),
            "width": lambda x: x * x.size(1),
            "permute": lambda x: x.permute(0, 1, 3, 2),
        }
        return simple.get(kind, layer)(x)

    def forward(self, x):
        x = self.layers["stem"](x)
        for i, kind in enumerate(self.steps):
            x = self.step(kind, str(i), x)
        x = self.layers["neck"](x)
        x = x.view(x.size(0), -1) if self.flat else x.mean((2, 3))
        return self.layers["head"](self.layers["norm"](self.layers["hidden"](x)).relu())
