"""What a server keeps of how its state came about, and how that is written."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedmask_flwr.methods.trail import (
    REPLAYS,
    Relayed,
    Trail,
    counts_bytes,
    given_bytes,
    levels,
    read_rounds,
    shortened,
    write_round,
)
from fedmask_flwr.wire import Counts, Field, SideInfo, WireError
from fedmask_flwr.wire.counts import CountsCodec
from fedmask_flwr.wire.grouped import ClassCountsCodec

NAMES = ["delta", "index", "mask"]
CLIENTS = st.integers(0, 2**64 - 1) | st.sampled_from([0, 127, 128, 2**63, 2**64 - 1])
FIELDS = st.builds(
    Field, st.sampled_from(NAMES), st.integers(0, 255), st.integers(0, 2**40), st.binary(max_size=300)
)
ROUNDS = st.builds(
    Relayed,
    st.integers(0, 2**32 - 1),
    st.booleans(),
    st.lists(st.tuples(CLIENTS, st.lists(FIELDS, max_size=3).map(tuple)), min_size=1, max_size=4).map(tuple),
)


@given(st.lists(ROUNDS, max_size=4))
def test_rounds_survive_the_way(rounds):
    raw = b"".join(write_round(found, NAMES) for found in rounds)
    assert list(read_rounds(raw, NAMES)) == rounds


@pytest.mark.parametrize("rounds", [1, 3, 101])
def test_no_server_has_a_device_replay_more_than_it_keeps(rounds):
    """However small the replies are; those before are replayed, and the rest not even read."""
    each = tuple((client, ()) for client in range(-(-REPLAYS // rounds)))
    raw = b"".join(write_round(Relayed(n, False, each), NAMES) for n in range(rounds + 1))
    seen, found = [], read_rounds(raw, NAMES)
    with pytest.raises(WireError, match=r"expected 1 to \d+ \(100 in all\)"):
        while True:
            seen.append(next(found))
    assert REPLAYS // 2 <= sum(len(relayed.replies) for relayed in seen) <= REPLAYS


def drained(raw):
    try:
        return list(read_rounds(raw, NAMES))
    except WireError:
        return None


@given(st.binary(max_size=200))
def test_any_bytes_are_read_or_refused(raw):
    drained(raw)


@given(st.lists(ROUNDS, min_size=1, max_size=2), st.data())
def test_damaged_rounds_are_read_or_refused(rounds, data):
    raw = bytearray(b"".join(write_round(found, NAMES) for found in rounds))
    at = data.draw(st.integers(0, len(raw) - 1))
    raw[at] ^= data.draw(st.integers(1, 255))
    drained(bytes(raw))
    with pytest.raises(WireError):
        list(read_rounds(bytes(raw[:at]) + b"\xff" * 11, NAMES))


HEAD = b"\x03\x00\x01"  # round 3, which does not begin anew, of one reply


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"\x03\x00\xff\xff\xff\xff\x0f", "above its limit"),  # four thousand million replies
        (HEAD + b"\x09\x01\x07\x00", "without a name"),
        (HEAD + b"\x09\x04", "above its limit"),  # more fields than there are names
        (HEAD + b"\x09\x01", "reply is truncated"),
        (HEAD + b"\x09\x01\x02\x01\x08", "truncated within an integer"),
        (HEAD + b"\x09\x01\x02\x01\x08\x03ab", "reply is truncated"),
        (HEAD, "truncated within an integer"),
        (b"\x03\x02\x00", "above its limit"),  # neither anew nor not
        (HEAD + b"\x09\x00\x00", "longer than its replies"),
        (b"\x03\x00\x00", "relayed round of 0 replies"),
    ],
)
def test_a_round_that_does_not_add_up_is_refused(body, message):
    with pytest.raises(WireError, match=message):
        list(read_rounds(bytes([len(body)]) + body, NAMES))
    with pytest.raises(WireError, match=r"round is truncated|above its limit"):
        list(read_rounds(bytes([len(body) + 1]) + body, NAMES))


def test_claims_take_no_memory():
    """A length, a number of replies and a number of elements that nothing backs."""
    big = b"\xff\xff\xff\xff\x0f"
    for raw in (big, b"\x08\x03\x00" + big, b"\x0f\x03\x00\x01\x09\x01\x02\x01" + big + b"\x01", b"\x01" * 64):
        tracemalloc.start()
        drained(raw)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 100_000


MOST = 2**64 - 1


def test_who_holds_what():
    trail = Trail(now=4)
    trail = Trail(now=6, held=trail.with_trained([MOST, 0, 2**63, 7]))
    trail = Trail(now=6, held=trail.with_trained([7, 8]))
    assert trail.held.dtype == np.uint64
    assert trail.held[:, 0].tolist() == [0, 7, 8, 2**63, MOST]
    asked = (0, 7, 8, 2**63, MOST, 1, 2**63 - 1, MOST - 1)
    assert [trail.base(client) for client in asked] == [4, 6, 6, 4, 4, None, None, None]
    left = Trail(held=trail.without([MOST, 8, 1]))
    assert left.held[:, 0].tolist() == [0, 7, 2**63]
    assert left.base(MOST) is left.base(8) is None
    assert Trail().without([3]).shape == Trail().with_trained([]).shape == (0, 2)
    assert Trail().base(0) is None


@given(st.sets(CLIENTS, max_size=6), st.sets(CLIENTS, max_size=6), CLIENTS)
def test_held_is_a_dict(first, second, client):
    twin = {**dict.fromkeys(first, 1), **dict.fromkeys(second, 2)}
    trail = Trail(now=2, held=Trail(now=1).with_trained(sorted(first)))
    trail = Trail(held=trail.with_trained(sorted(second)))
    assert [(int(c), int(r)) for c, r in trail.held] == sorted(twin.items())
    assert trail.base(client) == twin.get(client)


def rounds_of(*numbers):
    return b"".join(
        write_round(Relayed(n, False, ((1, (Field("mask", 0, n, bytes(10 * n)),)),)), NAMES) for n in numbers
    )


def kept(*numbers, oldest=1):
    return Trail(relay=np.frombuffer(rounds_of(*numbers), np.uint8), oldest=oldest)


def test_rounds_since_a_base():
    """All from the base on, whichever brought something; none where some are gone."""
    trail = kept(3, 4, 7, 9, oldest=2)
    assert trail.since(1) is None
    for base, numbers in {2: (3, 4, 7, 9), 3: (3, 4, 7, 9), 4: (4, 7, 9), 5: (7, 9), 9: (9,), 10: ()}.items():
        assert trail.since(base) == rounds_of(*numbers)


def test_the_oldest_rounds_are_dropped():
    raw = rounds_of(3, 4, 7)
    assert shortened(raw, len(raw)) == (raw, 1)
    assert shortened(raw, len(raw) - 0.5) == (rounds_of(4, 7), 4)
    assert shortened(raw, len(rounds_of(7))) == (rounds_of(7), 5)
    assert shortened(raw, 0) == (b"", 8)
    assert shortened(b"", 0) == (b"", 1)
    assert shortened(raw, len(raw), 2) == (rounds_of(4, 7), 4), "a device decodes no more than so many replies"
    assert shortened(raw, len(raw), 0) == (b"", 8)


@given(st.integers(0, 2**32 - 1), st.data())
def test_levels_are_shares_of_the_votes(total, data):
    ones = data.draw(st.lists(st.integers(0, total), min_size=1, max_size=8))
    found = levels(np.array(ones, np.uint32), total)
    assert found.dtype == np.uint8
    assert found.tolist() == [n * 63 // max(total, 1) for n in ones]
    assert found.max() < 64


@pytest.mark.parametrize("total", [1, 10, 300])
def test_expected_bytes_are_those_of_the_codecs(total):
    """Within a tenth: they decide which way is the shorter one."""
    rng = np.random.default_rng(total)
    theta = rng.beta(0.3, 0.3, 40_000)
    before, votes = rng.binomial(total, theta).astype(np.uint32), rng.binomial(8, theta).astype(np.uint32)
    layers = (before.size,)
    whole = len(CountsCodec().encode(Counts(before, total), SideInfo(layers)))
    assert whole == pytest.approx(counts_bytes(before), rel=0.1)
    classes = levels(before, total)
    less = len(ClassCountsCodec().encode(Counts(votes, 8), SideInfo(layers, None, lambda: classes)))
    assert less == pytest.approx(given_bytes(votes, classes), rel=0.1)
    assert less < len(CountsCodec().encode(Counts(votes, 8), SideInfo(layers)))
