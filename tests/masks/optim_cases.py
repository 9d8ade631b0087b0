"""Small networks, optimisers and checks that the tests of mask optimisers share."""

from __future__ import annotations

import copy

import torch
from oracles_masks import ste_gradient
from torch import nn

from fedmask_flwr.masks import MaskAdam, MaskOptimizer, MaskSGD, derive, thresholds
from fedmask_flwr.masks.tiled import tiled


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.attention(x, x, x)[0]


CASES = {
    "linear": (lambda: nn.Linear(5, 3), randn(4, 5)),
    "conv1d": (lambda: nn.Conv1d(2, 4, 3), randn(2, 2, 7)),
    "conv2d": (lambda: nn.Conv2d(4, 6, 3, stride=2, groups=2), randn(2, 4, 7, 7)),
    "conv3d": (lambda: nn.Conv3d(1, 2, 2), randn(2, 1, 4, 4, 4)),
    "embedding": (lambda: nn.Embedding(9, 4), torch.tensor([[1, 2, 1], [0, 8, 5]])),
    "sparse embedding": (lambda: nn.Embedding(9, 4, sparse=True), torch.tensor([[1, 2, 1], [0, 8, 5]])),
    "attention": (Attention, randn(2, 3, 6)),
    "encoder": (lambda: nn.TransformerEncoderLayer(6, 2, 8, dropout=0.0, batch_first=True), randn(2, 3, 6)),
    "stack": (lambda: nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)), randn(4, 5)),
}


def build(case: str) -> tuple[nn.Module, torch.Tensor]:
    make, x = CASES[case]
    with torch.random.fork_rng():
        torch.manual_seed(11)
        return make(), x


def curve(y: torch.Tensor) -> torch.Tensor:
    return (y**2).mean() + (y**3).mean()


def oracle_gradient(model, optimiser, x, **kwargs):
    """dL/ds of mean(y**2) + mean(y**3) at the optimiser's scores and mask, as one flat vector."""
    spec = optimiser.spec
    dense = copy.deepcopy(model)  # autograd.grad wants dense gradients; the optimiser also takes sparse ones
    for module in dense.modules():
        if isinstance(module, nn.Embedding):
            module.sparse = False
    grads = ste_gradient(
        dense,
        spec.split_weights(optimiser.frozen),
        spec.split(optimiser.scores.clone()),
        spec.split(optimiser.mask().float()),
        lambda f: curve(f(x)),
        **kwargs,
    )
    return torch.cat([g.reshape(-1) for g in grads.values()])


OPTIMISERS = {
    "adam": (lambda m, **k: MaskAdam(m, lr=0.07, **k), lambda s: torch.optim.Adam([s], lr=0.07)),
    "adam betas": (
        lambda m, **k: MaskAdam(m, lr=0.03, betas=(0.5, 0.9), eps=1e-3, **k),
        lambda s: torch.optim.Adam([s], lr=0.03, betas=(0.5, 0.9), eps=1e-3),
    ),
    "sgd": (lambda m, **k: MaskSGD(m, lr=2.0, **k), lambda s: torch.optim.SGD([s], lr=2.0)),
    "momentum": (
        lambda m, **k: MaskSGD(m, lr=0.5, momentum=0.9, **k),
        lambda s: torch.optim.SGD([s], lr=0.5, momentum=0.9),
    ),
}


def assert_live_mask(optimiser: MaskOptimizer, model: nn.Module) -> None:
    """The model holds w*m, and m is the draw that key, step and theta name."""
    spec = optimiser.spec
    key = derive(*optimiser._key, "step", optimiser.updates)
    bits = torch.from_numpy(tiled(key, spec.numel) < thresholds(optimiser.theta().double().numpy()))
    assert torch.equal(optimiser.mask(), bits)
    weights = spec.split_weights(optimiser.frozen)
    for name, m in spec.split(bits).items():
        assert torch.equal(model.get_parameter(name), weights[name] * m)
