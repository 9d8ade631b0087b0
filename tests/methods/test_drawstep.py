"""DrawStep: KLMS for a share of the change, and a server that takes it many times."""

from __future__ import annotations

import numpy as np
import pytest
from following_fleet import Fleet, some
from stepping_turns import D, built, somewhere, trained

from fedmask_flwr.masks import divergence
from fedmask_flwr.methods import Turn, Update
from fedmask_flwr.methods.beta import BetaState, trained_theta
from fedmask_flwr.methods.drawstep import DrawStep
from fedmask_flwr.methods.klms import Klms
from fedmask_flwr.methods.stepping import LEVELS
from fedmask_flwr.wire import WireError, unpack_bits


@pytest.mark.parametrize("step", [1.0, 2.0, 3.0])
def test_it_costs_the_divergence_of_a_share_of_the_change(step):
    found, turn, got = built(DrawStep, step=step), Turn(1, 1, 5, 3), somewhere()
    model, optimizer = trained(found, turn, got)
    theta_g, theta_k = found.theta(got), trained_theta(optimizer).astype(np.float64)
    index = found.finish(got, model, optimizer, turn, {}).counts["index"]
    bits = divergence(theta_g + (theta_k - theta_g) / step, theta_g).sum()
    assert index.top == 1
    assert abs(index.values.size - bits * 10 / 9 - 3) <= 1
    assert index.values.size > 16


def test_at_step_one_it_sends_and_does_what_klms_does():
    """With KLMS's counts on the grid of theta, and one round as its window."""
    ours = built(DrawStep, step=1.0)
    theirs = built(Klms, code="trellis", index_bits=10, margin=1.0)
    turn, got = Turn(1, 2, 5, 3), somewhere()
    updates, replies = ([], []), []
    for client in range(5):
        turn = Turn(1, 2, 5, client)
        for found, kept in zip((ours, theirs), updates, strict=True):
            model, optimizer = trained(found, turn, got)
            reply = found.finish(got, model, optimizer, turn, {})
            kept.append(Update(client, found.reconstruct(got, reply, turn), 1.0, 0.0))
            replies.append(reply.counts["index"].values.tolist())
    assert replies[::2] == replies[1::2]
    state = BetaState(got.counts["ones"].values, LEVELS, 1, 0.0)
    after = [found.aggregate(state, kept) for found, kept in zip((ours, theirs), updates, strict=True)]
    assert np.allclose(
        ours.theta(ours.broadcast(after[0])), theirs.theta(theirs.broadcast(after[1])), atol=1 / LEVELS
    )


def test_blocks_are_left_as_a_setting():
    found, turn, got = built(DrawStep, code="blocks", index_bits=8, margin=2.0), Turn(1, 1, 5, 3), somewhere()
    model, optimizer = trained(found, turn, got)
    reply = found.finish(got, model, optimizer, turn, {})
    assert reply.counts["index"].top == 255
    with pytest.raises(WireError, match="indices up to 255, expected 1 bits each"):
        built(DrawStep).reconstruct(got, reply, turn)
    path = built(DrawStep).finish(got, model, optimizer, turn, {}).counts["index"]
    assert path.values.size < 0.9 * 8 * reply.counts["index"].values.size


def test_in_expectation_theta_goes_to_the_mean_of_the_clients():
    """Over many keys; candidates are about a sample, so the change is met within a tenth."""
    found, got = built(DrawStep, step=2.0, step_min=2.0), somewhere()
    model, optimizer = trained(found, Turn(1, 2, 5, 0), got, 40)
    theta_g = found.theta(got)
    change, total, n = trained_theta(optimizer).astype(np.float64) - theta_g, np.zeros(D), 80
    for client in range(n):
        turn = Turn(1, 2, 5, client)
        reply = found.finish(got, model, optimizer, turn, {})
        total += unpack_bits(found.reconstruct(got, reply, turn).bits["mask"], D)
    moved = 2.0 * (total / n - theta_g)
    slope = float(moved @ change / (change @ change))
    assert slope == pytest.approx(1.0, abs=0.1)


@pytest.mark.parametrize("way", ["votes", "relay"])
def test_every_device_follows_theta(way):
    whole, fleet = Fleet("drawstep"), Fleet("drawstep", downlink=way)
    for number in range(1, 8):
        lost = {number % 5} if number == 4 else set()
        assert whole.play(some(number), lost) == fleet.play(some(number), lost) == {}
        assert np.array_equal(whole.state.ones, fleet.state.ones)
    if way == "relay":
        assert way in fleet.said
        assert fleet.down < whole.down


def test_a_step_is_one_or_more_or_the_method_s_own():
    assert built(DrawStep).step(Turn(1, 1, 5, 0)) == 1.5
    assert built(DrawStep, step=1.25, step_min=3.0).step(Turn(1, 5, 5, 0)) == 1.25
    with pytest.raises(ValueError, match="a step is 1 or more"):
        built(DrawStep, step=0.5)
