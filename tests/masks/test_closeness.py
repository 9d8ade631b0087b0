from __future__ import annotations

import math
from fractions import Fraction
from itertools import pairwise

import numpy as np
import oracles_sampled as oracle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ways import WAYS, machine_code, needs_numba

from fedmask_flwr.masks import Key, bernoulli, closeness, derive, thresholds, words
from fedmask_flwr.masks.closeness import CLASSES
from fedmask_flwr.masks.keyed import CHUNK

EDGES = [math.ldexp(half, e) for e in range(-8, 12) for half in (1.0, 1.5)]
NEAR = Fraction(1, 2**40)  # float64 finds r - 1 >= 2^-8 to within this share
SHARES = (1 - NEAR, Fraction(1), 1 + NEAR)

keys = st.builds(Key, st.integers(-(2**31), 2**31 - 1), st.integers(-(2**31), 2**31 - 1))
thetas = st.one_of(
    st.floats(0.01, 0.99),
    st.floats(1e-6, 1 - 1e-6),
    st.sampled_from((1e-6, 1 - 1e-6, 0.01, 0.99, 0.5, 2**-30, 1 - 2**-30)),
)


@pytest.fixture(params=WAYS, scope="module", autouse=True)
def way(request):
    with machine_code(request.param == "compiled"):
        yield request.param


def check(theta, key, start):
    """Equal to the exact class, or next to it where r - 1 is at their common edge to within NEAR."""
    got = closeness(np.array(theta), key, start)
    assert got.dtype == np.uint8
    for i, (p, found) in enumerate(zip(theta, got.tolist(), strict=True)):
        away = oracle.apart(p, oracle.uniform(key, start + i))
        allowed = {oracle.closeness_class(away * share) for share in SHARES}
        assert found in allowed, (p, key, start + i)


@settings(max_examples=60)
@given(st.lists(thetas, max_size=20), keys, st.integers(0, 2**32 - 20))
def test_equals_exact_arithmetic(theta, key, start):
    check(theta, key, start)


@settings(max_examples=20)
@given(keys, st.integers(0, 2**32 - 80), st.booleans())
def test_equals_exact_arithmetic_at_the_edges(key, start, above):
    """Theta such that r - 1 is an edge, and its neighbours among the doubles."""
    theta = []
    for i, edge in enumerate(EDGES):
        u = float(oracle.uniform(key, start + i))
        odds = u / (1 - u) * (1 + edge if above else 1 / (1 + edge))
        theta.append(odds / (1 + odds))
    around = [np.nextafter(p, way) for p in theta for way in (0.0, 1.0)]
    if all(0 < p < 1 for p in [*theta, *around]):
        check(theta, key, start)
        check(around[::2], key, start)
        check(around[1::2], key, start)


def test_edges_are_where_they_are_said_to_be():
    key, d = derive("edges"), len(EDGES)
    u = np.array([float(oracle.uniform(key, i)) for i in range(d)])
    for share, shift in ((1 + 1e-9, 0), (1 - 1e-9, -1)):
        odds = u / (1 - u) * (1 + share * np.array(EDGES))
        expected = np.maximum(np.arange(d) + shift, 0)
        assert closeness(odds / (1 + odds), key).tolist() == expected.tolist()
    assert d == CLASSES


def test_monotone_in_the_distance_on_both_sides():
    d = 2000
    for i in (0, 5, 11):
        key = derive("monotone", i)
        u = float(oracle.uniform(key, i))
        theta = np.linspace(1e-6, 1 - 1e-6, d)
        # the same word for every theta
        found = np.array([closeness(np.full(1, p), key, i)[0] for p in theta], np.int64)
        step, below = np.diff(found), theta[1:] < u
        assert (step[below] <= 0).all()
        assert (step[theta[:-1] > u] >= 0).all()
        assert found[np.argmin(abs(theta - u))] <= 1
        assert found.max() - found.min() > 15


@pytest.mark.parametrize("start", [0, 3, 2**31 - 100, 2**32 - 2 * CHUNK - 9])
def test_chunks_do_not_show(start):
    d, key = 2 * CHUNK + 9, derive("chunks")
    theta = np.random.default_rng(0).uniform(0.01, 0.99, d)
    whole = closeness(theta, key, start)
    cuts = [0, 1, 700, CHUNK - 1, CHUNK + 300, d]
    parts = [closeness(theta[a:b], key, start + a) for a, b in pairwise(cuts)]
    assert np.array_equal(np.concatenate(parts), whole)
    with pytest.raises(ValueError, match="derive another key"):
        closeness(theta, key, 2**32 - d + 1)


def key_that_gives(w):
    """The key whose first word is w, an unsigned 32-bit number: the finaliser is undone step by step."""
    x = w ^ w >> 16
    x = x * pow(0x846CA68B, -1, 2**32) % 2**32
    x ^= x >> 15 ^ x >> 30
    x = x * pow(0x7FEB352D, -1, 2**32) % 2**32
    x ^= x >> 16
    return Key(0, x - 2**32 if x >= 2**31 else x)  # of counter 0 and k0 = 0, the first round makes 0


@pytest.mark.parametrize("w", [-(2**31), -(2**31) + 1, -1, 0, 1, 2**31 - 2, 2**31 - 1])
def test_every_extreme_word_and_theta(w):
    """No division by zero, no overflow: warnings are errors."""
    key = key_that_gives(w % 2**32)
    assert words(key, 1)[0] == w
    u = Fraction(2 * w + 2**32 + 1, 2**33)
    for p in (1e-6, 0.01, 0.5, 0.99, 1 - 1e-6, 2**-40, 1 - 2**-40, 0.0, 2**-1074, 1 - 2**-53, 1.0, 0.5 + 2**-33):
        assert closeness(np.full(1, p), key).tolist() == [oracle.closeness_class(oracle.apart(p, u))]


@needs_numba
@settings(max_examples=20)
@given(keys, st.integers(0, 2**32 - 300), st.integers(0, 300), st.integers(0, 2**32 - 1))
def test_machine_code_and_numpy_agree(key, start, d, seed):
    theta = np.random.default_rng(seed).choice([0.0, 1.0, 1e-12, 0.3, *np.linspace(0.001, 0.999, 97)], d)
    found = []
    for on in (False, True):
        with machine_code(on):
            found.append(closeness(theta, key, start))
    assert np.array_equal(*found)


def test_nothing():
    assert closeness(np.zeros(0), derive(0)).shape == (0,)


def test_near_positions_flip_and_far_ones_do_not():
    """A move of theta in the odds flips exactly the bits whose r it passes."""
    d, key = 200_000, derive("flip")
    rng = np.random.default_rng(0)
    theta = rng.uniform(0.05, 0.95, d)
    before = bernoulli(key, thresholds(theta))
    for edge in (5, 16, 22):
        odds = theta / (1 - theta) * np.where(before, 1 / (1 + EDGES[edge]), 1 + EDGES[edge])
        flipped = bernoulli(key, thresholds(odds / (1 + odds))) != before
        nearer = closeness(theta, key) < edge
        assert (flipped != nearer).mean() < 1e-5  # words are whole numbers
