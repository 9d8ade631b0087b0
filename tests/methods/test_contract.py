"""What every method promises, whatever it learns: run over each row of ``cases.py``."""

from __future__ import annotations

import weakref

import numpy as np
import pytest
import tiny
import torch
from cases import CASES

from fedmask_flwr.checkpoint import load_state, save_state
from fedmask_flwr.masks import MaskSpec, derive, frozen_weights, initialise
from fedmask_flwr.methods import BUILTIN, Training, Turn, Update, resolve
from fedmask_flwr.wire import Counts, Payload, SideInfo, codec_names, pack, unpack

every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
DIGEST = b"contract"


def build(case):
    model = tiny.net()
    initialise(model, "seed:3")
    floats = sum(t.numel() for t in model.state_dict().values())
    kind = resolve(case.method)
    settings = {k: v for k, v in case.settings.items() if k != "codec"}
    return kind(MaskSpec.of(model), floats, kind.Config(**settings)), model


def random_update(method, client, seed):
    rng = np.random.default_rng([client, seed])
    fields = {"bits": {}, "counts": {}, "dense": {}}
    for name, (kind, numel) in method.fields("up").items():
        fields[kind][name] = {
            "bits": lambda n: np.packbits(rng.random(n) < rng.random(), bitorder="little"),
            "counts": lambda n: Counts(rng.integers(0, 8, n).astype(np.uint32), 7),
            "dense": lambda n: rng.normal(size=n).astype(np.float32),
        }[kind](numel)
    return Update(client, Payload(**fields), float(rng.integers(1, 50)), float(client % 2) * 2.0**-8)


def visible(method, state):
    """What the state says to a client: theta, or the weights."""
    got = method.broadcast(state)
    return method.theta(got) if hasattr(method, "theta") else got.dense["weights"]


def test_every_registered_method_has_a_row():
    assert set(BUILTIN) == {case.method for case in CASES.values()}


@every_case
def test_aggregation_equals_the_pseudocode(case):
    method, _ = build(case)
    state, rounds = method.init(), []
    for number, clients in enumerate([3, 5, 0, 1, 4, 2]):
        updates = [random_update(method, k, number) for k in range(clients)]
        rounds.append(updates)
        state = method.aggregate(state, iter(updates))
        assert np.allclose(visible(method, state), case.oracle(method, rounds), rtol=1e-6, atol=1e-7)


@every_case
def test_aggregation_does_not_depend_on_order(case):
    method, _ = build(case)
    updates = [random_update(method, k, 0) for k in range(7)]
    forward = method.aggregate(method.init(), iter(updates))
    backward = method.aggregate(method.init(), (u for u in reversed(updates)))
    if case.exact:
        assert tiny.equal(forward, backward)
    else:
        assert np.allclose(visible(method, forward), visible(method, backward), rtol=1e-6)


@every_case
def test_aggregation_streams(case):
    """One update is decoded and dropped before the next is asked for."""
    method, _ = build(case)
    seen = []

    def stream():
        for k in range(6):
            assert sum(ref() is not None for ref in seen) <= 1  # the loop variable may hold the last one
            update = random_update(method, k, 1)
            fields = update.payload
            seen.extend(weakref.ref(a) for a in [*fields.bits.values(), *fields.dense.values()])
            yield update
            del update, fields

    state = method.aggregate(method.init(), stream())
    assert len(seen) == 6
    assert np.isfinite(visible(method, state)).all()


@every_case
def test_no_update_leaves_the_state(case):
    method, _ = build(case)
    fresh = method.init()
    assert tiny.equal(method.aggregate(fresh, iter(())), fresh)
    state = method.aggregate(fresh, [random_update(method, 0, 0)])
    assert tiny.equal(method.aggregate(state, iter(())), state)


@every_case
def test_state_survives_the_disk(case, tmp_path):
    method, _ = build(case)
    for state in (method.init(), method.aggregate(method.init(), [random_update(method, 0, 0)])):
        save_state(tmp_path / "state", state, {"round": 3})
        back, meta = load_state(tmp_path / "state", method.State)
        assert tiny.equal(back, state)
        assert meta == {"round": 3}


@every_case
def test_payloads_round_trip_through_every_codec(case):
    method, _ = build(case)
    state = method.aggregate(method.init(), [random_update(method, k, 0) for k in range(3)])
    got, turn = method.broadcast(state), Turn(1, 2, 5, 0)
    for direction, payload in (("down", got), ("up", random_update(method, 0, 0).payload)):
        fields = method.fields(direction)
        known = method.known(got, turn) if direction == "up" else SideInfo(method.spec.sizes)
        kinds = {kind for kind, _ in fields.values()}
        for kind in kinds:
            for name in codec_names(kind):
                frame = pack(payload, digest=DIGEST, round_=2, known=known, codecs={kind: name})
                expect = {k: n for k, (_, n) in fields.items()}
                back = unpack(frame, digest=DIGEST, round_=2, known=known, expect=expect).payload
                same(payload, back, known, lossless="fuse" not in name)


def same(sent, back, known, *, lossless):
    assert sent.meta == back.meta
    for name, counts in sent.counts.items():
        assert np.array_equal(counts.values, back.counts[name].values)
        assert counts.top == back.counts[name].top
    for name, values in sent.dense.items():
        assert np.array_equal(values, back.dense[name])
    for name, bits in sent.bits.items():
        if lossless:
            assert np.array_equal(bits, back.bits[name])
        else:  # no flip is lost; some are added
            reference = 0 if known.reference is None else known.reference
            flips, found = bits ^ reference, back.bits[name] ^ reference
            assert np.array_equal(found & flips, flips)


@every_case
def test_a_turn_is_deterministic_and_in_bounds(case):
    """Same broadcast, same data, same reply, byte for byte; and its size keeps the card's promise."""
    frames = []
    for _ in range(2):
        method, model = build(case)
        state = method.aggregate(method.init(), [random_update(method, k, 0) for k in range(4)])
        got, turn = method.broadcast(state), Turn(1, 2, 5, 3)
        optimizer = method.begin(got, model, Training(), turn)
        x = torch.from_numpy(tiny.blobs("train", "")[0])
        y = torch.from_numpy(tiny.blobs("train", "")[1])
        for _ in range(3):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
        payload = method.finish(got, model, optimizer, turn)
        assert {*payload.bits, *payload.counts, *payload.dense} == set(method.fields("up"))
        codecs = {**method.codecs, "bits": case.settings.get("codec", "auto")}
        frames.append(pack(payload, digest=DIGEST, round_=2, known=method.known(got, turn), codecs=codecs))
    assert frames[0] == frames[1]
    assert 8 * len(frames[0]) <= case.bpp_up * method.numel + 8 * 120


@every_case
def test_known_is_the_same_on_both_ends(case):
    method, _ = build(case)
    state = method.aggregate(method.init(), [random_update(method, k, 0) for k in range(4)])
    sent = method.broadcast(state)
    frame = pack(sent, digest=DIGEST, round_=2, known=SideInfo(method.spec.sizes))
    expect = {name: numel for name, (_, numel) in method.fields("down").items()}
    got = unpack(frame, digest=DIGEST, round_=2, known=SideInfo(method.spec.sizes), expect=expect).payload
    for client in (0, 1):
        here, there = (method.known(p, Turn(1, 2, 5, client)) for p in (sent, got))
        if here is None:
            assert there is None
        else:
            assert here.sizes == there.sizes
            assert np.array_equal(here.reference, there.reference)


@every_case
def test_install_writes_the_network_in_every_mode(case):
    method, model = build(case)
    frozen = frozen_weights(model, method.spec)
    state = method.aggregate(method.init(), [random_update(method, k, 0) for k in range(4)])
    for mode in method.modes:
        method.install(method.broadcast(state), model, frozen, mode, derive(1, "x"))
        assert all(torch.isfinite(p).all() for p in model.parameters())
        if mode != "expected":
            kept = torch.cat([p.detach().reshape(-1) for p in method.spec.params(model)])
            assert bool(((kept == 0) | (kept == frozen)).all())


@every_case
def test_result_is_one_field(case):
    method, _ = build(case)
    state = method.aggregate(method.init(), [random_update(method, k, 0) for k in range(4)])
    result = method.result(state)
    assert len(result.bits) + len(result.dense) == 1
