from __future__ import annotations

import io
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fedmask_flwr.masks import MaskAdam, MaskSGD, derive

from .optim_cases import OPTIMISERS, assert_live_mask, build, curve


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


RULES = {
    "plain": {},
    "pruned": {"support": torch.arange(56) % 4 != 1},
    "threshold": {"draw": "threshold", "tau": 0.6, "theta": torch.linspace(0.3, 0.8, 56)},
    "both": {"draw": "threshold", "support": torch.arange(56) % 4 != 1},
}


@pytest.mark.parametrize("name", OPTIMISERS)
@pytest.mark.parametrize("rule", RULES)
def test_resume_is_exact(name, rule):
    make, _ = OPTIMISERS[name]
    rule = RULES[rule]

    def run(model, optimiser, x, steps):
        for _ in range(steps):
            optimiser.zero_grad()
            curve(model(x)).backward()
            optimiser.step()

    model, x = build("stack")
    whole = make(model, key=4, **rule)
    run(model, whole, x, 2)
    file = io.BytesIO()
    torch.save(whole.state_dict(), file)
    file.seek(0)
    again, _ = build("stack")
    resumed = make(again, key=99, **rule)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    if not rule:
        assert_live_mask(resumed, again)
    run(model, whole, x, 3)
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


@pytest.mark.parametrize(("ours", "theirs"), [(a, b) for a in RULES for b in RULES if a != b])
def test_a_state_of_another_rule_is_refused(ours, theirs):
    state = MaskAdam(build("stack")[0], **RULES[theirs]).state_dict()
    optimiser = MaskAdam(build("stack")[0], key=8, **RULES[ours])
    before, mask = optimiser.scores.clone(), optimiser.mask()
    with pytest.raises(ValueError, match="the same"):
        optimiser.load_state_dict(state)
    assert torch.equal(optimiser.scores, before)
    assert torch.equal(optimiser.mask(), mask)


def test_a_rule_is_more_than_its_kind():
    half = torch.arange(56) < 28
    for ours, theirs, message in (
        ({"draw": "threshold", "tau": 0.4}, {"draw": "threshold"}, "tau=0.4"),
        ({"support": half}, {"support": ~half}, "another support"),
    ):
        state = MaskAdam(build("stack")[0], **ours).state_dict()
        with pytest.raises(ValueError, match=message):
            MaskAdam(build("stack")[0], **theirs).load_state_dict(state)
    # tau says nothing about a sample, and a support of all positions prunes nothing
    state = MaskAdam(build("stack")[0], tau=0.4, support=half | ~half).state_dict()
    MaskAdam(build("stack")[0]).load_state_dict(state)
    del state["rule"]  # as saved before there were rules
    MaskAdam(build("stack")[0]).load_state_dict(state)
    with pytest.raises(ValueError, match="another support"):
        MaskAdam(build("stack")[0], support=half).load_state_dict(state)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=30), st.booleans())
def test_scores_are_set_bit_for_bit(scores, threshold):
    model = nn.Linear(len(scores), 1, bias=False)
    rule = {"draw": "threshold"} if threshold else {}
    first = MaskAdam(model, key=1, clip=0.01, **rule)
    given_ = torch.tensor(scores)
    first.set_scores(given_)
    bound = math.log(0.99 / 0.01)
    assert torch.equal(first.scores, given_.clamp(-bound, bound))
    inside = given_.abs() < bound
    assert torch.equal(first.scores[inside].view(torch.int32), given_[inside].view(torch.int32))
    again = nn.Linear(len(scores), 1, bias=False)
    second = MaskAdam(again, key=1, clip=0.01, frozen=first.frozen, theta=0.9, **rule)
    second.set_scores(first.scores)
    assert torch.equal(second.scores.view(torch.int32), first.scores.view(torch.int32))
    assert torch.equal(second.mask(), first.mask())
    assert torch.equal(again.weight, model.weight)


def test_a_device_goes_on_with_remembered_scores():
    """MaskSGD has no memory but its scores: stopping and setting them anew changes no bit."""
    model, x = build("stack")
    other, _ = build("stack")
    whole, part = (MaskSGD(m, lr=5.0, draw="threshold", tau=0.4, key=3) for m in (model, other))
    for step in range(6):
        for m, optimiser in ((model, whole), (other, part)):
            optimiser.zero_grad()
            curve(m(x)).backward()
            optimiser.step()
        if step == 2:
            remembered = part.scores.clone()
            part.restore()
            part = MaskSGD(other, lr=5.0, draw="threshold", tau=0.4, key=9, theta=0.1)
            part.set_scores(remembered)
    assert torch.equal(whole.scores, part.scores)
    assert torch.equal(model[0].weight, other[0].weight)
    assert whole.mask().float().std() > 0


@pytest.mark.parametrize(
    "bad",
    [torch.zeros(55), torch.zeros(1, 56), torch.zeros(()), torch.zeros(56).double(), torch.full((56,), math.nan)],
)
def test_wrong_scores_are_refused(bad):
    model, _ = build("stack")
    optimiser = MaskAdam(model, theta=0.7)
    before, held = optimiser.scores.clone(), model[0].weight.clone()
    with pytest.raises(ValueError, match="scores h" if bad.isnan().any() else r"scores must be \(56,\) float32"):
        optimiser.set_scores(bad)
    assert torch.equal(optimiser.scores, before)
    assert torch.equal(model[0].weight, held)


def test_scores_written_from_outside_count_in_the_next_step():
    """Nothing that a step leaves behind may count but what the state holds."""
    model, x = build("stack")
    given = torch.linspace(-3, 3, MaskAdam(model).spec.numel)
    found = []
    for steps in (0, 3):
        model, x = build("stack")
        optimiser = MaskAdam(model, key=1)
        for _ in range(steps):
            optimiser.zero_grad()
            curve(model(x)).backward()
            optimiser.step()
        fresh = MaskAdam(build("stack")[0], key=1).state_dict() | {"scores": given}
        optimiser.load_state_dict(fresh)
        optimiser.zero_grad()
        curve(model(x)).backward()
        optimiser.step()
        found.append(optimiser.scores.clone())
    assert torch.equal(*found)
