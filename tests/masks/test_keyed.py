from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles_masks import word
from ways import WAYS, machine_code

from fedmask_flwr.masks import Key, bernoulli, derive, permutation, thresholds, words, words_torch
from fedmask_flwr.masks.keyed import CHUNK, encode

int32 = st.integers(-(2**31), 2**31 - 1)
part = st.one_of(st.integers(-(2**70), 2**70), st.text(max_size=4), st.binary(max_size=4))


@given(int32, int32, st.integers(0, 2**32 - 20), st.integers(0, 20))
def test_words_equal_python_integers(k0, k1, start, n):
    key = Key(k0, k1)
    expected = [word(k0, k1, i) for i in range(start, start + n)]
    assert words(key, n, start).tolist() == expected
    assert words_torch(key, n, "cpu", start).tolist() == expected


def test_known_words():
    assert tuple(derive(7, "train", 3, 4)) == (-1304437214, 1141955226)
    assert words(Key(1, 2), 4).tolist() == [-889199728, -787275391, -726475646, -238177609]


def test_words_do_not_depend_on_chunks():
    key, n = derive("chunks"), 2 * CHUNK + 5
    whole = words(key, n)
    assert np.array_equal(whole[CHUNK - 3 :], words(key, n - CHUNK + 3, CHUNK - 3))
    assert np.array_equal(whole, words_torch(key, n, "cpu").numpy())
    assert whole[CHUNK + 1] == word(*key, CHUNK + 1)


def test_counters_across_the_sign_and_to_the_end():
    key = derive(0)
    for start in (2**31 - 2, 2**32 - 4):
        expected = [word(*key, i) for i in range(start, start + 4)]
        assert words(key, 4, start).tolist() == expected
        assert words_torch(key, 4, "cpu", start).tolist() == expected


@pytest.mark.parametrize(("n", "start"), [(2, 2**32 - 1), (1, 2**32), (-1, 0), (1, -1)])
def test_counters_out_of_range(n, start):
    with pytest.raises(ValueError, match=r"derive another key|negative"):
        words(derive(0), n, start)
    with pytest.raises(ValueError, match=r"derive another key|negative"):
        words_torch(derive(0), n, "cpu", start)


@given(st.lists(part, max_size=4), st.lists(part, max_size=4))
def test_encoding_is_unambiguous(a, b):
    # Python calls 1 == True and so on equal; these parts are ints, text and bytes only.
    assert (encode(*a) == encode(*b)) == (a == b)


def test_encoding_separates_types_and_boundaries():
    variants = [
        ("ab", "c"),
        ("a", "bc"),
        ("abc",),
        (b"abc",),
        (1,),
        ("1",),
        (b"1",),
        (256,),
        (-1,),
        (255,),
        (),
    ]
    assert len({encode(*v) for v in variants}) == len({derive(*v) for v in variants}) == len(variants)
    with pytest.raises(TypeError, match="float"):
        derive(1.5)  # type: ignore[arg-type]


@pytest.fixture(params=WAYS, scope="module")
def way(request):
    with machine_code(request.param == "compiled"):
        yield request.param


@settings(max_examples=50)
@given(st.lists(st.floats(0, 1), max_size=50), st.integers(0, 2**32 - 50))
def test_bernoulli_equals_its_definition(way, theta, start):
    key = derive("bernoulli", start)
    cut = thresholds(np.array(theta))
    assert cut.tolist() == [min(int(p * 2**32), 2**32 - 1) - 2**31 for p in theta]
    expected = [word(*key, start + i) < c for i, c in enumerate(cut.tolist())]
    assert bernoulli(key, cut, start).tolist() == expected


def test_bernoulli_edges(way):
    n = CHUNK + 9
    assert not bernoulli(derive(1), thresholds(np.zeros(n))).any()
    assert bernoulli(derive(1), thresholds(np.ones(n))).all()
    assert thresholds(np.array([-0.5, 1.5])).tolist() == [-(2**31), 2**31 - 1]
    with pytest.raises(ValueError, match="NaN"):
        thresholds(np.array([np.nan]))
    with pytest.raises(ValueError, match="flat"):
        bernoulli(derive(1), np.zeros((2, 2), np.int32))


def uniforms(key: Key, n: int) -> np.ndarray:
    return (words(key, n).astype(np.float64) + 2**31 + 0.5) / 2**32


@pytest.mark.parametrize("seed", range(4))
def test_calibration(seed):
    n = 1_000_000
    u = uniforms(derive("calibration", seed), n)
    deciles = np.bincount((u * 10).astype(int), minlength=10)
    assert ((deciles - n / 10) ** 2 / (n / 10)).sum() < 33.7  # chi-square, 9 degrees of freedom, p = 1e-4
    v = (u - 0.5) * np.sqrt(12)
    for lag in (1, 2, 3, 64, 1024, 65536):
        assert abs((v[:-lag] * v[lag:]).sum() / np.sqrt(n - lag)) < 4.5
    bits = np.unpackbits(words(derive("bits", seed), n).view(np.uint8)).reshape(n, 32).sum(0)
    assert (np.abs(bits - n / 2) < 4.5 * np.sqrt(n / 4)).all()


def test_neighbouring_keys_are_independent():
    n = 1_000_000
    streams = [uniforms(derive("step", t), n) - 0.5 for t in range(6)]
    for i, a in enumerate(streams):
        for b in streams[:i]:
            for x, y in ((a, b), (a[1:], b[:-1]), (a[:-1], b[1:])):
                assert abs((x * y).sum() * 12 / np.sqrt(n)) < 4.5


def test_probability_is_met():
    n = 400_000
    for i, p in enumerate((1e-4, 0.01, 0.3, 0.5, 0.9)):
        hits = bernoulli(derive("p", i), thresholds(np.full(n, p))).sum()
        assert abs(hits - n * p) < 4.5 * np.sqrt(n * p * (1 - p))


@given(st.integers(0, 300), st.integers())
def test_permutation(n, seed):
    p = permutation(derive(seed), n)
    assert sorted(p.tolist()) == list(range(n))
    assert p.dtype == np.int64
    assert np.array_equal(p, permutation(derive(seed), n))


def test_permutation_depends_on_the_key():
    assert not np.array_equal(permutation(derive(1), 50), permutation(derive(2), 50))


def test_no_global_state_is_read_or_written():
    torch.manual_seed(1)
    np.random.seed(1)  # noqa: NPY002
    before = torch.get_rng_state().clone(), np.random.get_state()[1].copy()  # noqa: NPY002
    a = words(derive(5), 10)
    assert torch.equal(before[0], torch.get_rng_state())
    assert np.array_equal(before[1], np.random.get_state()[1])  # noqa: NPY002
    torch.manual_seed(2)
    assert np.array_equal(a, words(derive(5), 10))
