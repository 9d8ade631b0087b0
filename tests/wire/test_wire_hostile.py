"""10,000 damaged frames: each is refused with WireError or decodes to something valid, in bounded memory."""

from __future__ import annotations

import contextlib
import tracemalloc

import numpy as np
import pytest
from test_wire_frame import reseal
from ways import machine_code
from wire_cases import DIGEST, all_names, frame_of

from fedmask_flwr.wire import WireError, unpack
from fedmask_flwr.wire.bits import check_bits

NAMES = all_names()
FRAMES = -(-10_000 // len(NAMES))
SLACK = 64 * 1024


def mutate(rng, data, other):
    """One of the ways a frame goes wrong; every second one has a CRC that fits."""
    bad = bytearray(data)
    # half of the damage behind the frame's own header, where the codecs read
    first = 43 if rng.random() < 0.5 and len(bad) > 44 else 0
    kind = rng.integers(6)
    if kind == 0:
        for at in rng.integers(first, len(bad), rng.integers(1, 4)):
            bad[at] ^= 1 << rng.integers(8)
    elif kind == 1:
        for at in rng.integers(first, len(bad), rng.integers(1, 9)):
            bad[at] = rng.choice([0, 1, 127, 128, 255, rng.integers(256)])
    elif kind == 2:
        del bad[rng.integers(first, len(bad)) :]
    elif kind == 3:
        at = rng.integers(first, len(bad))
        bad[at:] = other[min(at, len(other) - 1) :]
    elif kind == 4:
        at = rng.integers(first, len(bad) + 1)
        bad[at:at] = rng.bytes(rng.integers(1, 40))
    else:
        at = rng.integers(first, len(bad))
        del bad[at : at + rng.integers(1, 9)]
    if rng.random() < 0.5 and len(bad) >= 43:
        # the body length follows, so that the codec and not the frame sees the damage
        body = len(bad) - 42 - int.from_bytes(bad[17:19], "little")
        if body >= 0:
            bad[34:42] = body.to_bytes(8, "little")
    return reseal(bad) if rng.random() < 0.5 and len(bad) >= 23 else bytes(bad)


def decode(data, known, d):
    got = unpack(data, digest=DIGEST, round_=5, known=known, expect={"x": d})
    for bits in got.payload.bits.values():
        check_bits(bits, d)
    for counts in got.payload.counts.values():
        assert counts.values.shape == (d,)
        assert not d or int(counts.values.max()) <= counts.top
    for dense in got.payload.dense.values():
        assert dense.shape == (d,)
        assert np.isfinite(dense).all()
    return got


def peak_of(data, known, d):
    tracemalloc.reset_peak()
    before = tracemalloc.get_traced_memory()[0]
    decode(data, known, d)
    return tracemalloc.get_traced_memory()[1] - before


def honest_peak(d):
    """The most that any honest frame of d elements takes, over all codecs and two densities."""
    frames = [frame_of(kind, name, d, p=p) for kind, name in NAMES for p in (0.05, 0.4)]
    return max(peak_of(data, known, d) for data, known in frames)


@pytest.fixture(scope="module")
def traced():
    with machine_code(on=False):  # loading it would count
        tracemalloc.start()
        yield
        tracemalloc.stop()


@pytest.fixture(scope="module")
def small_peak(traced):
    return honest_peak(700)


@pytest.mark.parametrize(("kind", "name"), NAMES)
def test_damaged_frames(kind, name, small_peak):
    rng = np.random.default_rng([*name.encode()])
    others = [frame_of(k, n, 700, seed=1)[0] for k, n in NAMES if n == name or rng.random() < 0.3]
    honest = [frame_of(kind, name, 700, seed=i, p=p) for i in range(3) for p in (0.01, 0.05, 0.4)]
    decoded = refused = 0
    for i in range(FRAMES):
        data, known = honest[i % len(honest)]
        bad = mutate(rng, data, others[rng.integers(len(others))])
        tracemalloc.reset_peak()
        before = tracemalloc.get_traced_memory()[0]
        try:
            decode(bad, known, 700)
            decoded += 1
        except WireError:
            refused += 1
        peak = tracemalloc.get_traced_memory()[1] - before
        assert peak <= 2 * small_peak + SLACK, (peak, small_peak, bad.hex())
    assert refused > FRAMES // 2
    assert decoded + refused == FRAMES


def test_damage_takes_no_more_memory_at_a_real_size(traced):
    d = 100_000
    peak = honest_peak(d)
    rng = np.random.default_rng(0)
    frames = [frame_of(kind, name, d) for kind, name in NAMES]
    for i in range(2 * len(frames)):
        data, known = frames[i % len(frames)]
        bad = mutate(rng, data, frames[rng.integers(len(frames))][0])
        tracemalloc.reset_peak()
        before = tracemalloc.get_traced_memory()[0]
        with contextlib.suppress(WireError):
            decode(bad, known, d)
        assert tracemalloc.get_traced_memory()[1] - before <= 2 * peak + SLACK
