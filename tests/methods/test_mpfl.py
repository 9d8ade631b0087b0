"""MPFL: what a node votes, what travels, what is refused, and that the network gets smaller."""

from __future__ import annotations

import numpy as np
import oracles_slimming as oracles
import pytest
import tiny
import torch
from federation import DIGEST, Federation, blobs, build, network, over_the_wire, steps
from torch import nn
from torch.nn import functional as F

from fedmask_flwr.flower.records import read_broadcast, read_reply
from fedmask_flwr.masks import (
    count_parameters,
    couple,
    filter_scores,
    frozen_weights,
    gather,
    initialise,
    model_digest,
    slim_,
)
from fedmask_flwr.methods import Training, Turn, Update, resolve
from fedmask_flwr.methods.mpfl import MPFL
from fedmask_flwr.methods.pruning_fl import PruningFL
from fedmask_flwr.wire import Payload, WireError, pack, pack_bits, unpack_bits

TRAINING = Training("adam", 0.02)


class Residual(nn.Module):
    """A stem and two blocks; what is added shares its channels."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(1, 12, 3, padding=1), nn.BatchNorm2d(12)
        self.a, self.b = nn.Conv2d(12, 16, 3, padding=1), nn.Conv2d(16, 12, 3, padding=1)
        self.c, self.d = nn.Conv2d(12, 20, 3, padding=1, stride=2), nn.Conv2d(12, 20, 1, stride=2)
        self.head = nn.Linear(20, 3)

    def forward(self, x):
        x = F.relu(self.norm(self.stem(x)))
        x = F.relu(x + self.b(F.relu(self.a(x))))
        return self.head(F.relu(self.c(x) + self.d(x)).mean((2, 3)))


def mlp3():
    """Two units and three layers."""
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 3))


def turn_of(round_, client=0):
    return Turn(1, round_, 9, client)


def told(method, keep, searched):
    return Payload(bits={"keep": pack_bits(keep)}, meta={"searched": searched})


def some(method, seed=0, share=0.7):
    rng = np.random.default_rng(seed)
    keep = rng.random(method.spec.numel) < share
    for start in np.cumsum([0, *method.spec.sizes[:-1]]):
        keep[start] = True
    return keep


def images(n=24):
    g = torch.Generator().manual_seed(0)
    return torch.randn(n, 1, 8, 8, generator=g), torch.arange(n) % 3


def take_turn(method, make, got, round_=1, memory=None, x=None, y=None, n=4):
    """A node's turn: its reply and its trained model."""
    model, memory = network(make), {} if memory is None else memory
    optimizer = method.begin(got, model, TRAINING, turn_of(round_), memory)
    steps(model, optimizer, n, x, y)
    return method.finish(got, model, optimizer, turn_of(round_), memory), model


# Votes


@pytest.mark.parametrize(("make", "data"), [(tiny.net, blobs), (mlp3, blobs), (Residual, images)])
@pytest.mark.parametrize("searched", [0, 1])
def test_a_vote_drops_the_lowest_norms_of_the_slim_model(make, data, searched):
    """One bit a filter: L2 over all rows that a unit owns, of what was trained, mapped back to the full network."""
    method = build(MPFL, make, search_rounds=3, keep_min=3)
    keep = some(method) if searched else np.ones(method.spec.numel, bool)
    reply, model = take_turn(method, make, told(method, keep, searched), 1, None, *data())
    vote = unpack_bits(reply.bits["vote"], method.spec.numel)
    assert set(reply.bits) == {"vote"}
    assert not (reply.dense or reply.counts)
    assert not (vote & ~keep).any()
    weights, start = dict(model.named_parameters()), 0
    for unit, size in enumerate(method.spec.sizes):
        names = [n for n, u in zip(method.spec.names, method.spec.units, strict=True) if u == unit]
        left = [i for i in range(start, start + size) if keep[i]]
        score = {}
        for row, i in enumerate(left):
            score[i] = sum(float(v) ** 2 for name in names for v in weights[name][row].detach().ravel())
        goal = max(method.lost(searched + 1)[unit], size - len(left))
        gone = sorted(left, key=lambda i: (score[i], i))[: goal - (size - len(left))]
        assert [i for i in left if not vote[i]] == sorted(gone)
        start += size


@pytest.mark.parametrize("make", [tiny.net, mlp3, Residual])
def test_norms_are_filter_scores(make):
    method, model = build(PruningFL, make, keep_min=2), network(make)
    for p in model.parameters():
        with torch.no_grad():
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    scores = filter_scores(model, couple(model), method.spec)
    assert np.allclose(method.norms(method.read(model)), scores, rtol=1e-12)


def test_layers_that_are_added_vote_as_one():
    method = build(MPFL, Residual)
    assert method.spec.sizes == (12, 16, 20)
    assert len(method.spec.names) == 5


# What travels


def test_no_weights_travel_before_the_search_is_over():
    method = build(MPFL, search_rounds=3, keep_min=4)
    federation = Federation(method, training=TRAINING)
    for round_ in range(1, 7):
        sent = method.broadcast(federation.state)
        (form,) = method.up(sent, {})
        assert set(form) == ({"vote"} if round_ <= 3 else {"weights"})
        assert bool(sent.dense) == (round_ > 4)
        assert ("keep" in sent.bits) == (round_ > 1)
        sizes = federation.train(1)
        n = method.slim_numel(method.keep(method.broadcast(federation.state)))
        assert max(sizes) < (60 if round_ <= 3 else 4 * n + 60)
    assert n < method.floats
    result = method.result(federation.state)
    assert result.dense["weights"].size == n
    assert unpack_bits(result.bits["keep"], 32).sum() == 16


@pytest.mark.parametrize("rule", ["quota", "threshold", "released"])
def test_votes_become_the_filters_that_are_left(rule):
    """A federation's own votes, against the slow twin."""
    method = build(MPFL, search_rounds=3, keep_min=4, rule=rule)
    state, rounds = method.init(), []
    for round_ in range(1, 4):
        got, updates = method.broadcast(state), []
        for k in range(3):
            x, y = (t[k::3] for t in blobs())
            reply, _ = take_turn(method, tiny.net, got, round_, None, x, y)
            updates.append(Update(k, reply, 1.0, 0.0))
            method.check(state, updates[-1])
        rounds.append(updates)
        state = method.aggregate(state, iter(updates))
        assert oracles.visible(method, state) == oracles.mpfl(method, rounds)
    assert state.searched == 3
    assert not method.searching(method.broadcast(state))


def test_a_round_without_votes_is_no_search():
    method = build(MPFL)
    state = method.init()
    assert method.aggregate(state, iter(())) is state
    late = type(state)(state.keep, state.history, 8, state.weights)
    assert method.aggregate(late, iter(())) is late


# Rewinding and memory


def starts(method, got, memory):
    model = network()
    method.begin(got, model, TRAINING, turn_of(2), memory)
    return method.read(model)


def test_every_search_begins_from_the_initial_weights():
    method, memory = build(MPFL, search_rounds=3, keep_min=4), {}
    take_turn(method, tiny.net, Payload(), 1, memory)
    assert memory == {}
    keep = some(method)
    for searched in (1, 3):  # and the slim network's own training too
        assert np.array_equal(starts(method, told(method, keep, searched), memory), method.slim_start(keep))


def test_without_rewinding_a_node_goes_on_from_its_own_weights():
    method, memory = build(MPFL, search_rounds=3, keep_min=4, rewind="never"), {}
    _, model = take_turn(method, tiny.net, Payload(), 1, memory)
    own, keep = method.read(model), some(method)
    assert np.array_equal(memory["weights"], own)
    found = starts(method, told(method, keep, 1), memory)
    flags = oracles.there(keep)
    assert found.tolist() == [v for v, flag in zip(own.tolist(), flags, strict=True) if flag]
    assert not np.array_equal(found, method.slim_start(keep))
    _, model = take_turn(method, tiny.net, told(method, keep, 1), 2, memory)
    assert np.array_equal(memory["weights"], method.read(model))
    fewer = keep & (np.arange(32) % 5 > 0)
    assert starts(method, told(method, fewer, 2), memory).size == method.slim_numel(fewer)
    after = told(method, fewer, 3)
    assert np.array_equal(starts(method, after, memory), method.slim_start(fewer)), (
        "the search is over: all begin alike"
    )


@pytest.mark.parametrize("memory", [{}, "other"])
def test_a_lost_or_foreign_memory_begins_anew(memory):
    """Filters that a memory lacks would be empty, and voted out for it."""
    method, keep = build(MPFL, search_rounds=3, keep_min=4, rewind="never"), some(build(MPFL, keep_min=4))
    if memory == "other":
        then = keep & (np.arange(32) % 7 > 0)
        memory = {"weights": method.slim_start(then) + 1, "keep": pack_bits(then)}
    assert np.array_equal(starts(method, told(method, keep, 1), memory), method.slim_start(keep))


# Hostile and wrong replies


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
        lambda: method.install(got, model, frozen, "expected"),
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
            method.install(got, network(), frozen, "expected")
    for size in (0, method.floats + 1):
        payload = Payload(dense={"weights": np.ones(size, np.float32)})
        frame = pack(payload, digest=DIGEST, round_=9, known=None)
        with pytest.raises(WireError, match="elements, expected"):
            read_broadcast(frame, method, {}, digest=DIGEST, round_=9)


# The network gets smaller


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
    method.install(sent, model, frozen_weights(model, method.spec), "expected")
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
    method.install(got, model, frozen_weights(model, method.spec), "expected")
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
    method.install(told(method, keep, 8), model, frozen_weights(model, method.spec), "expected")
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


def test_report_is_of_the_slim_network():
    method = build(MPFL, keep_min=4)
    assert method.report(Payload(), {}) == {"model_bits": 32.0 * method.floats, "kept": 1.0}
    keep = some(method)
    n = sum(oracles.there(keep))
    assert method.report(told(method, keep, 8), {}) == {"model_bits": 32.0 * n, "kept": float(keep.mean())}


def test_result_before_any_round_is_the_start():
    method = build(MPFL)
    result = method.result(method.init())
    assert np.array_equal(result.dense["weights"], method.start)
    assert unpack_bits(result.bits["keep"], 32).all()


# Models


@pytest.mark.parametrize("kind", [MPFL, PruningFL])
def test_a_model_that_cannot_lose_a_filter_says_so(kind):
    with pytest.raises(ValueError, match="no filter of this network can be pruned"):
        build(kind, lambda: nn.Sequential(nn.Flatten(), nn.Linear(8, 3)))


def test_a_floor_above_all_layers_says_so():
    with pytest.raises(ValueError, match="layers have 32 filters, and keep-min 32 always stay"):
        build(MPFL, keep_min=32)
    build(MPFL, keep_min=31)


def test_a_depthwise_unit_of_one_channel_votes():
    """With one channel a depthwise convolution looks like any other."""

    def make():
        return nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3, groups=4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3)
        )

    method = build(MPFL, make, keep_min=1, search_rounds=2, prune_to=0.75)
    keep = np.arange(4) == 2
    reply, _ = take_turn(method, make, told(method, keep, 1), 2, None, *images())
    assert unpack_bits(reply.bits["vote"], 4).tolist() == keep.tolist()


@pytest.mark.parametrize("rewind", ["initial", "never"])
@pytest.mark.parametrize("rule", ["quota", "threshold", "released"])
def test_it_learns(rule, rewind):
    method = build(MPFL, search_rounds=3, keep_min=4, rule=rule, rewind=rewind)
    federation = Federation(method, training=TRAINING)
    federation.train(3)
    kept = method.keep(method.broadcast(federation.state))
    federation.train(8)
    assert np.array_equal(method.keep(method.broadcast(federation.state)), kept)
    assert 4 <= kept.sum() < 32
    assert federation.accuracy() > 0.9


def test_a_residual_network_learns_through_the_wire():
    method = build(MPFL, Residual, search_rounds=2, keep_min=4)
    (x, y), state = images(), method.init()
    with torch.no_grad():
        x = x + y.reshape(-1, 1, 1, 1)
    for round_ in range(1, 9):
        sent = method.broadcast(state)
        got, _ = over_the_wire(sent, method.down({}), method.heard({}), round_)
        reply, _ = take_turn(method, Residual, got, round_, None, x, y, 15)
        back, _ = over_the_wire(reply, method.up(got, {})[0], method.known(got, turn_of(round_), {}), round_)
        method.check(state, Update(0, back, 1.0, 0.0))
        state = method.aggregate(state, iter([Update(0, back, 1.0, 0.0)]))
    model = network(Residual)
    method.install(method.broadcast(state), model, frozen_weights(model, method.spec), "expected")
    assert unpack_bits(state.keep, 48).sum() == 24
    assert float((model(x).argmax(1) == y).float().mean()) > 0.9


def test_the_same_start_on_both_ends():
    """``start`` is read from the model with its named weights, in the order of names."""
    model = tiny.net()
    initialise(model, "seed:3")
    method = MPFL(MPFL.layout(model), model, MPFL.Config())
    assert np.array_equal(
        method.start, np.concatenate([t.numpy().ravel() for _, t in sorted(model.state_dict().items())])
    )
