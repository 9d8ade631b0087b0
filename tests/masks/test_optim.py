from __future__ import annotations

import copy
import io
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles_masks import ste_gradient
from torch import nn

from fedmask_flwr.masks import (
    MaskAdam,
    MaskOptimizer,
    MaskSGD,
    MaskSpec,
    bernoulli,
    derive,
    frozen_weights,
    mask_values,
    thresholds,
    write_mask,
)
from fedmask_flwr.masks.kernels import probabilities, sample_, sample_torch_
from fedmask_flwr.masks.keyed import CHUNK
from fedmask_flwr.models import backbone


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


def curve(y: torch.Tensor) -> torch.Tensor:
    return (y**2).mean() + (y**3).mean()


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


def assert_live_mask(optimiser: MaskOptimizer, model: nn.Module) -> None:
    """The model holds w*m, and m is the draw that key, step and theta name."""
    spec = optimiser.spec
    key = derive(*optimiser._key, "step", optimiser.updates)
    bits = torch.from_numpy(bernoulli(key, thresholds(optimiser.theta().double().numpy())))
    assert torch.equal(optimiser.mask(), bits)
    weights = spec.split_weights(optimiser.frozen)
    for name, m in spec.split(bits).items():
        assert torch.equal(model.get_parameter(name), weights[name] * m)


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


@settings(max_examples=30)
@given(st.lists(st.floats(-16, 16, width=32), min_size=1, max_size=80), st.integers(0, 9))
def test_sampling_equals_its_definition(scores, seed):
    s = torch.tensor(scores)
    out = torch.empty_like(s)
    sample_(s, derive(seed), out)
    theta = probabilities(s)
    assert np.array_equal(out.numpy() == 1, bernoulli(derive(seed), thresholds(theta.double().numpy())))
    assert torch.allclose(theta, torch.sigmoid(s.double()).float(), rtol=1e-6, atol=1e-9)


def test_the_accelerators_sampler_agrees():
    # theta may differ in its last place, which moves a bit with probability 2**-23 or so.
    s = torch.linspace(-16, 16, CHUNK + 7)
    a, b = torch.empty_like(s), torch.empty_like(s)
    sample_(s, derive(3), a)
    sample_torch_(s, derive(3), b)
    assert torch.equal(a, b)
    assert 0.4 < a.mean() < 0.6


def masks_of(key, steps: int = 4) -> list[torch.Tensor]:
    model, x = build("stack")
    optimiser = MaskAdam(model, key=key)
    out = [optimiser.mask()]
    for _ in range(steps):
        optimiser.zero_grad()
        curve(model(x)).backward()
        optimiser.step()
        out.append(optimiser.mask())
    return out


def test_replay():
    a, b = masks_of(derive(1, "train", 2, 3)), masks_of(derive(1, "train", 2, 3))
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    other = masks_of(derive(1, "train", 2, 4))
    assert not any(torch.equal(x, y) for x, y in zip(a, other, strict=True))
    assert len({tuple(m.tolist()) for m in a}) == len(a)
    assert torch.equal(masks_of(7)[0], masks_of(derive(7))[0])


def test_global_generator_is_neither_read_nor_written():
    torch.manual_seed(1)
    before = torch.get_rng_state().clone()
    a = masks_of(3)
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(2)
    assert all(torch.equal(x, y) for x, y in zip(a, masks_of(3), strict=True))


@pytest.mark.parametrize("name", OPTIMISERS)
def test_resume_is_exact(name):
    make, _ = OPTIMISERS[name]

    def run(model, optimiser, x, steps):
        for _ in range(steps):
            optimiser.zero_grad()
            curve(model(x)).backward()
            optimiser.step()

    model, x = build("stack")
    whole = make(model, key=4)
    run(model, whole, x, 2)
    file = io.BytesIO()
    torch.save(whole.state_dict(), file)
    file.seek(0)
    run(model, whole, x, 3)
    again, _ = build("stack")
    resumed = make(again, key=99)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    assert_live_mask(resumed, again)
    run(again, resumed, x, 3)
    left, right = whole.state_dict(), resumed.state_dict()
    assert left["moments"].keys() == right["moments"].keys()
    for a, b in (
        (left["scores"], right["scores"]),
        *((left["moments"][k], right["moments"][k]) for k in left["moments"]),
    ):
        assert torch.equal(a, b)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    assert (left["step"], left["key"], left["param_groups"]) == (5, right["key"], right["param_groups"])


def test_state_is_a_copy_and_is_checked():
    model, x = build("stack")
    optimiser = MaskAdam(model)
    state = optimiser.state_dict()
    before = state["scores"].clone()
    curve(model(x)).backward()
    optimiser.step()
    assert torch.equal(state["scores"], before)
    other, _ = build("linear")
    with pytest.raises(ValueError, match="another mask"):
        MaskAdam(other).load_state_dict(state)
    fresh, _ = build("stack")
    with pytest.raises(ValueError, match="another kind"):
        MaskSGD(fresh).load_state_dict(state)


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


def test_momentum_and_groups_are_checked():
    with pytest.raises(ValueError, match="momentum"):
        MaskSGD(build("stack")[0], momentum=1.0)
    model, _ = build("stack")
    with pytest.raises(ValueError, match="one group"):
        MaskAdam(model).add_param_group({"params": [model[0].bias]})
    with pytest.raises(TypeError, match="abstract"):
        MaskOptimizer(model)  # type: ignore[abstract]


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


@pytest.mark.parametrize("granularity", ["weight", "filter"])
def test_write_mask(granularity):
    model, _ = build("conv2d")
    spec = MaskSpec.of(model, granularity=granularity)
    w = frozen_weights(model, spec)
    values = torch.rand(spec.numel, generator=torch.Generator().manual_seed(0))
    write_mask(model, spec, w, values)
    view = (6, 1, 1, 1) if granularity == "filter" else (6, 2, 3, 3)
    assert torch.equal(model.weight, w.view(6, 2, 3, 3) * values.view(view))
    write_mask(model, spec, w, values > 0.5)
    assert torch.equal(model.weight, w.view(6, 2, 3, 3) * (values > 0.5).view(view))
    for bad in ((w[1:], values), (w, values[1:])):
        with pytest.raises(ValueError, match="expected a flat vector"):
            write_mask(model, spec, *bad)


def test_mask_values():
    theta = np.array([0.0, 0.2, 0.5, 0.9, 1.0])
    assert mask_values(theta, "threshold").tolist() == [False, False, True, True, True]
    assert mask_values(theta, "expected").dtype == np.float32
    key = derive("eval")
    assert np.array_equal(mask_values(theta, "sampled", key), bernoulli(key, thresholds(theta)))
    with pytest.raises(ValueError, match="needs a key"):
        mask_values(theta, "sampled")
    with pytest.raises(ValueError, match="mode must be"):
        mask_values(theta, "mean")  # type: ignore[arg-type]


def test_it_learns():
    """A random network with no trained weight separates four Gaussian blobs by its mask alone."""
    y = torch.arange(400) % 4
    x = 4.0 * torch.eye(4, 10)[y] + randn(400, 10)
    for make in (lambda m: MaskAdam(m, key=1), lambda m: MaskSGD(m, lr=30.0, momentum=0.9, key=1)):
        model = backbone("mlp", "seed:1", (10,), 4, hidden=(64,)).build()
        optimiser = make(model)
        spec, w = optimiser.spec, optimiser.frozen.clone()
        before = (model(x).argmax(1) == y).float().mean()
        for _ in range(120):
            optimiser.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimiser.step()
        assert torch.equal(optimiser.frozen, w)
        for mode in ("sampled", "threshold", "expected"):
            values = mask_values(optimiser.theta().double().numpy(), mode, derive("test"))
            write_mask(model, spec, w, torch.from_numpy(values))
            assert (model(x).argmax(1) == y).float().mean() > max(0.95, float(before) + 0.2), mode
