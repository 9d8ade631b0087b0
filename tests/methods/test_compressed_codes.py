"""Top-k, SignSGD, QSGD, EDEN and FedCode: each one's own code."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import oracles_compressed as oracles
import pytest
import tiny
import torch
from compressed_cases import TURN, build, some_round, train
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fedmask_flwr.masks import Key, words
from fedmask_flwr.methods import Training, Update
from fedmask_flwr.methods.eden import Eden, hadamard, parts
from fedmask_flwr.methods.fedavg import FedAvg
from fedmask_flwr.methods.fedcode import FedCode, cluster
from fedmask_flwr.methods.qsgd import QSGD
from fedmask_flwr.methods.signsgd import SignSGD
from fedmask_flwr.methods.topk import TopK, largest
from fedmask_flwr.wire import Counts, Payload, WireError, popcount, positions, unpack_bits

# Top-k


def test_topk_sends_the_largest_and_keeps_the_rest():
    method, model = build(TopK, {"share": 0.1})
    memory = {}
    payload = train(method, model, Payload(), TURN, memory)
    delta = (method.read(model) - method.start)[method.learned].astype(np.float64)
    where = positions(payload.bits["where"], method.d)
    assert where.size == popcount(payload.bits["where"]) == method.k == math.ceil(0.1 * method.d)
    assert np.array_equal(payload.dense["values"], delta[where].astype(np.float32))
    assert np.abs(delta[where]).min() >= np.abs(np.delete(delta, where)).max()
    assert np.array_equal(memory["residual"] + method.decode(Payload(), payload), delta.astype(np.float32))


def test_topk_says_in_the_end_what_it_could_not_say_at_first():
    """Without new changes the residual empties, k values a turn, and nothing is lost on the way."""
    method, _ = build(TopK, {"share": 0.1})
    delta = np.random.default_rng(0).normal(size=method.d).astype(np.float32).astype(np.float64)
    memory, said = {}, np.zeros(method.d)
    for number in range(10):
        said += method.decode(
            Payload(), method.encode(Payload(), delta if number == 0 else delta * 0, TURN, memory)
        )
        assert np.array_equal(said + memory["residual"], delta)
    assert np.array_equal(said, delta)


def test_topk_goes_on_from_zeros_without_memory():
    method, _ = build(TopK, {"share": 0.1})
    delta = np.random.default_rng(0).normal(size=method.d)
    first, again = (method.encode(Payload(), delta, TURN, {}) for _ in range(2))
    assert np.array_equal(first.dense["values"], again.dense["values"])


def test_topk_of_everything_is_fedavg():
    whole, model = build(TopK, {"share": 1.0})
    delta = train(whole, model, Payload(), TURN, {})
    average, model = build(FedAvg)
    weights = train(average, model, Payload(), TURN, {})
    found = whole.aggregate(whole.init(), [Update(0, delta, 2.0, 0.0)]).weights
    want = average.aggregate(average.init(), [Update(0, weights, 2.0, 0.0)]).weights
    assert np.allclose(found, want, rtol=1e-6, atol=1e-7)


values = hnp.arrays(np.float32, st.integers(1, 40), elements=st.integers(0, 5).map(float))


@given(values, st.data())
def test_largest_is_a_stable_sort(x, data):
    k = data.draw(st.integers(1, x.size))
    want = sorted(sorted(range(x.size), key=lambda i: (-x[i], i))[:k])
    assert largest(x, k).tolist() == want


# SignSGD


def test_signs_are_of_the_change_and_a_coin_where_nothing_changed():
    method, _ = build(SignSGD)
    delta = np.random.default_rng(0).normal(size=method.d)
    delta[::2] = 0.0
    one, other = (
        unpack_bits(method.encode(Payload(), delta, replace(TURN, round=r), {}).bits["signs"], method.d)
        for r in (1, 2)
    )
    assert np.array_equal(one[1::2], delta[1::2] > 0)
    assert np.array_equal(other[1::2], delta[1::2] > 0)
    assert 0.35 < one[::2].mean() < 0.65
    assert (one[::2] != other[::2]).any()


def test_the_majority_decides_and_a_tie_moves_nothing():
    method, _ = build(SignSGD, {"server_lr": 0.25}, make=tiny.net)
    up, down = np.ones(method.d), -np.ones(method.d)
    mixed = np.where(np.arange(method.d) % 2, up, down)
    votes = [Update(k, method.encode(Payload(), d, TURN, {}), 10.0**k, 0.0) for k, d in enumerate((up, mixed))]
    step = method.aggregate(method.init(), votes).weights - method.start
    assert np.allclose(step, np.where(np.arange(method.d) % 2, 0.25, 0.0), atol=1e-6)
    votes.append(Update(2, method.encode(Payload(), down, TURN, {}), 1.0, 0.0))
    step = method.aggregate(method.init(), votes).weights - method.start
    assert np.allclose(step, 0.25 * mixed, atol=1e-6)


# QSGD


@pytest.mark.parametrize("config", [{"bucket": 0}, {"bucket": 50, "levels": 2}])
def test_qsgd_is_unbiased(config):
    method, _ = build(QSGD, config)
    delta = np.random.default_rng(0).normal(size=method.d)
    n = 2000
    replies = [method.encode(Payload(), delta, replace(TURN, round=r), {}) for r in range(n)]
    mean = np.mean([method.decode(Payload(), reply) for reply in replies], axis=0)
    step = np.repeat(replies[0].dense["norms"], method.buckets) / method.config.levels
    p = np.abs(delta) / step % 1.0  # of the upper one of two levels
    deviation = (mean - delta) / (step * np.sqrt(p * (1 - p) / n) + 1e-6)
    assert np.abs(deviation).max() < 6.0
    assert 0.8 < (deviation**2).mean() < 1.2


def test_qsgd_buckets_never_cross_a_tensor():
    method, _ = build(QSGD, {"bucket": 100})
    assert sum(method.buckets) == method.d
    assert set(np.cumsum(method.sizes)) <= set(np.cumsum(method.buckets))
    assert max(method.buckets) == 100


def test_qsgd_codes_norms_and_levels():
    method, _ = build(QSGD, {"bucket": 0, "levels": 4}, make=tiny.net)
    delta = np.zeros(method.d)
    delta[:4] = [0.0, 3.0, -4.0, 0.0]  # norm 5: 2.4 and -3.2 levels
    payload = method.encode(Payload(), delta, TURN, {})
    assert payload.dense["norms"].tolist() == [5.0, 0.0, 0.0, 0.0]
    levels = payload.counts["levels"].values.astype(int)[:4] - 4
    assert levels[0] == levels[3] == 0
    assert levels[1] in (2, 3)
    assert levels[2] in (-3, -4)
    assert (payload.counts["levels"].values[4:] == 4).all()


# EDEN


@given(st.integers(0, 5), st.integers(1, 3), st.integers(0, 2**32 - 1))
def test_the_fast_transform_is_the_matrix(log, rows, seed):
    x = np.random.default_rng(seed).normal(size=(rows, 1 << log))
    fast = x.copy()
    hadamard(fast)
    assert np.allclose(fast, x @ oracles.hadamard_matrix(1 << log), atol=1e-12)
    hadamard(fast)
    assert np.allclose(fast, x, atol=1e-12)


@given(st.integers(1, 3 * 10**7))
def test_parts_hold_everything_and_little_more(d):
    count, length = parts(d)
    edges = np.arange(count + 1) * d // count
    assert length & (length - 1) == 0
    assert 0 < np.diff(edges).min() <= np.diff(edges).max() <= length
    assert count * length < 2 * d or d == 1
    assert d < 10_000 or count * (length + 32) < 1.12 * d
    assert d < 10**6 or count * (length + 32) < 1.02 * d


def test_eden_sends_the_signs_of_the_rotation_and_the_papers_scale():
    method, _ = build(Eden)
    x = np.random.default_rng(0).normal(size=method.d)
    payload = method.encode(Payload(), x, TURN, {})
    (count, length), key = method.shape, Key(payload.meta["k0"], payload.meta["k1"])
    assert count == 1
    padded = np.concatenate([x, np.zeros(length - x.size)])
    rotated = oracles.hadamard_matrix(length) @ (padded * np.where(words(key, length) < 0, -1, 1))
    assert np.array_equal(unpack_bits(payload.bits["signs"], length), rotated >= 0)
    quantised = math.sqrt(2 / math.pi) * np.sign(rotated)
    scale = (x @ x) / (rotated @ quantised)  # as the paper writes it
    assert np.isclose(payload.dense["scale"][0], scale * math.sqrt(2 / math.pi), rtol=1e-6)


@pytest.mark.parametrize(("width", "shape"), [(63, (1, 512)), (43, (1, 512)), (191, (3, 512))])
def test_eden_is_unbiased_and_its_error_is_the_papers(width, shape):
    """One part, one with zeros behind it, three of them."""
    method, _ = build(Eden, make=lambda: torch.nn.Linear(width, 8))
    assert method.shape == shape
    x = np.random.default_rng(0).normal(size=method.d)
    n = 400
    turns = (replace(TURN, client=c) for c in range(n))
    found = np.array([method.decode(Payload(), method.encode(Payload(), x, turn, {})) for turn in turns])
    deviation = (found.mean(axis=0) - x) / (found.std(axis=0) / math.sqrt(n))
    assert np.abs(deviation).max() < 5.0
    assert 0.8 < (deviation**2).mean() < 1.25
    error = ((found - x) ** 2).sum(axis=1) / (x @ x)
    assert np.isclose(error.mean(), (math.pi / 2 - 1) * method.d / math.prod(shape), rtol=0.03)


def test_eden_of_nothing_is_nothing():
    method, _ = build(Eden)
    payload = method.encode(Payload(), np.zeros(method.d), TURN, {})
    assert (method.decode(Payload(), payload) == 0.0).all()


def test_clients_and_rounds_rotate_by_keys_of_their_own():
    method, _ = build(Eden)
    turns = [TURN, replace(TURN, round=2), replace(TURN, client=1), replace(TURN, seed=2)]
    metas = [tuple(method.encode(Payload(), np.ones(method.d), turn, {}).meta.values()) for turn in turns]
    assert len(set(metas)) == 4


# FedCode


@given(hnp.arrays(np.float64, st.integers(1, 60), elements=st.integers(-9, 9).map(float)), st.integers(2, 8))
def test_each_value_goes_to_the_nearest_centre(x, m):
    codebook, groups = cluster(x, m)
    assert (np.diff(codebook) >= 0).all()
    error = np.abs(codebook[groups] - x)
    assert (error[:, None] <= np.abs(codebook[None] - x[:, None]) + 1e-5).all()
    assert x.min() <= codebook[0]
    assert codebook[-1] <= x.max()


@settings(max_examples=20)
@given(st.integers(0, 2**32 - 1), st.integers(50, 300), st.integers(2, 12))
def test_clusters_are_lloyds(seed, n, m):
    x = np.random.default_rng(seed).normal(size=n)
    codebook, groups = cluster(x, m)
    centres, want = oracles.kmeans(x, m)
    assert np.allclose(codebook, centres, rtol=1e-6, atol=1e-7)
    assert groups.tolist() == want


def test_assignments_travel_in_calibration_rounds_only():
    method, model = build(FedCode, {"centres": 8, "calibrate_every": 3})
    got, state, whole = Payload(), method.init(), []
    for number in range(1, 8):
        payload = train(method, model, got, replace(TURN, round=number), {})
        whole.append("assignments" in payload.counts)
        state = method.aggregate(state, [Update(0, payload, 1.0, 0.0)])
        got = method.broadcast(state)
    assert whole == [True, False, False, True, False, False, True]
    # a client whose first broadcast is empty has no groups to speak of, whatever the round
    assert "assignments" in train(method, model, Payload(), replace(TURN, round=2), {}).counts
    assert all("assignments" in form for form in method.up(Payload(), {}))


def test_between_calibrations_the_centres_are_the_means_of_the_old_groups():
    method, model = build(FedCode, {"centres": 8})
    got = method.broadcast(method.aggregate(method.init(), some_round("fedcode", method, method.init(), 0, 3)))
    memory = {}
    payload = train(method, model, got, replace(TURN, round=2), memory)
    trained, groups = method.read(model)[method.learned], got.counts["assignments"].values
    for j in range(8):
        own = trained[groups == j]
        want = got.dense["codebook"][j] if own.size == 0 else own.mean(dtype=np.float64)
        assert np.isclose(payload.dense["codebook"][j], want, rtol=1e-5, atol=1e-7)
    assert np.allclose(memory["rest"] + payload.dense["codebook"][groups], trained, atol=1e-6)


def test_a_device_trains_on_from_what_it_could_not_say():
    method, model = build(FedCode, {"centres": 8})
    got = method.broadcast(method.aggregate(method.init(), some_round("fedcode", method, method.init(), 0, 3)))
    memory = {"rest": np.full(method.d, 0.5, np.float32)}
    method.begin(got, model, Training(), TURN, memory)
    assert np.allclose((method.read(model) - method.weights(got))[method.learned], 0.5, atol=1e-6)
    method.begin(got, model, Training(), TURN, {})
    assert np.array_equal(method.read(model), method.weights(got))


def test_the_server_keeps_what_clustering_takes_away():
    """Steps far below the distance of two centres add up."""
    method, _ = build(FedCode, {"centres": 2}, make=tiny.net)
    state = method.aggregate(method.init(), some_round("fedcode", method, method.init(), 0, 1))
    before = state.weights
    for _ in range(10):
        got = method.broadcast(state)
        nudged = replace(got, dense={"codebook": got.dense["codebook"] + np.float32(0.01)}, counts={})
        state = method.aggregate(state, [Update(0, nudged, 1.0, 0.0)])
    assert np.allclose(state.weights - before, 0.1, atol=1e-4)


def test_a_broadcast_for_another_codebook_is_refused():
    method, model = build(FedCode, {"centres": 8})
    state = method.aggregate(method.init(), some_round("fedcode", method, method.init(), 0, 3))
    got = method.broadcast(state)
    assert method.heard({})["assignments"].sizes == method.sizes
    wrong = replace(got, counts={"assignments": Counts(got.counts["assignments"].values, 9)})
    with pytest.raises(WireError, match="8 centres"):
        method.begin(wrong, model, Training(), TURN, {})


def test_fedcode_exports_what_it_broadcasts():
    method, _ = build(FedCode, {"centres": 8})
    state = method.aggregate(method.init(), some_round("fedcode", method, method.init(), 0, 3))
    assert np.array_equal(method.result(state).dense["weights"], method.weights(method.broadcast(state)))
    assert np.array_equal(method.result(method.init()).dense["weights"], method.start)
    assert method.report(Payload(), {})["model_bits"] == 3 * method.d + 32 * (8 + 64)
