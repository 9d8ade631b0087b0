"""The devices of CONFEDMADE and FedWeIT: what they send, what they remember, and that it is what they trained."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import nn
from weit_turns import (
    ROUNDS,
    Device,
    alike,
    begun,
    build,
    different,
    edited,
    examples,
    folded,
    judged,
    network,
    nll,
    over_the_wire,
    play,
)

from fedmask_flwr.masks import initialise
from fedmask_flwr.methods import Training, Turn
from fedmask_flwr.methods.fedweit import FedWeIT
from fedmask_flwr.train import train
from fedmask_flwr.wire import Payload, WireError, popcount

FRAME = 300  # bytes at most of a frame's header, directory, meta data and ids


def wide():
    return network(64, 100)


def one_round(model=wide, **settings):
    """A device of a wide MADE after a round that is its task's last; no step, so that it takes no time."""
    method = build(model(), tasks=2, **settings)
    state = begun(method, method.init(), rounds=2)
    assert state.last == 1
    device = Device(method, 0, model)
    got = method.broadcast(state, 0)
    x = (torch.rand(50, 64, generator=torch.Generator().manual_seed(1)) > 0.5).float()
    net, now = model(), Turn(1, 1, 2, 0)
    optimizer = method.begin(got, net, Training(lr=0.01), now, device.memory)
    train(net, optimizer, x, torch.zeros(50), epochs=2, batch_size=25, key=(1,), losses=nll)
    reply = method.finish(got, net, optimizer, now, device.memory)
    back, frame = over_the_wire(method, reply, method.up(got, {}), method.known(got, now, {}), 1)
    return method, state, device, reply, back, frame


def weights(model):
    """All weights that matter and biases, as one vector."""
    keep = model.structure()
    parts = [p[keep[name]] if name in keep else p for name, p in model.named_parameters()]
    return torch.cat([p.detach().reshape(-1) for p in parts])


def unpacked(method, model, flags, values):
    """The slow twin of packing: {kind: dense tensor with NaN where nothing came}."""
    out, at, column = {}, 0, 0
    for name, mask in model.structure().items():
        dense = torch.full(mask.shape, torch.nan)
        for o, row in enumerate(mask):
            for i in row.nonzero().flatten().tolist():
                if flags[column + o]:
                    dense[o, i] = float(values[at])
                    at += 1
        out[name], column = dense, column + len(mask)
    assert (at, column) == (len(values), len(flags))
    return out


# What travels


@pytest.mark.parametrize("sparsity", [0.0, 0.2])
def test_a_reply_holds_masked_columns_and_the_bytes_of_the_formula(sparsity):
    """4 nnz(M & columns) for B, a bit a column; at the end of a task a bit a position, and 4 bytes a kept value."""
    method, _, device, reply, back, frame = one_round(client_sparsity=sparsity)
    assert alike(reply, back)
    model, flags = wide(), method.flags(back)
    kinds = model.structure()
    for part, mask in zip(
        np.split(flags, np.cumsum([len(m) for m in kinds.values()])[:-1]), kinds.values(), strict=True
    ):
        assert part.sum() == np.ceil((1 - sparsity) * len(mask))
    got = unpacked(method, model, flags, back.dense["base"])
    method.structure.write(model, torch.from_numpy(device.memory["base"]))
    nnz = 0
    for (name, mask), chosen in zip(kinds.items(), got.values(), strict=True):
        there = ~chosen.isnan()
        assert torch.equal(chosen[there], dict(model.named_parameters())[name][there])
        assert not (there & ~mask).any()
        nnz += int(there.sum())
    assert nnz == sum(int(m.sum()) for m in kinds.values()) or sparsity
    kept = int((np.abs(device.memory["A.0"]) > method.config.prune_below).sum())
    assert 0 < kept < method.structure.numel
    base = 4 * nnz + sum(-(-len(m) // 8) for m in kinds.values())
    entry = 4 * kept + -(-method.structure.numel // 8)
    assert back.dense["values"].size == kept == popcount(back.bits["where"])
    assert 0.99 * (base + 4 * kept) < len(frame) < 1.01 * (base + entry) + FRAME
    assert 0.45 < method.structure.numel / method.structure.dense_numel < 0.55, "half of the weights: one mask"


def test_a_broadcast_and_an_entry_cost_what_the_formula_says():
    method, state, device, _, back, _ = one_round(client_sparsity=0.0)
    state = begun(method, folded(method, state, {0: back}), rounds=2)
    n, columns = method.structure.numel, method.structure.columns
    sizes = {}
    for client in (0, 1):
        told = method.broadcast(state, client)
        got, frame = over_the_wire(method, told, [method.down({})], method.heard({}), 2)
        assert alike(told, got)
        sizes[client] = len(frame)
    base, entry = 4 * n + -(-columns // 8), 4 * back.dense["values"].size + -(-n // 8)
    assert 4 * n < sizes[0] < 1.01 * base + FRAME, "its own entry does not come back"
    assert sizes[0] + entry - n / 8 < sizes[1] < 1.01 * (base + entry) + FRAME
    assert np.array_equal(got.dense["base"], device.memory["base"])
    assert np.array_equal(got.dense["values.0"], back.dense["values"])
    assert np.array_equal(got.bits["where.0"], back.bits["where"])


def test_the_naive_combination_sends_all_weights():
    model = network()
    assert build(model, FedWeIT).structure.numel == sum(p.numel() for p in model.parameters() if p.ndim == 2)
    assert build(model).structure.numel == sum(int(mask.sum()) for mask in model.structure().values())
    with pytest.raises(ValueError, match="use model made, or method fedweit"):
        build(nn.Linear(4, 2))


def test_columns_with_the_largest_gates_are_sent():
    method = build(client_sparsity=0.25)
    mask = np.linspace(-1, 1, method.structure.columns, dtype=np.float32)
    mask[::2] *= -1
    flags, at = method._columns(mask), 0
    for size in method.structure.column_sizes:
        own = sorted(range(size), key=lambda o: -mask[at + o])[: int(np.ceil(0.75 * size))]
        assert np.flatnonzero(flags[at : at + size]).tolist() == sorted(own)
        at += size


def test_released_columns_are_those_strictly_above_by_magnitude():
    method = build(client_sparsity=0.25, compat="released")
    mask = np.linspace(-1, 1, method.structure.columns, dtype=np.float32)
    flags, at = method._columns(mask), 0
    for size in method.structure.column_sizes:
        m = np.abs(mask[at : at + size])
        cut = sorted(m.tolist())[int(size * 0.25)]
        assert np.array_equal(flags[at : at + size], m > cut)
        assert flags[at : at + size].sum() < np.ceil(0.75 * size), "strictly: a column less than the share"
        at += size
    assert flags[0], "the most suppressed column counts as important"
    assert not build(client_sparsity=0.25)._columns(mask)[0]


# theta is what was trained


def test_the_installed_network_is_the_trained_one_bit_for_bit():
    """Every round of a first task, and of a second one with knowledge of others in it."""
    method = build(tasks=2)
    devices, state = [Device(method, k) for k in range(2)], method.init()
    for _ in range(2 * ROUNDS):
        state = play(method, devices, state, 1, different)
        for device in devices:
            assert device.optimizer.structure.numel == method.structure.numel
            assert torch.equal(weights(device.network()), weights(device.trained))
            assert torch.equal(weights(device.network(state.task)), weights(device.trained))
    assert all(len(device.memory["ids"]) == 1 and device.memory["alpha"].all() for device in devices)


def kept(retroactive, lambda2=100.0, compat="fixed", rounds=ROUNDS):
    """Largest change of a weight of the first tasks' networks while second ones are learned, and of their NLL."""
    method = build(tasks=2, retroactive=retroactive, lambda2=lambda2, compat=compat, client_sparsity=0.0)
    devices = [Device(method, k, lr=0.03) for k in range(2)]
    state = play(method, devices, method.init(), ROUNDS, different, steps=3)
    first = [device.network(0) for device in devices]
    moved, worse, shared = [], [], [state.base]
    for _ in range(rounds):
        state = play(method, devices, state, 1, different, steps=3)
        shared.append(state.base)
        now = [device.network(0) for device in devices]
        moved += [float((weights(a) - weights(b)).abs().max()) for a, b in zip(now, first, strict=True)]
        worse.append([judged(a, k) - judged(b, k) for k, (a, b) in enumerate(zip(now, first, strict=True))])
    assert all(np.abs(a - b).max() > 1e-3 for a, b in pairwise(shared)), "theta_G does move"
    return max(moved), np.array(worse)


def test_exact_keeps_the_old_network():
    moved, worse = kept("exact")
    assert 0 < moved < 1e-5
    assert np.abs(worse).max() < 1e-4


@pytest.mark.parametrize("retroactive", ["gradient", "freeze"])
def test_the_other_ways_keep_it_nearly(retroactive):
    moved, worse = kept(retroactive)
    assert moved > 1e-4
    assert np.abs(worse).max() < 0.1


def test_without_lambda2_the_old_network_is_lost():
    assert kept("gradient", lambda2=0.0)[1][-1].min() > 1
    assert kept("exact", lambda2=0.0)[0] > 0.1, "and there is nothing to solve for"


def test_raw_masks_are_the_released_penalty():
    """B*sigma(m) + A is then no longer what stays: B*m + A is."""
    assert kept("exact", compat="released", rounds=1)[0] > 1e-2
    method = build(tasks=2, compat="released", lambda1=0.0)
    device, state = Device(method, 0), method.init()
    state = play(method, [device], state, ROUNDS + 1, different)
    memory, column = device.memory, method.structure.column.numpy()
    assert np.abs(memory["base"] - memory["snap.base"]).max() > 1e-3
    before = memory["snap.base"] * memory["m.0"][column] + memory["snap.A.0"]
    after = memory["base"] * memory["m.0"][column] + memory["A.0"]
    assert np.allclose(before, after, atol=1e-6)
    assert device.optimizer._old_gates is None, "exact: solved for, not trained"


# A new task


def test_a_switch_comes_before_theta_g():
    method = build(tasks=2, client_sparsity=0.5)
    devices = [Device(method, k) for k in range(3)]
    state = play(method, devices, method.init(), ROUNDS, different)
    device, before = devices[0], {k: v.copy() for k, v in devices[0].memory.items()}
    state = begun(method, state)
    assert (state.task, before["task"][0]) == (1, 0)
    assert np.abs(state.base - before["base"]).max() > 1e-3
    device.turn(state, 2)
    began, column = device.began, method.structure.column.numpy()
    assert np.array_equal(began["snap.base"], before["base"])
    assert np.array_equal(began["snap.A.0"], before["A.0"])
    assert np.allclose(began["A.1"], before["base"] / 3, rtol=1e-6)
    sent = state.sent.astype(bool)[column]
    assert 0 < sent.sum() < sent.size
    assert np.array_equal(began["base"], np.where(sent, state.base, before["base"])), "unsent columns stay own"
    assert not began["local.1"].any() and before["local.0"].any(), "biases begin at 0, the old ones are kept"
    assert np.array_equal(began["local.0"], before["local.0"])
    assert np.abs(began["m.1"]).max() < 1 and np.abs(began["m.1"] - before["m.0"]).max() > 0.05
    assert began["ids"].tolist() == [1, 2] and not began["alpha"].any()
    assert not any(name.startswith("moments.") for name in began)
    assert int(device.memory["moments.base.step"][0]) == device.memory["moments.alpha.step"][0] > 0


def test_masks_begin_differently_on_every_device_and_in_every_task():
    method = build(tasks=2)
    devices = [Device(method, k) for k in range(2)]
    play(method, devices, method.init(), ROUNDS + 1, different)
    first = [d.began[name] for d in devices for name in ("m.0", "m.1")]
    assert len({m.tobytes() for m in first}) == 4


def test_a_finished_task_does_not_need_its_entries():
    """What it knew of others is folded into a constant, and stays when the entries are let go."""
    method = build(tasks=3)
    devices, state = [Device(method, k) for k in range(2)], method.init()

    def task_of(_, task):
        return different(0, task)

    for round_ in range(1, 7):
        if round_ == 5:
            known = devices[0].network()
            assert devices[0].memory["alpha"].all() and devices[0].held() == [1]
        state = method.advance(state, Turn(1, round_, 6, 0))
        replies = {d.client: d.turn(state, task_of(d.client, state.task), 4) for d in devices}
        state = folded(method, state, replies)
    device = devices[0]
    assert device.memory["task"][0] == 2
    assert np.abs(device.memory["K.1"]).max() > 1e-4 and "K.0" not in device.memory
    for name in [name for name in device.memory if name.startswith("kb.")]:
        del device.memory[name]
    device.memory["ids"], device.memory["alpha"] = np.zeros(0, np.int64), np.zeros((0, 3), np.float32)
    assert (weights(device.network(1)) - weights(known)).abs().max() < 1e-5


def test_a_device_says_which_tasks_it_met():
    method, device = build(tasks=2), Device(build(tasks=2), 0)
    assert method.tasks({}) == ()
    start = network()
    assert torch.equal(weights(device.network()), weights(start)), "before its first turn: the named weights"
    play(method, [device], method.init(), ROUNDS + 1, different)
    assert method.tasks(device.memory) == (0, 1)
    with pytest.raises(ValueError, match="never met task 2, only 0, 1"):
        device.network(2)
    report = method.report(None, device.memory)
    assert report["capacity"] == pytest.approx(report["model_bits"] / 32 / method.numel)
    assert 1 < report["capacity"] < 2.5


def test_the_server_cannot_send_a_device_back():
    method, device = build(tasks=2), Device(build(tasks=2), 0)
    state = play(method, [device], method.init(), ROUNDS + 1, different)
    got = edited(method.broadcast(state, 0), meta={"task": 0})
    with pytest.raises(WireError, match="at task 1 already"):
        method.begin(got, network(), Training(), Turn(1, 9, 9, 0), device.memory)


@pytest.mark.parametrize("task", ["1", 2**40, -2, None, 0.5])
def test_a_task_is_a_number(task):
    method = build(tasks=2)
    got = Payload(meta={} if task is None else {"task": task})
    with pytest.raises(WireError, match="expected a number"):
        method.begin(got, network(), Training(), Turn(1, 1, 9, 0), {})


def test_damaged_broadcasts_are_refused():
    method = build(tasks=2)
    devices = [Device(method, k) for k in range(2)]
    state = begun(method, play(method, devices, method.init(), ROUNDS, different))
    told = method.broadcast(state, 0)
    assert told.counts["new"].values.tolist() == [1]
    wrong = {
        "theta_G": edited(told, dense={"base": told.dense["base"][:-1]}),
        "entry 1": edited(told, dense={"values.0": told.dense["values.0"][:-1]}),
        "came damaged": edited(told, counts={"new": type(told.counts["new"])(np.array([1, 7], np.uint32), 7)}),
    }
    for match, got in wrong.items():
        memory = dict(devices[0].memory)
        with pytest.raises(WireError, match=match):
            method.begin(got, network(), Training(), Turn(1, 5, 8, 0), memory)


# Tasks that are found


def test_a_jump_of_the_losses_begins_a_task():
    method = build(tasks=0)
    device, state = Device(method, 0), method.init()
    rng, seen = np.random.default_rng(0), []
    assert not method.observe(rng.normal(9, 1, 50), Turn(1, 1, 9, 0), device.memory), "nothing was learned yet"
    for mean in (4.0, 3.9, 3.8, 9.0, 3.9):
        state = begun(method, state)
        if device.memory:
            method.observe(rng.normal(mean, 1, 50), Turn(1, state.clock, 9, 0), device.memory)
        state = folded(method, state, {0: device.turn(state, 0)})
        seen.append(method.tasks(device.memory))
        assert "switch" not in device.memory
    assert seen == [(0,), (0,), (0,), (0, 1), (0, 1)]
    assert state.knowledge.tasks(0) == (0,)


# Heads of classifiers


def test_a_classifier_keeps_a_head_for_each_task():
    def make():
        model = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 4))
        initialise(model, "seed:1:glorot")
        return model

    method = build(make(), FedWeIT, tasks=2)
    assert method.structure.names == ("0.weight",)
    assert build(make(), FedWeIT, local_layers=0).structure.names == ("0.weight", "2.weight")
    device, state = Device(method, 0, make), method.init()

    def turn(state, source):
        got, net, now = method.broadcast(state, 0), make(), Turn(1, state.clock, 2, 0)
        optimizer = method.begin(got, net, Training(lr=0.01), now, device.memory)
        began = net[2].weight.detach().clone()
        x, y = examples(source)
        train(net, optimizer, x, y, epochs=1, batch_size=32, key=(1,))
        reply = method.finish(got, net, optimizer, now, device.memory)
        return folded(method, state, {0: reply}), net, began

    state, first, _ = turn(begun(method, method.init(), 2), 0)
    state, second, began = turn(begun(method, state, 2), 3)
    assert torch.equal(began, make()[2].weight), "a new head from the named weights"
    assert torch.equal(device.network(0)[2].weight, first[2].weight)
    assert torch.equal(device.network(1)[2].weight, second[2].weight)
    assert not torch.equal(first[2].weight, second[2].weight)
