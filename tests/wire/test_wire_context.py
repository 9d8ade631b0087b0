"""Codec context: its bytes, its size against what the classes tell, what it refuses and what it takes to decode."""

from __future__ import annotations

import tracemalloc

import numpy as np
import oracles_wire as oracle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from wire_cases import DIGEST, masks

from fedmask_flwr.masks import bernoulli, closeness, derive, thresholds
from fedmask_flwr.wire import (
    CODECS,
    Payload,
    SideInfo,
    WireError,
    get_varint,
    pack,
    pack_bits,
    put_varint,
    unpack_bits,
)
from fedmask_flwr.wire.context import _GROUPS, _layout
from fedmask_flwr.wire.order import tally

CONTEXT = CODECS["context"]
SHAPES = {
    # spread of theta's logit, drift of it: from a round that hardly moves to one that moves all
    "early": (0.5, 0.3),
    "middle": (3.0, 0.3),
    "late": (6.0, 0.1),
    "still": (1.0, 0.05),
    "wild": (2.0, 2.0),
}


def classes_of(known):
    return np.zeros(known.numel, np.uint8) if known.classes is None else known.classes()


def drifted(shape, d, seed=0):
    """Bits and SideInfo of a mask that is drawn with the reference's own uniforms, from a theta that drifted."""
    spread, drift = SHAPES[shape]
    rng, key = np.random.default_rng(seed), derive("drift", seed)
    logit = rng.normal(0, spread, d)
    before, after = (np.clip(1 / (1 + np.exp(-s)), 0.01, 0.99) for s in (logit, logit + rng.normal(0, drift, d)))
    reference, bits = (pack_bits(bernoulli(key, thresholds(p))) for p in (before, after))
    return bits, SideInfo((d // 3, d - d // 3), reference, lambda: closeness(before, key))


def told(bits, known):
    """Sum over the classes of n*H(p), in bits."""
    delta, classes = unpack_bits(known.delta(bits), known.numel), known.classes()
    sizes, ones = np.bincount(classes), np.bincount(classes[delta], minlength=256)
    return sum(oracle.entropy_bits(int(ones[c]), int(n)) for c, n in enumerate(sizes) if n)


def lanes_of(body, dense):
    """Lane count of the entropy body within a context body."""
    at = 1 + body[0]
    _, at = get_varint(body, at, len(body))
    return (get_varint(body, at + 2 * dense, 4096)[0] if at + 2 * dense < len(body) else 1), at


@settings(max_examples=60)
@given(masks())
def test_equals_the_oracle(case):
    bits, known = case
    body, classes = CONTEXT.encode(bits, known), classes_of(known)
    delta = unpack_bits(known.delta(bits), known.numel)
    groups = oracle.context_groups(body)
    dense, sparse, _ = _layout(groups, tally(pack_bits(delta), classes))
    ps, lanes, at = [], 1, 0
    if dense:
        lanes, at = lanes_of(body, len(dense))
        ps = np.frombuffer(body, "<u2", len(dense), at).tolist()
        length, at = get_varint(body, 1 + body[0], len(body))
        at += length
    else:
        at = 1 + body[0]
    params = []
    for size in sparse:
        _, at = get_varint(body, at, size)
        params.append(body[at] & 127)
        at += 1
    expected = oracle.context_encode(delta.astype(int).tolist(), classes.tolist(), groups, ps, lanes, params)
    assert body == expected
    assert len(body) <= CONTEXT.max_body(known.numel, len(known.sizes))
    np.testing.assert_array_equal(CONTEXT.decode(body, known), bits)


def test_chunks_do_not_show():
    d = 2 * 65536 + 77
    rng = np.random.default_rng(1)
    classes = rng.integers(0, 9, d).astype(np.uint8)
    delta = rng.random(d) < np.linspace(0.001, 0.4, 9)[classes]
    known = SideInfo((d,), None, lambda: classes)
    body = CONTEXT.encode(pack_bits(delta), known)
    assert len(oracle.context_groups(body)) > 5
    # the same positions, sorted by hand: classes in order, each in one piece
    order = np.argsort(classes, kind="stable")
    by_hand = SideInfo((d,), None, lambda: classes[order])
    assert CONTEXT.encode(pack_bits(delta[order]), by_hand) == body
    np.testing.assert_array_equal(unpack_bits(CONTEXT.decode(body, by_hand), d), delta[order])
    np.testing.assert_array_equal(unpack_bits(CONTEXT.decode(body, known), d), delta)


@pytest.mark.parametrize(
    ("shape", "d"), list(zip(SHAPES, (200_000, 400_000, 2_200_000, 1_500_000, 100_000), strict=True))
)
def test_within_three_percent_of_what_the_classes_leave_open(shape, d):
    bits, known = drifted(shape, d)
    delta = known.delta(bits)
    assert unpack_bits(delta, d).sum() >= 10_000
    body = CONTEXT.encode(bits, known)
    assert 8 * len(body) <= 1.03 * told(bits, known) + 8 * 64
    assert len(body) == pytest.approx(CONTEXT.measure(delta, known), rel=0.01, abs=32)
    np.testing.assert_array_equal(CONTEXT.decode(body, known), bits)


@pytest.mark.parametrize("shape", SHAPES)
def test_what_classes_are_worth(shape):
    bits, known = drifted(shape, 200_000)
    best = min(len(CODECS[n].encode(bits, known)) for n in ("bits", "rice", "entropy"))
    assert len(CONTEXT.encode(bits, known)) < {"wild": 0.97, "early": 0.9}.get(shape, 0.8) * best


@settings(max_examples=60)
@given(masks())
def test_auto_is_near_the_best(case):
    bits, known = case
    names = ["bits", "rice", "entropy", *(["context"] if known.classes else [])]
    best = min(len(CODECS[n].encode(bits, known)) for n in names)
    size = len(pack(Payload(bits={"m": bits}), digest=DIGEST, round_=0, known=known)) - 23 - 19
    assert size <= 1.01 * best + 64
    assert size <= -(-known.numel // 8)


@pytest.mark.parametrize("d", [3_000, 300_000])
@pytest.mark.parametrize("shape", SHAPES)
def test_auto_is_near_the_best_where_masks_drift(shape, d):
    bits, known = drifted(shape, d, seed=d)
    best = min(len(CODECS[n].encode(bits, known)) for n in ("bits", "rice", "entropy", "context"))
    assert len(pack(Payload(bits={"m": bits}), digest=DIGEST, round_=0, known=known)) - 42 <= 1.01 * best + 64


def test_classes_are_asked_for_only_where_they_are_used():
    def never():
        raise AssertionError

    known = SideInfo((40,), None, never)
    bits = pack_bits(np.arange(40) % 3 == 0)
    for name in ("bits", "rice", "entropy", "fuse8"):
        CODECS[name].decode(CODECS[name].encode(bits, known), known)
    with pytest.raises(AssertionError):
        CONTEXT.encode(bits, known)
    # nothing to be coded: no classes needed either
    pack(Payload(bits={"m": pack_bits(np.zeros(40, bool))}), digest=DIGEST, round_=0, known=known)


@pytest.mark.parametrize("classes", [np.zeros(9, np.int64), np.zeros(8, np.uint8), np.zeros((9, 1), np.uint8)])
def test_wrong_classes_are_an_error_of_the_caller(classes):
    known = SideInfo((9,), None, lambda: classes)
    with pytest.raises(ValueError, match=r"classes are \(9,\) uint8"):
        CONTEXT.encode(pack_bits(np.ones(9, bool)), known)


def every(d, count=256):
    return SideInfo((d,), None, lambda: (np.arange(d) % count).astype(np.uint8))


def test_no_more_groups_than_the_format_has():
    d = 256 * 4096
    rng = np.random.default_rng(0)
    known = every(d)
    # neighbours differ as much as they can: no two are worth joining
    delta = rng.random(d) < np.where(known.classes() % 2, 0.5, 0.03)
    body = CONTEXT.encode(pack_bits(delta), known)
    assert len(oracle.context_groups(body)) == _GROUPS
    np.testing.assert_array_equal(unpack_bits(CONTEXT.decode(body, known), d), delta)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"\0",
        b"\2\0",  # two groups, one given
        b"\1\0",  # one class of three
        b"\2\2\2",  # four classes of three
        b"\4\0\0\0\0",  # more groups than classes
        b"\1\5",  # by rANS, and nothing follows
        b"\1\5\x7f\0\0",  # its length is more than what is there
        b"\1\5\x03\0\0\0",  # a length that is not its own
        b"\1\5\x02\0\0\0",  # something behind it
        b"\1\4\0",  # by gaps, cut short
        b"\1\4\0\0\0",  # something behind them
        b"\x81\0\4\0\0",  # a number that is not in its shortest form
    ],
)
def test_bodies_that_do_not_add_up(body):
    with pytest.raises(WireError):
        CONTEXT.decode(body, every(30, 3))


def test_what_no_encoder_would_write_but_is_clear():
    known = every(30, 3)
    none = np.zeros(4, np.uint8)
    for body in (b"\1\5\x02\0\0", b"\3\0\0\0" + 6 * b"\0", b"\3\1\1\1\x06" + 6 * b"\0", b"\2\1\2\x02\0\0\0\0"):
        np.testing.assert_array_equal(CONTEXT.decode(body, known), none)


def test_nothing_to_code():
    known = SideInfo((0, 0))
    assert CONTEXT.encode(pack_bits(np.zeros(0, bool)), known) == b"\0"
    assert CONTEXT.decode(b"\0", known).size == 0
    with pytest.raises(WireError):
        CONTEXT.decode(b"\0\0", known)
    with pytest.raises(WireError):
        CONTEXT.decode(b"\1\0", known)


def peak_of(body, known):
    classes = known.classes()
    held = SideInfo(known.sizes, known.reference, lambda: classes)
    CONTEXT.decode(body, held)  # loads machine code, where there is any
    tracemalloc.start()
    CONTEXT.decode(body, held)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


def test_a_decode_holds_few_bytes_a_position():
    small, large = (
        peak_of(CONTEXT.encode(*case), case[1]) for case in (drifted("still", n) for n in (400_000, 1_200_000))
    )
    assert large - small <= 5 * 800_000


def test_the_most_that_tables_take():
    d, count = 64 * 800, 64
    known = every(d, count)
    part = d // count
    delta = np.random.default_rng(0).random(d) < 0.3
    ps = [32 * (i + 16) for i in range(16)] + [64 * (i + 16) for i in range(16)]
    ps += [128 * (i + 16) for i in range(16)] + [256 * (i + 16) for i in range(16)]
    layers = [delta[i::count].astype(int).tolist() for i in range(count)]
    entropy = oracle.entropy_encode(layers, ps, 1)
    body = put_varint(count) + bytes([1]) * count + put_varint(len(entropy)) + entropy
    assert part == len(layers[0])
    assert peak_of(body, known) <= 64 * 900_000
    np.testing.assert_array_equal(unpack_bits(CONTEXT.decode(body, known), d), delta)
    with pytest.raises(WireError, match="above its limit of 64"):
        CONTEXT.decode(put_varint(65) + bytes([1]) * 65, every(d, 65))


@given(st.integers(0, 40), st.data())
def test_random_bodies(d, data):
    count = data.draw(st.integers(1, 5))
    known = every(d, count)
    body = data.draw(st.binary(max_size=24))
    try:
        got = CONTEXT.decode(body, known)
    except WireError:
        return
    assert got.size == -(-d // 8)


def test_the_nearer_the_likelier_a_flip():
    bits, known = drifted("middle", 300_000)
    delta, classes = unpack_bits(known.delta(bits), known.numel), known.classes()
    sizes = np.bincount(classes, minlength=40)
    rate = np.bincount(classes[delta], minlength=40)[sizes > 500] / sizes[sizes > 500]
    assert rate[0] > 0.4
    assert rate[-1] < 0.01
    assert (np.diff(rate) < 0.03).all()
