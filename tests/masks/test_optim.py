from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from fedmask_flwr.masks import MaskAdam, MaskSGD, MaskSpec, couple

from .optim_cases import CASES, assert_live_mask, build, curve, oracle_gradient, randn


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("granularity", ["weight", "filter"])
@pytest.mark.parametrize(("ste", "sparsity"), [("identity", 0.0), ("p", 0.0), ("p", 0.7)])
def test_gradient_equals_autograd(case, granularity, ste, sparsity):
    model, x = build(case)
    spec = MaskSpec.of(model, granularity=granularity)
    theta = torch.rand(spec.numel, generator=torch.Generator().manual_seed(1)) * 0.8 + 0.1
    optimiser = MaskSGD(model, spec, lr=1.0, theta=theta, key=5, ste=ste, sparsity=sparsity)
    before = optimiser.scores.clone()
    expected = oracle_gradient(model, optimiser, x, ste=ste, sparsity=sparsity)
    curve(model(x)).backward()
    optimiser.step()
    assert torch.allclose(before - optimiser.scores, expected, rtol=1e-4, atol=1e-6)
    assert expected.abs().max() > 1e-4


@pytest.mark.parametrize("ste", ["identity", "p"])
def test_gradient_of_a_linear_loss_is_closed_form(ste):
    """L = sum(c*m): dL/ds is c*theta*(1-theta), for "p" times theta."""
    model = nn.Linear(40, 3, bias=False)
    nn.init.ones_(model.weight)
    c, theta = randn(3, 40), torch.rand(120, generator=torch.Generator().manual_seed(2)) * 0.98 + 0.01
    optimiser = MaskSGD(model, lr=1.0, theta=theta, ste=ste)
    before = optimiser.scores.clone()
    (c * model.weight).sum().backward()
    optimiser.step()
    p = torch.sigmoid(before.double())
    expected = c.flatten() * p * (1 - p) * (p if ste == "p" else 1)
    assert torch.allclose((before - optimiser.scores).double(), expected, atol=2e-6)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("granularity", ["weight", "filter"])
def test_model_holds_the_mask_and_can_be_restored(case, granularity):
    model, x = build(case)
    original, _ = build(case)
    optimiser = MaskAdam(model, MaskSpec.of(model, granularity=granularity), key=9)
    assert_live_mask(optimiser, model)
    curve(model(x)).backward()
    optimiser.step()
    assert optimiser.updates == 1
    assert_live_mask(optimiser, model)
    optimiser.restore()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), original.parameters(), strict=True))


def test_theta_is_clipped_at_the_start():
    theta = torch.linspace(0, 1, 12)
    optimiser = MaskAdam(nn.Linear(4, 3, bias=False), theta=theta, clip=1e-3)
    assert torch.allclose(optimiser.theta(), theta.clamp(1e-3, 1 - 1e-3), atol=1e-6)
    assert torch.allclose(MaskAdam(nn.Linear(4, 3), theta=0.3).theta(), torch.tensor(0.3))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_bad_gradient_names_the_layer_and_changes_nothing(bad):
    model, x = build("stack")
    optimiser = MaskAdam(model)
    curve(model(x)).backward()
    model[2].weight.grad[1, 2] = bad
    before, mask = optimiser.state_dict(), optimiser.mask()
    with pytest.raises(ValueError, match=r"'2\.weight'"):
        optimiser.step()
    assert torch.equal(optimiser.scores, before["scores"])
    assert not optimiser.state_dict()["moments"]["m"].any()
    assert optimiser.updates == 0
    assert torch.equal(optimiser.mask(), mask)


def test_a_large_finite_gradient_is_no_error():
    model, _ = build("stack")
    optimiser = MaskSGD(model)
    for p in optimiser.param_groups[0]["params"]:
        p.grad = torch.full_like(p, 3e38)
    optimiser.step()
    assert optimiser.updates == 1


def test_no_gradient_counts_as_zero():
    model, _ = build("stack")
    optimiser = MaskSGD(model, sparsity=2.0, lr=1.0)
    optimiser.step()
    d = optimiser.spec.numel
    assert torch.allclose(optimiser.scores, torch.full((d,), -2.0 / d / 4))


@pytest.mark.parametrize(
    ("settings_", "message"),
    [
        ({"ste": "gumbel"}, "ste"),
        ({"clip": 0.0}, "clip"),
        ({"clip": 0.5}, "clip"),
        ({"lr": -1.0}, "lr"),
        ({"lr": math.nan}, "lr"),
        ({"sparsity": -1.0}, "sparsity"),
        ({"theta": 1.5}, r"\[0, 1\]"),
        ({"theta": math.nan}, r"\[0, 1\]"),
        ({"theta": torch.zeros(3)}, "theta must be a number or"),
        ({"frozen": torch.zeros(3)}, "frozen"),
        ({"betas": (1.0, 0.9)}, "betas"),
        ({"eps": 0.0}, "eps"),
    ],
)
def test_settings_are_checked(settings_, message):
    with pytest.raises(ValueError, match=message):
        MaskAdam(build("stack")[0], **settings_)


def test_coupled_filters_are_not_trained():
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    spec = couple(model, (4,)).spec()
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(ValueError, match="voted on, not trained"):
        MaskAdam(model, spec)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))
    assert all(p.requires_grad for p in model.parameters())


def test_frozen_weights_can_be_given():
    model, _ = build("stack")
    first = MaskAdam(model, key=1)
    second = MaskAdam(model, key=2, frozen=first.frozen)
    assert torch.equal(second.frozen, first.frozen)
    assert_live_mask(second, model)


def test_schedulers_closures_and_zero_grad():
    model, x = build("stack")
    optimiser = MaskAdam(model, lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimiser, 1, 0.5)

    def closure():
        optimiser.zero_grad()
        loss = curve(model(x))
        loss.backward()
        return loss.item()

    expected = curve(model(x)).item()
    assert optimiser.step(closure) == expected
    assert torch.allclose(optimiser.scores.abs().max(), torch.tensor(0.1), rtol=1e-3)
    scheduler.step()
    assert optimiser.param_groups[0]["lr"] == 0.05
    optimiser.zero_grad()
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes(dtype):
    model = nn.Linear(8, 4, bias=False).to(dtype)
    w = model.weight.detach().float().flatten().clone()
    optimiser = MaskSGD(model, lr=0.1)
    (model.weight * 2).sum().backward()
    optimiser.step()
    assert torch.equal(model.weight.flatten().float(), (w * optimiser.mask()).to(dtype).float())
    assert torch.allclose(optimiser.scores, -0.1 * 2 * w / 4)


def test_grad_scaler_skips_and_unscales():
    model, x = build("stack")
    optimiser = MaskSGD(model, lr=1.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    expected = oracle_gradient(model, optimiser, x)
    scaler.scale(curve(model(x))).backward()
    scaler.step(optimiser)
    scaler.update()
    assert torch.allclose(-optimiser.scores, expected, rtol=1e-4, atol=1e-6)
    optimiser.zero_grad()
    scaler.scale(curve(model(x)) * math.inf).backward()
    scaler.step(optimiser)
    assert optimiser.updates == 1


def test_channels_last_and_eager_compile():
    x = randn(2, 4, 7, 7)
    plain, _ = build("conv2d")
    other, _ = build("conv2d")
    compiled = torch.compile(other.to(memory_format=torch.channels_last), backend="eager")
    a, b = MaskAdam(plain, key=1), MaskAdam(compiled, key=1)
    for _ in range(3):
        for model, optimiser in ((plain, a), (compiled, b)):
            optimiser.zero_grad()
            curve(model(x)).backward()
            optimiser.step()
    assert torch.allclose(a.scores, b.scores, atol=1e-5)
    assert a.spec == b.spec


def test_tied_weights_get_one_mask_and_both_gradients():
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(3, 3, bias=False)
            self.b = nn.Linear(3, 3, bias=False)
            self.b.weight = self.a.weight

        def forward(self, x):
            return self.b(torch.tanh(self.a(x)))

    model, x = Tied(), randn(4, 3)
    optimiser = MaskSGD(model, lr=1.0, key=2)
    expected = oracle_gradient(model, optimiser, x)
    curve(model(x)).backward()
    optimiser.step()
    assert torch.allclose(-optimiser.scores, expected, rtol=1e-4, atol=1e-6)
    assert model.a.weight is model.b.weight
