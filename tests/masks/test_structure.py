from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles_weit import CASES, SlowWeit, best_by_search, build, make, random_masks, random_parts, train
from torch import nn

from fedmask_flwr.masks import Structure, compose, settle


@given(st.sampled_from(CASES), st.sampled_from([0.0, 0.3, 0.8, 1.0]), st.integers(0, 5))
def test_order_is_row_major_over_the_true_positions(case, density, seed):
    model, _ = build(case)
    masks = random_masks(model, density, seed)
    structure = Structure.of(model, masks)
    values = [torch.randn(s, generator=torch.Generator().manual_seed(i)) for i, s in enumerate(structure.shapes)]
    assert structure.names == tuple(masks)
    packed = [float(t[tuple(i)]) for t, mask in zip(values, masks.values(), strict=True) for i in mask.nonzero()]
    assert structure.gather(values).tolist() == packed
    first, columns = 0, []
    for mask in masks.values():
        columns += [first + int(index[0]) for index in mask.nonzero()]
        first += mask.shape[0]
    assert structure.column.tolist() == columns
    assert structure.column.dtype == torch.int64 and structure.columns == first
    assert structure.lengths().tolist() == [columns.count(o) for o in range(first)]
    assert structure.sizes == tuple(int(mask.sum()) for mask in masks.values())
    assert structure.numel == sum(structure.sizes)
    assert structure.dense_numel == sum(mask.numel() for mask in masks.values())
    assert [part.stop - part.start for part in structure.kind_slices()] == list(structure.sizes)
    assert structure.kind_slices()[-1].stop == structure.numel


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("density", [0.5, 1.0])
def test_write_then_gather_is_the_identity_and_leaves_the_rest(case, density):
    model, _ = build(case)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    masks = random_masks(model, density, 3)
    structure = Structure.of(model, masks)
    values = torch.randn(structure.numel)
    structure.write(model, values)
    assert torch.equal(structure.gather(structure.params(model)), values)
    for name, p in model.named_parameters():
        outside = ~masks[name] if name in masks else torch.ones_like(p, dtype=torch.bool)
        assert torch.equal(p[outside], before[name][outside])


@pytest.mark.parametrize("density", [0.5, 1.0])
def test_weights_that_are_not_contiguous(density):
    model, _ = build("conv")
    model = model.to(memory_format=torch.channels_last)
    structure = Structure.of(model, random_masks(model, density, 3))
    assert not all(p.is_contiguous() for p in structure.params(model))
    values = torch.randn(structure.numel)
    structure.write(model, values)
    assert torch.equal(structure.gather(structure.params(model)), values)


def test_a_missing_gradient_counts_as_zero():
    model, _ = build("mlp")
    structure = Structure.of(model)
    first, second = structure.kind_slices()
    out = torch.full((structure.numel,), 7.0)
    assert structure.gather([None, torch.ones(structure.shapes[1])], out=out) is out
    assert not out[first].any() and bool((out[second] == 1).all())


def test_local_weights_are_no_kinds_and_compiling_changes_no_name():
    model, _ = build("mlp")
    assert Structure.of(model, local=["2.weight", "0.bias"]).names == ("0.weight",)
    compiled = nn.Module()
    compiled.add_module("_orig_mod", model)  # As `torch.compile` names it, without the minute that it takes.
    assert Structure.of(compiled).names == ("0.weight", "2.weight")
    assert Structure.of(model).params(compiled)[1] is model[2].weight


def test_misfits_are_refused():
    model, _ = build("mlp")
    wide = torch.ones(9, 9, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"no parameter '9\.weight'"):
        Structure.of(model, local=["9.weight"])
    with pytest.raises(ValueError, match=r"no kind '0\.bias'"):
        Structure.of(model, {"0.bias": wide})
    with pytest.raises(ValueError, match="must be bool with shape"):
        Structure.of(model, {"0.weight": wide})
    with pytest.raises(ValueError, match="must be bool with shape"):
        Structure.of(model, {"0.weight": torch.ones_like(model[0].weight)})
    with pytest.raises(ValueError, match="nothing to decompose"):
        Structure.of(nn.BatchNorm1d(3))
    structure = Structure.of(model)
    with pytest.raises(ValueError, match=r"has no parameter '0\.weight'"):
        structure.params(nn.BatchNorm1d(3))
    with pytest.raises(ValueError, match="the structure is for"):
        structure.params(nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 2)))
    with pytest.raises(ValueError, match="for each of 2 kinds"):
        structure.gather([None])
    with pytest.raises(ValueError, match="has shape"):
        structure.gather([None, torch.zeros(1)])
    with pytest.raises(ValueError, match="packed values"):
        structure.write(model, torch.zeros(structure.numel + 1))


@settings(max_examples=30)
@given(
    st.integers(0, 500), st.integers(0, 3), st.sampled_from([(1e-4, 100.0), (0.1, 2.0), (0.0, 3.0)]), st.booleans()
)
def test_settling_is_the_minimum_of_the_penalty(seed, tasks, penalties, raw):
    model, _ = build("mlp", seed)
    structure = Structure.of(model, random_masks(model, 0.6, seed))
    p = random_parts(structure, tasks, 0, seed)
    lambda1, lambda2 = penalties
    got = settle(structure, p.base, p.snap_base, p.old_masks, p.snap_adaptive, lambda1, lambda2, raw_masks=raw)
    assert got.shape == p.old_adaptive.shape
    masks = p.old_masks if raw else torch.sigmoid(p.old_masks)
    pull = ((p.base - p.snap_base) * masks[:, structure.column]).double()

    def loss(A):
        return lambda1 * A.abs() + lambda2 / 2 * (pull + A - p.snap_adaptive) ** 2

    best = best_by_search(loss, p.snap_adaptive, 2.0)
    assert torch.allclose(got.double(), best, atol=1e-6)
    # Old weights stay where they were, to within lambda1/lambda2 and rounding.
    assert not tasks or (pull + got - p.snap_adaptive).abs().max() <= lambda1 / lambda2 + 1e-6
    if lambda1 == 0.1 and tasks:
        assert bool((got == 0).any())


def test_settling_without_an_anchor_changes_nothing():
    model, _ = build("mlp")
    structure = Structure.of(model)
    p = random_parts(structure, 2, 0, 0)
    got = settle(structure, p.base, p.snap_base, p.old_masks, p.snap_adaptive, 0.1, 0.0)
    assert torch.equal(got, p.snap_adaptive) and got is not p.snap_adaptive
    with pytest.raises(ValueError, match="penalties"):
        settle(structure, p.base, p.snap_base, p.old_masks, p.snap_adaptive, -1.0, 0.0)


@given(st.sampled_from(CASES), st.sampled_from([0.2, 1.0]), st.integers(0, 3), st.integers(0, 50))
def test_the_model_holds_theta(case, density, entries, seed):
    model, x, masks, parts, optimiser = make(case, density, 1, entries, seed)
    twin, _ = build(case, seed)
    slow = SlowWeit(twin.double(), masks, parts)
    for name, theta in slow.theta().items():
        assert torch.allclose(dict(model.named_parameters())[name].double(), theta, atol=1e-6)
    train(model, optimiser, x)
    p, structure = optimiser.parts, optimiser.structure
    theta = compose(structure, p.base, p.mask, p.adaptive, p.alpha, p.knowledge)
    assert torch.equal(structure.gather(structure.params(model)), theta)
