"""KLMS: what travels, what it costs, and that both ends draw the same."""

from __future__ import annotations

import numpy as np
import pytest
from federation import blobs, network, steps
from following_fleet import Fleet, wide
from torch import nn

from fedmask_flwr.masks import Draws, derive, divergence, frozen_weights, replay, thresholds
from fedmask_flwr.methods import Training, Turn, View
from fedmask_flwr.methods.beta import trained_theta
from fedmask_flwr.methods.klms import Klms, KlmsConfig
from fedmask_flwr.train import evaluate
from fedmask_flwr.wire import Counts, Payload, WireError, unpack_bits

D = 2816


def method(**settings):
    model = network(wide)
    return Klms(Klms.layout(model), model, KlmsConfig(**settings))


def trained(klms, n=10, got=None):
    """An optimiser after n steps."""
    turn, model = Turn(1, 1, 5, 3), network(wide)
    got = Payload() if got is None else got
    optimizer = klms.begin(got, model, Training(), turn, {})
    steps(model, optimizer, n)
    return got, model, optimizer, turn


def test_defaults_are_the_card_s():
    config = KlmsConfig()
    assert (config.size, config.spare, config.target_bpp, config.downlink) == (8, 2.0, 0.0, "whole")
    assert not config.trellis
    assert not method().personal
    assert method().up(Payload(), {}) == ({"index": ("counts", range(1, D + 1))},)
    assert method().known(Payload(), Turn(1, 1, 1, 0), {}) is None


@pytest.mark.parametrize(("index_bits", "margin"), [(8, 2.0), (6, 1.0), (10, 4.0)])
def test_it_costs_the_divergence(index_bits, margin):
    """b bits a block, a block every b - margin bits of divergence, and the indices one by one are what is sent."""
    klms = method(index_bits=index_bits, margin=margin)
    got, model, optimizer, turn = trained(klms)
    bits = divergence(trained_theta(optimizer).astype(np.float64), klms.theta(got)).sum()
    reply = klms.finish(got, model, optimizer, turn, {})
    index = reply.counts["index"]
    assert set(reply.counts) == {"index"}
    assert not (reply.bits or reply.dense or reply.meta)
    assert index.top == 2**index_bits - 1
    expected = min(bits * index_bits / (index_bits - margin), D)
    assert abs(index.values.size * index_bits - expected) <= index_bits
    assert 10 < index.values.size < D // index_bits


@pytest.mark.parametrize("bits", [0.0, 1.0, 100.0, 1e4, 1e9])
@pytest.mark.parametrize("target", [0.0, 0.05, 0.5, 3.0])
def test_never_more_than_a_bit_or_the_target(bits, target):
    blocks = method(target_bpp=target).blocks(bits)
    assert blocks >= 1
    assert blocks * 8 <= D * (min(target, 1.0) or 1.0)
    assert blocks == 1 or blocks <= np.ceil(bits / 6)


def large():
    """22528 weights."""
    return nn.Sequential(nn.Linear(8, 2048), nn.ReLU(), nn.Linear(2048, 3))


@pytest.mark.parametrize("target", [0.04, 0.06])
def test_the_target_is_held_in_every_round(target):
    """Whole frames, within 5 % and 16 bytes; less only where the step asks for less."""
    fleet, full = Fleet("klms", clients=3, make=large, steps=20, target_bpp=target), 0
    free = Fleet("klms", make=large).device
    for _ in range(4):
        assert fleet.play(range(3)) == {}
        for client, received in fleet.up.items():
            got, theta_k = fleet.trained[client]
            bits = float(divergence(theta_k.astype(np.float64), free.theta(got)).sum())
            blocks, used = received.payload.counts["index"].values.size, 8 * received.nbytes / free.numel
            assert used <= 1.05 * target
            assert blocks <= free.blocks(bits)
            if blocks < free.blocks(bits):
                full += 1
                assert used + 8 * 16 / free.numel >= 0.95 * target
    assert full >= 3


def test_the_mask_is_a_sample_of_what_was_trained():
    """It moves from theta_g to theta_k by about as much as theta did: the expected log weight is reached."""
    klms = method()
    got, model, optimizer, turn = trained(klms, 40)
    theta_k, theta_g = trained_theta(optimizer).astype(np.float64), klms.theta(got)
    reply = klms.finish(got, model, optimizer, turn, {})
    mask = unpack_bits(klms.reconstruct(got, reply, turn).bits["mask"], D)
    along = theta_k - theta_g
    moved = float(((mask - theta_g) * along).sum() / (along * along).sum())
    assert moved == pytest.approx(1.0, abs=0.25)


def test_both_ends_draw_the_same_and_others_do_not():
    klms, other = method(), method()
    got, model, optimizer, turn = trained(klms)
    reply = klms.finish(got, model, optimizer, turn, {})
    again = klms.finish(got, model, optimizer, turn, {})
    index = reply.counts["index"].values
    assert np.array_equal(index, again.counts["index"].values)
    mask = klms.reconstruct(got, reply, turn).bits["mask"]
    assert np.array_equal(mask, other.reconstruct(got, reply, turn).bits["mask"])
    draws = Draws(derive(1, "candidates", 1, 3), index.size, 256)
    assert np.array_equal(unpack_bits(mask, D), replay(draws, thresholds(klms.theta(got)), index))
    for elsewhere in (Turn(1, 1, 5, 4), Turn(1, 2, 5, 3), Turn(2, 1, 5, 3)):
        assert not np.array_equal(mask, klms.reconstruct(got, reply, elsewhere).bits["mask"])


def test_an_unchanged_theta_costs_one_index():
    klms = method()
    got, model, optimizer, turn = trained(klms, 0)
    assert klms.finish(got, model, optimizer, turn, {}).counts["index"].values.size == 1


@pytest.mark.parametrize("top", [127, 254, 256, 65535])
def test_indices_of_another_length_are_refused(top):
    reply = Payload(counts={"index": Counts(np.zeros(4, np.uint32), top)})
    with pytest.raises(WireError, match=f"indices up to {top}, expected 8 bits each"):
        method().reconstruct(Payload(), reply, Turn(1, 1, 5, 0))


def test_it_learns_with_a_tenth_of_a_bit():
    """Eight rounds of the tiny task; guessing is a third."""
    fleet = Fleet("klms", clients=2, steps=20, target_bpp=0.1)
    for _ in range(8):
        fleet.play([0, 1])
    model = network(wide)
    frozen = frozen_weights(model, fleet.server.spec)
    fleet.server.install(fleet.server.broadcast(fleet.state), model, frozen, View("threshold"))
    assert evaluate(model, *blobs("test"))[1] > 0.8
