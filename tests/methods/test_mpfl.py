"""MPFL: what a node votes, what travels, what it remembers, and that it learns."""

from __future__ import annotations

import numpy as np
import oracles_slimming as oracles
import pytest
import tiny
import torch
from federation import Federation, blobs, build, network, over_the_wire
from slimming_turns import TRAINING, Residual, images, mlp3, some, take_turn, told, turn_of
from torch import nn

from fedmask_flwr.masks import (
    couple,
    filter_scores,
    frozen_weights,
    initialise,
)
from fedmask_flwr.methods import Update, View
from fedmask_flwr.methods.mpfl import MPFL
from fedmask_flwr.methods.pruning_fl import PruningFL
from fedmask_flwr.wire import Payload, pack_bits, unpack_bits


@pytest.mark.parametrize(("make", "data"), [(tiny.net, blobs), (mlp3, blobs), (Residual, images)])
@pytest.mark.parametrize("searched", [0, 1])
def test_a_vote_drops_the_lowest_norms_of_the_slim_model(make, data, searched):
    """One bit a filter: L2 over all rows that a unit owns, of what was trained, mapped back to the full network."""
    method = build(MPFL, make, search_rounds=3, keep_min=3)
    keep = some(method) if searched else np.ones(method.spec.numel, bool)
    reply, model = take_turn(method, make, told(method, keep, searched), 1, None, *data())
    vote = unpack_bits(reply.bits["vote"], method.spec.numel)
    assert set(reply.bits) == {"vote"}
    assert not (reply.dense or reply.counts)
    assert not (vote & ~keep).any()
    weights, start = dict(model.named_parameters()), 0
    for unit, size in enumerate(method.spec.sizes):
        names = [n for n, u in zip(method.spec.names, method.spec.units, strict=True) if u == unit]
        left = [i for i in range(start, start + size) if keep[i]]
        score = {}
        for row, i in enumerate(left):
            score[i] = sum(float(v) ** 2 for name in names for v in weights[name][row].detach().ravel())
        goal = max(method.lost(searched + 1)[unit], size - len(left))
        gone = sorted(left, key=lambda i: (score[i], i))[: goal - (size - len(left))]
        assert [i for i in left if not vote[i]] == sorted(gone)
        start += size


@pytest.mark.parametrize("make", [tiny.net, mlp3, Residual])
def test_norms_are_filter_scores(make):
    method, model = build(PruningFL, make, keep_min=2), network(make)
    for p in model.parameters():
        with torch.no_grad():
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    scores = filter_scores(model, couple(model), method.spec)
    assert np.allclose(method.norms(method.read(model)), scores, rtol=1e-12)


def test_layers_that_are_added_vote_as_one():
    method = build(MPFL, Residual)
    assert method.spec.sizes == (12, 16, 20)
    assert len(method.spec.names) == 5


# What travels


def test_no_weights_travel_before_the_search_is_over():
    method = build(MPFL, search_rounds=3, keep_min=4)
    federation = Federation(method, training=TRAINING)
    for round_ in range(1, 7):
        sent = method.broadcast(federation.state)
        (form,) = method.up(sent, {})
        assert set(form) == ({"vote"} if round_ <= 3 else {"weights"})
        assert bool(sent.dense) == (round_ > 4)
        assert ("keep" in sent.bits) == (round_ > 1)
        sizes = federation.train(1)
        n = method.slim_numel(method.keep(method.broadcast(federation.state)))
        assert max(sizes) < (60 if round_ <= 3 else 4 * n + 60)
    assert n < method.floats
    result = method.result(federation.state)
    assert result.dense["weights"].size == n
    assert unpack_bits(result.bits["keep"], 32).sum() == 16


@pytest.mark.parametrize("rule", ["quota", "threshold", "released"])
def test_votes_become_the_filters_that_are_left(rule):
    """A federation's own votes, against the slow twin."""
    method = build(MPFL, search_rounds=3, keep_min=4, rule=rule)
    state, rounds = method.init(), []
    for round_ in range(1, 4):
        got, updates = method.broadcast(state), []
        for k in range(3):
            x, y = (t[k::3] for t in blobs())
            reply, _ = take_turn(method, tiny.net, got, round_, None, x, y)
            updates.append(Update(k, reply, 1.0, 0.0))
            method.check(state, updates[-1])
        rounds.append(updates)
        state = method.aggregate(state, iter(updates))
        assert oracles.visible(method, state) == oracles.mpfl(method, rounds)
    assert state.searched == 3
    assert not method.searching(method.broadcast(state))


def test_a_round_without_votes_is_no_search():
    method = build(MPFL)
    state = method.init()
    assert method.aggregate(state, iter(())) is state
    late = type(state)(state.keep, state.history, 8, state.weights)
    assert method.aggregate(late, iter(())) is late


# Rewinding and memory


def starts(method, got, memory):
    model = network()
    method.begin(got, model, TRAINING, turn_of(2), memory)
    return method.read(model)


def test_every_search_begins_from_the_initial_weights():
    method, memory = build(MPFL, search_rounds=3, keep_min=4), {}
    take_turn(method, tiny.net, Payload(), 1, memory)
    assert memory == {}
    keep = some(method)
    for searched in (1, 3):  # and the slim network's own training too
        assert np.array_equal(starts(method, told(method, keep, searched), memory), method.slim_start(keep))


def test_without_rewinding_a_node_goes_on_from_its_own_weights():
    method, memory = build(MPFL, search_rounds=3, keep_min=4, rewind="never"), {}
    _, model = take_turn(method, tiny.net, Payload(), 1, memory)
    own, keep = method.read(model), some(method)
    assert np.array_equal(memory["weights"], own)
    found = starts(method, told(method, keep, 1), memory)
    flags = oracles.there(keep)
    assert found.tolist() == [v for v, flag in zip(own.tolist(), flags, strict=True) if flag]
    assert not np.array_equal(found, method.slim_start(keep))
    _, model = take_turn(method, tiny.net, told(method, keep, 1), 2, memory)
    assert np.array_equal(memory["weights"], method.read(model))
    fewer = keep & (np.arange(32) % 5 > 0)
    assert starts(method, told(method, fewer, 2), memory).size == method.slim_numel(fewer)
    after = told(method, fewer, 3)
    assert np.array_equal(starts(method, after, memory), method.slim_start(fewer)), (
        "the search is over: all begin alike"
    )


@pytest.mark.parametrize("memory", [{}, "other"])
def test_a_lost_or_foreign_memory_begins_anew(memory):
    """Filters that a memory lacks would be empty, and voted out for it."""
    method, keep = build(MPFL, search_rounds=3, keep_min=4, rewind="never"), some(build(MPFL, keep_min=4))
    if memory == "other":
        then = keep & (np.arange(32) % 7 > 0)
        memory = {"weights": method.slim_start(then) + 1, "keep": pack_bits(then)}
    assert np.array_equal(starts(method, told(method, keep, 1), memory), method.slim_start(keep))


def test_report_is_of_the_slim_network():
    method = build(MPFL, keep_min=4)
    assert method.report(Payload(), {}) == {"model_bits": 32.0 * method.floats, "kept": 1.0}
    keep = some(method)
    n = sum(oracles.there(keep))
    assert method.report(told(method, keep, 8), {}) == {"model_bits": 32.0 * n, "kept": float(keep.mean())}


def test_result_before_any_round_is_the_start():
    method = build(MPFL)
    result = method.result(method.init())
    assert np.array_equal(result.dense["weights"], method.start)
    assert unpack_bits(result.bits["keep"], 32).all()


# Models


@pytest.mark.parametrize("kind", [MPFL, PruningFL])
def test_a_model_that_cannot_lose_a_filter_says_so(kind):
    with pytest.raises(ValueError, match="no filter of this network can be pruned"):
        build(kind, lambda: nn.Sequential(nn.Flatten(), nn.Linear(8, 3)))


def test_a_floor_above_all_layers_says_so():
    with pytest.raises(ValueError, match="layers have 32 filters, and keep-min 32 always stay"):
        build(MPFL, keep_min=32)
    build(MPFL, keep_min=31)


def test_a_depthwise_unit_of_one_channel_votes():
    """With one channel a depthwise convolution looks like any other."""

    def make():
        return nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3, groups=4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3)
        )

    method = build(MPFL, make, keep_min=1, search_rounds=2, prune_to=0.75)
    keep = np.arange(4) == 2
    reply, _ = take_turn(method, make, told(method, keep, 1), 2, None, *images())
    assert unpack_bits(reply.bits["vote"], 4).tolist() == keep.tolist()


@pytest.mark.parametrize("rewind", ["initial", "never"])
@pytest.mark.parametrize("rule", ["quota", "threshold", "released"])
def test_it_learns(rule, rewind):
    method = build(MPFL, search_rounds=3, keep_min=4, rule=rule, rewind=rewind)
    federation = Federation(method, training=TRAINING)
    federation.train(3)
    kept = method.keep(method.broadcast(federation.state))
    federation.train(8)
    assert np.array_equal(method.keep(method.broadcast(federation.state)), kept)
    assert 4 <= kept.sum() < 32
    assert federation.accuracy() > 0.9


def test_a_residual_network_learns_through_the_wire():
    method = build(MPFL, Residual, search_rounds=2, keep_min=4)
    (x, y), state = images(), method.init()
    with torch.no_grad():
        x = x + y.reshape(-1, 1, 1, 1)
    for round_ in range(1, 9):
        sent = method.broadcast(state)
        got, _ = over_the_wire(sent, method.down({}), method.heard({}), round_)
        reply, _ = take_turn(method, Residual, got, round_, None, x, y, 15)
        back, _ = over_the_wire(reply, method.up(got, {})[0], method.known(got, turn_of(round_), {}), round_)
        method.check(state, Update(0, back, 1.0, 0.0))
        state = method.aggregate(state, iter([Update(0, back, 1.0, 0.0)]))
    model = network(Residual)
    method.install(method.broadcast(state), model, frozen_weights(model, method.spec), View("expected"))
    assert unpack_bits(state.keep, 48).sum() == 24
    assert float((model(x).argmax(1) == y).float().mean()) > 0.9


def test_the_same_start_on_both_ends():
    """``start`` is read from the model with its named weights, in the order of names."""
    model = tiny.net()
    initialise(model, "seed:3")
    method = MPFL(MPFL.layout(model), model, MPFL.Config())
    assert np.array_equal(
        method.start, np.concatenate([t.numpy().ravel() for _, t in sorted(model.state_dict().items())])
    )
