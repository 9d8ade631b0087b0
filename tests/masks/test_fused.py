"""One step, three ways: compiled, in numpy, in torch operations as an accelerator runs them. The same bits."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from ways import needs_numba

from fedmask_flwr.masks import MaskAdam, MaskSGD, MaskSpec, derive, draw, fused, kernels, optim
from fedmask_flwr.masks.kernels import CPU_SLICE, native, probabilities, sample_, sample_torch_, sigmoid_

from .optim_cases import build, curve, randn

WAYS = ("compiled", "numpy", "torch")
MAKE = {
    "adam": lambda m, **k: MaskAdam(m, lr=0.3, betas=(0.7, 0.97), **k),
    "sgd": lambda m, **k: MaskSGD(m, lr=20.0, **k),
    "momentum": lambda m, **k: MaskSGD(m, lr=7.0, momentum=0.8, **k),
}


def way(patch: pytest.MonkeyPatch, name: str) -> None:
    """Switch to one of the ways."""
    if name == "compiled":
        assert fused.available()
        return
    patch.setenv("FEDMASK_JIT", "0")
    if name == "torch":
        patch.setattr(optim, "native", lambda x: x)
        patch.setattr(draw, "sample_", sample_torch_)
        patch.setattr(draw, "probabilities", lambda s: sigmoid_(s, torch.empty_like(s), s.new_empty(3, len(s))))


def bits(x: torch.Tensor) -> torch.Tensor:
    assert x.element_size() in (2, 4, 8)
    return x.detach().contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])


def network() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8 * 9, 40), nn.Linear(40, 3, bias=False))


def constant(model: nn.Module) -> nn.Module:
    """The model with weights of -c or +c in each layer, as a seed makes them."""
    with torch.no_grad():
        for i, p in enumerate(model.parameters()):
            p.copy_(torch.where(p < 0, -1.0, 1.0) * (0.1 + 0.2 * i))
    return model


def trained(name, make, steps=4, prepare=lambda m: m, seed=0, missing=(), granularity="weight", **settings_):
    """Everything that steps on given gradients leave behind, and what was used: tensors of bits."""
    with pytest.MonkeyPatch.context() as patch:
        way(patch, name)
        model = prepare(network())
        optimiser = MAKE[make](model, spec=MaskSpec.of(model, granularity=granularity), key=5, **settings_)
        params = optimiser.param_groups[0]["params"]
        rng = torch.Generator().manual_seed(seed)
        for _ in range(steps):
            for i, p in enumerate(params):
                noise = torch.randn(p.shape, generator=rng) * 10 ** (6 * torch.rand(p.shape, generator=rng) - 4)
                p.grad = None if i in missing else noise.to(p)
            optimiser.step()
        state = optimiser.state_dict()
        found = [state["scores"], *state["moments"].values(), optimiser.theta(), *params]
        assert torch.equal(optimiser.mask(), torch.cat([p.detach().flatten() != 0 for p in params])) or (
            granularity == "filter"
        )
        return [bits(x) for x in found]


def assert_same(ways, *args, **kwargs):
    first, *others = (trained(name, *args, **kwargs) for name in ways)
    for other in others:
        for a, b in zip(first, other, strict=True):
            assert torch.equal(a, b)
    return first


SUPPORT = torch.arange(8 * 27 + 72 * 40 + 120) % 3 > 0
SETTINGS = {
    "plain": {},
    "p": {"ste": "p", "sparsity": 3.0},
    "pruned": {"support": SUPPORT, "sparsity": 0.5},
    "threshold": {"draw": "threshold", "tau": 0.4, "theta": torch.linspace(0.1, 0.9, len(SUPPORT))},
    "threshold pruned": {"draw": "threshold", "support": SUPPORT, "ste": "p"},
    "missing": {"missing": (1,), "sparsity": 2.0},
    "all missing": {"missing": (0, 1, 2)},
    "channels last": {"prepare": lambda m: m.to(memory_format=torch.channels_last)},
    "half": {"prepare": lambda m: m.bfloat16()},
    "double": {"prepare": lambda m: m.double()},
    "constants": {"prepare": constant, "ste": "p", "sparsity": 3.0},
    "constants pruned": {"prepare": constant, "support": SUPPORT, "missing": (1,)},
    "constants by threshold": {"prepare": constant, "draw": "threshold", "tau": 0.4},
    "constants in another format": {"prepare": lambda m: constant(m).to(memory_format=torch.channels_last)},
    "constants in half": {"prepare": lambda m: constant(m).bfloat16()},
}


def test_weights_of_a_seed_are_held_as_a_byte_each():
    model = constant(network())
    optimiser = MaskSGD(model)
    held = optimiser._layers.frozen
    assert held.scales == pytest.approx([0.1, 0.5, 0.9])  # of the weights; biases are not masked
    assert {held.held(layer).dtype for layer in range(len(held))} == {torch.int8}
    before = torch.cat([p.detach().flatten() for p in constant(network()).parameters() if p.ndim > 1])
    assert torch.equal(bits(optimiser.frozen), bits(before))
    optimiser.restore()
    assert torch.equal(torch.cat([p.detach().flatten() for p in model.parameters() if p.ndim > 1]), before)
    others = network()
    with torch.no_grad():
        others[3].weight.fill_(2.0)[0, 0] = 0.0  # neither c nor -c
    assert MaskSGD(others)._layers.frozen.scales is None


@needs_numba
@pytest.mark.parametrize("make", MAKE)
@pytest.mark.parametrize("name", SETTINGS)
def test_three_ways_give_the_same_bits(name, make):
    first = assert_same(WAYS, make, **SETTINGS[name])
    assert first[0].unique().numel() > 1 or name == "all missing"


@pytest.mark.parametrize("make", MAKE)
@pytest.mark.parametrize("ste", ["identity", "p"])
def test_a_bit_a_filter_gives_the_same_bits_with_torch(make, ste):
    assert_same(("numpy", "torch"), make, granularity="filter", ste=ste, sparsity=0.2)


@needs_numba
@settings(max_examples=8, deadline=None)
@given(st.sampled_from(sorted(MAKE)), st.integers(0, 2**31), st.floats(1e-7, 0.4), st.floats(0, 1))
def test_any_gradients_give_the_same_bits(make, seed, clip, theta):
    assert_same(WAYS, make, seed=seed, clip=clip, theta=theta, steps=3)


FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=False)
SCORES = st.lists(st.floats(-16.125, 16.125, width=32), min_size=1, max_size=60)


@settings(max_examples=100, deadline=None)
@given(SCORES, st.data(), st.booleans(), st.sampled_from([0.0, 1e-7, 0.3]))
def test_formulas_give_the_same_bits(scores, data, power, penalty):
    n = len(scores)
    g, m = (torch.tensor(data.draw(st.lists(FLOATS, min_size=n, max_size=n))) for _ in range(2))
    rates = kernels.adam_rates(0.1, (0.9, 0.999), 1e-8, data.draw(st.integers(1, 10**6)))
    found = []
    for view in (native, lambda x: x):
        s, g_, m_, v, h = (view(x.clone()) for x in (torch.tensor(scores), g, m, m.abs(), g))
        room = view(torch.empty(4, n))
        with np.errstate(all="ignore"):
            kernels.score_gradient_(g_, s, room, power=power, penalty=penalty)
            ds = torch.as_tensor(g_).clone()
            kernels.adam_(s, g_, m_, v, room[0], rates)
            kernels.sgd_(s, h, m_, kernels.SgdRates(kernels.single(0.9), kernels.single(0.7)))
        found.append([bits(torch.as_tensor(x).nan_to_num(7.0)) for x in (ds, s, m_, v)])
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


@settings(max_examples=100, deadline=None)
@given(SCORES, st.integers(0, 2**31), st.integers(0, 2**32 - 100))
def test_samplers_give_the_same_bits(scores, seed, start):
    s = torch.tensor(scores)
    a, b = torch.empty_like(s), torch.empty_like(s)
    sample_(s, derive(seed), a, start)
    sample_torch_(s, derive(seed), b, start)
    assert torch.equal(a, b)


def test_sigmoid_is_within_a_few_units_in_the_last_place():
    s = torch.cat([torch.linspace(-16.2, 16.2, 2_000_001), randn(100_000) * 1e-3, torch.tensor([-0.0, 1e-40])])
    theta = probabilities(s).numpy()
    exact = 1 / (1 + np.exp(-s.double().numpy()))
    assert (np.abs(theta - exact) / np.spacing(exact.astype(np.float32))).max() < 2.5
    assert (theta > 0).all() and (theta < 1).all()
    assert probabilities(torch.tensor([0.0, -0.0])).tolist() == [0.5, 0.5]
    # It falls by at most one unit, and seldom.
    steps = np.diff(theta[:2_000_001])
    assert (steps >= -np.spacing(theta[1:2_000_001])).all()
    assert (steps < 0).mean() < 1e-3


def test_sigmoid_may_overwrite_its_scores():
    s = randn(CPU_SLICE + 5) * 4
    expected = probabilities(s)
    assert torch.equal(sigmoid_(s, s, s.new_empty(3, len(s))), expected)
    assert not torch.equal(s, randn(CPU_SLICE + 5) * 4)


@pytest.mark.parametrize("name", ["numpy", pytest.param("compiled", marks=needs_numba)])
def test_a_stale_graph_is_refused(name, monkeypatch):
    """Backward through a mask that a step has replaced would give a wrong gradient in silence."""
    way(monkeypatch, name)
    model, x = build("stack")
    optimiser = MaskAdam(model)
    loss = curve(model(x))
    loss.backward(retain_graph=True)
    optimiser.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@needs_numba
def test_layers_longer_than_a_block_and_a_slice():
    model = nn.Linear(CPU_SLICE // 2 + 3, 5, bias=False)
    c, found = randn(*model.weight.shape), []
    w = model.weight.detach().clone()
    for name in WAYS:
        with pytest.MonkeyPatch.context() as patch:
            way(patch, name)
            model.weight.data.copy_(w)
            optimiser = MaskAdam(model, lr=0.1, key=1)
            for _ in range(2):
                model.weight.grad = c.clone()
                optimiser.step()
            found.append((bits(optimiser.scores), bits(model.weight).clone()))
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))
