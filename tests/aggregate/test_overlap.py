"""FedMask's means over owners against a loop over positions."""

from __future__ import annotations

import numpy as np
import oracles_fedmask as oracles
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedmask_flwr.aggregate import OverlapMean

LEVELS = (4, 6, 60, 254)


def means_of(supports, masks, d, levels):
    overlap = OverlapMean(d)
    for support, mask in zip(supports, masks, strict=True):
        overlap.add(support, mask)
    return overlap.means(levels)


@given(st.integers(0, 40), st.integers(0, 12), st.sampled_from(LEVELS), st.integers(0, 2**32 - 1))
def test_means_equal_the_loop(d, clients, levels, seed):
    """Ones off a support do not count, whoever sends them."""
    rng = np.random.default_rng(seed)
    supports, masks = (
        [np.packbits(rng.random(d) < p, bitorder="little") for p in rng.random(clients)] for _ in range(2)
    )
    means, shared = means_of(supports, masks, d, levels)
    for i, (level, owners) in enumerate(oracles.overlap_levels(supports, masks, d, levels)):
        assert shared[i] == (owners >= 2)
        assert means[i] == (0 if level is None else level)


@pytest.mark.parametrize("levels", LEVELS)
@pytest.mark.parametrize("owners", [1, 2, 3, 7, 61, 300])
def test_a_majority_stays_one_and_only_extremes_are_extreme(owners, levels):
    """Position i is 1 at the first i of the owners."""
    d = owners + 1
    everywhere = np.packbits(np.ones(d, bool), bitorder="little")
    masks = [np.packbits(np.arange(d) > k, bitorder="little") for k in range(owners)]
    means, shared = means_of([everywhere] * owners, masks, d, levels)
    assert shared.all() == (owners >= 2)
    ones = np.arange(d)
    assert (means == 0).tolist() == (ones == 0).tolist()
    assert (means == levels).tolist() == (ones == owners).tolist()
    assert (2 * means == levels).tolist() == (2 * ones == owners).tolist()
    assert (2 * means > levels).tolist() == (2 * ones > owners).tolist()
    assert (np.diff(means) >= 0).all()


def test_sixty_levels_are_exact_for_up_to_six_owners():
    for owners in range(1, 7):
        masks = [np.packbits(np.arange(owners + 1) > k, bitorder="little") for k in range(owners)]
        full = np.packbits(np.ones(owners + 1, bool), bitorder="little")
        means, _ = means_of([full] * owners, masks, owners + 1, 60)
        assert (means * owners == 60 * np.arange(owners + 1)).all()


def test_order_and_reading_twice_change_nothing():
    rng = np.random.default_rng(3)
    pairs = [[np.packbits(rng.random(50) < 0.5, bitorder="little") for _ in range(2)] for _ in range(9)]
    forward, backward = OverlapMean(50), OverlapMean(50)
    for (a, b), (c, d) in zip(pairs, reversed(pairs), strict=True):
        forward.add(a, b)
        forward.means(60)
        backward.add(c, d)
    for one, other in zip(forward.means(60), backward.means(60), strict=True):
        assert np.array_equal(one, other)


def test_a_support_of_another_length_is_refused():
    with pytest.raises(ValueError, match="9 bits is 2 uint8"):
        OverlapMean(9).add(np.zeros(3, np.uint8), np.zeros(3, np.uint8))
