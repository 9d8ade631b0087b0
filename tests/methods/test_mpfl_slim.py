"""MPFL: the network that is trained is smaller, and computes what the installed one does."""

from __future__ import annotations

import numpy as np
import pytest
import tiny
import torch
from federation import blobs, build, network, steps
from slimming_turns import TRAINING, Residual, images, mlp3, some, take_turn, told, turn_of

from fedmask_flwr.masks import (
    count_parameters,
    frozen_weights,
    gather,
    slim_,
)
from fedmask_flwr.methods import Training, View
from fedmask_flwr.methods.mpfl import MPFL
from fedmask_flwr.methods.pruning_fl import PruningFL
from fedmask_flwr.wire import Payload, pack_bits


@pytest.mark.parametrize(("make", "data"), [(tiny.net, blobs), (mlp3, blobs), (Residual, images)])
def test_begin_makes_the_model_smaller(make, data):
    method = build(MPFL, make, search_rounds=2, keep_min=2)
    keep = some(method, 3, 0.5)
    full, model = network(make), network(make)
    optimizer = method.begin(told(method, keep, 2), model, TRAINING, turn_of(3), {})
    assert count_parameters(model) < 0.75 * count_parameters(full)
    before = method.read(model)
    steps(model, optimizer, 2, *data())
    assert method.read(model).size == before.size == method.slim_numel(keep)
    assert (method.read(model) != before).mean() > 0.5


@pytest.mark.parametrize(("make", "data"), [(tiny.net, blobs), (mlp3, blobs), (Residual, images)])
def test_the_installed_network_is_the_slim_one(make, data):
    method = build(MPFL, make, search_rounds=2, keep_min=2)
    keep, (x, y) = some(method, 5, 0.6), data()
    got = told(method, keep, 2)
    reply, slim = take_turn(method, make, got, 3, None, x, y)
    sent = Payload(bits=got.bits, dense=reply.dense, meta=got.meta)
    model = network(make)
    method.install(sent, model, frozen_weights(model, method.spec), View("expected"))
    with torch.no_grad():
        for net in (model, slim):
            net.eval()
        assert torch.allclose(model(x), slim(x), atol=1e-5, rtol=1e-5)
        again = slim_(network(make), method.coupling, method.spec, keep)
        again.load_state_dict(slim.state_dict())
        assert torch.equal(again.eval()(x), slim(x)), "what a user saves, a slim network reads"


@pytest.mark.parametrize(("make", "data"), [(tiny.net, blobs), (Residual, images)])
@pytest.mark.parametrize("kind", [MPFL, PruningFL])
def test_adapting_brings_no_filter_back(kind, make, data):
    method, (x, y) = build(kind, make, keep_min=2), data()
    keep = some(method, 5, 0.6)
    got, model = Payload(bits={"keep": pack_bits(keep)}, meta={"searched": 8}), network(make)
    method.install(got, model, frozen_weights(model, method.spec), View("expected"))
    optimizer = method.adapt(got, model, Training("adam", 0.05), turn_of(9), {})
    before = method.read(model)
    steps(model, optimizer, 5, x, y)
    after = method.read(model)
    moved = np.flatnonzero(after != before)
    inside = gather(np.arange(method.floats), method.coupling, method.spec, keep)
    assert np.isin(moved, inside).all()
    assert moved.size > 0.5 * inside.size


def test_running_statistics_are_cut_and_put_back():
    """A checkpoint's BatchNorm keeps its statistics; pruned channels get a harmless variance."""
    torch.manual_seed(0)
    model = Residual()
    method = MPFL(MPFL.layout(model), model, MPFL.Config(keep_min=2))
    keep = some(method, 2, 0.5)
    method.install(told(method, keep, 8), model, frozen_weights(model, method.spec), View("expected"))
    unit = method.spec.units[method.spec.names.index("stem.weight")]
    start = int(np.cumsum([0, *method.spec.sizes])[unit])
    gone = torch.from_numpy(~keep[start : start + 12])
    assert gone.any()
    assert (model.norm.weight[gone] == 0).all()
    assert (model.norm.bias[gone] == 0).all()
    assert (model.norm.running_var == 1).all()
    other = Residual()
    method.begin(told(method, keep, 8), other, TRAINING, turn_of(9), {})
    assert other.norm.running_mean.shape == (int((~gone).sum()),)
