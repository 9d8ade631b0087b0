from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedmask_flwr.wire import (
    SideInfo,
    from_positions,
    ones_per_layer,
    pack_bits,
    popcount,
    positions,
    slice_bits,
    unpack_bits,
)
from fedmask_flwr.wire import bits as bits_module

flags_ = st.one_of(
    st.lists(st.booleans(), max_size=300),
    st.builds(
        lambda d, seed, p: (np.random.default_rng(seed).random(d) < p).tolist(),
        st.integers(0, 5000),
        st.integers(0, 9999),
        st.sampled_from((0.0005, 0.01, 0.5, 1.0)),
    ),
)


@given(flags_)
def test_against_plain_lists(flags):
    d = len(flags)
    bits = pack_bits(np.array(flags, bool))
    assert bits.tolist() == [sum(f << i for i, f in enumerate(flags[j : j + 8])) for j in range(0, d, 8)]
    assert unpack_bits(bits, d).tolist() == flags
    ones = [i for i, f in enumerate(flags) if f]
    assert positions(bits, d).tolist() == ones
    assert positions(bits, d).dtype == np.int64
    assert popcount(bits) == len(ones)
    assert from_positions(np.array(ones, np.int64), d).tolist() == bits.tolist()


@given(flags_, st.data())
def test_slices_pastes_and_flips(flags, data):
    d = len(flags)
    a = data.draw(st.integers(0, d))
    b = data.draw(st.integers(a, d))
    bits = pack_bits(np.array(flags, bool))
    assert unpack_bits(slice_bits(bits, a, b), b - a).tolist() == flags[a:b]
    out = np.zeros_like(bits)
    bits_module.paste_bits(out, a, slice_bits(bits, a, b))
    assert unpack_bits(out, d).tolist() == [f and a <= i < b for i, f in enumerate(flags)]
    flipped = bits.copy()
    bits_module.flip_range(flipped, a, b)
    assert unpack_bits(flipped, d).tolist() == [f != (a <= i < b) for i, f in enumerate(flags)]
    sizes = (a, b - a, 0, d - b)
    assert ones_per_layer(bits, sizes) == (sum(flags[:a]), sum(flags[a:b]), 0, sum(flags[b:]))


def test_popcount_without_numpy_2(monkeypatch):
    monkeypatch.setattr(bits_module, "_bitwise_count", None)
    assert popcount(np.arange(256, dtype=np.uint8)) == 1024


@pytest.mark.parametrize("pos", [[-1], [10], [3, 3], [4, 3]])
def test_positions_that_are_none(pos):
    with pytest.raises(ValueError, match="strictly increasing"):
        from_positions(np.array(pos), 10)


def test_sideinfo_refuses_what_is_not_a_packed_vector():
    with pytest.raises(ValueError, match="take 2 bytes, got 1"):
        SideInfo((9,), np.zeros(1, np.uint8))
    with pytest.raises(ValueError, match="pad bits"):
        SideInfo((9,)).delta(np.array([0, 2], np.uint8))
    with pytest.raises(ValueError, match="uint8"):
        SideInfo((8,)).delta(np.zeros(1, np.int64))
    with pytest.raises(ValueError, match="negative"):
        SideInfo((-1,))
