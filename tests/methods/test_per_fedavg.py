"""Per-FedAvg: pairs of steps, and a network that adapts."""

from __future__ import annotations

import numpy as np
import oracles_baselines as oracles
import pytest
import torch
from federation import Federation, blobs, build, flat, network, over_the_wire, steps
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy

from fedmask_flwr.methods import Training, Turn, Update
from fedmask_flwr.methods.fedavg import FedAvg
from fedmask_flwr.methods.per_fedavg import PairedSteps, PerFedAvg
from fedmask_flwr.wire import Payload, WireError

TURN = Turn(1, 2, 5, 0)
ALPHA, BETA = 0.02, 0.05


def paper(model, batches, alpha, beta):
    """Algorithm 1's inner loop, first-order, one float at a time; batches come in pairs."""
    w = [float(v) for v in flat(model)]
    for first, second in zip(batches[::2], batches[1::2], strict=False):
        g = gradient(model, w, *first)
        adapted = [a - alpha * b for a, b in zip(w, g, strict=True)]
        g = gradient(model, adapted, *second)
        w = [a - beta * b for a, b in zip(w, g, strict=True)]
    return w


def gradient(model, w, x, y):
    at = 0
    for p in model.parameters():
        p.data = torch.tensor(w[at : at + p.numel()], dtype=torch.float32).reshape(p.shape)
        p.grad = None
        at += p.numel()
    cross_entropy(model(x), y).backward()
    return [float(v) for p in model.parameters() for v in p.grad.ravel()]


@given(n=st.integers(1, 5))
def test_a_turn_is_the_papers_loop(n):
    """An odd batch at the end leaves nothing."""
    method, model = build(PerFedAvg, inner_lr=ALPHA), network()
    x, y = blobs()
    batches = [(x[i::5], y[i::5]) for i in range(n)]
    optimizer = method.begin(Payload(), model, Training("sgd", BETA), TURN, {})
    for batch in batches:
        steps(model, optimizer, 1, *batch)
    method.finish(Payload(), model, optimizer, TURN, {})
    assert np.allclose(flat(model), paper(network(), batches, ALPHA, BETA), rtol=1e-4, atol=1e-5)
    if n == 1:
        assert np.array_equal(flat(model), flat(network()))


def test_finish_sends_the_weights_without_the_half_done_pair():
    method, model = build(PerFedAvg), network()
    optimizer = method.begin(Payload(), model, Training("adam", 0.01), TURN, {})
    steps(model, optimizer, 2)
    whole = method.read(model).copy()
    steps(model, optimizer, 1)
    assert not np.array_equal(method.read(model), whole)
    reply = method.finish(Payload(), model, optimizer, TURN, {})
    assert np.array_equal(reply.dense["weights"], whole)
    assert not np.array_equal(whole, method.start)


def test_a_scheduler_reaches_the_move():
    model = network()
    method = build(PerFedAvg)
    optimizer = method.begin(Payload(), model, Training("sgd", 1.0), TURN, {})
    assert isinstance(optimizer, PairedSteps)
    optimizer.param_groups[0]["lr"] = 0.0
    steps(model, optimizer, 2)
    assert np.array_equal(flat(model), flat(network()))


def test_a_closure_is_called_once_a_step():
    model = network()
    optimizer = build(PerFedAvg).begin(Payload(), model, Training(), TURN, {})
    calls = []

    def closure():
        optimizer.zero_grad()
        loss = cross_entropy(model(blobs()[0]), blobs()[1])
        loss.backward()
        calls.append(loss.item())
        return loss.item()

    assert optimizer.step(closure) == calls[0]
    assert optimizer.step(closure) == calls[1]
    assert len(calls) == 2


def test_finish_wants_its_own_optimiser():
    model = network()
    with pytest.raises(TypeError, match="not SGD"):
        build(PerFedAvg).finish(Payload(), model, torch.optim.SGD(model.parameters(), 0.1), TURN, {})


def test_adaptation_is_plain_sgd_at_alpha():
    method, model = build(PerFedAvg, inner_lr=ALPHA), network()
    optimizer = method.adapt(Payload(), model, Training("adam", 7.0), TURN, {})
    (gradients,) = steps(model, optimizer, 1)
    for p, start, g in zip(model.parameters(), network().parameters(), gradients, strict=True):
        assert torch.allclose(p, start - ALPHA * g)
    assert method.adapt_epochs == 1


@pytest.mark.parametrize("seed", range(3))
def test_aggregate_equals_the_oracle(seed):
    method, rng = build(PerFedAvg), np.random.default_rng(seed)
    state, rounds = method.init(), []
    for clients in (0, 4, 0, 1):
        updates = [
            Update(k, Payload(dense={"weights": rng.normal(size=387).astype(np.float32)}), rng.integers(1, 9), 0.0)
            for k in range(clients)
        ]
        rounds.append(updates)
        before, state = state, method.aggregate(state, iter(updates))
        assert clients or state is before
        assert np.allclose(method.current(state), oracles.mean_of_weights(method, rounds), rtol=1e-6)


def test_other_fields_are_refused():
    (form,) = build(PerFedAvg).up(Payload(), {})
    with pytest.raises(WireError):
        over_the_wire(Payload(dense={"weights": np.zeros(386, np.float32)}), form, None, 1)


def test_it_learns():
    federation = Federation(build(PerFedAvg), training=Training("adam", 0.02))
    assert federation.accuracy() < 0.7
    sizes = federation.train(8)
    assert federation.accuracy() > 0.9
    assert max(sizes) < 4 * 387 + 120


def test_devices_that_disagree_adapt():
    """Labels of its own on each device: adapted networks are far better than the one they start from."""
    federation = Federation(build(PerFedAvg, inner_lr=0.02), training=Training("adam", 0.005), skew=True)
    federation.train(10)
    before = np.mean([federation.accuracy(k) for k in range(3)])
    after = np.mean([federation.accuracy(k, adapt=1) for k in range(3)])
    assert before < 0.6
    assert after > before + 0.2


def test_it_is_not_fedavg():
    found = []
    for kind in (PerFedAvg, FedAvg):
        federation = Federation(build(kind), training=Training("sgd", 0.01))
        federation.train(1)
        found.append(flat(federation.network()))
    assert not np.array_equal(*found)
