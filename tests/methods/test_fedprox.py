"""FedProx: the gradient of its loss, FedAvg at mu = 0, and clients that stay near."""

from __future__ import annotations

import numpy as np
import pytest
import tiny
import torch
from federation import Federation, blobs, build, flat, network, steps
from pydantic import ValidationError
from torch.nn.functional import cross_entropy

from fedmask_flwr.methods import Training, Turn
from fedmask_flwr.methods.fedavg import FedAvg
from fedmask_flwr.methods.fedprox import FedProx
from fedmask_flwr.wire import Payload

TURN = Turn(1, 2, 5, 0)


def begun(mu, training, make=tiny.net):
    """A method, its network at a broadcast that is not the initial weights, and the turn's optimiser."""
    method, model = build(FedProx, make, mu=mu), network(make)
    got = Payload(dense={"weights": method.start + np.float32(0.1)})
    return model, method.begin(got, model, training, TURN, {})


def by_the_loss(mu, training, n, x, y):
    """The paper's h(w), written as a loss and left to autograd."""
    model, _ = begun(0.0, training)
    start = [p.detach().clone() for p in model.parameters()]
    kind = torch.optim.Adam if training.optimizer == "adam" else torch.optim.SGD
    optimizer = kind(model.parameters(), training.lr)
    for _ in range(n):
        optimizer.zero_grad()
        near = sum(((p - a) ** 2).sum() for p, a in zip(model.parameters(), start, strict=True))
        (cross_entropy(model(x), y) + mu / 2 * near).backward()
        optimizer.step()
    return flat(model)


@pytest.mark.parametrize("mu", [0.001, 0.1, 1.0, 10.0])
@pytest.mark.parametrize("kind", ["sgd", "adam"])
@pytest.mark.parametrize("n", [1, 2, 6])
def test_the_gradient_is_that_of_the_loss(mu, kind, n):
    training = Training(kind, 0.05 if kind == "sgd" else 0.01)
    model, optimizer = begun(mu, training)
    steps(model, optimizer, n)
    assert np.allclose(flat(model), by_the_loss(mu, training, n, *blobs()), rtol=1e-3, atol=2e-5)


def test_the_term_tells():
    training = Training("sgd", 0.05)
    plain, held = (by_the_loss(mu, training, 6, *blobs()) for mu in (0.0, 1.0))
    assert np.abs(plain - held).max() > 1e-3


def test_without_the_term_it_is_fedavg_bit_for_bit():
    for kind in ("adam", "sgd"):
        training = Training(kind, 0.05)
        ours, theirs = (Federation(m, training=training) for m in (build(FedProx, mu=0.0), build(FedAvg)))
        ours.train(3)
        theirs.train(3)
        assert np.array_equal(ours.state.weights, theirs.state.weights)


@pytest.mark.parametrize("kind", ["adam", "sgd"])
def test_the_first_step_is_fedavg_s(kind):
    """Where w is w_t the term has no gradient."""
    found = []
    for mu in (0.0, 5.0):
        model, optimizer = begun(mu, Training(kind, 0.05))
        steps(model, optimizer, 1)
        found.append(flat(model))
    assert np.array_equal(*found)


def test_a_larger_mu_stays_nearer():
    """h falls, so mu/2 ||w - w_t||^2 never exceeds F(w_t)."""
    x, y = blobs()
    far = []
    for mu in (0.0, 0.1, 1.0, 10.0, 100.0):
        model, optimizer = begun(mu, Training("sgd", 0.01))
        before, loss = flat(model).copy(), cross_entropy(model(x), y).item()
        steps(model, optimizer, 200)
        far.append(np.linalg.norm(flat(model) - before))
        assert mu * far[-1] ** 2 / 2 <= loss
    assert far == sorted(far, reverse=True)
    assert far[-1] < 0.1 * far[0]


def test_a_closure_is_held_as_well():
    x, y = blobs()
    found = []
    for closed in (False, True):
        model, optimizer = begun(1.0, Training("sgd", 0.05))

        def closure(model=model, optimizer=optimizer):
            optimizer.zero_grad()
            loss = cross_entropy(model(x), y)
            loss.backward()
            return loss

        for step in range(4):
            if closed:
                before = cross_entropy(model(x), y).item()
                loss = optimizer.step(closure) if step % 2 else optimizer.step(closure=closure)
                assert loss.item() == before
            else:
                closure()
                optimizer.step()
        found.append(flat(model))
    assert np.array_equal(*found)


def test_only_what_trains_and_has_a_gradient_is_held():
    model, optimizer = begun(1.0, Training("sgd", 0.05))
    steps(model, optimizer, 2)
    optimizer.zero_grad()
    before = flat(model).copy()
    optimizer.step()
    assert np.array_equal(flat(model), before)


def test_learns_together_and_next_round_holds_to_the_new_weights():
    federation = Federation(build(FedProx, mu=0.1), training=Training("adam", 0.02))
    federation.train(4)
    assert federation.accuracy() > 0.8


def test_evaluation_s_fine_tuning_is_plain():
    method, model = build(FedProx, mu=10.0), network()
    optimizer = method.adapt(Payload(), model, Training("sgd", 0.05), TURN, {})
    steps(model, optimizer, 3)
    other = network()
    steps(other, torch.optim.SGD(other.parameters(), 0.05), 3)
    assert np.array_equal(flat(model), flat(other))


def test_settings_and_broadcast():
    assert FedProx.Config().mu == 0.01
    for wrong in (-0.1, float("inf"), float("nan")):
        with pytest.raises(ValidationError):
            FedProx.Config(mu=wrong)
    method = build(FedProx)
    assert not method.broadcast(method.init()).dense
