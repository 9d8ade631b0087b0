"""What every method promises, whatever it learns: run over each row of ``cases.py``."""

from __future__ import annotations

import weakref

import numpy as np
import pytest
import tiny
import torch
from cases import CASES

from fedmask_flwr.aggregate.planes import BATCH
from fedmask_flwr.checkpoint import load_state, save_state
from fedmask_flwr.masks import derive, frozen_weights, initialise
from fedmask_flwr.methods import BUILTIN, Training, Turn, Update, View, resolve
from fedmask_flwr.wire import Counts, Frame, Payload, SideInfo, codec_names, pack, unpack

every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
WITH_NETWORK = {name: case for name, case in CASES.items() if resolve(case.method).modes}
DIGEST = b"contract"


def build(case):
    model = getattr(tiny, case.net)()
    initialise(model, "seed:3")
    kind = resolve(case.method)
    return kind(kind.layout(model), model, kind.Config(**case.config())), model


def begun(method, state, round_):
    return method.advance(state, Turn(1, round_, 6, 0))


def random_update(case, method, client, seed, state=None, round_=1):
    """A reply that the method allows, of random content, as the server reads it."""
    state = method.init() if state is None else state
    payload, rng = random_reply(case, method, client, seed, state)
    got, shared, turn = method.understood(state, client), method.recall(state, client), Turn(1, round_, 6, client)
    coded = pack(payload, digest=DIGEST, round_=round_, known=method.known(got, turn, shared))
    meant = method.reconstruct(got, payload, turn)
    fields = Frame.parse(coded).fields
    return Update(client, meant, float(rng.integers(1, 50)), float(client % 2) * case.flip_rate, fields)


def random_reply(case, method, client, seed, state):
    rng = np.random.default_rng([client, seed])
    return (case.reply or any_reply)(method, state, client, rng), rng


def aggregated(case, method, clients, state=None, round_=1):
    """A round of random replies of so many clients."""
    state = begun(method, method.init() if state is None else state, round_)
    return method.aggregate(state, [random_update(case, method, k, 0, state, round_) for k in range(clients)])


def any_reply(method, state, client, rng):
    fields = {"bits": {}, "counts": {}, "dense": {}}
    form = method.up(method.broadcast(state, client), method.recall(state, client))[0]
    for name, (kind, numel) in form.items():
        fields[kind][name] = {
            "bits": lambda n: np.packbits(rng.random(n) < rng.random(), bitorder="little"),
            "counts": lambda n: Counts(rng.integers(0, 8, n).astype(np.uint32), 7),
            "dense": lambda n: rng.normal(size=n).astype(np.float32),
        }[kind](numel)
    return Payload(**fields)


def visible(case, method, state):
    """What the state says to a client: theta, or the weights."""
    if case.visible is not None:
        return case.visible(method, state)
    got = method.broadcast(state)
    return method.theta(got) if hasattr(method, "theta") else method.weights(got)


def test_every_registered_method_has_a_row():
    assert set(BUILTIN) == {case.method for case in CASES.values()}


@every_case
def test_aggregation_equals_the_pseudocode(case):
    method, _ = build(case)
    state, rounds = method.init(), []
    for number, clients in enumerate([3, 5, 0, 1, 4, 2]):
        state = begun(method, state, number + 1)
        updates = [random_update(case, method, k, number, state, number + 1) for k in range(clients)]
        rounds.append(updates)
        state = method.aggregate(state, iter(updates))
        assert np.allclose(visible(case, method, state), case.oracle(method, rounds), rtol=1e-6, atol=1e-7)


@every_case
def test_aggregation_does_not_depend_on_order(case):
    method, _ = build(case)
    start = begun(method, method.init(), 1)
    updates = [random_update(case, method, k, 0, start) for k in range(7)]
    forward = method.aggregate(start, iter(updates))
    backward = method.aggregate(start, (u for u in reversed(updates)))
    if case.exact:
        assert tiny.equal(forward, backward)
    else:
        assert np.allclose(visible(case, method, forward), visible(case, method, backward), rtol=1e-6)


@every_case
def test_aggregation_streams(case):
    """An update is decoded and dropped before the next is asked for; of masks, a vote's batch is held."""
    method, _ = build(case)
    seen, taken = {"bits": [], "dense": []}, []

    def alive(kind):
        return len({k for k, ref in seen[kind] if ref() is not None})

    def stream():
        for k in range(2 * BATCH + 4):
            assert alive("dense") <= 1  # the loop variable may hold the last one
            assert alive("bits") <= BATCH
            update = random_update(case, method, k, 1)
            for kind, found in seen.items():
                found.extend((k, weakref.ref(a)) for a in getattr(update.payload, kind).values())
            yield update
            taken.append(k)
            del update

    state = method.aggregate(method.init(), stream())
    assert taken == list(range(2 * BATCH + 4))
    assert np.isfinite(visible(case, method, state)).all()


@every_case
def test_no_update_leaves_the_state(case):
    method, _ = build(case)
    fresh = method.init()
    assert tiny.equal(method.aggregate(fresh, iter(())), fresh)
    state = aggregated(case, method, 1)
    assert tiny.equal(method.aggregate(state, iter(())), state)


@every_case
def test_state_survives_the_disk(case, tmp_path):
    method, _ = build(case)
    for state in (method.init(), aggregated(case, method, 1)):
        save_state(tmp_path / "state", state, {"round": 3})
        back, meta = load_state(tmp_path / "state", method.State)
        assert tiny.equal(back, state)
        assert meta == {"round": 3}


@every_case
def test_payloads_round_trip_through_every_codec(case):
    method, _ = build(case)
    state = aggregated(case, method, 3)
    got, shared, turn = method.broadcast(state, 0), method.recall(state, 0), Turn(1, 2, 5, 0)
    reply, _ = random_reply(case, method, 0, 0, state)
    ways = [(got, method.down(shared), method.heard(shared))]
    ways += [(reply, form, method.known(got, turn, shared)) for form in method.up(got, shared)[:1]]
    for payload, fields, known in ways:
        for kind in {kind for kind, _ in fields.values()}:
            for name in codec_names(kind):
                frame = pack(payload, digest=DIGEST, round_=2, known=known, codecs={kind: name})
                expect = {k: n for k, (_, n) in fields.items()}
                back = unpack(frame, digest=DIGEST, round_=2, known=known, expect=expect).payload
                same(payload, back, known, codec=name)


def same(sent, back, known, *, codec):
    assert sent.meta == back.meta
    for name, counts in sent.counts.items():
        assert np.array_equal(counts.values, back.counts[name].values)
        assert counts.top == back.counts[name].top
    for name, values in sent.dense.items():
        kept = values.astype(np.float16) if codec.startswith("float16") else values
        assert np.array_equal(kept, back.dense[name])
    for name, bits in sent.bits.items():
        if not codec.startswith("fuse"):
            assert np.array_equal(bits, back.bits[name])
        else:  # no flip is lost; some are added
            own = known if isinstance(known, SideInfo) else known[name]
            reference = 0 if own.reference is None else own.reference
            flips, found = bits ^ reference, back.bits[name] ^ reference
            assert np.array_equal(found & flips, flips)


@every_case
def test_a_turn_is_deterministic_and_in_bounds(case):
    """Same broadcast, same data, same replies, byte for byte; and their size keeps the card's promise.

    A newcomer's first turn, then a second one with the memory of the first.
    """
    runs = []
    for _ in range(2):
        method, _ = build(case)
        state = aggregated(case, method, 3)
        frames, memory = [], {}
        for round_ in (2, 3):
            state = begun(method, state, round_)
            update, frame = take_turn(case, method, state, Turn(1, round_, 6, 3), memory)
            frames.append(frame)
            state = method.aggregate(state, [update])
        runs.append(frames)
        assert all(8 * len(frame) <= case.bpp_up * method.numel + 8 * 120 for frame in frames)
    assert runs[0] == runs[1]


def take_turn(case, method, state, turn, memory):
    """Three steps on the tiny task; the reply as the server reads it, and its frame."""
    _, model = build(case)
    got = method.complete(method.broadcast(state, turn.client), turn, memory)
    optimizer = method.begin(got, model, Training(), turn, memory)
    x, y = map(torch.from_numpy, tiny.blobs("train", ""))
    for _ in range(3):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    payload = method.finish(got, model, optimizer, turn, memory)
    forms = method.up(got, memory)
    assert {*payload.bits, *payload.counts, *payload.dense} in [set(form) for form in forms]
    codecs = {**method.codecs, "bits": case.settings.get("codec", "auto")}
    known = method.known(got, turn, memory)
    frame = pack(payload, digest=DIGEST, round_=turn.round, known=known, codecs=codecs)
    meant = method.reconstruct(method.understood(state, turn.client), payload, turn)
    return Update(turn.client, meant, 1.0, 0.0, Frame.parse(frame).fields), frame


@every_case
def test_known_is_the_same_on_both_ends(case):
    method, _ = build(case)
    state = aggregated(case, method, 4)
    for client in (0, 1):
        sent, shared = method.broadcast(state, client), method.recall(state, client)
        frame = pack(sent, digest=DIGEST, round_=2, known=method.heard(shared), codecs=method.codecs)
        expect = {name: numel for name, (_, numel) in method.down(shared).items()}
        got = unpack(frame, digest=DIGEST, round_=2, known=method.heard(shared), expect=expect).payload
        turn = Turn(1, 2, 6, client)
        ends = method.understood(state, client), method.complete(got, turn, dict(shared))
        here, there = (by_name(method.known(p, turn, shared)) for p in ends)
        assert here.keys() == there.keys()
        for name, known in here.items():
            assert known.sizes == there[name].sizes
            assert np.array_equal(known.reference, there[name].reference)
            assert np.array_equal(known.checked_classes(), there[name].checked_classes())


def by_name(known):
    return {"": known} if isinstance(known, SideInfo) else known or {}


@pytest.mark.parametrize("case", WITH_NETWORK.values(), ids=WITH_NETWORK)
def test_install_writes_the_network_in_every_mode(case):
    method, model = build(case)
    frozen = frozen_weights(model, method.spec)
    state = aggregated(case, method, 4)
    for mode in method.modes:
        method.install(method.broadcast(state), model, frozen, View(mode, derive(1, "x")))
        assert all(torch.isfinite(p).all() for p in model.parameters())
        if mode != "expected":
            kept = torch.cat([p.detach().reshape(-1) for p in method.spec.params(model)])
            assert bool(((kept == 0) | (kept == frozen)).all())


@every_case
def test_install_writes_a_device_s_own_network(case):
    """With the memory of its last turn, and without one."""
    method, model = build(case)
    frozen, memory = frozen_weights(model, method.spec), {}
    state = aggregated(case, method, 3)
    state = begun(method, state, 2)
    update, _ = take_turn(case, method, state, Turn(1, 2, 6, 3), memory)
    state = method.aggregate(state, [update])
    told = [(method.complete(method.broadcast(state, 3), Turn(1, 2, 6, 3), memory), memory)]
    told += [(method.broadcast(state, 9), {})]  # one that the server never heard of
    for got, own in told:
        method.install(got, model, frozen, View((*method.modes, "threshold")[0], derive(1, "x"), own))
        assert all(torch.isfinite(p).all() for p in model.parameters())
        assert method.report(got, own)["model_bits"] > 0


@every_case
def test_result_can_be_read_without_the_method(case):
    """A mask, or weights, or weights and which of them they are: at most one field of a kind."""
    method, _ = build(case)
    state = aggregated(case, method, 4)
    result = method.result(state)
    assert sorted((len(result.bits), len(result.dense))) in ([0, 1], [1, 1])
    assert not result.counts
