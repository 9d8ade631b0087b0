from __future__ import annotations

import importlib.util
import math
import struct
import sys
from pathlib import Path

import numpy as np
import oracles_wire as oracle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from wire_cases import BIT_NAMES, DIGEST, count_ones, count_vectors, masks

from fedmask_flwr.wire import (
    CODECS,
    Counts,
    FilterBuildError,
    Payload,
    SideInfo,
    WireError,
    codec,
    codec_names,
    from_positions,
    fuse,
    membership,
    pack,
    pack_bits,
    popcount,
    rans,
    rice,
    unpack,
    unpack_bits,
)
from fedmask_flwr.wire.entropy import quantise


@pytest.mark.parametrize("name", BIT_NAMES)
@settings(max_examples=40)
@given(masks())
def test_bits_round_trip(name, case):
    bits, known = case
    data = pack(Payload(bits={"m": bits}), digest=DIGEST, round_=1, known=known, codecs={"bits": name})
    got = unpack(data, digest=DIGEST, round_=1, known=known, expect={"m": known.numel})
    coder, found = got.codecs["m"], got.payload.bits["m"]
    assert (found.size, found.dtype, got.nbytes) == (bits.size, np.uint8, len(data))
    found[:1] ^= 0  # writable
    if coder.lossless:
        assert coder.flip_rate == 0
        np.testing.assert_array_equal(found, bits)
    else:  # no one is lost
        assert not (known.delta(bits) & ~known.delta(found)).any()
        assert name.startswith(coder.name)
    if name == "auto":
        assert len(data) <= 23 + 19 + math.ceil(known.numel / 8)


@pytest.mark.parametrize("name", codec_names("counts"))
@settings(max_examples=60)
@given(count_vectors())
def test_counts_round_trip_and_bound(name, case):
    counts, known = case
    n = counts.values.size
    data = pack(Payload(counts={"c": counts}), digest=DIGEST, round_=0, known=known, codecs={"counts": name})
    got = unpack(data, digest=None, round_=None, known=known, expect={"c": n}).payload.counts["c"]
    assert got.top == counts.top
    np.testing.assert_array_equal(got.values, counts.values)
    if name == "counts":
        body = CODECS["counts"].encode(counts, known)
        assert len(body) <= 1.01 * n * math.log2(counts.top + 1) / 8 + 64
        if not n or counts.values.min() == counts.values.max():
            assert len(body) <= 11


@pytest.mark.parametrize("name", codec_names("dense"))
@given(st.data())
def test_dense_round_trip(name, data):
    width = int(name.partition("+")[0].removeprefix("float"))
    floats = st.floats(width=width, allow_nan=False, allow_infinity=False)
    values = np.array(data.draw(st.lists(floats, max_size=200)), np.float32)
    data = pack(Payload(dense={"w": values}), digest=DIGEST, round_=0, known=None, codecs={"dense": name})
    got = unpack(data, digest=DIGEST, round_=0, known=None, expect={"w": values.size}).payload.dense["w"]
    assert got.tobytes() == values.tobytes()


@given(masks())
def test_rice_equals_the_oracle(case):
    bits, known = case
    delta = unpack_bits(known.delta(bits), known.numel).astype(int).tolist()
    rarer = [min(n, s - n) for n, s in zip(count_ones(bits, known), known.sizes, strict=True)]
    params = [rice.best(n, s)[1] for n, s in zip(rarer, known.sizes, strict=True)]
    assert CODECS["rice"].encode(bits, known) == oracle.rice_encode(delta, known.sizes, params)


@given(st.integers(1, 400), st.integers(1, 3), st.integers(1, 5), st.integers(0, 9999))
def test_rans_equals_the_oracle(n, rows, alphabet, seed):
    rng = np.random.default_rng(seed)
    cuts = np.sort(rng.choice(rans.TOTAL - 1, (rows, alphabet - 1), replace=False) + 1, axis=1)
    tables = np.diff(cuts, axis=1, prepend=0, append=rans.TOTAL).astype(np.uint32)
    symbols, contexts = rng.integers(0, alphabet, n), rng.integers(0, rows, n)
    tables[tables == 0] = 1
    tables[np.arange(rows), tables.argmax(axis=1)] += (rans.TOTAL - tables.sum(axis=1)).astype(np.uint32)
    body = rans.encode(symbols.astype(np.uint8), contexts.astype(np.uint16), tables)
    assert body == oracle.rans_encode(symbols.tolist(), contexts.tolist(), tables.tolist(), body[0])
    np.testing.assert_array_equal(rans.decode(body, 0, n, contexts.astype(np.uint16), tables), symbols)


def test_rans_many_lanes_equals_the_oracle():
    rng = np.random.default_rng(0)
    tables = np.array([[60000, 5000, 500, 36]], np.uint32)
    symbols = rng.integers(0, 4, 5003).astype(np.uint8)
    body = rans.encode(symbols, None, tables)
    assert body[0] > 1
    assert body == oracle.rans_encode(symbols.tolist(), [0] * symbols.size, tables.tolist(), body[0])


def test_rans_refuses_a_symbol_without_a_frequency():
    with pytest.raises(ValueError, match="frequency 0"):
        rans.encode(np.array([1], np.uint8), None, np.array([[rans.TOTAL, 0]], np.uint32))


@pytest.mark.parametrize("width", [1, 2])
@pytest.mark.parametrize("n", [1, 2, 100, 7000])
def test_fuse_query_equals_the_c_core(width, n):
    from pyfusefilter._xorfilter import ffi, lib

    d = 140_000  # more than two chunks
    keys = np.sort(np.random.default_rng(n).choice(d, n, replace=False))
    body = fuse.build(keys, width)
    ours = unpack_bits(membership.query(fuse.parse(body, width, d), d), d)
    slots = np.frombuffer(body, np.uint8, offset=28).copy()
    seed, size, length, segments, span, array = fuse._HEAD.unpack_from(body)
    c = ffi.new(f"binary_fuse{8 * width}_t *")
    c.Seed, c.Size, c.SegmentLength, c.SegmentLengthMask = seed, size, length, length - 1
    c.SegmentCount, c.SegmentCountLength, c.ArrayLength = segments, span, array
    c.Fingerprints = ffi.cast(f"uint{8 * width}_t *", ffi.from_buffer(slots))
    contain = getattr(lib, f"binary_fuse{8 * width}_contain")
    assert ours.tolist() == [contain(i, c) for i in range(d)]
    assert ours[keys].all()
    assert ours[:300].tolist() == [oracle.fuse_contains(body, width, i) for i in range(300)]


@pytest.mark.parametrize(("name", "rate"), [("fuse8", 2**-8), ("fuse16", 2**-16)])
def test_false_flips_come_at_the_stated_rate(name, rate):
    d = 1_000_000
    keys = np.arange(0, d, 100)
    coder, known = CODECS[name], SideInfo((d,))
    assert coder.flip_rate == rate
    flips = popcount(coder.decode(coder.encode(from_positions(keys, d), known), known)) - keys.size
    assert abs(flips - (d - keys.size) * rate) <= 4 * math.sqrt(d * rate)


def test_fuse_falls_back_to_rice_when_the_filter_cannot_be_built(monkeypatch):
    ffi, lib = fuse._core()

    class Stubborn:
        binary_fuse8_allocate = lib.binary_fuse8_allocate
        binary_fuse8_free = lib.binary_fuse8_free

        @staticmethod
        def binary_fuse8_populate(keys, n, filter_):
            return False

    monkeypatch.setattr(fuse, "_core", lambda: (ffi, Stubborn))
    known = SideInfo((40,))
    bits = from_positions(np.array([3, 30]), 40)
    with pytest.raises(FilterBuildError, match="rice"):
        CODECS["fuse8"].encode(bits, known)
    data = pack(Payload(bits={"m": bits}), digest=DIGEST, round_=0, known=known, codecs={"bits": "fuse8+png"})
    got = unpack(data, digest=DIGEST, round_=0, known=known, expect={"m": 40})
    assert got.codecs["m"].name == "rice"
    np.testing.assert_array_equal(got.payload.bits["m"], bits)


@pytest.mark.parametrize("p", [0.001, 0.003, 0.01, 0.03, 0.05])
def test_rice_is_within_one_percent_of_the_entropy(p):
    d = 2_000_000
    flags = np.random.default_rng(7).random(d) < p
    body = CODECS["rice"].encode(pack_bits(flags), SideInfo((d,)))
    assert 8 * len(body) <= 1.01 * oracle.entropy_bits(int(flags.sum()), d)


@pytest.mark.parametrize("d", [100_000, 2_000_000])
@pytest.mark.parametrize("ps", [(0.05,), (0.2,), (0.5,), (0.05, 0.3, 0.12)])
def test_entropy_is_within_one_percent_of_the_layers_entropies(d, ps):
    rng = np.random.default_rng(7)
    layers = [rng.random(d // len(ps)) < p for p in ps]
    known = SideInfo(tuple(x.size for x in layers))
    body = CODECS["entropy"].encode(pack_bits(np.concatenate(layers)), known)
    assert 8 * len(body) <= 1.01 * sum(oracle.entropy_bits(int(x.sum()), x.size) for x in layers)


@pytest.mark.parametrize("name", ["bits", "rice", "entropy", "fuse8", "fuse16"])
@pytest.mark.parametrize("p", [0.001, 0.05, 0.3])
def test_analytic_size_is_near_the_real_one(name, p):
    rng = np.random.default_rng(3)
    known = SideInfo((70_000, 0, 30_001))
    bits = pack_bits(rng.random(known.numel) < p)
    body = CODECS[name].encode(bits, known)
    assert len(body) == pytest.approx(CODECS[name].size(count_ones(bits, known), known), rel=0.02, abs=24)
    assert len(body) <= CODECS[name].max_body(known.numel, len(known.sizes))


@given(st.integers(0, 200_000), st.integers(1, 200_000))
def test_layer_levels_are_stable(ones, size):
    p = quantise(min(ones, size), size)
    assert 0 <= p <= 65535
    assert (p == 0) == (ones == 0)
    assert (p == 65535) == (ones >= size)


def test_auto_chooses_by_density():
    rng = np.random.default_rng(0)
    known = SideInfo((200_000,))
    chosen = {}
    for p in (0.0, 0.001, 0.2, 0.5, 0.999):
        bits = pack_bits(rng.random(known.numel) < p)
        data = pack(Payload(bits={"m": bits}), digest=DIGEST, round_=0, known=known)
        chosen[p] = unpack(data, digest=DIGEST, round_=0, known=known, expect={"m": known.numel}).codecs["m"].name
    assert chosen == {0.0: "rice", 0.001: "rice", 0.2: "entropy", 0.5: "bits", 0.999: "rice"}


def test_auto_never_exceeds_a_bit_each_however_the_ones_lie():
    known = SideInfo((64,))
    for pattern in (0x5555555555555555, 0xFFFFFFFF, 0xFF00FF00FF00FF00, 1 << 63, 0x7FFFFFFF00000000):
        bits = np.frombuffer(pattern.to_bytes(8, "little"), np.uint8)
        assert len(pack(Payload(bits={"m": bits}), digest=DIGEST, round_=0, known=known)) <= 23 + 19 + 8


def test_counts_per_layer_tables_pay_off():
    rng = np.random.default_rng(0)
    values = np.concatenate([rng.integers(0, 2, 50_000), rng.integers(9, 11, 50_000)]).astype(np.uint32)
    one, two = SideInfo((100_000,)), SideInfo((50_000, 50_000))
    counts = Counts(values, 10)
    sizes = [len(CODECS["counts"].encode(counts, k)) for k in (one, two)]
    assert sizes[1] < 0.6 * sizes[0]
    np.testing.assert_array_equal(CODECS["counts"].decode(CODECS["counts"].encode(counts, two), two).values, values)


def test_registry():
    assert len({c.id for c in CODECS.values()}) == len(CODECS)
    assert all(0 < c.id < 64 for c in CODECS.values())
    assert codec("fuse8+png") == (CODECS["fuse8"], 1)
    assert codec("rice+zstd") == (CODECS["rice"], 2)
    for wrong in ("gzip", "rice+gzip", "rice+", "auto", "auto+zstd"):
        with pytest.raises(ValueError, match=r"use one of auto, bits, rice"):
            codec(wrong)
    with pytest.raises(ValueError, match="does not code 'counts'"):
        pack(Payload(), digest=DIGEST, round_=0, known=None, codecs={"counts": "rice"})


def test_dense_refuses_what_is_not_finite():
    coder = CODECS["float32"]
    for bad in (np.nan, np.inf):
        values = np.array([1, bad], np.float32)
        with pytest.raises(ValueError, match="NaN"):
            coder.encode(values)
        with pytest.raises(WireError, match="NaN"):
            coder.decode(values.tobytes(), 2)


@given(st.lists(st.floats(-65000, 65000, width=32), max_size=50))
def test_float16_is_the_nearest_half(values):
    values = np.array(values, np.float32)
    coder = CODECS["float16"]
    got = coder.decode(coder.encode(values), values.size)
    assert [struct.unpack("<e", struct.pack("<e", float(v)))[0] for v in values] == got.tolist()


def test_float16_says_when_a_weight_has_none():
    with pytest.raises(ValueError, match=r"beyond the range of float16; use float32"):
        CODECS["float16"].encode(np.array([1, 65520], np.float32))
    with pytest.raises(WireError, match="2 float16 values take 4 bytes, the body has 8"):
        CODECS["float16"].decode(bytes(8), 2)


@pytest.mark.slow
def test_filter_query_is_twenty_times_faster_than_the_public_api():
    path = Path(__file__).parents[2] / "benchmarks" / "fuse_query.py"
    spec = importlib.util.spec_from_file_location("fuse_query", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["fuse_query"] = module
    spec.loader.exec_module(module)
    row = module.compare(numel=10_000_000, density=0.01, subset=200_000)
    assert row["api_over_ours"] >= 20, row
