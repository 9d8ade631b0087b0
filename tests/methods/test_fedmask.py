"""FedMask's device: turns, memory and its loss, what it evaluates."""

from __future__ import annotations

import copy

import numpy as np
import oracles_fedmask as oracles
import pytest
import tiny
import torch
from fedmask_turns import (
    DIGEST,
    TRAINING,
    answer,
    build,
    first,
    fold,
    fresh_model,
    hear,
    later,
    mask_in,
    network,
    play,
    rows_of,
    take_turn,
)
from torch.nn.functional import cross_entropy

from fedmask_flwr.flower.records import read_broadcast
from fedmask_flwr.masks import frozen_weights
from fedmask_flwr.methods import Training, Turn, resolve
from fedmask_flwr.methods.fedmask import LEVELS, FedMaskConfig
from fedmask_flwr.train import evaluate
from fedmask_flwr.wire import Counts, Payload, SideInfo, WireError, pack, pack_bits, unpack_bits

every_return = pytest.mark.parametrize("returns", ["mean", "bit"])


def turn_of(round_, client=0):
    return Turn(1, round_, 9, client)


def support_of(memory, method):
    return unpack_bits(memory["support"], method.numel)


# Turns


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_the_first_turn_trains_all_weights_then_prunes(optimizer):
    method, memory = build(prune=0.3), {}
    training = Training(optimizer, 0.1 if optimizer == "adam" else 5.0)
    update, model, trained = take_turn(method, method.init(), turn_of(1), memory, training=training)
    assert trained.support.all()
    importance = trained.frozen.abs().numpy() * trained.theta().numpy()
    expected = oracles.keep_largest(importance, method.spec.shapes, 0.3, 2, "weight")
    assert support_of(memory, method).tolist() == expected
    assert (memory["scores"] == trained.scores.numpy()).all()
    values = update.payload.counts["first"].values
    assert ((values > 0) == expected).all()
    assert ((values == 2) == (mask_in(method, model) & expected)).all()


@every_return
def test_later_turns_train_the_support_alone(returns):
    method = build(returns=returns)
    state, memories = play(method, 1)
    support, scores = support_of(memories[0], method), memories[0]["scores"].copy()
    model, got = fresh_model(), hear(method, state, turn_of(2), memories[0])
    optimizer = method.begin(got, model, TRAINING, turn_of(2), memories[0])
    x, y = rows_of(0)
    moved = np.zeros(method.numel, bool)
    start = optimizer.scores.numpy().copy()
    for _ in range(5):
        assert not mask_in(method, model)[~support].any()
        optimizer.zero_grad()
        cross_entropy(model(x), y).backward()
        optimizer.step()
        moved |= optimizer.scores.numpy() != start
    assert moved[support].mean() > 0.5
    assert not moved[~support].any()
    payload = method.finish(got, model, optimizer, turn_of(2), memories[0])
    assert (support_of(memories[0], method) == support).all()
    assert (memories[0]["scores"][~support] == scores[~support]).all()
    mask = unpack_bits(payload.bits["mask"], int(support.sum()))
    assert (mask == mask_in(method, model)[support]).all()


@every_return
@pytest.mark.parametrize("tau", [0.3, 0.5, 0.8])
def test_begin_moves_the_scores_as_documented(returns, tau):
    """One position at a time, against the text of the card."""
    method, rng = build(returns=returns, tau=tau), np.random.default_rng(0)
    d, cut = method.numel, np.log(tau / (1 - tau))
    support = rng.random(d) < 0.8
    scores = (cut + rng.normal(0, 2, d)).astype(np.float32)
    memory = {"support": pack_bits(support), "scores": scores.copy()}
    replies = {f"k{k}": first(method, rng.random(d) < 0.8, rng.random(d) < 0.5) for k in range(1, 4)}
    state = fold(method, method.init(), k0=first(method, support, scores >= np.float32(cut)), **replies)
    got = hear(method, state, turn_of(2), memory)
    optimizer = method.begin(got, fresh_model(), TRAINING, turn_of(2), memory)
    vector, kinds = state.means[0], set()
    for i in range(d):
        own, found = bool(scores[i] >= np.float32(cut)), float(optimizer.scores[i])
        told = int(vector[i]) if returns == "mean" else LEVELS * int(2 * vector[i] >= LEVELS)
        if not support[i] or told == LEVELS * own or 2 * told == LEVELS:
            kinds.add("kept")
            assert found == scores[i]
        else:
            kinds.add(told)
            mean = min(max(told / LEVELS, 0.01), 0.99)
            assert found == pytest.approx(cut + np.log(mean / (1 - mean)), abs=1e-5)
            assert (found >= np.float32(cut)) == (2 * told >= LEVELS)
    assert kinds == ({"kept", 0, 60} if returns == "bit" else {"kept", 15, 20, 40, 45})
    assert (memory["scores"] == scores).all(), "begin must not write into the memory"


def test_the_first_scores_are_of_all_devices_and_of_the_seed():
    """All begin with one mask, of which theta0 are ones, whatever tau is."""
    method = build()
    turns = [Turn(1, 1, 5, 0), Turn(1, 1, 5, 1), Turn(1, 3, 5, 0), Turn(2, 1, 5, 0)]
    scores = [method.begin(Payload(), fresh_model(), TRAINING, turn, {}).scores.numpy() for turn in turns]
    assert (scores[0] == scores[1]).all()
    assert (scores[0] == scores[2]).all()
    assert (scores[0] != scores[3]).mean() > 0.9
    for theta0 in (0.2, 0.5, 0.9):
        for tau in (0.1, 0.5, 0.95):
            own = build(theta0=theta0, tau=tau)
            mask = own.begin(Payload(), fresh_model(), TRAINING, turns[0], {}).mask().numpy()
            assert abs(mask.mean() - theta0) < 4 * np.sqrt(theta0 * (1 - theta0) / own.numel)


@every_return
def test_what_a_device_is_told_again_it_already_does(returns):
    """Between rounds without training, hearing the server twice is hearing it once."""
    method = build(returns=returns)
    state, memories = play(method, 2)
    for client, memory in enumerate(memories):
        got = hear(method, state, turn_of(3, client), memory)
        once = method.scores(got, memory)
        again = method.scores(got, memory | {"scores": once})
        assert ((once >= 0) == (again >= 0)).all()
        model, _ = network(method, state, turn_of(2, client), memory)
        assert (mask_in(method, model) == ((once >= 0) & support_of(memory, method))).all()


@every_return
def test_the_installed_mask_is_the_majority_of_the_owners(returns):
    method = build(returns=returns)
    state, memories = play(method, 2, clients=4)
    for client, memory in enumerate(memories):
        support = support_of(memory, method)
        model, _ = network(method, state, turn_of(2, client), memory)
        mask = mask_in(method, model)
        vector = state.means[client].astype(int)
        own = memory["scores"] >= 0
        expected = np.where(2 * vector == LEVELS, own, 2 * vector > LEVELS) & support
        assert (mask == expected).all()
        assert (mask != (own & support)).any(), "nobody was outvoted: the test says nothing"


@every_return
@pytest.mark.parametrize("codec", ["auto", "bits", "fuse8+png"])
def test_devices_learn(returns, codec):
    """The first reply is exact in every codec: a support with wrong bits would never be agreed on."""
    method = build(returns=returns)
    state, memories = play(method, 5, codec=codec)
    x, y = map(torch.from_numpy, tiny.blobs("test", ""))
    for client, memory in enumerate(memories):
        assert method.in_step(method.broadcast(state, client).meta, memory)
        model, _ = network(method, state, turn_of(5, client), memory)
        assert evaluate(model, x, y)[1] > (0.7 if codec == "fuse8+png" else 0.85)


@every_return
def test_turns_repeat_bit_for_bit(returns):
    runs = [play(build(returns=returns), 3) for _ in range(2)]
    assert tiny.equal(runs[0][0], runs[1][0])
    for a, b in zip(runs[0][1], runs[1][1], strict=True):
        assert all(np.array_equal(a[name], b[name]) for name in ("support", "scores"))


def test_devices_with_other_data_get_other_supports():
    _, memories = play(build(), 1)
    assert not np.array_equal(memories[0]["support"], memories[1]["support"])


def test_another_optimizer_is_refused():
    method, model = build(), fresh_model()
    with pytest.raises(TypeError, match="not SGD"):
        method.finish(Payload(), model, torch.optim.SGD(model.parameters(), 0.1), turn_of(1), {})


# Lost, other and wrong memories


@every_return
@pytest.mark.parametrize("prune", [0.0, 0.2])
def test_a_device_that_lost_its_memory_rejoins(returns, prune):
    """With prune = 0 it prunes to the support it had: still it was told nothing, and says all."""
    method = build(returns=returns, prune=prune)
    state, _ = play(method, 2)
    memory = {}
    got = hear(method, state, turn_of(3), memory)
    assert not (got.bits or got.counts)
    assert got.meta == method.broadcast(state, 0).meta
    model, _ = network(method, state, turn_of(3), memory)  # evaluates with all weights
    assert mask_in(method, model).all()
    update, _, trained = take_turn(method, state, turn_of(3), memory)
    assert trained.support.all()
    assert set(update.payload.counts) == {"first"}
    state = method.aggregate(state, [update])
    assert (method.recall(state, 0)["support"] == memory["support"]).all()
    update, *_ = take_turn(method, state, turn_of(4), memory)
    assert set(update.payload.bits) == {"mask"}


@every_return
def test_a_lost_first_reply_heals(returns):
    method = build(returns=returns)
    state, memory = method.init(), {}
    take_turn(method, state, turn_of(1), memory)
    support, scores = memory["support"].copy(), memory["scores"].copy()
    model, got = network(method, state, turn_of(1), memory)
    assert (mask_in(method, model) == ((scores >= 0) & support_of(memory, method))).all()
    begun = method.begin(got, fresh_model(), TRAINING, turn_of(2), memory)
    assert (begun.scores.numpy() == scores).all()
    assert not begun.support.all()
    update, *_ = take_turn(method, state, turn_of(2), memory)
    values = update.payload.counts["first"].values
    assert (pack_bits(values > 0) == support).all()
    state = method.aggregate(state, [update])
    update, *_ = take_turn(method, state, turn_of(3), memory)
    assert set(update.payload.bits) == {"mask"}


@every_return
def test_a_memory_with_another_support_heals(returns):
    """A backup of another time, or a device that swapped its card: it keeps what it has and says so."""
    method = build(returns=returns)
    state, memories = play(method, 2)
    memory = copy.deepcopy(memories[1])
    scores = memory["scores"].copy()
    got = hear(method, state, turn_of(3), memory)
    assert not (got.bits or got.counts)
    assert (method.begin(got, fresh_model(), TRAINING, turn_of(3), memory).scores.numpy() == scores).all()
    update, *_ = take_turn(method, state, turn_of(3), memory)
    state = method.aggregate(state, [update])
    assert (method.recall(state, 0)["support"] == memories[1]["support"]).all()
    update, *_ = take_turn(method, state, turn_of(4), memory)
    assert set(update.payload.bits) == {"mask"}


def test_a_lost_later_reply_leaves_both_in_step():
    method = build()
    state, memories = play(method, 2)
    take_turn(method, state, turn_of(3), memories[0])  # never arrives
    update, *_ = take_turn(method, state, turn_of(4), memories[0])
    assert set(update.payload.bits) == {"mask"}


def test_a_reply_on_an_older_support_is_refused():
    """The support changed between rounds: a late or replayed mask is of the wrong length."""
    method = build(prune=0.2)
    state, memories = play(method, 2)
    old, got = copy.deepcopy(memories[0]), hear(method, state, turn_of(3), memories[0])
    smaller = support_of(old, method) & (np.arange(method.numel) % 7 > 0)
    state = fold(method, state, k0=first(method, smaller, smaller))
    payload = later(support_of(old, method), np.ones(method.numel, bool))
    with pytest.raises(WireError, match=f"expected {smaller.sum()}"):
        answer(method, state, got, payload, turn_of(3), old)


# A hostile server


@every_return
@pytest.mark.parametrize("meta", [{}, {"support": 7}, {"support": 0.5}, {"support": ""}, {"support": "f" * 999}])
def test_other_meta_is_another_support(returns, meta):
    method = build(returns=returns)
    state, memories = play(method, 1)
    shared, sent = method.recall(state, 0), method.broadcast(state, 0)
    payload = Payload(sent.bits, sent.counts, meta=meta)
    frame = pack(payload, digest=DIGEST, round_=2, known=method.heard(shared), codecs=method.codecs)
    for memory in (copy.deepcopy(memories[0]), {}):
        if not memory and meta.get("support") in (None, ""):
            with pytest.raises(WireError, match="unexpected field"):
                read_broadcast(frame, method, memory, digest=DIGEST, round_=2)
            continue
        got = read_broadcast(frame, method, memory, digest=DIGEST, round_=2)
        model = fresh_model()
        optimizer = method.begin(got, model, TRAINING, turn_of(2), memory)
        assert set(method.finish(got, model, optimizer, turn_of(2), memory).counts) == {"first"}
        assert set(method.known(got, turn_of(2), memory)) == {"first"}


@pytest.mark.parametrize("top", [61, 59, 2])
def test_means_in_other_steps_are_refused(top):
    method = build()
    state, memories = play(method, 1)
    sent = method.broadcast(state, 0)
    values = np.minimum(sent.counts["mean"].values, top).astype(np.uint32)
    got = Payload(counts={"mean": Counts(values, top)}, meta=sent.meta)
    with pytest.raises(WireError, match=f"steps of 1/{top}, expected 1/60"):
        method.begin(got, fresh_model(), TRAINING, turn_of(2), memories[0])


def test_a_server_that_returns_another_kind_is_refused():
    state, memories = play(build(returns="bit"), 1)
    method, other = build(returns="mean"), build(returns="bit")
    frame = pack(
        other.broadcast(state, 0),
        digest=DIGEST,
        round_=2,
        known=SideInfo(other.sizes(memories[0]["support"])),
        codecs=other.codecs,
    )
    with pytest.raises(WireError, match="unexpected field 'bit'"):
        read_broadcast(frame, method, memories[0], digest=DIGEST, round_=2)


# Evaluation


def test_adapt_moves_active_weights_alone():
    method = build(tune_lr=0.01)
    state, memories = play(method, 2)
    model, got = network(method, state, turn_of(2), memories[0])
    active, before = mask_in(method, model), frozen_weights(model, method.spec).numpy().copy()
    others = {name: p.detach().clone() for name, p in model.named_parameters() if name not in method.spec.names}
    assert 0 < active.mean() < 1
    optimizer = method.adapt(got, model, TRAINING, turn_of(2), memories[0])
    x, y = rows_of(0)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = cross_entropy(model(x), y)
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        after = frozen_weights(model, method.spec).numpy()
        assert (after[~active] == 0).all()
    assert (after[active] != before[active]).mean() > 0.5
    assert losses[-1] < losses[0]
    assert all(torch.equal(p, others[name]) for name, p in model.named_parameters() if name in others)


def test_report_counts_the_support_and_the_ones():
    method = build()
    assert method.report(Payload(), {}) == {"model_bits": method.numel, "kept": 1.0, "active": 1.0}
    state, memories = play(method, 2)
    model, got = network(method, state, turn_of(2), memories[0])
    report = method.report(got, memories[0])
    assert report["model_bits"] == method.numel
    assert report["kept"] == support_of(memories[0], method).mean()
    assert report["active"] == mask_in(method, model).mean()


def test_replies_cost_what_the_card_promises():
    """Below 1 bit a parameter, 1.6 in the first turn; down at most 6, or 1."""
    for returns, most in (("mean", 6.0), ("bit", 1.0)):
        method = build(returns=returns)
        state, memories = play(method, 2)
        d, shared = method.numel, method.recall(state, 0)
        down = pack(
            method.broadcast(state, 0), digest=DIGEST, round_=3, known=method.heard(shared), codecs=method.codecs
        )
        assert 8 * len(down) <= most * d + 8 * 100
        for memory, bits in ((memories[0], 1.0), ({}, 1.6)):
            got, model = hear(method, state, turn_of(3), memory), fresh_model()
            optimizer = method.begin(got, model, TRAINING, turn_of(3), memory)
            payload = method.finish(got, model, optimizer, turn_of(3), memory)
            known = method.known(got, turn_of(3), memory)
            assert 8 * len(pack(payload, digest=DIGEST, round_=3, known=known)) <= bits * d + 8 * 100


@pytest.mark.parametrize("bad", [{"tau": 0.0}, {"tau": 1.0}, {"prune": 1.0}, {"returns": "all"}, {"levels": 3}])
def test_bad_settings_are_refused(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        FedMaskConfig(**bad)


def test_it_is_registered():
    assert resolve("fedmask").name == "fedmask"
