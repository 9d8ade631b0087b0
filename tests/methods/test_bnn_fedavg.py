"""BNN-FedAvg: signs up, counts down, latent weights between."""

from __future__ import annotations

import math

import numpy as np
import oracles_baselines as oracles
import pytest
import tiny
import torch
from federation import Federation, build, network, over_the_wire, steps
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from fedmask_flwr.masks import frozen_weights
from fedmask_flwr.methods import Training, Turn, Update, View
from fedmask_flwr.methods.bnn_fedavg import BnnFedAvg, SignOptimizer
from fedmask_flwr.wire import Counts, Payload, WireError, pack_bits, unpack_bits

TURN = Turn(1, 2, 5, 0)
D, REST = 352, 35


def update(client, rng, d=D, rest=REST):
    dense = {"rest": rng.normal(size=rest).astype(np.float32)} if rest else {}
    signs = pack_bits(rng.random(d) < rng.random())
    return Update(client, Payload(bits={"signs": signs}, dense=dense), float(rng.integers(1, 9)), 0.0)


@given(seed=st.integers(0, 2**31), rounds=st.lists(st.integers(0, 5), max_size=4))
def test_aggregate_equals_the_oracle(seed, rounds):
    method, rng = build(BnnFedAvg), np.random.default_rng(seed)
    state, seen = method.init(), []
    for clients in rounds:
        seen.append([update(k, rng) for k in range(clients)])
        before, state = state, method.aggregate(state, iter(seen[-1]))
        assert clients or state is before
    assert np.allclose(method.weights(method.broadcast(state)), oracles.signs(method, seen), rtol=1e-6)


def test_before_round_one_it_is_the_seeded_network():
    method, model = build(BnnFedAvg), network()
    assert method.scale == [pytest.approx(math.e / math.sqrt(fan_in)) for fan_in in (8, 32)]
    assert method.broadcast(method.init()).counts == {}
    method.install(Payload(), model, frozen_weights(model, method.spec), View("expected"))
    for p, w in zip(model.parameters(), network().parameters(), strict=True):
        assert torch.equal(p, w)


def test_the_network_is_the_majoritys():
    method, model = build(BnnFedAvg), network()
    plus = np.arange(D, dtype=np.uint32) % 5
    rest = np.arange(REST, dtype=np.float32)
    got = Payload(counts={"plus": Counts(plus, 4)}, dense={"rest": rest})
    method.install(got, model, frozen_weights(model, method.spec), View("expected"))
    found, start = frozen_weights(model, method.spec).numpy(), frozen_weights(network(), method.spec).numpy()
    assert np.array_equal(np.sign(found), np.select([plus > 2, plus < 2], [1, -1], np.sign(start)))
    assert np.array_equal(np.abs(found), np.abs(start))
    assert np.array_equal(model[1].bias.detach(), rest[:32])
    assert np.array_equal(model[3].bias.detach(), rest[32:])


def test_latent_weights_begin_at_the_mean_sign():
    method = build(BnnFedAvg)
    plus = np.arange(D, dtype=np.uint32) % 5
    latent = method.latent(Payload(counts={"plus": Counts(plus, 4)}), TURN)
    start = np.sign(frozen_weights(network(), method.spec).numpy())
    decided = plus != 2
    assert np.allclose(latent[decided], plus[decided] / 2 - 1)
    assert np.array_equal(np.sign(latent[~decided]), start[~decided])
    first = method.latent(Payload(), TURN)
    assert np.array_equal(np.sign(first), start)
    assert 0.0 < np.abs(first).min() < 0.02 < 0.98 < np.abs(first).max() <= 1.0
    assert abs(np.abs(first).mean() - 0.5) < 0.06
    assert np.array_equal(first, method.latent(Payload(), Turn(1, 9, 5, 3)))  # one start for all clients
    assert not np.array_equal(first, method.latent(Payload(), Turn(2, 2, 5, 0)))


def test_a_step_moves_latents_by_the_binary_gradient():
    """SGD, by hand: latent - lr * g, clipped to [-1, 1]; the model holds c * sign."""
    method, model, lr = build(BnnFedAvg), network(), 0.5
    latent = method.latent(Payload(), TURN)
    optimizer = method.begin(Payload(), model, Training("sgd", lr), TURN, {})
    for _ in range(3):
        (gradients,) = steps(model, optimizer, 1)
        weights = np.concatenate([gradients[0].ravel(), gradients[2].ravel()])
        latent = np.clip(latent - lr * weights, -1, 1).astype(np.float32)
        found = frozen_weights(model, method.spec).numpy()
        c = np.repeat(np.float32(method.scale), method.spec.sizes)
        assert np.array_equal(found, np.where(latent >= 0, c, -c))
    assert bool((np.abs(latent) == 1).any())
    assert np.array_equal(optimizer.signs(), latent >= 0)
    reply = method.finish(Payload(), model, optimizer, TURN, {})
    assert np.array_equal(unpack_bits(reply.bits["signs"], D), latent >= 0)
    biases = torch.cat([model[1].bias.detach(), model[3].bias.detach()]).numpy()
    assert np.array_equal(reply.dense["rest"], biases)
    assert bool((biases != 0).any())  # the rest trains too


def test_adam_is_the_default_and_a_scheduler_reaches_it():
    method, model = build(BnnFedAvg), network()
    optimizer = method.begin(Payload(), model, Training(), TURN, {})
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 1e-3]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    before = optimizer.signs()
    steps(model, optimizer, 2)
    assert np.array_equal(optimizer.signs(), before)


def test_a_closure_gives_its_loss():
    model = network()
    optimizer = build(BnnFedAvg).begin(Payload(), model, Training(), TURN, {})
    assert optimizer.step(lambda: 2.5) == 2.5


def test_a_nan_is_not_sent_as_a_sign():
    method, model = build(BnnFedAvg), network()
    optimizer = method.begin(Payload(), model, Training(), TURN, {})
    model[1].weight.grad = torch.full((32, 8), math.nan)
    optimizer.step()
    with pytest.raises(ValueError, match="NaN: check the training"):
        method.finish(Payload(), model, optimizer, TURN, {})


def test_finish_wants_its_own_optimiser():
    model = network()
    with pytest.raises(TypeError, match="not SGD"):
        build(BnnFedAvg).finish(Payload(), model, torch.optim.SGD(model.parameters(), 0.1), TURN, {})


def test_a_broadcast_of_no_votes_is_refused():
    with pytest.raises(WireError, match="0 votes"):
        build(BnnFedAvg).weights(Payload(counts={"plus": Counts(np.zeros(D, np.uint32), 0)}))


@pytest.mark.parametrize(
    "payload",
    [
        Payload(bits={"signs": pack_bits(np.ones(D + 8, np.bool_))}),
        Payload(bits={"signs": pack_bits(np.ones(D, np.bool_))}, dense={"rest": np.zeros(REST + 1, np.float32)}),
        Payload(bits={"mask": pack_bits(np.ones(D, np.bool_))}),
    ],
)
def test_other_fields_are_refused(payload):
    method = build(BnnFedAvg)
    (form,) = method.up(Payload(), {})
    with pytest.raises((WireError, ValueError)):
        over_the_wire(payload, form, method.known(Payload(), TURN, {}), 1)


def test_a_network_without_biases_sends_signs_alone():
    def plain():
        return nn.Sequential(nn.Linear(8, 16, bias=False), nn.ReLU(), nn.Linear(16, 3, bias=False))

    method = build(BnnFedAvg, plain)
    d = 8 * 16 + 16 * 3
    assert method.up(Payload(), {}) == ({"signs": ("bits", d)},)
    assert method.down({}) == {"plus": ("counts", d)}
    state = method.aggregate(method.init(), [update(k, np.random.default_rng(k), d, 0) for k in range(3)])
    assert method.broadcast(state).dense == {}
    assert state.total == 3
    federation = Federation(method, plain)
    assert max(federation.train(1)) <= d / 8 + 60


def test_weights_outside_the_mask_are_dense():
    method = build(BnnFedAvg, include=("1.*",))
    assert method.up(Payload(), {}) == ({"signs": ("bits", 256), "rest": ("dense", 387 - 256)},)


def test_a_tied_weight_is_one_field():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.head = nn.Embedding(5, 4), nn.Linear(4, 5, bias=False)
            self.head.weight = self.embed.weight

    model = Tied()
    method = BnnFedAvg(BnnFedAvg.layout(model), model)
    assert method.up(Payload(), {}) == ({"signs": ("bits", 20)},)
    assert method.weights(Payload()).size == method.numel == 40


def test_a_layer_of_zeros_has_no_scale():
    model = network()
    nn.init.zeros_(model[3].weight)
    with pytest.raises(ValueError, match=r"'3\.weight' are all 0"):
        BnnFedAvg(BnnFedAvg.layout(model), model)


@pytest.mark.parametrize("make", [tiny.net, tiny.norm_net])
def test_it_learns_for_a_bit_a_weight(make):
    method = build(BnnFedAvg, make)
    federation = Federation(method, make)
    sizes = federation.train(6)
    assert federation.accuracy() > 0.9
    assert max(sizes) <= D / 8 + 4 * method.start.size + 120
    assert method.report(Payload(), {}) == {"model_bits": D + 32 * method.start.size}
    federation.accuracy(0, adapt=1)
    assert isinstance(method.adapt(federation.told(), federation.network(), Training(), TURN, {}), SignOptimizer)
