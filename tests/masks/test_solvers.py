from __future__ import annotations

import pytest
import torch
from torch import nn

from fedmask_flwr.masks import MaskAdam, MaskOptimizer, MaskSGD, MaskSpec, derive, mask_values, write_mask
from fedmask_flwr.masks.keyed import CHUNK
from fedmask_flwr.models import backbone

from .optim_cases import OPTIMISERS, assert_live_mask, build, curve, oracle_gradient, randn


@pytest.mark.parametrize("name", OPTIMISERS)
@pytest.mark.parametrize("granularity", ["weight", "filter"])
def test_trajectory_equals_torch(name, granularity):
    ours, theirs = OPTIMISERS[name]
    model, x = build("stack")
    optimiser = ours(model, spec=MaskSpec.of(model, granularity=granularity), key=3, sparsity=0.1)
    scores = optimiser.scores.clone().requires_grad_()
    reference = theirs(scores)
    for _ in range(12):
        scores.grad = oracle_gradient(model, optimiser, x, sparsity=0.1)
        reference.step()
        optimiser.zero_grad()
        curve(model(x)).backward()
        optimiser.step()
        assert torch.allclose(optimiser.scores, scores, rtol=1e-4, atol=1e-5)
    assert (scores.abs() > 1e-2).float().mean() > 0.5


def test_steps_over_many_chunks():
    """Slices of the flat vector meet without a seam."""
    model = nn.Linear(CHUNK // 2 + 3, 5, bias=False)
    optimiser = MaskAdam(model, lr=0.1, key=1)
    scores = optimiser.scores.clone().requires_grad_()
    reference = torch.optim.Adam([scores], lr=0.1)
    c = randn(*model.weight.shape)
    for _ in range(3):
        p = torch.sigmoid(scores.detach())
        scores.grad = c.flatten() * optimiser.frozen * p * (1 - p)
        reference.step()
        optimiser.zero_grad()
        (c * model.weight).sum().backward()
        optimiser.step()
    assert torch.allclose(optimiser.scores, scores, rtol=1e-4, atol=1e-5)
    assert_live_mask(optimiser, model)


def test_scores_stay_finite_and_alive():
    model = nn.Linear(4, 4, bias=False)
    optimiser = MaskSGD(model, lr=1e6, clip=0.01)
    sign = torch.where(torch.arange(16).view(4, 4) % 2 == 0, 1.0, -1.0) / optimiser.frozen.view(4, 4)
    (sign * model.weight).sum().backward()
    optimiser.step()
    assert torch.allclose(optimiser.theta(), torch.tensor([0.01, 0.99]).repeat(8))
    optimiser.zero_grad()
    (-sign * model.weight).sum().backward()
    optimiser.step()
    assert torch.allclose(optimiser.theta(), torch.tensor([0.99, 0.01]).repeat(8))


def test_momentum_and_groups_are_checked():
    with pytest.raises(ValueError, match="momentum"):
        MaskSGD(build("stack")[0], momentum=1.0)
    model, _ = build("stack")
    with pytest.raises(ValueError, match="one group"):
        MaskAdam(model).add_param_group({"params": [model[0].bias]})
    with pytest.raises(TypeError, match="abstract"):
        MaskOptimizer(model)  # type: ignore[abstract]


def test_it_learns():
    """A random network with no trained weight separates four Gaussian blobs by its mask alone."""
    y = torch.arange(400) % 4
    x = 4.0 * torch.eye(4, 10)[y] + randn(400, 10)
    support = torch.arange(64 * 14) % 7 > 1
    every = ("sampled", "threshold", "expected")
    for make, modes in (
        (lambda m: MaskAdam(m, key=1), every),
        (lambda m: MaskSGD(m, lr=30.0, momentum=0.9, key=1), every),
        (lambda m: MaskAdam(m, draw="threshold", support=support), ("threshold",)),
    ):
        model = backbone("mlp", "seed:1", (10,), 4, hidden=(64,)).build()
        optimiser = make(model)
        spec, w = optimiser.spec, optimiser.frozen.clone()
        before = (model(x).argmax(1) == y).float().mean()
        for _ in range(120):
            optimiser.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimiser.step()
        assert torch.equal(optimiser.frozen, w)
        for mode in modes:
            values = mask_values(optimiser.theta().double().numpy(), mode, derive("test"))
            write_mask(model, spec, w, torch.from_numpy(values))
            assert (model(x).argmax(1) == y).float().mean() > max(0.95, float(before) + 0.2), mode
