"""LG-FedAvg, linear probing and fine-tuning: FedAvg of a part of the network."""

from __future__ import annotations

import numpy as np
import oracles_baselines as oracles
import pytest
import tiny
import torch
from federation import Federation, build, network, over_the_wire, steps
from torch import nn

from fedmask_flwr.masks import frozen_weights
from fedmask_flwr.methods import Training, Turn, Update, View
from fedmask_flwr.methods.fedavg import FedAvg
from fedmask_flwr.methods.finetune import FineTune, selection
from fedmask_flwr.methods.layers import last_layers, layers
from fedmask_flwr.methods.lg_fedavg import LgFedAvg
from fedmask_flwr.methods.linear_probe import LinearProbe
from fedmask_flwr.wire import Payload, WireError

TURN = Turn(1, 2, 5, 0)
HEAD = {"include": ("3.*",)}
KINDS = [
    pytest.param(LgFedAvg, {"shared_layers": 1}, id="lg-fedavg"),
    pytest.param(LinearProbe, {}, id="linear-probe"),
    pytest.param(FineTune, HEAD, id="finetune"),
]


def stored_norm():
    """A pretrained network's BatchNorm: it stores statistics."""
    model = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 3))
    with torch.no_grad():
        for i, p in enumerate(model.parameters()):
            p.copy_(torch.sin(torch.arange(p.numel()) + i).reshape(p.shape))
    return model


@pytest.mark.parametrize(("kind", "settings"), KINDS)
def test_the_head_is_what_travels(kind, settings):
    method = build(kind, **settings)
    model = network()
    assert np.array_equal(method.start, np.concatenate([model[3].bias.detach(), model[3].weight.detach().ravel()]))
    assert method.up(Payload(), {}) == ({"weights": ("dense", 99)},)
    assert method.numel == 387


@pytest.mark.parametrize(("kind", "settings"), KINDS)
@pytest.mark.parametrize("seed", range(3))
def test_aggregate_equals_the_oracle(kind, settings, seed):
    method, rng = build(kind, **settings), np.random.default_rng(seed)
    state, rounds = method.init(), []
    for clients in (0, 3, 0, 2):
        updates = [
            Update(k, Payload(dense={"weights": rng.normal(size=99).astype(np.float32)}), rng.integers(1, 9), 0.0)
            for k in range(clients)
        ]
        rounds.append(updates)
        before, state = state, method.aggregate(state, iter(updates))
        assert clients or state is before
        assert np.allclose(method.current(state), oracles.mean_of_weights(method, rounds), rtol=1e-6)


@pytest.mark.parametrize(("kind", "settings"), KINDS)
def test_it_learns_for_the_bits_of_a_head(kind, settings):
    federation = Federation(build(kind, **settings), training=Training("adam", 0.05))
    assert federation.accuracy(0) < 0.7
    sizes = federation.train(6)
    assert federation.accuracy(0) > 0.85
    assert all(4 * 99 <= size < 4 * 99 + 120 for size in sizes)


@pytest.mark.parametrize(("kind", "settings"), KINDS)
def test_other_fields_are_refused(kind, settings):
    method = build(kind, **settings)
    (form,) = method.up(Payload(), {})
    for values in (np.zeros(387, np.float32), np.zeros(98, np.float32)):
        with pytest.raises(WireError):
            over_the_wire(Payload(dense={"weights": values}), form, None, 1)


def test_lg_fedavg_keeps_the_lower_layers_on_the_device():
    method, memory, model = build(LgFedAvg, shared_layers=1), {}, network()
    optimizer = method.begin(Payload(), model, Training("adam", 0.05), TURN, memory)
    steps(model, optimizer, 3)
    reply = method.finish(Payload(), model, optimizer, TURN, memory)
    lower = [model[1].bias.detach().clone(), model[1].weight.detach().clone()]
    assert not torch.equal(lower[1], network()[1].weight)  # both parts train
    assert np.array_equal(memory["local"], torch.cat([t.reshape(-1) for t in lower]).numpy())
    assert reply.dense["weights"].size == 99

    told = Payload(dense={"weights": np.full(99, 0.5, np.float32)})
    for write in (
        lambda m, own: method.begin(told, m, Training(), TURN, own),
        lambda m, own: method.install(told, m, frozen_weights(m, method.spec), View("expected", memory=own)),
    ):
        write(own := network(), memory)
        assert torch.equal(own[1].weight, lower[1])
        assert bool((own[3].weight == 0.5).all())
        write(model, {})  # the memory is lost
        assert torch.equal(model[1].weight, network()[1].weight)
        assert torch.equal(model[1].bias, network()[1].bias)


def test_lg_fedavg_serves_devices_that_disagree():
    """With labels of its own on each device, personal lower layers help; one network cannot please them all."""
    both = {}
    for kind, settings in ((LgFedAvg, {"shared_layers": 1}), (FedAvg, {})):
        federation = Federation(build(kind, **settings), training=Training("adam", 0.02), skew=True)
        federation.train(8)
        both[kind] = np.mean([federation.accuracy(k) for k in range(3)])
    assert both[LgFedAvg] > 0.85
    assert both[FedAvg] < 0.6


def test_lg_fedavg_needs_that_many_layers():
    with pytest.raises(ValueError, match="has 2 with weights: ask for fewer"):
        build(LgFedAvg, shared_layers=3)


def test_layers_have_a_weight_of_two_dimensions():
    model = stored_norm()
    assert [[p.ndim for p in layer] for layer in layers(model)] == [[2, 1], [2, 1]]
    assert last_layers(model, 1) == {"3.weight", "3.bias"}
    assert last_layers(model, 2) == {"0.weight", "0.bias", "3.weight", "3.bias"}


def test_a_tied_layer_travels_by_all_its_names():
    model = nn.ModuleDict({"embed": nn.Embedding(5, 4), "body": nn.Linear(4, 4), "head": nn.Linear(4, 5)})
    model["head"].weight = model["embed"].weight
    assert last_layers(model, 1) == {"embed.weight", "head.weight", "head.bias"}


@pytest.mark.parametrize(("kind", "settings"), KINDS[1:])
def test_a_frozen_backbone_does_not_move(kind, settings):
    def body(model):
        return {name: t.clone() for name, t in model.state_dict().items() if not name.startswith("3.")}

    model = stored_norm()
    method = kind(kind.layout(model, **settings), model)
    before, head = body(model), model[3].weight.detach().clone()
    optimizer = method.begin(Payload(), model, Training(), TURN, {})
    model.train()
    steps(model, optimizer, 2)
    assert not torch.equal(model[3].weight, head)
    after = body(model)
    assert all(torch.equal(after[name], before[name]) for name in before)  # statistics too
    assert [name for name, p in model.named_parameters() if p.requires_grad] == ["3.weight", "3.bias"]


@pytest.mark.parametrize("make", [tiny.net, tiny.norm_net, stored_norm])
def test_fine_tuning_everything_is_fedavg(make):
    frames = []
    for kind in (FineTune, FedAvg):
        model = make()
        torch.manual_seed(0)
        for p in model.parameters():
            nn.init.normal_(p)
        method = kind(kind.layout(model), model)
        optimizer = method.begin(Payload(), model, Training(), TURN, {})
        steps(model.train(), optimizer, 2)
        frames.append(method.finish(Payload(), model, optimizer, TURN, {}).dense["weights"])
    assert np.array_equal(*frames)


class Block(nn.Module):
    """A transformer block's shape: norms before what they feed."""

    def __init__(self):
        super().__init__()
        self.ln = nn.LayerNorm(4)
        self.attention = nn.MultiheadAttention(4, 1)
        self.mlp = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))


def test_vectors_go_with_their_weights():
    model = nn.ModuleDict({"a": Block(), "b": Block(), "ln": nn.LayerNorm(4), "head": nn.Linear(4, 2)})
    chosen = selection(FineTune.layout(model, ("b.*", "head.*")), model)
    assert chosen == {n for n, _ in model.named_parameters() if not n.startswith("a.")}
    chosen = selection(FineTune.layout(model, ("a.*",)), model)
    assert chosen == {n for n, _ in model.named_parameters() if n.startswith("a.")}
    chosen = selection(FineTune.layout(model, ("b.mlp.2.*",)), model)
    assert chosen == {"b.mlp.2.weight", "b.mlp.2.bias", "ln.weight", "ln.bias"}


def test_a_flat_norm_goes_with_the_weight_before_it():
    model = stored_norm()
    assert selection(FineTune.layout(model, ("0.*",)), model) == {"0.weight", "0.bias", "1.weight", "1.bias"}
    assert selection(FineTune.layout(model, ("3.*",)), model) == {"3.weight", "3.bias"}
    first = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 4), nn.Linear(4, 2))
    assert selection(FineTune.layout(first, ("2.*",)), first) == {"2.weight", "2.bias"}
