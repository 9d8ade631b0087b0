"""Top-k, SignSGD, QSGD, EDEN and FedCode: what all of them promise."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import tiny
import torch
from compressed_cases import ROWS, TURN, build, sent, some_round, train

from fedmask_flwr.masks import frozen_weights
from fedmask_flwr.methods import Training, Turn, Update, View
from fedmask_flwr.wire import Counts, Payload, WireError, pack

every_row = pytest.mark.parametrize("row", ROWS)


@every_row
def test_aggregation_equals_the_oracle(row):
    kind, config, oracle, _ = ROWS[row]
    method, _ = build(kind, config)
    state, rounds = method.init(), []
    for number, clients in enumerate([3, 5, 0, 1, 4]):
        rounds.append(some_round(row, method, state, number, clients))
        before, state = state, method.aggregate(state, iter(rounds[-1]))
        assert clients or state is before
        found = method.weights(method.broadcast(state))
        assert np.allclose(found, oracle(method, rounds), rtol=1e-6, atol=1e-7)


@every_row
def test_no_update_at_first_leaves_the_initial_weights(row):
    method, _ = build(*ROWS[row][:2])
    state = method.aggregate(method.init(), iter(()))
    assert method.broadcast(state).dense == {}
    assert np.array_equal(method.weights(method.broadcast(state)), method.start)


@every_row
def test_a_reply_survives_its_frame_and_passes_the_check(row):
    method, model = build(*ROWS[row][:2])
    got, memory = Payload(), {}
    state = method.init()
    for number in (1, 2):
        turn = replace(TURN, round=number)
        payload = train(method, model, got, turn, memory)
        back = sent(method, payload, got, turn)
        assert np.array_equal(method.decode(got, payload), method.decode(got, back))
        update = Update(0, back, 3.0, 0.0)
        method.check(state, update)
        state = method.aggregate(state, [update])
        got = method.broadcast(state)


@every_row
def test_a_turn_repeats_bit_for_bit(row):
    replies = []
    for _ in range(2):
        method, model = build(*ROWS[row][:2])
        payload = train(method, model, Payload(), TURN, {})
        replies.append(pack(payload, digest=b"eight by", round_=1, known=method.known(Payload(), TURN, {})))
    assert replies[0] == replies[1]


@every_row
def test_statistics_are_averaged_whole(row):
    """A running variance moved by a sign, or cut out of the k largest, would be nonsense."""
    method, model = build(*ROWS[row][:2])
    payload = train(method, model, Payload(), TURN, {})
    names = sorted(name for name, t in model.state_dict().items() if t.is_floating_point() and "running" in name)
    want = torch.cat([model.state_dict()[name] for name in names]).numpy()
    assert want.size == 64
    assert np.array_equal(payload.dense["statistics"], want)
    state = method.aggregate(method.init(), [Update(0, payload, 7.0, 0.0)])
    method.install(method.broadcast(state), model, frozen_weights(model, method.spec), View("expected"))
    found = torch.cat([model.state_dict()[name] for name in names]).numpy()
    assert np.array_equal(found, want)


@every_row
def test_a_network_without_statistics_sends_none(row):
    method, model = build(*ROWS[row][:2], make=tiny.net)
    assert "statistics" not in train(method, model, Payload(), TURN, {}).dense
    assert method.d == method.floats == 387


@every_row
def test_diverged_training_is_not_sent(row):
    method, model = build(*ROWS[row][:2])
    optimizer = method.begin(Payload(), model, Training(), TURN, {})
    with torch.no_grad():
        model[1].weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match="learning rate"):
        method.finish(Payload(), model, optimizer, TURN, {})


@every_row
def test_a_huge_update_leaves_finite_weights(row):
    """Or the next broadcast could not be packed, and one client would end the run."""
    method, _ = build(*ROWS[row][:2])
    state = method.init()
    for number in range(3):
        updates = some_round(row, method, state, number, 1)
        for values in updates[0].payload.dense.values():
            values[:] = np.finfo(np.float32).max
        state = method.aggregate(state, updates)
        assert np.isfinite(state.weights).all()
        assert all(np.isfinite(v).all() for v in method.broadcast(state).dense.values())


@every_row
def test_lossy_bits_are_refused(row):
    method, _ = build(*ROWS[row][:2])
    (update,) = some_round(row, method, method.init(), 0, 1)
    method.check(method.init(), update)
    with pytest.raises(WireError, match="exact codec"):
        method.check(method.init(), replace(update, flip_rate=2.0**-8))


@every_row
@pytest.mark.parametrize("make", [tiny.net, tiny.norm_net])
def test_it_learns(row, make):
    method, model = build(*ROWS[row][:2], make=make)
    state, memories = method.init(), [{}, {}, {}]
    x, y = tiny.blobs("train", "")
    for number in range(1, 13):
        got, updates = method.broadcast(state), []
        for client in range(3):
            turn = Turn(1, number, 12, client)
            mine = x[client * 50 : client * 50 + 50], y[client * 50 : client * 50 + 50]
            payload = train(method, model, got, turn, memories[client], data=mine, lr=0.05, epochs=4)
            updates.append(Update(client, sent(method, payload, got, turn), 50.0, 0.0))
        state = method.aggregate(state, iter(updates))
    method.install(method.broadcast(state), model, frozen_weights(model, method.spec), View("expected"))
    x, y = (torch.from_numpy(a) for a in tiny.blobs("test", ""))
    with torch.no_grad():
        assert (model.eval()(x).argmax(1) == y).float().mean() >= 0.85


def hostile(row, change):
    method, _ = build(*ROWS[row][:2])
    (update,) = some_round(row, method, method.init(), 0, 1)
    return method, replace(update, payload=change(update.payload))


@pytest.mark.parametrize(
    ("row", "change", "why"),
    [
        ("topk", lambda p: replace(p, bits={"where": p.bits["where"] | 1 ^ p.bits["where"] & 1}), "positions"),
        ("topk", lambda p: replace(p, bits={"where": p.bits["where"] * 0}), "0 positions"),
        ("qsgd", lambda p: replace(p, counts={"levels": Counts(p.counts["levels"].values, 13)}), "0..13"),
        ("qsgd", lambda p: replace(p, dense={**p.dense, "norms": -p.dense["norms"]}), "norm"),
        ("eden", lambda p: replace(p, meta={"k0": 1}), "k1 = None"),
        ("eden", lambda p: replace(p, meta={"k0": 1, "k1": 2**31}), "k1"),
        ("eden", lambda p: replace(p, meta={"k0": "1", "k1": 0}), "k0 = '1'"),
        ("eden", lambda p: replace(p, meta={"k0": 1.0, "k1": 0}), "k0"),
        ("eden", lambda p: replace(p, dense={**p.dense, "scale": -p.dense["scale"]}), "below 0"),
        ("fedcode", lambda p: replace(p, counts={"assignments": Counts(np.zeros(355, np.uint32), 8)}), "8 centres"),
    ],
)
def test_hostile_replies_are_refused(row, change, why):
    method, update = hostile(row, change)
    with pytest.raises(WireError, match=why):
        method.check(method.init(), update)
