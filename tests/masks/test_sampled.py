from __future__ import annotations

import math
import tracemalloc

import numpy as np
import oracles_sampled as oracle
import pytest
from drift import drifted
from hypothesis import given, settings
from hypothesis import strategies as st
from ways import machine_code, needs_numba

from fedmask_flwr.masks import Change, Draws, change, derive, divergence, pick, replay, sampled, thresholds
from fedmask_flwr.masks.keyed import CHUNK


@st.composite
def cases(draw):
    """Draws, theta_g, theta_k: some positions moved, some by a hair; blocks may outnumber the positions."""
    d = draw(st.integers(0, 40))
    seed = draw(st.integers(0, 2**32))
    rng = np.random.default_rng(seed)
    draws = Draws(derive("case", seed), draw(st.integers(1, 12)), draw(st.integers(1, 9)))
    theta_g = rng.uniform(0.01, 0.99, d)
    moved = rng.random(d) < draw(st.sampled_from((0.0, 0.3, 1.0)))
    theta_k = np.where(
        moved, np.clip(theta_g + rng.normal(0, draw(st.sampled_from((1e-9, 0.1, 0.5))), d), 0.001, 0.999), theta_g
    )
    return draws, theta_g, theta_k


def scored(draws, theta_g, theta_k):
    """Log weight of each candidate, (size, blocks), and the wanted one, (blocks,)."""
    weighed = sampled.weigh(draws, Change.between(theta_g, theta_k))
    return sampled._scores(draws, weighed, 0, draws.blocks), weighed.wanted


def places(d):
    return np.arange(d, dtype=np.int32)


@settings(max_examples=60)
@given(cases(), st.data())
def test_replay_equals_the_oracle(case, data):
    draws, theta_g, _ = case
    chosen = data.draw(st.lists(st.integers(0, draws.size - 1), min_size=draws.blocks, max_size=draws.blocks))
    got = replay(draws, thresholds(theta_g), np.array(chosen, np.uint32))
    assert got.dtype == np.bool_
    assert got.tolist() == oracle.replay(draws, theta_g.tolist(), chosen)
    assert draws.block_of(places(theta_g.size)).tolist() == [oracle.block(draws, i) for i in range(theta_g.size)]


@settings(max_examples=60)
@given(cases())
def test_what_is_scored_is_what_is_replayed(case):
    """Every candidate's score is its log weight, but for a constant of the block; the wanted one is the KL."""
    draws, theta_g, theta_k = case
    scores, wanted = scored(draws, theta_g, theta_k)
    assert (scores.shape, scores.dtype) == ((draws.size, draws.blocks), np.float32)
    block = draws.block_of(places(theta_g.size))
    base = np.bincount(block, np.log((1 - theta_k) / (1 - theta_g)), minlength=draws.blocks)
    nats = np.bincount(block, divergence(theta_k, theta_g) * math.log(2), minlength=draws.blocks)
    np.testing.assert_allclose(wanted + base, nats, atol=1e-4)
    for c in range(draws.size):
        mask = replay(draws, thresholds(theta_g), np.full(draws.blocks, c, np.uint32))
        for b in range(draws.blocks):
            here = block == b
            expected = oracle.log_weight(mask[here].tolist(), theta_g[here].tolist(), theta_k[here].tolist())
            assert scores[c, b] + base[b] == pytest.approx(expected, abs=1e-4)


@settings(max_examples=60)
@given(cases())
def test_pick_equals_the_oracle(case):
    draws, theta_g, theta_k = case
    chance = derive("chance", *draws.key)
    chosen = pick(draws, Change.between(theta_g, theta_k), chance)
    assert (chosen.shape, chosen.dtype) == ((draws.blocks,), np.uint32)
    scores, wanted = scored(draws, theta_g, theta_k)
    scale = sampled._scale(scores, wanted)
    for b in range(draws.blocks):
        race = [scale * float(scores[c, b]) + oracle.gumbel(chance, draws, c, b) for c in range(draws.size)]
        assert race[chosen[b]] >= max(race) - 1e-3


@settings(max_examples=40)
@given(cases())
def test_the_scale_brings_the_expected_log_weight_to_that_of_theta_k(case):
    draws, theta_g, theta_k = case
    scores, wanted = scored(draws, theta_g, theta_k)
    scale = sampled._scale(scores, wanted)
    assert 1.0 <= scale <= 64.0
    rows = scores.astype(np.float64)

    def reached(factor):
        weight = np.exp(factor * (rows - rows.max(axis=0)))
        return (weight * rows).sum() if not weight.size else ((weight * rows).sum(0) / weight.sum(0)).sum()

    target = wanted.astype(np.float64).sum()
    slack = 1e-3 + 1e-3 * abs(target)
    if 1.001 < scale < 63.9:
        assert reached(scale * 1.001) >= target - slack
        assert reached(scale / 1.001) <= target + slack
    elif scale < 2:
        assert reached(scale) >= target - slack
    else:
        assert reached(64.0) <= target + slack


def test_the_mask_is_a_sample_of_theta_k():
    """Tiny blocks and many candidates: mean and variance of K devices' masks are those of K Bernoulli variables."""
    d, devices = 4000, 10
    rng = np.random.default_rng(0)
    theta_g = rng.choice([0.1, 0.5, 0.9], d)
    theta_k = rng.choice([0.05, 0.3, 0.5, 0.8], d)
    masks = []
    for k in range(devices):
        draws = Draws(derive("sample", k), 1700, 512)
        masks.append(
            replay(draws, thresholds(theta_g), pick(draws, Change.between(theta_g, theta_k), derive("chance", k)))
        )
    mean = np.mean(masks, axis=0)
    for g in np.unique(theta_g):
        for p in np.unique(theta_k):
            here = mean[(theta_g == g) & (theta_k == p)]
            sigma = math.sqrt(p * (1 - p) / devices / here.size)
            # 512 candidates are not infinitely many: a block of several large changes falls short a little
            assert abs(here.mean() - p) < 4 * sigma + 0.06 * abs(p - g), (g, p)
            assert here.var() == pytest.approx(p * (1 - p) / devices, rel=0.25)


def slope(theta_g, theta_k, blocks, size, repeats, rest=0.0):
    """Least-squares slope of E[m] - theta_g on theta_k - theta_g."""
    step, found = theta_k - theta_g, []
    for i in range(repeats):
        draws = Draws(derive("slope", i), blocks, size)
        mask = replay(
            draws, thresholds(theta_g), pick(draws, Change.between(theta_g, theta_k, rest), derive("chance", i))
        )
        found.append(float(((mask - theta_g) * step).sum() / (step * step).sum()))
    return float(np.mean(found))


def test_the_step_keeps_its_size():
    """Indices of 8 bits, for blocks of 6, 8, 16 and 64 bits of divergence."""
    theta_g, theta_k = drifted(60_000, 4000)
    bits = divergence(theta_k, theta_g).sum()
    assert bits == pytest.approx(4000, rel=0.01)
    found = [slope(theta_g, theta_k, round(bits / per_block), 256, 4) for per_block in (6, 8, 16, 64)]
    assert 0.95 <= found[0] <= 1.03
    assert found == sorted(found, reverse=True)
    assert 0.78 <= found[1] <= 0.92
    assert 0.5 <= found[2] <= 0.95
    assert 0.2 <= found[3] <= 0.6
    assert 0.93 <= slope(theta_g, theta_k, round(bits / 6), 256, 4, rest=1e-3) <= 1.05


def test_where_nothing_moved_the_mask_is_a_sample_of_theta_g():
    d, draws = 200_000, Draws(derive("still"), 5000, 16)
    theta = np.random.default_rng(0).choice([0.01, 0.3, 0.9], d)
    chosen = pick(draws, Change.between(theta, theta), derive("chance"))
    counts = np.bincount(chosen, minlength=16)
    assert ((counts - 312.5) ** 2 / 312.5).sum() < 45  # chi-square, 15 degrees of freedom, p = 1e-4
    mask = replay(draws, thresholds(theta), chosen)
    for p in (0.01, 0.3, 0.9):
        here = mask[theta == p]
        assert abs(here.mean() - p) < 4.5 * math.sqrt(p * (1 - p) / here.size)


def test_candidates_are_independent():
    """They share the first half of their keys: between any two, words must not show it."""
    n, draws = 20_000, Draws(derive("apart"), 1, 48)
    k0, k1 = draws.candidates()
    assert np.unique(k1).size == draws.size
    u = np.stack([(sampled.words(sampled.Key(k0, k), n) + 2.0**31 + 0.5) / 2**32 - 0.5 for k in k1.tolist()])
    seen = u @ u.T * 12 / math.sqrt(n)
    off = np.abs(seen[~np.eye(draws.size, dtype=bool)])
    assert off.max() < 4.9
    assert off.std() < 1
    for b in range(4):  # high bits, which the masks are made of
        bit = (np.floor((u + 0.5) * 2 ** (b + 1)) % 2) * 2 - 1
        off = np.abs((bit @ bit.T / math.sqrt(n))[~np.eye(draws.size, dtype=bool)])
        assert off.max() < 4.9
    blocks = Draws(draws.key, 50, 1).block_of(places(n))
    assert ((np.bincount(blocks, minlength=50) - 400.0) ** 2 / 400).sum() < 100  # 49 degrees of freedom


@pytest.mark.parametrize(
    ("d", "blocks", "size"), [(0, 1, 1), (0, 7, 4), (1, 1, 1), (1, 9, 8), (5, 1, 1), (3, 100, 2)]
)
def test_small_cases(d, blocks, size):
    draws, theta_g = Draws(derive(d, blocks), blocks, size), np.full(d, 0.3)
    chosen = pick(draws, Change.between(theta_g, np.full(d, 0.6)), derive("chance"))
    assert chosen.shape == (blocks,)
    assert (chosen < size).all()
    assert replay(draws, thresholds(theta_g), chosen).tolist() == oracle.replay(
        draws, theta_g.tolist(), chosen.tolist()
    )


def test_equal_inputs_give_equal_bits():
    theta_g, theta_k = drifted(3000, 200)

    def run(key="a", chance="b"):
        draws = Draws(derive(key), 150, 64)
        chosen = pick(draws, Change.between(theta_g, theta_k), derive(chance))
        return chosen.tolist(), replay(draws, thresholds(theta_g), chosen).tolist()

    assert run() == run()
    assert run()[0] != run(chance="c")[0]
    assert run()[1] != run(key="d")[1]


def test_known_bits():
    theta = np.linspace(0.1, 0.9, 24)
    draws = Draws(derive(7, "golden"), 3, 16)
    mask = replay(draws, thresholds(theta), np.array([0, 5, 15], np.uint32))
    assert np.packbits(mask).tolist() == [115, 164, 255]


def test_chunks_do_not_show(monkeypatch):
    theta_g, theta_k = drifted(5000, 300)
    draws, chance = Draws(derive("chunks"), 50, 16), derive("chance")
    scores, _ = scored(draws, theta_g, theta_k)
    chosen = pick(draws, Change.between(theta_g, theta_k), chance)
    mask = replay(draws, thresholds(theta_g), chosen)
    for cached, chunk, part in ((1, 1000, 999), (333, 4999, 1), (2500, 5000, 5000)):
        monkeypatch.setattr(sampled, "_CACHED", cached)
        monkeypatch.setattr(sampled, "CHUNK", chunk)
        monkeypatch.setattr(change, "_PART", part)
        assert np.array_equal(scored(draws, theta_g, theta_k)[0], scores)
        assert np.array_equal(pick(draws, Change.between(theta_g, theta_k), chance), chosen)
        assert np.array_equal(replay(draws, thresholds(theta_g), chosen), mask)


def test_over_a_real_chunk():
    d, draws = CHUNK + 40, Draws(derive("long"), 11, 8)
    theta = np.random.default_rng(0).uniform(0.01, 0.99, d)
    chosen = (np.arange(11) % 8).astype(np.uint32)
    mask, block = replay(draws, thresholds(theta), chosen), draws.block_of(places(d))
    for i in (0, 1, CHUNK - 1, CHUNK, CHUNK + 1, d - 1):
        assert block[i] == oracle.block(draws, i)
        assert mask[i] == oracle.bit(draws, int(chosen[block[i]]), i, theta[i])


@settings(max_examples=40)
@given(cases(), st.sampled_from((0.01, 0.3, 0.9)))
def test_rest_leaves_the_smallest_changes_to_chance(case, rest):
    draws, theta_g, theta_k = case
    chance, bits = derive("chance"), np.maximum(divergence(theta_k, theta_g), 0.0)
    every, some = Change.between(theta_g, theta_k), Change.between(theta_g, theta_k, rest)
    assert some.bits == every.bits == pytest.approx(float(bits.sum()))
    here, left = set(some.places.tolist()), set(every.places.tolist()) - set(some.places.tolist())
    assert here <= set(every.places.tolist())
    lost, total = sum(bits[i] for i in left), sum(bits[i] for i in every.places)
    assert lost <= rest * total * (1 + 1e-5)
    if here:  # what is the least of them would have been too much, with all that are like it
        least = min(bits[i] for i in here)
        assert all(bits[i] <= least * (1 + 1e-5) for i in left)
        alike = sum(bits[i] for i in here if bits[i] <= least * (1 + 1 / 63))
        assert lost + alike >= rest * total * (1 - 1e-5)
    kept = np.where(np.isin(np.arange(theta_g.size), some.places), theta_k, theta_g)
    assert pick(draws, some, chance).tolist() == pick(draws, Change.between(theta_g, kept), chance).tolist()
    still = pick(draws, Change.between(theta_g, theta_g), chance).tolist()
    assert pick(draws, Change.between(theta_g, theta_k, 1.0), chance).tolist() == still


def test_divergence_is_in_bits():
    k, g = np.array([0.5, 0.25, 0.0, 1.0, 0.3]), np.array([0.25, 0.5, 0.5, 0.5, 0.3])
    expected = [
        0.5 * math.log2(2) + 0.5 * math.log2(0.5 / 0.75),
        0.25 * math.log2(0.5) + 0.75 * math.log2(1.5),
        1,
        1,
        0,
    ]
    np.testing.assert_allclose(divergence(k, g), expected, atol=1e-9)


def test_theta_at_its_ends():
    """No division by zero and no NaN: warnings are errors. What theta_g excludes is never drawn."""
    theta_g, theta_k = np.repeat([0.0, 1.0, 0.5], 6), np.tile([0.0, 1.0, 0.3], 6)
    draws = Draws(derive("ends"), 4, 32)
    assert np.isfinite(divergence(theta_k, theta_g)).all()
    mask = replay(draws, thresholds(theta_g), pick(draws, Change.between(theta_g, theta_k), derive("chance")))
    assert mask[:12].tolist() == [False] * 6 + [True] * 6


@pytest.mark.parametrize(("blocks", "size"), [(0, 4), (-1, 4), (2**31, 4), (3, 0)])
def test_no_blocks_or_no_candidates(blocks, size):
    with pytest.raises(ValueError, match="at least"):
        Draws(derive(0), blocks, size)


@pytest.mark.parametrize("chosen", [[0, 1], [0, 1, 2, 3], [0, 1, 8], []])
def test_numbers_that_name_no_candidates(chosen):
    with pytest.raises(ValueError, match="3 blocks need a number below 8 each"):
        replay(Draws(derive(0), 3, 8), thresholds(np.full(9, 0.5)), np.array(chosen, np.uint32))


@settings(max_examples=40)
@given(st.integers(1, 60), st.integers(1, 40), st.data())
def test_the_compiled_count_is_the_same(blocks, size, data):
    from fedmask_flwr.masks import hashed

    lengths = np.array(data.draw(st.lists(st.integers(1, 30), min_size=blocks, max_size=blocks)))
    n = int(lengths.sum())
    rng = np.random.default_rng(data.draw(st.integers(0, 999)))
    places, cuts, keys = (rng.integers(-(2**31), 2**31, m).astype(np.int32) for m in (n, n, size))
    weights = rng.integers(-(2**24), 2**24, n).astype(np.int32)
    starts = np.concatenate([[0], np.cumsum(lengths)[:-1]])
    k0 = data.draw(st.integers(-(2**31), 2**31 - 1))
    plain = sampled._count(places, cuts, weights, starts, k0, keys)
    assert np.array_equal(plain, hashed.count(places, cuts, weights, starts, k0, keys))


@needs_numba
def test_pick_is_the_same_without_numba():
    rng = np.random.default_rng(0)
    theta_g = rng.random(3000)
    theta_k = np.clip(theta_g + rng.normal(0, 0.1, 3000), 0, 1)
    draws, chance, found = Draws(derive("numba"), 7, 64), derive("chance"), []
    for on in (True, False):
        with machine_code(on):
            assert (sampled._counter(1) is sampled._count) is not on
            found.append(pick(draws, Change.between(theta_g, theta_k, 1e-3), chance))
    assert np.array_equal(*found)


@settings(max_examples=60)
@given(cases(), st.data())
def test_replay_is_the_same_without_numba(case, data):
    draws, theta_g, _ = case
    chosen = data.draw(st.lists(st.integers(0, draws.size - 1), min_size=draws.blocks, max_size=draws.blocks))
    found = []
    for on in (True, False):
        with machine_code(on):
            found.append(replay(draws, thresholds(theta_g), np.array(chosen, np.uint32)))
    assert np.array_equal(*found)


def test_other_portions_of_blocks_are_scored_alike(monkeypatch):
    """But for the scale, which is found on the first."""
    theta_g, theta_k = drifted(3000, 200)
    draws, changed = Draws(derive("portions"), 40, 16), Change.between(theta_g, theta_k)
    monkeypatch.setattr(sampled, "_scale", lambda scores, wanted: 2.0)
    whole = pick(draws, changed, derive("chance"))
    for scores in (1, 16 * 7, 1 << 20):
        monkeypatch.setattr(sampled, "_SCORES", scores)
        assert np.array_equal(pick(draws, changed, derive("chance")), whole)


def test_a_change_takes_what_it_holds():
    """Not theta as vectors of float64: 20 bytes a position that moved, and what sorting them by block takes."""
    d = 400_000
    theta_g, theta_k = drifted(d, 4000)
    draws = Draws(derive("memory"), 700, 64)
    pick(draws, Change.between(theta_g, theta_k), derive("chance"))
    tracemalloc.start()
    try:
        changed = Change.between(theta_g, theta_k, 1e-3)
        taken = tracemalloc.get_traced_memory()[1]
        tracemalloc.reset_peak()
        sampled.weigh(draws, changed)
        dealt = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert taken < 45 * d  # half of them moved; the arrays are as long as all positions
    assert dealt < 60 * d
