"""Votes and posterior against slow twins."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedmask_flwr.aggregate import VoteCounter, beta_theta
from fedmask_flwr.aggregate.planes import BATCH


def packed(rows):
    return [np.packbits(row, bitorder="little") for row in rows]


@given(st.integers(0, 70), st.integers(0, 300), st.integers(0, 2**32 - 1))
def test_votes_equal_the_plain_sum(numel, masks, seed):
    rows = np.random.default_rng(seed).random((masks, numel)) < 0.5
    counter = VoteCounter(numel)
    for row in packed(rows):
        counter.add(row)
    assert np.array_equal(counter.votes(), rows.sum(axis=0))
    assert counter.masks == masks


def test_votes_can_be_read_between_masks():
    rows = np.ones((300, 9), bool)
    counter = VoteCounter(9)
    for n, row in enumerate(packed(rows), 1):
        counter.add(row)
        if n in {1, 254, 255, 256}:
            assert counter.votes().tolist() == [n] * 9


def test_a_mask_of_another_length_is_refused():
    with pytest.raises(ValueError, match="9 bits is 2 uint8"):
        VoteCounter(9).add(np.zeros(3, np.uint8))


def test_memory_does_not_grow_with_clients():
    numel = 4_000_000
    row = np.zeros(numel // 8, np.uint8)
    counter = VoteCounter(numel)
    for _ in range(BATCH):  # machine code is loaded
        counter.add(row)
    tracemalloc.start()
    for _ in range(50):
        counter.add(row.copy())
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2.5 * numel  # never N x d


@given(st.integers(1, 1000), st.floats(1.0, 5.0), st.integers(0, 2**32 - 1))
def test_posterior_equals_the_closed_form(total, prior, seed):
    ones = np.random.default_rng(seed).integers(0, total + 1, 20).astype(np.uint32)
    alpha, beta = prior + ones.astype(float), prior + total - ones.astype(float)
    mode = np.clip((alpha - 1) / (alpha + beta - 2), 0.01, 0.99)
    mean = np.clip(alpha / (alpha + beta), 0.01, 0.99)
    assert np.allclose(beta_theta(ones, total, prior=prior), mode)
    assert np.allclose(beta_theta(ones, total, prior=prior, estimator="mean"), mean)


def test_flat_prior_without_clipping_is_the_mean_of_the_masks():
    rows = np.random.default_rng(0).random((10, 50)) < 0.5
    theta = beta_theta(rows.sum(0).astype(np.uint32), 10, epsilon=1e-12)
    assert np.allclose(theta, np.clip(rows.mean(0), 1e-12, 1 - 1e-12))


def test_flip_correction_is_unbiased():
    rng = np.random.default_rng(1)
    truth, flip, n = 0.3, 2.0**-4, 200_000
    votes = (rng.random(n) < truth) ^ (rng.random(n) < flip)
    theta = beta_theta(np.array([votes.sum()], np.uint32), n, flip_rate=flip)
    assert abs(theta[0] - truth) < 4 * np.sqrt(0.25 / n) / (1 - 2 * flip)


def test_extremes_are_clipped_and_finite():
    theta = beta_theta(np.array([0, 10], np.uint32), 10, epsilon=0.02)
    assert theta.tolist() == [0.02, 0.98]


@pytest.mark.parametrize(
    "bad", [{"total": 0}, {"prior": 0.5}, {"epsilon": 0.0}, {"flip_rate": 0.5}, {"estimator": "median"}]
)
def test_bad_settings_are_refused(bad):
    settings = {"total": 3} | bad
    with pytest.raises(ValueError, match=r"theta needs|need prior|estimator must"):
        beta_theta(np.zeros(2, np.uint32), **settings)
