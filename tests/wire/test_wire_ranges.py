"""Filters of ranges of positions, which `fuse8` and `fuse16` write where one filter would not fit a cache."""

from __future__ import annotations

import struct
from itertools import pairwise

import numpy as np
import oracles_wire as oracle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ways import needs_numba

from fedmask_flwr import jit
from fedmask_flwr.wire import (
    CODECS,
    SideInfo,
    WireError,
    from_positions,
    fuse,
    membership,
    positions,
    unpack_bits,
)

D = 1 << 17
CODEC = CODECS["fuse8"]


@pytest.fixture(scope="module", autouse=True)
def small():
    """Ranges small enough to test."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fuse, "_KEYS", 2000)
        patch.setattr(fuse, "_RANGE", 512)
        yield


def bits_of(d, n, seed=0):
    return from_positions(np.sort(np.random.default_rng(seed).choice(d, n, replace=False)), d)


@settings(max_examples=25)
@given(
    st.integers(2001, 20_000),
    st.sampled_from((1.0, 0.3)),
    st.integers(0, 999),
    st.sampled_from(("fuse8", "fuse16")),
)
def test_no_one_is_lost_and_the_size_is_right(n, part, seed, name):
    d, coder = D + seed, CODECS[name]
    keys = np.sort(np.random.default_rng(seed).choice(int(part * d), n, replace=False))
    bits, known = from_positions(keys, d), SideInfo((d,))
    body = coder.encode(bits, known)
    assert struct.unpack_from("<QI", body) == (-(-n // 2000), 0)
    assert len(body) == pytest.approx(coder.size((n,), known), rel=0.1)  # segments are coarse here
    assert len(body) <= coder.max_body(d, 1)
    found = coder.decode(body, known)
    assert not (bits & ~found).any()
    wrong = positions(found, d).size - n
    assert abs(wrong - (d - n) * coder.flip_rate) <= 6 * (d * coder.flip_rate) ** 0.5 + 6
    for (start, size, filter_), (then, *_) in pairwise(fuse.parse_ranges(body, coder.width, d)):
        assert start % 64 == 0
        assert start + size == then
        assert filter_.fingerprints.size < 2.1 * 2000


def test_equals_the_oracle():
    bits, known = bits_of(D, 5000), SideInfo((D,))
    body = CODEC.encode(bits, known)
    count = int.from_bytes(body[:8], "little")
    stops = struct.unpack_from(f"<{count}Q", body, 12)
    flags, at, start = unpack_bits(CODEC.decode(body, known), D), 12 + 8 * count, 0
    for stop in stops:
        array = struct.unpack_from("<I", body, at + 24)[0]
        one = body[at : at + 28 + array]
        for key in [*range(start, start + 40), *range(stop - 40, stop)]:
            assert flags[key] == oracle.fuse_contains(one, 1, key)
        start, at = stop, at + len(one)
    assert (start, at) == (D, len(body))


def test_the_size_of_real_ranges_is_right(monkeypatch):
    monkeypatch.setattr(fuse, "_KEYS", 1 << 18)
    monkeypatch.setattr(fuse, "_RANGE", 1 << 16)
    d, n = 700_000, 300_000
    body = CODEC.encode(bits_of(d, n), SideInfo((d,)))
    assert len(fuse.parse_ranges(body, 1, d)) == 2
    assert len(body) == pytest.approx(CODEC.size((n,), SideInfo((d,))), rel=0.01)
    assert len(body) < 1.04 * fuse._single(n, 1)


@needs_numba
def test_short_ranges_of_a_long_field_are_asked_by_machine_code(monkeypatch):
    body = CODEC.encode(bits_of(D, 5000), SideInfo((D,)))
    expected = CODEC.decode(body, SideInfo((D,)))
    for least in ("PAYS_FROM", "LOADED_FROM"):
        monkeypatch.setattr(jit, least, D)
    monkeypatch.setattr(membership, "query_numpy", None)
    assert np.array_equal(CODEC.decode(body, SideInfo((D,))), expected)


def test_few_keys_are_one_filter():
    bits, known = bits_of(D, 2000), SideInfo((D,))
    assert CODEC.encode(bits, known) == fuse.build(positions(bits, D), 1)


def test_a_reference_and_crowded_ones():
    d = 70_001
    delta = from_positions(np.arange(30_000, 41_000), d)
    reference = bits_of(d, 9000, seed=4)
    known = SideInfo((d - 1, 1), reference)
    found = CODEC.decode(CODEC.encode(delta ^ reference, known), known) ^ reference
    assert not (delta & ~found).any()


def bad_bodies():
    known = SideInfo((D,))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fuse, "_KEYS", 2000)
        body = CODEC.encode(bits_of(D, 5000), known)
    (count,) = struct.unpack_from("<Q", body)
    stops = list(struct.unpack_from(f"<{count}Q", body, 12))
    rest = body[12 + 8 * count :]

    def made(stops, count=None, rest=rest):
        return (
            struct.pack("<QI", len(stops) if count is None else count, 0)
            + struct.pack(f"<{len(stops)}Q", *stops)
            + rest
        )

    return {
        "none": made([], 0),
        "one": made([D], 1),
        "count": made(stops, 2**63),
        "count beyond the body": made(stops, D // 512),
        "unaligned": made([stops[0] + 1, *stops[1:]]),
        "falling": made([stops[1], stops[0], *stops[2:]]),
        "tiny": made([64, *stops[1:]]),
        "beyond": made([*stops[:-1], 2**63]),
        "short": made([*stops[:-1], D - 64]),
        "cut": body[:-1],
        "cut header": body[: 12 + 8 * count + 20],
        "more": body + b"\0",
        "stops only": body[: 12 + 8 * count],
        "geometry": made(stops, rest=rest[:12] + b"\x03" + rest[13:]),
        "nested": made(stops, rest=rest[:8] + bytes(4) + rest[12:]),
    }


@pytest.mark.parametrize("name", bad_bodies())
def test_what_no_encoder_writes_is_refused(name):
    with pytest.raises(WireError):
        CODEC.decode(bad_bodies()[name], SideInfo((D,)))


def test_the_number_of_filters_is_bounded_by_the_positions(monkeypatch):
    monkeypatch.setattr(fuse, "_RANGE", 1 << 16)
    with pytest.raises(WireError, match="do not fit"):
        CODEC.decode(bad_bodies()["cut"], SideInfo((D,)))
