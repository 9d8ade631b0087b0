"""MPFL's rules against slow twins, and what a minority can do to each."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import oracles_quota as oracles
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedmask_flwr.aggregate import cubic, lowest, quota, released, targets, threshold


@st.composite
def elections(draw):
    """sizes, voters, votes of channels that are left, history, keep (a channel of every unit stays)."""
    sizes = draw(st.lists(st.integers(1, 12), min_size=1, max_size=4))
    voters, d = draw(st.integers(1, 30)), sum(sizes)
    keep = np.array(draw(st.lists(st.booleans(), min_size=d, max_size=d)))
    for unit in oracles.units(sizes):
        keep[draw(st.sampled_from(unit))] = True
    votes = np.array(draw(st.lists(st.integers(0, voters), min_size=d, max_size=d)), np.uint32) * keep
    more = np.array(draw(st.lists(st.integers(0, 3), min_size=d, max_size=d)), np.uint32)
    return sizes, voters, votes.astype(np.uint32), (votes + more).astype(np.uint32), keep


def gone(keep, sizes):
    return [int((~part).sum()) for part in np.split(keep, np.cumsum(sizes)[:-1])]


# The budget


@given(st.integers(1, 99), st.integers(1, 40))
def test_the_cubic_schedule_ends_at_the_target(percent, rounds):
    shares = [cubic(percent / 100, t, rounds) for t in range(rounds + 1)]
    assert shares[0] == 0
    assert shares[-1] == percent / 100 == cubic(percent / 100, rounds + 3, rounds)
    assert all(a < b for a, b in pairwise(shares))
    steps = np.diff(shares)
    assert (np.diff(steps) < 1e-12).all(), "it prunes most at first"
    for t, found in enumerate(shares):
        assert found == pytest.approx(float(oracles.share(percent, t, rounds)) / 100)


@given(st.lists(st.integers(1, 600), min_size=1, max_size=5), st.floats(0, 1), st.integers(1, 20))
def test_targets_round_and_leave_keep_min(sizes, share, keep_min):
    found = targets(sizes, share, keep_min)
    assert found == oracles.goals(sizes, share, keep_min)
    for n, lost in zip(sizes, found, strict=True):
        assert n - lost >= min(n, keep_min)
        assert abs(lost - share * n) <= 0.5 or n - lost == min(n, keep_min)


# Quota


@given(elections(), st.floats(0, 1), st.integers(1, 4))
def test_quota_equals_the_loop_and_prunes_exactly_its_target(election, share, keep_min):
    sizes, _, votes, history, keep = election
    lost = targets(sizes, share, keep_min)
    out = quota(votes, history, keep, sizes, lost)
    assert out.tolist() == oracles.quota(votes.tolist(), history.tolist(), keep.tolist(), sizes, lost)
    assert gone(out, sizes) == [max(a, b) for a, b in zip(lost, gone(keep, sizes), strict=True)]
    assert not (out & ~keep).any(), "what is gone stays gone"
    for before, after in zip(gone(keep, sizes), np.split(out, np.cumsum(sizes)[:-1]), strict=True):
        assert after.sum() >= min(after.size - before, keep_min)


def test_ties_go_by_history_then_by_index():
    votes = np.array([2, 1, 1, 1, 2], np.uint32)
    history = np.array([0, 5, 4, 4, 0], np.uint32)
    keep = np.ones(5, bool)
    order = [np.flatnonzero(~quota(votes, history, keep, [5], [n])).tolist() for n in range(1, 5)]
    assert order == [[2], [2, 3], [1, 2, 3], [0, 1, 2, 3]]


@given(elections(), st.integers(0, 2**32 - 1))
def test_lowest_takes_any_number_of_ranks(election, seed):
    sizes, _, votes, _, keep = election
    rng = np.random.default_rng(seed)
    scores = rng.integers(0, 3, votes.size) / 2
    lost = targets(sizes, 0.5, 1)
    for ranks in ((scores,), (scores, votes), (votes, scores, rng.random(votes.size))):
        out, want = lowest(ranks, keep, sizes, lost), keep.copy()
        for unit, goal in zip(oracles.units(sizes), lost, strict=True):
            ranked = sorted((i for i in unit if keep[i]), key=lambda i: (*(r[i] for r in ranks), i))
            want[ranked[: max(goal - sum(not keep[i] for i in unit), 0)]] = False
        assert (out == want).all()


def random_votes(rng, voters, keep, sizes, lost):
    """Votes within the budget: each drops a random set of channels that are left."""
    rows = np.zeros((voters, keep.size), bool)
    for row in rows:
        row[:] = lowest((rng.random(keep.size),), keep, sizes, lost)
    return rows


@given(st.integers(0, 2**32 - 1), st.integers(0, 3), st.sampled_from(["random", "against", "nothing"]))
def test_a_minority_cannot_decide(seed, bad, kind):
    """Whatever ``bad`` nodes vote beside the others, a channel farther than ``bad`` votes from the cut stays put.

    The cut is between L, the most votes of a pruned channel, and H, the fewest of a kept one, without the bad
    nodes' votes: pruned channels with at most H - bad - 1 stay pruned, kept ones with at least L + bad + 1 kept.
    """
    rng = np.random.default_rng(seed)
    sizes, voters = [int(rng.integers(4, 40)), int(rng.integers(2, 20))], 10 - bad
    keep = rng.random(sum(sizes)) < 0.9
    keep[0] = keep[-1] = True
    lost = targets(sizes, 0.5, 1)
    likes = rng.random(keep.size) * 2
    honest = [lowest((likes + rng.random(keep.size),), keep, sizes, lost) for _ in range(voters)]
    clean = np.sum(honest, 0).astype(np.uint32)
    before = quota(clean, clean, keep, sizes, lost)
    hostile = {
        "random": random_votes(rng, bad, keep, sizes, lost),
        "against": np.tile(lowest((-likes,), keep, sizes, lost), (bad, 1)),
        "nothing": np.tile(keep, (bad, 1)),
    }[kind]
    votes = (clean + hostile.sum(0)).astype(np.uint32)
    after = quota(votes, votes, keep, sizes, lost)
    assert gone(after, sizes) == gone(before, sizes)
    for unit in oracles.units(sizes):
        kept = [clean[i] for i in unit if before[i]]
        cut = [clean[i] for i in unit if keep[i] and not before[i]]
        for i in unit:
            if keep[i] and not before[i] and int(clean[i]) <= int(min(kept)) - bad - 1:
                assert not after[i]
            if before[i] and (not cut or int(clean[i]) >= int(max(cut)) + bad + 1):
                assert after[i]


def test_one_node_of_ten_changes_ties_alone():
    """Nine agree on all but a tie: one enemy that keeps what they drop moves nothing else."""
    votes = np.array([0, 0, 4, 5, 5, 9, 9, 9], np.uint32)
    keep = np.ones(8, bool)
    enemy = np.array([1, 1, 1, 1, 0, 0, 0, 0], np.uint32)
    before = quota(votes, votes, keep, [8], [4])
    after = quota(votes + enemy, votes + enemy, keep, [8], [4])
    assert np.flatnonzero(before != after).tolist() == [3, 4]
    assert released(votes + enemy, 10, keep, [8], [4], 1).sum() == 1  # one of 9 voters' darlings, by keep_min alone


# The other rules


@given(elections(), st.integers(1, 100), st.integers(1, 4))
def test_threshold_equals_the_loop(election, least, keep_min):
    """Exactly at the share a channel stays: 7 of 25 are 0.28."""
    sizes, voters, votes, _, keep = election
    out = threshold(votes, voters, keep, sizes, keep_min, least / 100)
    assert out.tolist() == oracles.threshold(votes.tolist(), voters, keep.tolist(), sizes, keep_min, least)
    assert not (out & ~keep).any()


@pytest.mark.parametrize(("percent", "voters"), [(28, 25), (56, 25), (14, 50), (50, 3), (30, 10), (70, 30)])
def test_a_share_that_is_met_exactly_is_met(percent, voters):
    votes = np.arange(voters + 1, dtype=np.uint32)
    out = threshold(votes, voters, np.ones(voters + 1, bool), [voters + 1], 1, percent / 100)
    assert out.tolist() == [100 * v >= percent * voters for v in range(voters + 1)]


@given(elections(), st.floats(0, 1), st.integers(1, 4))
def test_released_equals_the_loop(election, share, keep_min):
    sizes, voters, votes, _, keep = election
    lost = targets(sizes, share, keep_min)
    out = released(votes, voters, keep, sizes, lost, keep_min)
    want = oracles.released(votes.tolist(), voters, keep.tolist(), sizes, lost, keep_min)
    assert out.tolist() == want
    assert not (out & ~keep).any()


def test_what_a_single_node_does_to_the_released_rule():
    """masks.md 5.4: nine agree to the last filter; the tenth drops others and takes as many again with it."""
    agreed = np.arange(100) >= 30
    enemy = np.arange(100) < 70
    keep, lost = np.ones(100, bool), [30]
    clean, votes = (10 * agreed).astype(np.uint32), (9 * agreed + enemy).astype(np.uint32)
    assert (released(clean, 10, keep, [100], lost, 8) == agreed).all()
    assert (~released(votes, 10, keep, [100], lost, 8)).sum() == 60
    assert (quota(votes, votes, keep, [100], lost) == agreed).all()
    assert (threshold(votes, 10, keep, [100], 8) == agreed).all()


def test_the_floor_puts_the_most_wanted_back():
    votes = np.array([0, 2, 1, 2, 0, 3], np.uint32)
    keep = np.array([True, True, True, True, True, False])
    assert threshold(votes, 10, keep, [6], 3).tolist() == [False, True, True, True, False, False]
    assert threshold(votes, 10, keep, [6], 9).tolist() == keep.tolist()
    assert threshold(np.zeros(4, np.uint32), 10, np.ones(4, bool), [4], 2).tolist() == [True, True, False, False]
