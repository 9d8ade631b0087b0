"""The words of training steps: what they are, and that they are as good as those of a key's stream."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles_masks import step_word

from fedmask_flwr.masks import Key, derive
from fedmask_flwr.masks.kernels import CPU_SLICE
from fedmask_flwr.masks.tiled import AHEAD, TILE, StepKeys, Tiles, tiled, tiled_torch

int32 = st.integers(-(2**31), 2**31 - 1)
N = 1_000_000


@settings(max_examples=50, deadline=None)
@given(int32, int32, st.integers(0, 2**32 - 40), st.integers(0, 40))
def test_words_equal_python_integers(k0, k1, start, n):
    key = Key(k0, k1)
    expected = [step_word(k0, k1, i) for i in range(start, start + n)]
    assert tiled(key, n, start).tolist() == expected
    assert tiled_torch(key, n, "cpu", start).tolist() == expected


@pytest.mark.parametrize("start", [0, TILE - 3, 5 * TILE, 2**31 - 7, 2**32 - 3 * TILE - 5])
def test_tiles_meet_without_a_seam(start):
    key, n = derive("tiles"), 3 * TILE + 5
    whole = tiled(key, n, start)
    assert np.array_equal(whole, tiled_torch(key, n, "cpu", start).numpy())
    for i in (0, 2, 3, TILE, n - 1):
        assert whole[i] == step_word(*key, start + i)
    room = Tiles(n)
    for a, b in ((0, 1), (1, TILE + 4), (TILE + 4, n), (0, n)):
        assert np.array_equal(room.words(key, b - a, start + a), whole[a:b])
    assert np.array_equal(room.words(derive("others"), n, start), tiled(derive("others"), n, start))


def test_counters_out_of_range():
    for n, start in ((2, 2**32 - 1), (-1, 0), (1, -1)):
        with pytest.raises(ValueError, match=r"derive another key|negative"):
            tiled(derive(0), n, start)
        with pytest.raises(ValueError, match=r"derive another key|negative"):
            tiled_torch(derive(0), n, "cpu", start)


def uniforms(key: Key, start: int = 0) -> np.ndarray:
    return (tiled(key, N, start).astype(np.float64) + 2**31 + 0.5) / 2**32


@pytest.mark.parametrize("seed", range(4))
def test_calibration(seed):
    u = uniforms(derive("calibration", seed))
    deciles = np.bincount((u * 10).astype(int), minlength=10)
    assert ((deciles - N / 10) ** 2 / (N / 10)).sum() < 33.7  # chi-square, 9 degrees of freedom, p = 1e-4
    v = (u - 0.5) * np.sqrt(12)
    for lag in (1, 2, 3, 64, TILE - 1, TILE, TILE + 1, 2 * TILE, 16 * TILE, CPU_SLICE + TILE):
        assert abs((v[:-lag] * v[lag:]).sum() / np.sqrt(N - lag)) < 4.5
    bits = np.unpackbits(tiled(derive("bits", seed), N).view(np.uint8)).reshape(N, 32).sum(0)
    assert (np.abs(bits - N / 2) < 4.5 * np.sqrt(N / 4)).all()


def test_lanes_and_tiles_are_independent():
    """Words share lanes' and tiles' words, and four of them their exclusive or before it is mixed."""
    grid = uniforms(derive("grid"))[: N // TILE * TILE].reshape(-1, TILE) - 0.5
    tiles, lanes = grid.shape
    for means, n in ((grid.mean(0), tiles), (grid.mean(1), lanes)):
        z = means * np.sqrt(12 * n)  # of unit variance each
        assert abs((z**2).sum() - len(z)) < 4.5 * np.sqrt(2 * len(z))
    corners = grid[:-1, :-1] * grid[1:, 1:] * grid[:-1, 1:] * grid[1:, :-1] * 12**2
    assert abs(corners.sum() / np.sqrt(corners.size)) < 4.5
    for i in range(1, 60):  # any two tiles, any two lanes
        assert abs((grid[0] * grid[i]).sum() * 12 / np.sqrt(lanes)) < 4.5
        assert abs((grid[:, 0] * grid[:, i]).sum() * 12 / np.sqrt(tiles)) < 4.5


def test_neighbouring_steps_are_independent():
    streams = [uniforms(derive("step", t)) - 0.5 for t in range(4)]
    for i, a in enumerate(streams):
        for b in streams[:i]:
            for x, y in ((a, b), (a[1:], b[:-1]), (a[TILE:], b[:-TILE])):
                assert abs((x * y).sum() * 12 / np.sqrt(N)) < 4.5


def test_probability_is_met():
    for i, p in enumerate((1e-4, 0.01, 0.3, 0.5, 0.9)):
        hits = (uniforms(derive("p", i)) < p).sum()
        assert abs(hits - N * p) < 4.5 * np.sqrt(N * p * (1 - p))


def test_keys_of_steps():
    keys = StepKeys()
    for key, step in ((Key(1, 2), 0), (Key(1, 2), 3), (Key(1, 2), 2 * AHEAD), (Key(1, 2), 5), (Key(3, 2), 5)):
        assert keys.of(key, step) == derive(*key, "step", step)
