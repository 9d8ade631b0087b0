"""Task boundaries from losses: no false alarm, no late one, and why the reference is the observation before."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedmask_flwr.methods.drift import Drift

ROUNDS, RUNS = 50, 1000


def generator(kind, number=0):
    return np.random.Generator(np.random.Philox(key=np.array([kind, number], np.uint64)))


def firings(means, stds, *, rho=1.0, slack=0.2, threshold=1.0, floor=0.5, fewest=3):
    """The slow twin, of a whole trajectory: rounds (from 0) at which it fires.

    ``rho`` is what the reference takes of a new observation: 1 is the detector, 0.1 a slow running mean.
    """
    found, first = [], 0
    centre, spread, total = means[0], stds[0], 0.0
    for r in range(1, len(means)):
        if r - first + 1 >= fewest:
            total = max(0.0, total + (means[r] - centre) / max(spread, floor) - slack)
        if total > threshold:
            found.append(r)
            first, centre, spread, total = r, means[r], stds[r], 0.0
        else:
            centre += rho * (means[r] - centre)
            spread += rho * (stds[r] - spread)
    return found


def calm(key, n=1000):
    """A task of 50 rounds: means and sds of a round's losses, as batches of ``n`` examples show them.

    It falls from 1 + fall to 1 times its final level, at one of many rates; updates of others lift it a little each
    round, and on some rounds for good; on some it dips and comes back. Levels are those of 16 to 800 dimensions.
    """
    rng = generator(*key)
    level = rng.choice([0.05, 5.0, 40.0, 100.0])
    sd = level * rng.uniform(0.1, 0.6)
    rounds = np.arange(ROUNDS)
    mean = level * (1 + rng.choice([0.0, 0.3, 1.0, 4.0]) * np.exp(-rounds / rng.uniform(0.5, 15)))
    mean += sd * rng.uniform(0, 0.05) * rounds
    mean[rng.integers(3, ROUNDS) :] += 0.5 * sd
    mean[rng.integers(3, ROUNDS, 3)] -= 0.4 * sd
    mean += rng.normal(0, sd / np.sqrt(n), ROUNDS)
    return mean, sd * (1 + 0.3 * np.exp(-rounds / 5)) * (1 + rng.normal(0, 1 / np.sqrt(2 * n), ROUNDS))


def alarms(rho):
    return sum(bool(firings(*calm((1, i)), rho=rho)) for i in range(RUNS))


def switch(key, at, jump, n=1000):
    """80 -> 40 nats, sd 15, then a second set ``jump`` sd above with an sd of its own, that is learned as fast."""
    rng = generator(*key)
    rounds, sd = np.arange(ROUNDS), 15.0
    mean = 40 + 40 * np.exp(-rounds / 8)
    top = mean[at - 1] + jump * sd
    after = rounds[: ROUNDS - at]
    mean[at:] = 30 + (top - 30) * np.exp(-after / 8)
    sds = np.where(rounds < at, sd, sd * rng.uniform(0.5, 2))
    return mean + rng.normal(0, sds / np.sqrt(n)), sds


def batch(mean, std, n=64):
    """Losses with exactly that mean and sd."""
    raw = generator(9).normal(size=n)
    return mean + std * (raw - raw.mean()) / raw.std()


@given(seed=st.integers(0, 10_000), at=st.integers(1, 48), jump=st.floats(-1, 6), fewest=st.integers(2, 5))
def test_equals_its_slow_twin(seed, at, jump, fewest):
    means, stds = switch((2, seed), at, jump)
    drift, found = Drift(fewest=fewest), []
    for r, (mean, std) in enumerate(zip(means, stds, strict=True)):
        drift, fired = drift.observe(batch(mean, std))
        found += [r] * fired
        assert drift.mean == pytest.approx(mean)
        assert drift.std == pytest.approx(std)
        assert drift.rounds == r - (found[-1] if found else 0) + 1
    assert found == firings(means, stds, fewest=fewest)


def test_no_false_alarm_where_a_slow_mean_has_many():
    assert alarms(1.0) == 0
    assert alarms(0.1) > RUNS // 20  # a rise that stays is counted every round


def test_a_jump_is_noticed_within_two_rounds():
    for i in range(RUNS):
        at = 10 + i % 35
        found = firings(*switch((3, i), at, 1.5))
        assert len(found) == 1
        assert at <= found[0] <= at + 1


def test_a_jump_hides_from_a_slow_mean_while_the_loss_falls():
    """A switch in round 5: the mean is still where the network was long ago."""

    def noticed(rho):
        return sum(firings(*switch((4, i), 5, 1.7), rho=rho)[:1] in ([5], [6]) for i in range(RUNS))

    assert noticed(1.0) == RUNS
    assert noticed(0.1) < RUNS // 2


def test_a_big_jump_is_noticed_at_once_from_the_third_round_on():
    for at in range(2, ROUNDS):
        means = 40 + 40 * np.exp(-np.arange(ROUNDS) / 8)
        means[at:] += 80
        assert firings(means, np.full(ROUNDS, 15.0)) == [at]


def test_the_first_observations_only_set_the_reference():
    drift = Drift(fewest=4)
    for mean in (10.0, 1000.0, 100_000.0):
        drift, fired = drift.observe(batch(mean, 1.0))
        assert not fired
        assert drift.cusum == 0
    drift, fired = drift.observe(batch(100_002.0, 1.0))
    assert fired
    assert (drift.rounds, drift.cusum) == (1, 0)
    assert drift.mean == pytest.approx(100_002.0)


def test_thousands_of_examples_do_not_make_a_small_change_a_switch():
    """A z-test of this rise has z = 0.1 * sqrt(1e6) = 100."""
    drift, many = Drift(), batch(40.0, 15.0, 1_000_000)
    for r in range(10):
        drift, fired = drift.observe(many + 1.5 * r)
        assert not fired


def test_a_fitted_classifier_is_not_startled():
    """Losses near 0 with an sd near 0: 0.3 nats more is nothing, unseen labels are."""
    drift = Drift()
    for loss in (0.01, 0.01, 0.01, 0.3, 0.02, 0.3):
        drift, fired = drift.observe(batch(loss, 1e-3))
        assert not fired
    assert drift.observe(batch(2.5, 1.0))[1]


@given(means=st.lists(st.floats(0, 1e3), min_size=1, max_size=12))
def test_a_device_that_restarts_goes_on_bit_for_bit(means):
    drift = kept = Drift(slack=0.1, fewest=2)
    for mean in means:
        losses = batch(mean, 3.0)
        array = kept.to_array()
        assert (array.dtype, array.shape) == (np.float64, (4,))
        drift, fired = drift.observe(losses)
        kept, again = Drift.from_array(array, slack=0.1, fewest=2).observe(losses)
        assert (kept, again) == (drift, fired)


@pytest.mark.parametrize("losses", [[], [[1.0]], [1.0, np.nan], [np.inf]])
def test_losses_that_are_none(losses):
    with pytest.raises(ValueError, match=r"vector|finite"):
        Drift().observe(np.array(losses))


@pytest.mark.parametrize("kept", [[1.0] * 3, [1.0, np.nan, 1.0, 0.0], [1.0, -1.0, 1.0, 0.0], [1.0, 1.0, -1.0, 0.0]])
def test_a_memory_that_is_none(kept):
    with pytest.raises(ValueError, match="memory"):
        Drift.from_array(np.array(kept))


@pytest.mark.parametrize("wrong", [{"slack": -1.0}, {"threshold": 0.0}, {"floor": np.nan}, {"fewest": 1}])
def test_parameters_out_of_range(wrong):
    with pytest.raises(ValueError, match=r"give 2 or more|must be"):
        Drift(**wrong)
