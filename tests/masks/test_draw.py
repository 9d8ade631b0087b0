from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles_masks import threshold_bit, train_positions
from torch import nn

from fedmask_flwr.masks import (
    MaskAdam,
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
from fedmask_flwr.masks.tiled import tiled

from .optim_cases import CASES, build, curve, oracle_gradient


@settings(max_examples=30)
@given(st.lists(st.floats(-16, 16, width=32), min_size=1, max_size=80), st.integers(0, 9))
def test_sampling_equals_its_definition(scores, seed):
    s = torch.tensor(scores)
    out = torch.empty_like(s)
    sample_(s, derive(seed), out)
    theta = probabilities(s)
    assert np.array_equal(out.numpy() == 1, tiled(derive(seed), len(s)) < thresholds(theta.double().numpy()))
    assert torch.allclose(theta, torch.sigmoid(s.double()).float(), rtol=1e-6, atol=1e-9)


def test_the_accelerators_sampler_agrees():
    s = torch.linspace(-16, 16, CHUNK + 7)
    a, b = torch.empty_like(s), torch.empty_like(s)
    sample_(s, derive(3), a)
    sample_torch_(s, derive(3), b)
    assert torch.equal(a, b)
    assert 0.4 < a.mean() < 0.6


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


def float32(low: float, high: float) -> st.SearchStrategy[float]:
    return st.floats(low, high, width=32)


POSITIONS = st.lists(
    st.tuples(
        float32(-4, 4),  # score
        st.sampled_from([-1.5, -0.25, 0.5, 2.0]),  # frozen weight
        st.sampled_from([-1.0, -0.5, 0.0, 0.25, 3.0]),  # dL/d(w*m)
        st.booleans(),  # on the support
    ),
    min_size=1,
    max_size=40,
)


@settings(max_examples=80, deadline=None)
@given(
    POSITIONS,
    st.sampled_from(["bernoulli", "threshold"]),
    float32(0.125, 0.875),
    st.sampled_from(["identity", "p"]),
    st.sampled_from(["adam", "sgd", "momentum"]),
    st.sampled_from([0.0, 0.5]),
)
def test_training_equals_the_oracle(positions, draw, tau, ste, solver, sparsity):
    s, w, grad, support = (list(column) for column in zip(*positions, strict=True))
    d, lr, steps = len(s), 0.3, 4
    model = nn.Linear(d, 1, bias=False)
    make = {"adam": MaskAdam, "sgd": MaskSGD, "momentum": lambda m, **k: MaskSGD(m, momentum=0.8, **k)}[solver]
    optimiser = make(
        model,
        lr=lr,
        ste=ste,
        sparsity=sparsity,
        frozen=torch.tensor(w),
        draw=draw,
        tau=tau,
        support=torch.tensor(support),
        clip=0.005,
    )
    optimiser.set_scores(torch.tensor(s))
    start, pruned = optimiser.scores.clone(), ~torch.tensor(support)
    for _ in range(steps):
        optimiser.zero_grad()
        (torch.tensor(grad) * model.weight).sum().backward()
        optimiser.step()
        assert torch.equal(model.weight.flatten(), optimiser.frozen * optimiser.mask())
    dloss = [a * b for a, b in zip(w, grad, strict=True)]
    expected = train_positions(
        s,
        dloss,
        support,
        steps,
        lr=lr,
        adam=solver == "adam",
        momentum=0.8 if solver == "momentum" else 0.0,
        ste=ste,
        sparsity=sparsity,
        bound=math.log(0.995 / 0.005),
    )
    assert torch.allclose(optimiser.scores, torch.tensor(expected), atol=1e-4)
    assert torch.equal(optimiser.scores[pruned].view(torch.int32), start[pruned].view(torch.int32))
    assert not any(bool(m[pruned].any()) for m in optimiser.state_dict()["moments"].values())
    assert not optimiser.mask()[pruned].any()
    assert torch.equal(optimiser.theta(), probabilities(optimiser.scores) * ~pruned)
    assert torch.equal(optimiser.support, ~pruned)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("granularity", ["weight", "filter"])
def test_a_thresholded_and_pruned_mask_trains_by_autograd_s_gradient(case, granularity):
    model, x = build(case)
    spec = MaskSpec.of(model, granularity=granularity)
    generator = torch.Generator().manual_seed(3)
    theta = torch.rand(spec.numel, generator=generator) * 0.8 + 0.1
    support = torch.rand(spec.numel, generator=generator) < 0.7
    optimiser = MaskSGD(model, spec, lr=1.0, theta=theta, draw="threshold", tau=0.4, support=support, sparsity=0.3)
    assert torch.equal(optimiser.mask(), (theta >= 0.4) & support)
    before = optimiser.scores.clone()
    expected = oracle_gradient(model, optimiser, x, sparsity=0.3) * support
    curve(model(x)).backward()
    optimiser.step()
    assert torch.allclose(before - optimiser.scores, expected, rtol=1e-4, atol=1e-6)
    assert expected.abs().max() > 1e-4


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(float32(-9, 9), st.booleans()), min_size=1, max_size=60), float32(0.0625, 0.9375))
def test_thresholding_equals_the_oracle_away_from_tau(positions, tau):
    s, support = (list(column) for column in zip(*positions, strict=True))
    model = nn.Linear(len(s), 1, bias=False)
    optimiser = MaskAdam(model, draw="threshold", tau=tau, support=torch.tensor(support))
    optimiser.set_scores(torch.tensor(s))
    expected = [threshold_bit(a, tau, kept) for a, kept in zip(s, support, strict=True)]
    clear = (torch.sigmoid(torch.tensor(s).double()) - tau).abs() > 1e-6
    assert torch.equal(optimiser.mask()[clear], torch.tensor(expected)[clear])
    mask, held = optimiser.mask(), model.weight.clone()
    optimiser.set_scores(optimiser.scores)
    assert torch.equal(optimiser.mask(), mask)
    assert torch.equal(model.weight, held)
    optimiser.set_theta(mask.float())  # the mask of a mask is that mask
    assert torch.equal(optimiser.mask(), mask)
    assert torch.equal(model.weight, held)


@pytest.mark.parametrize("tau", [0.5, 0.3, 0.77])
def test_the_threshold_is_one_float32(tau):
    cut = np.float32(math.log(tau / (1 - tau)))
    below, above = np.nextafter(cut, np.float32(-9)), np.nextafter(cut, np.float32(9))
    optimiser = MaskAdam(nn.Linear(4, 1, bias=False), draw="threshold", tau=tau)
    optimiser.set_scores(torch.from_numpy(np.array([below, cut, above, -0.0 if tau == 0.5 else above], np.float32)))
    assert optimiser.mask().tolist() == [False, True, True, True]
    optimiser.set_theta(tau)
    assert optimiser.mask().all()


def test_a_threshold_asks_no_key_and_step():
    masks = []
    for key in (1, 2):
        model, x = build("stack")
        optimiser = MaskSGD(model, key=key, draw="threshold", theta=torch.linspace(0.1, 0.9, 56), lr=0.0)
        masks.append(optimiser.mask())
        curve(model(x)).backward()
        optimiser.step()
        masks.append(optimiser.mask())
    assert all(torch.equal(m, masks[0]) for m in masks)
    assert masks[0].sum() == 28


def test_a_support_takes_bits_out_of_the_same_sample():
    support = torch.arange(56) % 3 != 0
    plain, full, part = (
        MaskAdam(build("stack")[0], key=4, support=s) for s in (None, torch.ones(56, dtype=torch.bool), support)
    )
    assert torch.equal(plain.mask(), full.mask())
    assert torch.equal(part.mask(), plain.mask() & support)
    assert not torch.equal(part.mask(), plain.mask())
    assert plain.support.all()
    support.zero_()
    assert part.support.sum() == 37  # a copy was taken


@pytest.mark.parametrize(
    ("settings_", "message"),
    [
        ({"draw": "gumbel"}, "draw must be"),
        ({"tau": 0.0}, "tau"),
        ({"tau": 1.0}, "tau"),
        ({"tau": math.nan, "draw": "threshold"}, "tau"),
        ({"tau": 0.05, "clip": 0.1, "draw": "threshold"}, "no bit can change"),
        ({"support": torch.ones(55, dtype=torch.bool)}, r"support must be \(56,\) bool"),
        ({"support": torch.ones(56)}, r"support must be \(56,\) bool"),
    ],
)
def test_draw_settings_are_checked(settings_, message):
    model, _ = build("stack")
    before = model[0].weight.clone()
    with pytest.raises(ValueError, match=message):
        MaskAdam(model, **settings_)
    assert torch.equal(model[0].weight, before)
