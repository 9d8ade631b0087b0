"""Pruning-FL: the average is pruned by the norms of its filters, and trained at the size that is left."""

from __future__ import annotations

import numpy as np
import oracles_slimming as oracles
import pytest
import tiny
from federation import DIGEST, Federation, build, network, over_the_wire, steps
from torch import nn

from fedmask_flwr.masks import count_parameters, couple, filter_scores
from fedmask_flwr.methods import Training, Turn, Update
from fedmask_flwr.methods.pruning_fl import PruningFL
from fedmask_flwr.methods.reading import read_reply
from fedmask_flwr.wire import Payload, WireError, pack, unpack_bits

TRAINING = Training("adam", 0.02)
TURN = Turn(1, 2, 9, 0)


def mlp3():
    """Two units and three layers."""
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 3))


def replies(method, state, clients, rng):
    """Random weights of the right number."""
    n = method.slim_numel(method.keep(method.broadcast(state)))
    return [
        Update(k, Payload(dense={"weights": rng.normal(size=n).astype(np.float32)}), float(rng.integers(1, 9)), 0.0)
        for k in range(clients)
    ]


@pytest.mark.parametrize("seed", range(3))
def test_aggregate_equals_the_oracle(seed):
    method, rng = build(PruningFL, search_rounds=3, keep_min=4, prune_to=0.6), np.random.default_rng(seed)
    state, rounds = method.init(), []
    for clients in (3, 0, 1, 2, 0, 4, 1):
        rounds.append(replies(method, state, clients, rng))
        before, state = state, method.aggregate(state, iter(rounds[-1]))
        assert clients or state is before
        assert np.allclose(oracles.visible(method, state), oracles.pruning_fl(method, rounds), rtol=1e-6)
    assert unpack_bits(state.keep, 32).sum() == 32 - round(0.6 * 32)
    assert state.pruned == 3


def test_the_filters_that_go_have_the_smallest_norms():
    """As ``filter_scores`` of the averaged network says."""
    method, rng = build(PruningFL, mlp3, search_rounds=1, keep_min=3), np.random.default_rng(0)
    updates = replies(method, method.init(), 2, rng)
    keep = unpack_bits(method.aggregate(method.init(), iter(updates)).keep, 28)
    model = network(mlp3)
    weights = [u.weight for u in updates]
    method.write(model, np.average([u.payload.dense["weights"] for u in updates], 0, weights).astype(np.float32))
    scores = filter_scores(model, couple(model), method.spec)
    for part, norms in zip(np.split(keep, [16]), np.split(scores, [16]), strict=True):
        assert part.sum() == part.size // 2
        assert norms[~part].max() < norms[part].min()


def test_what_is_left_keeps_its_averaged_weights():
    method, rng = build(PruningFL, search_rounds=2, keep_min=4), np.random.default_rng(1)
    (update,) = replies(method, method.init(), 1, rng)
    state = method.aggregate(method.init(), iter([update]))
    flags = oracles.there(unpack_bits(state.keep, 32))
    assert not all(flags)
    values = update.payload.dense["weights"].tolist()
    assert state.weights.tolist() == [v for v, flag in zip(values, flags, strict=True) if flag]


def test_a_turn_trains_the_slim_network_from_the_average():
    method, rng = build(PruningFL, search_rounds=1, keep_min=4), np.random.default_rng(2)
    state = method.aggregate(method.init(), iter(replies(method, method.init(), 2, rng)))
    got, model, memory = method.broadcast(state), network(), {}
    optimizer = method.begin(got, model, TRAINING, TURN, memory)
    assert np.array_equal(method.read(model), state.weights)
    assert count_parameters(model) == state.weights.size < method.floats
    steps(model, optimizer, 2)
    reply = method.finish(got, model, optimizer, TURN, memory)
    assert np.array_equal(reply.dense["weights"], method.read(model))
    assert (reply.dense["weights"] != state.weights).mean() > 0.9
    assert memory == {}
    back, _ = over_the_wire(reply, method.up(got, {})[0], method.known(got, TURN, {}), 2)
    assert np.array_equal(back.dense["weights"], reply.dense["weights"])


def test_the_first_turn_trains_the_whole_network():
    method, model = build(PruningFL), network()
    method.begin(Payload(), model, TRAINING, TURN, {})
    assert np.array_equal(method.read(model), method.start)
    assert not method.broadcast(method.init()).dense
    assert method.report(Payload(), {}) == {"model_bits": 32.0 * method.floats, "kept": 1.0}
    assert np.array_equal(method.result(method.init()).dense["weights"], method.start)


@pytest.mark.parametrize("change", [-1, 1, "full"])
def test_weights_of_another_size_are_refused(change):
    method, rng = build(PruningFL, search_rounds=1, keep_min=4), np.random.default_rng(3)
    state = method.aggregate(method.init(), iter(replies(method, method.init(), 1, rng)))
    n = method.floats if change == "full" else state.weights.size + change
    frame = pack(Payload(dense={"weights": np.ones(n, np.float32)}), digest=DIGEST, round_=2, known=None)
    with pytest.raises(WireError, match=f"has {n} elements, expected {state.weights.size}"):
        read_reply(frame, method, method.broadcast(state), TURN, {}, digest=DIGEST)


def test_it_learns_while_it_shrinks():
    method = build(PruningFL, search_rounds=4, keep_min=4)
    federation = Federation(method, training=TRAINING)
    found = [max(federation.train(1)) for _ in range(8)]
    assert found[0] > found[1] > found[2] > found[3] == found[7]
    assert federation.accuracy() > 0.9
    assert method.report(federation.told(), {})["kept"] == 0.5


def test_a_network_that_is_installed_has_empty_filters():
    method = build(PruningFL, search_rounds=1, keep_min=4)
    federation = Federation(method, training=TRAINING)
    federation.train(1)
    keep = method.keep(federation.told())
    model = federation.network()
    assert [bool(row.any()) for row in model[1].weight] == keep.tolist()
    assert (model[3].weight[:, ~keep] == 0).all()
    assert tiny.net()[1].weight.shape == model[1].weight.shape
