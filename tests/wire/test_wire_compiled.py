"""Machine code and numpy: the same bytes, the same bits, the same refusals."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_wire_hostile import mutate
from ways import machine_code, needs_numba
from wire_cases import BIT_NAMES, DIGEST, frame_of, masks

from fedmask_flwr import jit
from fedmask_flwr.wire import CODECS, Payload, SideInfo, WireError, fuse, membership, pack, rans, unpack
from fedmask_flwr.wire.order import Order, tally

pytestmark = needs_numba
PLAIN = [name for name in BIT_NAMES if "+" not in name]


def both(call):
    """What a call returns, or its WireError, in numpy and compiled."""
    found = []
    for on in (False, True):
        with machine_code(on):
            try:
                found.append(call())
            except WireError as error:
                found.append(str(error))
    return found


@pytest.mark.parametrize("name", PLAIN)
@settings(max_examples=30)
@given(masks())
def test_frames_are_the_same(name, case):
    bits, known = case

    def write():
        return pack(Payload(bits={"m": bits}), digest=DIGEST, round_=0, known=known, codecs={"bits": name})

    plain, compiled = both(write)
    assert plain == compiled

    def read():
        got = unpack(plain, digest=DIGEST, round_=0, known=known, expect={"m": known.numel}).payload.bits["m"]
        got[:0] = 0  # writable
        return got.tobytes()

    plain, compiled = both(read)
    assert plain == compiled


@settings(max_examples=40)
@given(st.integers(1, 3000), st.integers(1, 3), st.integers(1, 5), st.integers(0, 9999))
def test_rans_is_the_same(n, rows, alphabet, seed):
    rng = np.random.default_rng(seed)
    cuts = np.sort(rng.choice(rans.TOTAL - 1, (rows, alphabet - 1), replace=False) + 1, axis=1)
    tables = np.diff(cuts, axis=1, prepend=0, append=rans.TOTAL).astype(np.uint32)
    symbols = rng.integers(0, alphabet, n).astype(np.uint8)
    contexts = rng.integers(0, rows, n).astype(np.uint16) if rows > 1 else None
    plain, compiled = both(lambda: rans.encode(symbols, contexts, tables))
    assert plain == compiled
    plain, compiled = both(lambda: rans.decode(compiled, 0, n, contexts, tables).tolist())
    assert plain == compiled == symbols.tolist()


@given(st.integers(0, 700), st.integers(1, 256), st.integers(0, 9999))
def test_sorting_is_the_same_and_undone(d, groups, seed):
    rng = np.random.default_rng(seed)
    classes = rng.integers(0, 256, d).astype(np.uint8)
    row = rng.integers(0, groups, 256).astype(np.uint8)
    bits = np.packbits(rng.random(d) < 0.4, bitorder="little")
    plain, compiled = both(lambda: tally(bits, classes).tolist())
    assert plain == compiled
    assert plain[1] == np.bincount(classes[np.unpackbits(bits, count=d, bitorder="little") > 0], None, 256).tolist()
    plain, compiled = both(lambda: tally(None, classes).tolist())
    assert plain == compiled == [np.bincount(classes, None, 256).tolist(), [0] * 256]
    order = Order(classes, row, tuple(np.bincount(row[classes], minlength=groups).tolist()))
    plain, compiled = both(lambda: order.sort(bits).tobytes())
    assert plain == compiled
    sorted_ = np.frombuffer(plain, np.uint8)
    plain, compiled = both(lambda: order.restore(sorted_).tobytes())
    assert plain == compiled == bits.tobytes()


@pytest.mark.parametrize("width", [1, 2])
@settings(max_examples=30)
@given(st.integers(1, 5000), st.integers(0, 2**40), st.integers(0, 9999))
def test_filters_answer_the_same(width, numel, first, seed):
    rng = np.random.default_rng(seed)
    keys = first + np.flatnonzero(rng.random(numel) < 0.1)
    if not keys.size:
        keys = np.array([first])
    found = fuse.parse(fuse.build(keys, width), width, first + numel)
    wild = membership.Filter(2**64 - 1 - seed, found.segment, found.segments, found.fingerprints)
    for each in (found, wild):  # a sum of seed and key may be above 2^64
        plain, compiled = both(lambda each=each: membership.query(each, numel, first).tobytes())
        assert plain == compiled


@pytest.mark.parametrize("name", ["context", "entropy", "rice", "fuse8", "fuse16"])
def test_damaged_frames_fare_the_same(name):
    rng = np.random.default_rng([*name.encode()])
    data, known = frame_of("bits", name, 700)
    other = frame_of("bits", name, 700, seed=1)[0]
    decoded = 0
    for _ in range(150):
        bad = mutate(rng, data, other)

        def read(bad=bad):
            return unpack(bad, digest=DIGEST, round_=5, known=known, expect={"x": 700}).payload.bits["x"].tobytes()

        plain, compiled = both(read)
        assert plain == compiled, bad.hex()
        decoded += isinstance(plain, bytes)
    assert decoded


def test_a_large_field_is_the_same():
    d = jit.PAYS_FROM + 5
    rng = np.random.default_rng(1)
    classes = np.minimum(rng.geometric(0.1, d) - 1, 30).astype(np.uint8)
    bits = np.packbits(rng.random(d) < 0.3 * 0.8**classes, bitorder="little")
    known = SideInfo((d,), classes=lambda: classes)
    for name in ("context", "entropy", "fuse8"):
        body, compiled = both(lambda name=name: CODECS[name].encode(bits, known))
        assert body == compiled
        plain, compiled = both(lambda name=name, body=body: CODECS[name].decode(body, known).tobytes())
        assert plain == compiled
