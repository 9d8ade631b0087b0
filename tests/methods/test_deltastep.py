"""DeltaStep: what is sent is a sample of a share of the change, what theta makes of it is the change."""

from __future__ import annotations

from unittest.mock import patch

import numpy as np
import pytest
from following_fleet import Fleet, some
from hypothesis import given
from hypothesis import strategies as st
from stepping_turns import D, built, somewhere, trained
from torch import nn

from fedmask_flwr.methods import Turn, Update, stepping
from fedmask_flwr.methods.beta import BetaState, trained_theta
from fedmask_flwr.methods.deltastep import DeltaStep, DeltaStepConfig
from fedmask_flwr.methods.stepping import LEVELS
from fedmask_flwr.wire import Payload, pack_bits, unpack_bits


def large():
    """22528 weights."""
    return nn.Sequential(nn.Linear(8, 2048), nn.ReLU(), nn.Linear(2048, 3))


def method(**settings):
    return built(DeltaStep, **settings)


@pytest.mark.parametrize("step", [1.0, 4.0])
def test_it_sends_a_sample_of_a_share_of_the_change(step):
    found, turn, got = method(step=step, step_min=step), Turn(1, 2, 5, 3), somewhere()
    model, optimizer = trained(found, turn, got)
    mask = unpack_bits(found.finish(got, model, optimizer, turn, {}).bits["mask"], D)
    theta_g, theta_k = found.theta(got), trained_theta(optimizer).astype(np.float64)
    assert np.array_equal(mask, found.draw(theta_g + (theta_k - theta_g) / step, turn))
    flips = np.count_nonzero(mask != unpack_bits(found.guess(got, turn), D))
    expected = np.abs(theta_k - theta_g).sum() / step
    assert expected > 20
    assert abs(flips - expected) < 5 * np.sqrt(expected)


@pytest.mark.parametrize("target", [0.25, 0.4])
def test_a_budget_is_a_smaller_share(target):
    """The flips that are paid for are those of one smaller share, not any of them."""
    turn, got = Turn(1, 2, 5, 3), somewhere()
    found, free = method(step=1.0, step_min=1.0, target_bpp=target), method(step=1.0, step_min=1.0)
    model, optimizer = trained(found, turn, got)
    theta_g = found.theta(got)
    change = trained_theta(optimizer).astype(np.float64) - theta_g
    guess = unpack_bits(found.guess(got, turn), D)
    kept = guess != unpack_bits(found.finish(got, model, optimizer, turn, {}).bits["mask"], D)
    whole = guess != unpack_bits(free.finish(got, model, optimizer, turn, {}).bits["mask"], D)
    assert not (kept & ~whole).any()
    assert 0 < kept.sum() < whole.sum()
    flipped = [guess != found.draw(theta_g + share * change, turn) for share in np.linspace(0, 1, 400)]
    assert min(int((kept != f).sum()) for f in flipped) <= 2


@given(
    st.lists(st.lists(st.integers(0, 3), min_size=5, max_size=5), min_size=1, max_size=7),
    st.integers(64, 600).map(lambda n: n / 64),
    st.lists(st.integers(26, LEVELS - 26), min_size=5, max_size=5),
    st.integers(1, 6),
)
def test_theta_moves_by_step_times_the_mean_of_the_flips(replies, step, ones, block):
    model = nn.Sequential(nn.Linear(5, 1, bias=False))
    found = DeltaStep(DeltaStep.layout(model), model, DeltaStepConfig(step=step))
    state = BetaState(np.array(ones, np.uint32), LEVELS, 1, 0.0)
    updates = [
        Update(k, Payload(bits={
            "mask": pack_bits(np.array([r & 1 for r in reply], bool)),
            "guess": pack_bits(np.array([r >> 1 for r in reply], bool)),
        }, meta={"step": step}), 1.0, 0.0)
        for k, reply in enumerate(replies)
    ]  # fmt: skip
    with patch.object(stepping, "BLOCK", block):
        after = found.aggregate(state, updates)
    mean = np.mean([[(r & 1) - (r >> 1) for r in reply] for reply in replies], axis=0)
    wanted = np.clip(np.array(ones) / LEVELS + step * mean, 0.01, 0.99)
    assert np.abs(after.ones / LEVELS - wanted).max() <= 1 / LEVELS
    assert (after.total, after.age) == (LEVELS, 1)


def test_the_mean_of_theta_is_the_mean_of_the_clients():
    """Over many draws of u: unbiased, whatever the step."""
    found, got = method(step=3.0, step_min=3.0), somewhere()
    model, optimizer = trained(found, Turn(1, 2, 5, 0), got)
    theta_g = found.theta(got)
    change, total, n = trained_theta(optimizer).astype(np.float64) - theta_g, np.zeros(D), 100
    for client in range(n):
        turn = Turn(1, 2, 5, client)
        mask = unpack_bits(found.finish(got, model, optimizer, turn, {}).bits["mask"], D)
        total += mask.astype(float) - unpack_bits(found.guess(got, turn), D)
    error = 3.0 * total / n - change
    deviation = np.sqrt(3.0 * np.abs(change) / n) + 1e-9
    assert abs(error.mean()) < 4 * np.sqrt((deviation**2).mean() / D)
    assert (error**2).mean() == pytest.approx((deviation**2).mean(), rel=0.15)


@pytest.mark.parametrize("way", ["votes", "relay"])
def test_every_device_follows_theta(way):
    """Two to four of five devices at random: what each ends with is compared in ``play``."""
    whole, fleet = (Fleet("deltastep", make=large, steps=4, downlink=how) for how in ("whole", way))
    for number in range(1, 6):
        lost = {number % 5} if number == 4 else set()
        assert whole.play(some(number), lost) == fleet.play(some(number), lost) == {}
        assert np.array_equal(whole.state.ones, fleet.state.ones)
    assert way in fleet.said
    assert fleet.down < (1.0 if way == "relay" else 1.02) * whole.down


@pytest.mark.parametrize(
    "settings", [{"prior": 2.0}, {"reset": 3}, {"estimator": "mean"}, {"step": 0.5}, {"step_min": 0.5}]
)
def test_settings_of_a_posterior_are_refused(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        method(**settings)


def test_the_step_shrinks_over_the_run():
    found = method(step=6.0, step_min=2.0)
    steps_ = [found.step(Turn(1, r, 5, 0)) for r in range(1, 6)]
    assert steps_[0] == 6.0
    assert steps_[2] == 4.0
    assert steps_[4] == 2.0
    assert steps_ == sorted(steps_, reverse=True)
    assert found.step(Turn(1, 1, 1, 0)) == 6.0
