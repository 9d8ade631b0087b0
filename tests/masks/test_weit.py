from __future__ import annotations

from dataclasses import fields, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles_weit import (
    CASES,
    assert_same,
    build,
    curve,
    fast_and_slow,
    locals_of,
    make,
    random_masks,
    random_parts,
    train,
)
from torch import nn

from fedmask_flwr.masks import Parts, Structure, WeitOptimizer

MODES = ("gradient", "exact", "freeze")


@settings(max_examples=60)
@given(
    case=st.sampled_from(CASES),
    density=st.sampled_from([0.2, 0.6, 1.0]),
    tasks=st.integers(0, 3),
    entries=st.integers(0, 3),
    seed=st.integers(0, 1000),
    retroactive=st.sampled_from(MODES),
    raw_masks=st.booleans(),
    lambda1=st.sampled_from([0.0, 1e-2]),
    lambda2=st.sampled_from([0.0, 0.7]),
    lambda_mask=st.sampled_from([0.0, 0.3]),
    name=st.sampled_from(["adam", "sgd"]),
)
def test_steps_are_those_of_autograd(**case):
    _, pairs = fast_and_slow(3, **case)
    # Where a gradient is a rounding error of zero, Adam's first steps are noise of up to lr = 1e-3.
    assert_same(pairs)


@pytest.mark.parametrize("retroactive", MODES)
@pytest.mark.parametrize("name", ["adam", "sgd"])
def test_ten_steps_with_the_strong_penalty_of_the_paper(retroactive, name):
    _, pairs = fast_and_slow(10, tasks=3, density=0.5, retroactive=retroactive, name=name, lambda2=100.0)
    assert_same(pairs, atol=5e-5)


@pytest.mark.parametrize("case", CASES)
def test_the_task_reaches_every_part(case):
    """With all penalties at zero, one SGD step moves what has a gradient of CE, and nothing else."""
    before = make(case, density=0.7, retroactive="gradient")[3]
    free = {"lambda1": 0.0, "lambda2": 0.0, "name": "sgd", "lr": 1.0, "retroactive": "gradient"}
    model, x, _, _, optimiser = make(case, density=0.7, **free)
    held = {n: p.detach().clone() for n, p in locals_of(model).items()}
    train(model, optimiser, x)
    moved = {f.name: (getattr(optimiser.parts, f.name) - getattr(before, f.name)).abs() for f in fields(Parts)}
    assert all(moved[name].max() > 1e-3 for name in ("base", "adaptive", "mask", "alpha"))
    assert bool((moved["alpha"] > 0).all())
    assert bool((moved["mask"][optimiser.structure.lengths() > 0] > 0).float().mean() > 0.9)
    assert all(not moved[name].any() for name in moved if name not in ("base", "adaptive", "mask", "alpha"))
    assert all((p - held[n]).abs().max() > 1e-3 for n, p in locals_of(model).items())


def test_old_parts_move_by_the_penalties_alone():
    first = make(tasks=2, seed=3)[3]
    outcomes = []
    for scale in (1.0, 50.0):
        model, x, _, _, optimiser = make(tasks=2, seed=3, retroactive="gradient", name="sgd", lambda2=5.0)
        (scale * curve(model(x))).backward()
        optimiser.step()
        outcomes.append(optimiser.parts)
    assert torch.equal(outcomes[0].old_adaptive, outcomes[1].old_adaptive)
    assert not torch.allclose(outcomes[0].base, outcomes[1].base)
    assert (outcomes[0].old_adaptive - first.old_adaptive).abs().median() > 1e-5
    # Once B has moved, the old parts follow: the drift of B*sigma(m_i) + A_i is smaller than that of B alone.
    parts = replace(first, snap_base=first.base, snap_adaptive=first.old_adaptive)
    model, x = build("mlp", 3)
    structure = Structure.of(model)
    optimiser = WeitOptimizer(model, structure, parts, retroactive="gradient", name="sgd", lr=5e-3, lambda1=0.0)
    train(model, optimiser, x, 50)
    now, gates = optimiser.parts, torch.sigmoid(first.old_masks)[:, structure.column]
    drift = (now.base - first.base) * gates
    assert drift.abs().max() > 1e-3
    assert (drift + now.old_adaptive - first.old_adaptive).norm() < 0.5 * drift.norm()


@pytest.mark.parametrize("retroactive", ["exact", "freeze"])
def test_old_parts_are_constants_in_the_other_modes(retroactive):
    model, x, _, parts, optimiser = make(retroactive=retroactive)
    train(model, optimiser, x, 3)
    assert torch.equal(optimiser.parts.old_adaptive, parts.old_adaptive)


def test_freezing_holds_the_base_back_and_exact_leaves_it_free():
    moved = {}
    for retroactive in MODES:
        model, x = build("mlp")
        structure = Structure.of(model)
        first = random_parts(structure, 2, 0, 0)
        first = replace(first, snap_base=first.base, snap_adaptive=first.old_adaptive)
        optimiser = WeitOptimizer(model, structure, first, name="sgd", lr=5e-3, retroactive=retroactive)
        train(model, optimiser, x, 60)
        moved[retroactive] = (optimiser.parts.base - first.base).norm()
    assert moved["freeze"] < 0.2 * moved["exact"]
    assert moved["freeze"] < moved["gradient"] < moved["exact"]


@pytest.mark.parametrize("retroactive", MODES)
def test_without_lambda2_nothing_anchors(retroactive):
    results = []
    for tasks in (0, 3):
        model, x = build("mlp")
        structure = Structure.of(model)
        parts = random_parts(structure, 0, 0, 1)
        old = random_parts(structure, tasks, 0, 2)
        parts = replace(parts, **{k: getattr(old, k) for k in ("old_adaptive", "old_masks", "snap_adaptive")})
        optimiser = WeitOptimizer(model, structure, parts, retroactive=retroactive, lambda2=0.0)
        train(model, optimiser, x, 3)
        results.append(optimiser.parts)
    for name in ("base", "adaptive", "mask"):
        assert torch.equal(getattr(results[0], name), getattr(results[1], name))


def test_weights_outside_the_structure_never_change():
    original, _ = build("conv")
    model, x, masks, _, optimiser = make("conv", density=0.4, retroactive="gradient")
    train(model, optimiser, x, 4)
    then = dict(original.named_parameters())
    for name, mask in masks.items():
        p = dict(model.named_parameters())[name]
        assert torch.equal(p[~mask], then[name][~mask])
        assert not bool((p[mask] == then[name][mask]).any())


@pytest.mark.parametrize("retroactive", MODES)
@pytest.mark.parametrize("name", ["adam", "sgd"])
def test_a_restart_goes_on_bit_for_bit(retroactive, name):
    settings = {"retroactive": retroactive, "name": name, "density": 0.6}
    model, x, _, _, optimiser = make(**settings)
    train(model, optimiser, x, 3)
    parts, moments = optimiser.parts, optimiser.moments()
    biases = {n: p.detach().clone() for n, p in locals_of(model).items()}
    assert bool(moments) == (name == "adam")
    train(model, optimiser, x, 3)

    again, _ = build("mlp", seed=0)
    with torch.no_grad():
        for n, p in locals_of(again).items():
            p.copy_(biases[n])
    structure = optimiser.structure
    local = list(locals_of(again).values())
    other = WeitOptimizer(again, structure, parts, local=local, retroactive=retroactive, name=name, moments=moments)
    assert moments.keys() == other.moments().keys()
    assert all((moments[k] == v).all() and moments[k].dtype == v.dtype for k, v in other.moments().items())
    train(again, other, x, 3)
    for f in fields(Parts):
        assert torch.equal(getattr(optimiser.parts, f.name), getattr(other.parts, f.name)), f.name
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    # Without the moments Adam takes other steps, so they are what makes the restart exact.
    if name == "adam":
        fresh = WeitOptimizer(again, structure, parts, local=local, retroactive=retroactive)
        train(again, fresh, x, 3)
        assert not torch.equal(fresh.parts.base, other.parts.base)


def test_moments_are_flat_arrays_with_stable_names():
    model, x, _, _, optimiser = make(retroactive="gradient", entries=0)
    assert optimiser.moments() == {}
    train(model, optimiser, x, 2)
    names = ("base", "adaptive", "mask", "old_adaptive", "local.0.bias", "local.2.bias")
    wanted = {f"{n}.{f}" for n in names for f in ("step", "exp_avg", "exp_avg_sq")}
    moments = optimiser.moments()
    assert set(moments) == wanted
    assert all(
        a.ndim == 1 and a.dtype == ("int64" if n.endswith("step") else "float32") for n, a in moments.items()
    )
    assert moments["base.step"].tolist() == [2]


def test_parts_are_copies():
    model, x, _, given, optimiser = make(retroactive="gradient")
    first = optimiser.parts
    kept = {f.name: getattr(first, f.name).clone() for f in fields(Parts)}
    train(model, optimiser, x, 2)
    for name, value in kept.items():
        assert torch.equal(getattr(first, name), value) and torch.equal(getattr(given, name), value)
    assert not torch.equal(optimiser.parts.old_adaptive, first.old_adaptive)


def test_a_scheduler_reaches_the_update():
    model, x, _, parts, optimiser = make(lr=0.1, name="sgd")
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda epoch: 0.0 if epoch else 1.0)
    biases = [p.detach().clone() for p in locals_of(model).values()]
    train(model, optimiser, x)
    scheduler.step()
    first = optimiser.parts
    assert not torch.equal(first.base, parts.base)
    assert any(not torch.equal(a, b) for a, b in zip(biases, locals_of(model).values(), strict=True))
    biases = [p.detach().clone() for p in locals_of(model).values()]
    train(model, optimiser, x)
    assert torch.equal(optimiser.parts.base, first.base) and torch.equal(optimiser.parts.mask, first.mask)
    assert all(torch.equal(a, b) for a, b in zip(biases, locals_of(model).values(), strict=True))


def test_zero_grad_closures_and_missing_gradients():
    model, x, _, _, optimiser = make()

    def closure():
        optimiser.zero_grad()
        loss = curve(model(x))
        loss.backward()
        return loss

    assert optimiser.step(closure).item() > 0
    assert all(p.grad is not None for p in model.parameters())
    optimiser.zero_grad()
    assert all(p.grad is None for p in model.parameters())
    # Gradient zero of CE: only the L1 term on A is left, for SGD.
    model, _, _, parts, optimiser = make(name="sgd", lr=1.0, lambda1=0.25)
    optimiser.step()
    assert torch.equal(optimiser.parts.base, parts.base)
    assert torch.equal(optimiser.parts.adaptive, parts.adaptive - 0.25 * parts.adaptive.sign())


def test_other_parameters_are_left_as_they_are():
    model, x = build("conv")
    for p in model.parameters():
        p.requires_grad_(False)
    structure = Structure.of(model)
    optimiser = WeitOptimizer(model, structure, random_parts(structure, 0, 0, 0), local=[model[4].bias])
    train(model, optimiser, x, 2)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {"0.weight", "4.weight", "4.bias"}
    original, _ = build("conv")
    assert torch.equal(model[1].weight, original[1].weight) and torch.equal(model[1].bias, original[1].bias)
    assert not torch.equal(model[4].bias, original[4].bias)


def test_training_learns():
    model, x = build("mlp")
    structure = Structure.of(model, random_masks(model, 0.7, 1))
    parts = random_parts(structure, 1, 2, 0)
    optimiser = WeitOptimizer(model, structure, parts, local=list(locals_of(model).values()), lr=1e-2)
    before = curve(model(x)).item()
    train(model, optimiser, x, 100)
    assert curve(model(x)).item() < before - 0.3


def test_misfits_are_refused():
    model, x, _, parts, optimiser = make()
    structure, bias = optimiser.structure, model[0].bias

    def new(parts=parts, structure=structure, **settings):
        WeitOptimizer(model, structure, parts, **settings)

    for settings_ in ({"name": "rmsprop"}, {"retroactive": "no"}, {"lr": -1.0}, {"lr": float("nan")}):
        with pytest.raises(ValueError, match=r"no optimiser|lr must"):
            new(**settings_)
    for penalty in ("lambda1", "lambda2", "lambda_mask"):
        with pytest.raises(ValueError, match="penalties"):
            new(**{penalty: -1.0})
        with pytest.raises(ValueError, match="penalties"):
            new(**{penalty: float("inf")})
    for f in fields(Parts):
        with pytest.raises(ValueError, match="must have shape"):
            new(replace(parts, **{f.name: torch.zeros(1, 2, 3)}))
    for wrong in ([nn.Parameter(torch.zeros(2))], [model[0].weight], [bias, bias]):
        with pytest.raises(ValueError, match="each given once"):
            new(local=wrong)
    with pytest.raises(ValueError, match="one group"):
        optimiser.add_param_group({"params": [nn.Parameter(torch.zeros(2))]})
    with pytest.raises(NotImplementedError, match="moments"):
        optimiser.state_dict()
    with pytest.raises(NotImplementedError, match="moments"):
        optimiser.load_state_dict({})
    train(model, optimiser, x)
    moments = optimiser.moments()
    with pytest.raises(ValueError, match="lack one"):
        new(moments={"base.step": moments["base.step"]})
    with pytest.raises(ValueError, match="nothing has the moments 'local"):
        new(moments=moments)
    with pytest.raises(ValueError, match="must hold"):
        new(local=[bias, model[2].bias], moments={**moments, "mask.exp_avg": moments["base.exp_avg"]})
