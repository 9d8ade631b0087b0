"""MPFL: replies and broadcasts that are refused."""

from __future__ import annotations

import numpy as np
import pytest
import tiny
from federation import DIGEST, build, network
from slimming_turns import TRAINING, mlp3, some, told, turn_of

from fedmask_flwr.flower.records import read_broadcast
from fedmask_flwr.masks import (
    frozen_weights,
    model_digest,
)
from fedmask_flwr.methods import Update, View, resolve
from fedmask_flwr.methods.mpfl import MPFL
from fedmask_flwr.methods.pruning_fl import PruningFL
from fedmask_flwr.methods.reading import read_reply
from fedmask_flwr.wire import Payload, WireError, pack, pack_bits


def reply_of(method, state, vote, flip_rate=0.0):
    return Update(0, Payload(bits={"vote": pack_bits(vote)}), 1.0, flip_rate)


def test_a_vote_above_its_budget_is_refused():
    method = build(MPFL, mlp3, search_rounds=4, keep_min=3)
    state = method.init()
    budget = method.lost(1)
    vote = np.ones(28, bool)
    vote[: budget[0]] = vote[16 : 16 + budget[1]] = False
    method.check(state, reply_of(method, state, vote))
    for i in (15, 27):
        over = vote.copy()
        over[i] = False
        with pytest.raises(WireError, match="the vote drops"):
            method.check(state, reply_of(method, state, over))
    method.check(state, reply_of(method, state, np.ones(28, bool)))  # fewer is allowed


def test_a_vote_for_pruned_filters_is_refused():
    method = build(MPFL, search_rounds=4, keep_min=3, rule="threshold")
    keep = np.arange(32) >= 20  # the rule may take more than the budget
    state = type(method.init())(pack_bits(keep), np.zeros(32, np.uint32), 1, np.zeros(0, np.float32))
    method.check(state, reply_of(method, state, keep))
    with pytest.raises(WireError, match="pruned already"):
        method.check(state, reply_of(method, state, keep | (np.arange(32) == 3)))
    with pytest.raises(WireError, match="drops 21 filters of 32, allowed 20"):
        method.check(state, reply_of(method, state, keep & (np.arange(32) != 25)))


def test_a_lossy_codec_is_refused():
    method = build(MPFL, keep_min=4)
    state = method.init()
    with pytest.raises(WireError, match="use an exact one"):
        method.check(state, reply_of(method, state, np.ones(32, bool), 2.0**-8))


def test_a_frame_of_another_granularity_is_refused():
    """A bit a weight is another model to the server; so are fields of another length, phase or kind."""
    method, other = build(MPFL, keep_min=4), build(resolve("fedpm"))
    digests = [model_digest(m.spec, network()) for m in (method, other)]
    assert digests[0] != digests[1]
    got, turn = Payload(), turn_of(1)

    def answer(payload, known, digest=digests[0]):
        frame = pack(payload, digest=digest, round_=1, known=known)
        return read_reply(frame, method, got, turn, {}, digest=digests[0])

    known = method.known(got, turn, {})
    vote = pack_bits(np.ones(32, bool))
    assert answer(Payload(bits={"vote": vote}), known).payload.bits["vote"].tolist() == vote.tolist()
    weights = Payload(bits={"mask": pack_bits(np.ones(other.numel, bool))})
    with pytest.raises(WireError, match="another model"):
        answer(weights, other.known(got, turn, {}), digests[1])
    with pytest.raises(WireError, match="unexpected field 'mask'"):
        answer(weights, other.known(got, turn, {}))
    with pytest.raises(WireError, match=f"has {other.numel} elements, expected 32"):
        answer(Payload(bits={"vote": weights.bits["mask"]}), other.known(got, turn, {}))
    with pytest.raises(WireError, match="unexpected field 'weights'"):
        answer(Payload(dense={"weights": method.start}), known)
    with pytest.raises(WireError, match="came as dense"):
        answer(Payload(dense={"vote": np.ones(32, np.float32)}), known)


def test_weights_of_another_size_are_refused_after_the_search():
    method = build(MPFL, keep_min=4)
    keep = some(method)
    got, turn = told(method, keep, 8), turn_of(9)
    for n, good in ((method.slim_numel(keep), True), (method.floats, False), (0, False)):
        payload = Payload(dense={"weights": np.zeros(n, np.float32)})
        frame = pack(payload, digest=DIGEST, round_=9, known=None)
        if good:
            read_reply(frame, method, got, turn, {}, digest=DIGEST)
        else:
            with pytest.raises(WireError, match="elements, expected"):
                read_reply(frame, method, got, turn, {}, digest=DIGEST)


@pytest.mark.parametrize("searched", [-1, 9, 2**70, 0.5, float("inf"), "2", ""])
def test_a_broadcast_with_another_count_of_searches_is_refused(searched):
    method = build(MPFL, keep_min=4)
    got = told(method, np.ones(32, bool), searched)
    for act in (
        lambda: method.up(got, {}),
        lambda: method.begin(got, network(), TRAINING, turn_of(1), {}),
        lambda: method.finish(got, network(), None, turn_of(1), {}),
    ):
        with pytest.raises(WireError, match="searches of 8 are done"):
            act()


@pytest.mark.parametrize("kind", [MPFL, PruningFL])
@pytest.mark.parametrize("make", [tiny.net, mlp3])
def test_a_broadcast_with_an_empty_layer_is_refused(kind, make):
    """Whatever is asked first."""
    method = build(kind, make, keep_min=4)
    keep = np.ones(method.spec.numel, bool)
    keep[-method.spec.sizes[-1] :] = False
    got, turn = Payload(bits={"keep": pack_bits(keep)}, meta={"searched": 8}), turn_of(9)
    model, frozen = network(make), frozen_weights(network(make), method.spec)
    for act in (
        lambda: method.up(got, {}),
        lambda: method.begin(got, model, TRAINING, turn, {}),
        lambda: method.install(got, model, frozen, View("expected")),
        lambda: method.report(got, {}),
    ):
        with pytest.raises(WireError, match="without filters"):
            act()
    if kind is MPFL:
        with pytest.raises(WireError, match="without filters"):
            method.known(told(method, keep, 2), turn, {})


@pytest.mark.parametrize("kind", [MPFL, PruningFL])
def test_a_broadcast_with_too_many_or_few_weights_is_refused(kind):
    """Up to the full network a frame is readable; only the filters say how many there must be."""
    method, keep = build(kind, keep_min=4), some(build(kind, keep_min=4))
    n, frozen = method.slim_numel(keep), frozen_weights(network(), method.spec)
    for size in (1, n - 1, n + 1, method.floats):
        payload = Payload(
            bits={"keep": pack_bits(keep)},
            dense={"weights": np.ones(size, np.float32)},
            meta={"searched": 8} if kind is MPFL else {},
        )
        frame = pack(payload, digest=DIGEST, round_=9, known=method.heard({}))
        got = read_broadcast(frame, method, {}, digest=DIGEST, round_=9)
        with pytest.raises(WireError, match=f"{size} weights for a slim network of {n}"):
            method.begin(got, network(), TRAINING, turn_of(9), {})
        with pytest.raises(WireError, match=f"{size} weights for a slim network of {n}"):
            method.install(got, network(), frozen, View("expected"))
    for size in (0, method.floats + 1):
        payload = Payload(dense={"weights": np.ones(size, np.float32)})
        frame = pack(payload, digest=DIGEST, round_=9, known=None)
        with pytest.raises(WireError, match="elements, expected"):
            read_broadcast(frame, method, {}, digest=DIGEST, round_=9)
