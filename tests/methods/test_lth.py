"""LTH: magnitude pruning in cycles, with rewinding; one client is the paper's central algorithm."""

from __future__ import annotations

import numpy as np
import oracles_slimming as oracles
import pytest
import tiny
import torch
from federation import DIGEST, Federation, blobs, build, network, steps
from torch import nn
from torch.nn.functional import cross_entropy

from fedmask_flwr.flower.records import read_broadcast
from fedmask_flwr.masks import frozen_weights
from fedmask_flwr.methods import Training, Turn, Update, View
from fedmask_flwr.methods.lth import LTH
from fedmask_flwr.methods.reading import read_reply
from fedmask_flwr.train import train
from fedmask_flwr.wire import Payload, WireError, pack, pack_bits, unpack_bits

D, N = 8 * 32 + 32 * 3, 387
every_optimizer = pytest.mark.parametrize("training", [Training("adam", 0.02), Training("sgd", 0.1)])


def turn_of(round_):
    return Turn(1, round_, 9, 0)


def some(seed=0, share=0.6):
    return np.random.default_rng(seed).random(D) < share


def told(keep, weights=None):
    dense = {} if weights is None else {"weights": weights}
    return Payload(bits={"keep": pack_bits(keep)}, dense=dense)


def covered(model):
    """The weights that may be pruned, in the order of the mask."""
    return np.concatenate([model[i].weight.detach().numpy().ravel() for i in (1, 3)])


# Server


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("settings", [(1, 3, 0.5), (2, 2, 0.3), (3, 1, 0.9)])
def test_aggregate_equals_the_oracle(seed, settings):
    cycle, cycles, each = settings
    method = build(LTH, cycle=cycle, cycles=cycles, prune_each=each)
    rng, state, rounds = np.random.default_rng(seed), method.init(), []
    for clients in (3, 0, 1, 2, 0, 4, 1, 2):
        n = int(method.there(unpack_bits(state.keep, D)).sum())
        updates = [
            Update(k, Payload(dense={"weights": rng.normal(size=n).astype(np.float32)}), rng.integers(1, 9), 0.0)
            for k in range(clients)
        ]
        rounds.append(updates)
        before, state = state, method.aggregate(state, iter(updates))
        assert clients or state is before
        found, want = method.weights(method.broadcast(state)), oracles.lth(method, rounds)
        assert np.allclose(found, want, rtol=1e-6)
        assert ((found == 0) == (np.array(want) == 0)).all()


def test_each_layer_loses_its_own_share():
    method, rng = build(LTH, cycle=1, cycles=2, prune_each=0.25), np.random.default_rng(0)
    state = method.init()
    for layers in ([192, 72], [144, 54], [144, 54]):
        n = int(method.there(unpack_bits(state.keep, D)).sum())
        update = Update(0, Payload(dense={"weights": rng.normal(size=n).astype(np.float32)}), 1.0, 0.0)
        state = method.aggregate(state, iter([update]))
        assert [int(part.sum()) for part in np.split(unpack_bits(state.keep, D), [256])] == layers
        assert method.report(method.broadcast(state), {}) == {
            "model_bits": 32.0 * (sum(layers) + 35) + D,
            "kept": sum(layers) / D,
        }


def test_it_rewinds_to_the_initial_weights():
    method, rng = build(LTH, cycle=2, cycles=1, prune_each=0.5), np.random.default_rng(0)
    state = method.init()
    for round_ in range(1, 5):
        n = int(method.there(unpack_bits(state.keep, D)).sum())
        update = Update(0, Payload(dense={"weights": rng.normal(size=n).astype(np.float32)}), 1.0, 0.0)
        state = method.aggregate(state, iter([update]))
        got = method.broadcast(state)
        assert set(got.dense) == (set() if round_ == 2 else {"weights"}), "initial weights never travel"
        model = network()
        method.begin(got, model, Training(), turn_of(round_ + 1), {})
        kept = unpack_bits(state.keep, D)
        if round_ == 2:
            assert (covered(model)[kept] == covered(network())[kept]).all()
            assert kept.sum() == D // 2
        assert (covered(model)[~kept] == 0).all()
        assert np.array_equal(method.result(state).dense["weights"], method.read(model)[method.there(kept)])


def test_ties_go_by_position():
    method = build(LTH, prune_each=0.5)
    keep = np.ones(D, bool)
    keep[:10] = False
    out = method.pruned(keep, np.ones(D, np.float32))
    assert np.flatnonzero(~out).tolist() == [*range(10 + 123), *range(256, 256 + 48)]


# Client


@every_optimizer
@pytest.mark.parametrize("step", ["train", "adapt"])
def test_pruned_weights_stay_exactly_zero(training, step):
    method, keep, model = build(LTH), some(), network()
    got = told(keep)
    if step == "train":
        optimizer = method.begin(got, model, training, turn_of(2), {})
    else:
        method.install(got, model, frozen_weights(model, method.spec), View("expected"))
        optimizer = method.adapt(got, model, training, turn_of(2), {})
    before = covered(model).copy()
    x, y = blobs()
    for _ in range(5):
        optimizer.zero_grad()
        cross_entropy(model(x), y).backward()
        optimizer.step()
        assert (covered(model)[~keep] == 0).all()
    assert (covered(model)[keep] != before[keep]).mean() > 0.5
    assert all(p.requires_grad for p in model.parameters())


def test_a_reply_holds_what_is_left():
    method, keep, model = build(LTH), some(), network()
    got = told(keep)
    optimizer = method.begin(got, model, Training(), turn_of(2), {})
    steps(model, optimizer, 3)
    reply = method.finish(got, model, optimizer, turn_of(2), {})
    assert reply.dense["weights"].size == keep.sum() + 35
    frame = pack(reply, digest=DIGEST, round_=2, known=None)
    back = read_reply(frame, method, got, turn_of(2), {}, digest=DIGEST).payload
    full = method.weights(told(keep, back.dense["weights"]))
    assert np.array_equal(full, method.read(model))


def central(training, rounds, cycle, cycles, each):
    """The paper's algorithm on all data, in torch alone; as on a device, each round has an optimiser of its own."""
    model, start = network(), [p.detach().clone() for p in network().parameters()]
    masks = [torch.ones_like(p) for p in model.parameters()]
    for round_ in range(1, rounds + 1):
        kind = torch.optim.Adam if training.optimizer == "adam" else torch.optim.SGD
        optimizer = kind(model.parameters(), training.lr)
        for p, mask in zip(model.parameters(), masks, strict=True):
            p.register_hook(mask.mul)
        train(model, optimizer, *blobs(), epochs=3, batch_size=10, key=(1, round_, 0))
        if round_ % cycle == 0 and round_ <= cycle * cycles:
            with torch.no_grad():
                for p, mask, initial in zip(model.parameters(), masks, start, strict=True):
                    if p.ndim > 1:
                        left = p.abs()[mask.bool()]
                        cut = left.sort().values[int(each * left.numel())]
                        mask.mul_(p.abs() >= cut)
                    p.copy_(initial * mask)
    return model


@every_optimizer
def test_one_client_is_the_central_algorithm(training):
    for rounds in (2, 3, 6):
        federation = Federation(build(LTH, cycle=2, cycles=2, prune_each=0.4), clients=1, training=training)
        federation.train(rounds)
        want = central(training, rounds, 2, 2, 0.4)
        found = federation.network()
        for a, b in zip(found.parameters(), want.parameters(), strict=True):
            assert torch.equal(a, b)


def test_it_learns_and_what_is_left_is_smaller():
    federation = Federation(build(LTH, cycle=2, cycles=3, prune_each=0.3), training=Training("adam", 0.02))
    sizes = [max(federation.train(1)) for _ in range(9)]
    assert sizes[0] > sizes[2] > sizes[4] > sizes[6] == sizes[8]
    model = federation.network()
    assert (covered(model) != 0).sum() == federation.method.keep(federation.told()).sum()
    assert federation.accuracy() > 0.9


def test_batch_norm_is_never_pruned():
    method = build(LTH, tiny.norm_net, cycle=1, prune_each=0.5)
    federation = Federation(method, tiny.norm_net, training=Training("adam", 0.02))
    federation.train(1)
    model = federation.network()
    assert (model[1].weight == 0).float().mean() == 0.5
    assert (model[2].weight != 0).all()


def test_patterns_say_what_is_pruned():
    method = build(LTH, include=("1.*",), cycle=1, prune_each=0.5)
    federation = Federation(method, training=Training("adam", 0.02))
    federation.train(1)
    model = federation.network()
    assert (model[1].weight == 0).sum() == 128
    assert (model[3].weight != 0).all()


# Hostile


def test_the_first_broadcast_says_nothing():
    method = build(LTH)
    assert method.broadcast(method.init()).bits == {}
    assert np.array_equal(method.weights(Payload()), method.start)
    assert np.array_equal(method.result(method.init()).dense["weights"], method.start)


@pytest.mark.parametrize("change", [-1, 1, "full"])
def test_weights_of_another_number_are_refused(change):
    method, keep = build(LTH), some()
    left = int(keep.sum()) + 35
    n = N if change == "full" else left + change
    frame = pack(told(keep, np.ones(n, np.float32)), digest=DIGEST, round_=2, known=method.heard({}))
    got = read_broadcast(frame, method, {}, digest=DIGEST, round_=2)
    for act in (
        lambda: method.begin(got, network(), Training(), turn_of(2), {}),
        lambda: method.install(got, network(), torch.zeros(D), View("expected")),
    ):
        with pytest.raises(WireError, match=f"{n} weights for a network with {left} left"):
            act()
    frame = pack(Payload(dense={"weights": np.ones(n, np.float32)}), digest=DIGEST, round_=2, known=None)
    with pytest.raises(WireError, match=f"has {n} elements, expected {left}"):
        read_reply(frame, method, told(keep), turn_of(2), {}, digest=DIGEST)


def test_everything_may_be_pruned_but_biases():
    """A broadcast without any weight left is odd, not harmful."""
    method, model = build(LTH), network()
    got = told(np.zeros(D, bool), np.ones(35, np.float32))
    optimizer = method.begin(got, model, Training(), turn_of(2), {})
    steps(model, optimizer, 2)
    assert method.finish(got, model, optimizer, turn_of(2), {}).dense["weights"].size == 35
    assert not covered(model).any()


def test_a_compiled_model_is_the_same_to_it():
    """torch.compile renames the state dict."""
    model = network()
    wrapped = nn.Module()
    wrapped._orig_mod = model
    method = LTH(LTH.layout(wrapped), wrapped, LTH.Config())
    plain = build(LTH)
    assert np.array_equal(method.positions, plain.positions)
    assert np.array_equal(method.start, plain.start)


def test_tied_weights_are_refused():
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8))
    model[1].weight = model[0].weight
    with pytest.raises(ValueError, match="tied"):
        LTH(LTH.layout(model), model)
