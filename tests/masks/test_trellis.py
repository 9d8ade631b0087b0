"""A mask by a path: the best one, the same with and without machine code, and a sample of theta_k."""

from __future__ import annotations

import math

import numpy as np
import oracles_sampled as oracle
import pytest
from drift import drifted
from hypothesis import given, settings
from hypothesis import strategies as st
from ways import machine_code

from fedmask_flwr.masks import (
    Change,
    Draws,
    derive,
    divergence,
    path_candidates,
    pick,
    replay,
    thresholds,
    trace_path,
    trellis,
)


@st.composite
def cases(draw, blocks=9):
    """Draws of 2^b candidates, theta_g, theta_k: some positions moved; blocks may outnumber the positions."""
    d, seed = draw(st.integers(0, 40)), draw(st.integers(0, 2**32))
    rng = np.random.default_rng(seed)
    draws = Draws(derive("case", seed), draw(st.integers(1, blocks)), 1 << draw(st.integers(1, 5)))
    theta_g = rng.uniform(0.01, 0.99, d)
    moved = rng.random(d) < draw(st.sampled_from((0.0, 0.3, 1.0)))
    theta_k = np.where(moved, np.clip(theta_g + rng.normal(0, 0.3, d), 0.001, 0.999), theta_g)
    return draws, theta_g, theta_k


def masked(draws, theta_g, path):
    return replay(draws, thresholds(theta_g), path_candidates(path, draws.size))


@given(st.lists(st.integers(0, 1), max_size=40), st.integers(0, 16))
def test_a_register_names_the_candidates(bits, b):
    found = path_candidates(np.array(bits, np.uint32), 1 << b)
    assert found.dtype == np.uint32
    assert found.tolist() == oracle.path_candidates(bits, b)


@settings(max_examples=60)
@given(cases(blocks=8))
def test_no_path_has_a_larger_log_weight(case):
    draws, theta_g, theta_k = case
    path = trace_path(draws, Change.between(theta_g, theta_k))
    assert (path.shape, path.dtype, set(path.tolist()) <= {0, 1}) == ((draws.blocks,), np.uint32, True)

    def weight(bits):
        return oracle.log_weight(
            oracle.path_mask(draws, theta_g.tolist(), bits), theta_g.tolist(), theta_k.tolist()
        )

    best = max(weight([number >> t & 1 for t in range(draws.blocks)]) for number in range(1 << draws.blocks))
    assert weight(path.tolist()) == pytest.approx(best, abs=1e-4)
    assert masked(draws, theta_g, path).tolist() == oracle.path_mask(draws, theta_g.tolist(), path.tolist())


@settings(max_examples=60)
@given(cases(blocks=60), st.sampled_from((1, 40, 200)), st.sampled_from((0.0, 1e-3)))
def test_the_same_path_without_numba_and_in_other_portions(case, tallies, rest):
    draws, theta_g, theta_k = case
    change, found = Change.between(theta_g, theta_k, rest), []
    for on, portion in ((True, tallies), (False, tallies), (False, 1 << 20)):
        with machine_code(on), pytest.MonkeyPatch.context() as patch:
            patch.setattr(trellis, "_TALLIES", portion)
            found.append(trace_path(draws, change))
    assert np.array_equal(found[0], found[1])
    assert np.array_equal(found[0], found[2])


def along(theta_g, theta_k, mask):
    """How much of the change a mask carries, measured by log weight: 1 is a sample of theta_k in the mean."""
    k, g = np.clip(theta_k, 1e-12, 1 - 1e-12), np.clip(theta_g, 1e-12, 1 - 1e-12)
    gain = np.log(k / g) - np.log((1 - k) / (1 - g))
    return float((gain * (mask - theta_g)).sum() / (gain * (theta_k - theta_g)).sum())


@pytest.mark.parametrize(("b", "low", "ahead"), [(6, 0.93, 0.01), (8, 0.95, 0.04), (10, 0.97, 0.07)])
def test_the_change_keeps_its_size_and_more_of_it_than_blocks_carry(b, low, ahead):
    """With b / (b - 1) bits for a bit of divergence; numbers of separate blocks carry 0.90 to 0.93 with as many."""
    theta_g, theta_k = drifted(60_000, 3000)
    bits = float(divergence(theta_k, theta_g).sum())
    found, separate = [], []
    for key in range(3):
        draws = Draws(derive("path", key), math.ceil(bits * b / (b - 1)), 1 << b)
        found.append(
            along(theta_g, theta_k, masked(draws, theta_g, trace_path(draws, Change.between(theta_g, theta_k))))
        )
        blocks = Draws(derive("path", key), draws.blocks // 8, 256)
        chosen = pick(blocks, Change.between(theta_g, theta_k), derive("chance", key))
        separate.append(along(theta_g, theta_k, replay(blocks, thresholds(theta_g), chosen)))
    assert low <= np.mean(found) <= 1.02
    assert np.mean(found) > np.mean(separate) + ahead


def test_the_mask_is_a_sample_of_theta_k():
    """Mean and variance of many devices' masks are those of Bernoulli variables."""
    d, devices = 4000, 12
    rng = np.random.default_rng(0)
    theta_g = rng.choice([0.1, 0.5, 0.9], d)
    theta_k = np.clip(theta_g + rng.choice([-0.08, 0.0, 0.08], d), 0.05, 0.95)
    bits = float(divergence(theta_k, theta_g).sum())
    masks = []
    for k in range(devices):
        draws = Draws(derive("sample", k), math.ceil(bits * 10 / 9), 1 << 10)
        masks.append(masked(draws, theta_g, trace_path(draws, Change.between(theta_g, theta_k))))
    mean = np.mean(masks, axis=0)
    for g in np.unique(theta_g):
        for p in np.unique(theta_k[theta_g == g]):
            here = mean[(theta_g == g) & (theta_k == p)]
            sigma = math.sqrt(p * (1 - p) / devices / here.size)
            assert abs(here.mean() - p) < 4 * sigma + 0.06 * abs(p - g), (g, p)
            assert here.var() == pytest.approx(p * (1 - p) / devices, rel=0.25)


def test_devices_are_independent():
    """The masks of two of them agree in what both changed, and in nothing else."""
    theta_g, theta_k = drifted(30_000, 500)
    rest = []
    for k in range(2):
        draws = Draws(derive("apart", k), 600, 256)
        mask = masked(draws, theta_g, trace_path(draws, Change.between(theta_g, theta_k)))
        rest.append((mask - theta_k) / np.sqrt(theta_k * (1 - theta_k)))
    assert abs(float(rest[0] @ rest[1])) / math.sqrt(theta_g.size) < 4


@pytest.mark.parametrize(("d", "blocks", "size"), [(0, 1, 2), (0, 7, 4), (1, 1, 2), (1, 9, 8), (3, 100, 2)])
def test_small_cases(d, blocks, size):
    draws, theta_g = Draws(derive(d, blocks), blocks, size), np.full(d, 0.3)
    path = trace_path(draws, Change.between(theta_g, np.full(d, 0.6)))
    assert path.shape == (blocks,)
    assert masked(draws, theta_g, path).shape == (d,)


def test_theta_at_its_ends():
    theta_g, theta_k = np.repeat([0.0, 1.0, 0.5], 6), np.tile([0.0, 1.0, 0.3], 6)
    draws = Draws(derive("ends"), 4, 32)
    mask = masked(draws, theta_g, trace_path(draws, Change.between(theta_g, theta_k)))
    assert mask[:12].tolist() == [False] * 6 + [True] * 6


def test_known_bits():
    theta_g = np.linspace(0.1, 0.9, 24)
    draws = Draws(derive(7, "golden"), 9, 16)
    path = trace_path(draws, Change.between(theta_g, theta_g[::-1].copy()))
    assert path.tolist() == [0, 0, 1, 0, 1, 0, 0, 1, 0]
    assert np.packbits(masked(draws, theta_g, path)).tolist() == [113, 182, 107]


def test_a_register_has_a_power_of_two():
    with pytest.raises(ValueError, match=r"2\^b candidates, got 6"):
        trace_path(Draws(derive(0), 3, 6), Change.between(np.full(9, 0.5), np.full(9, 0.6)))
