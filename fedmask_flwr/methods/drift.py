"""Noticing that a device's task has changed, from nothing but the losses of the data it is about to train on.

Once a round, before training, a device measures the negative log-likelihood (nats) of each of its examples under
its current network. While a task goes on that falls, or creeps up a little when other clients' updates are merged;
at a switch it jumps. The test is a one-sided CUSUM (Page, "Continuous Inspection Schemes", Biometrika 41, 1954,
pp. 100-115) over effect sizes::

    d_r = (mean_r - mean_{r-1}) / max(std_{r-1}, floor)        S_r = max(0, S_{r-1} + d_r - slack)

and a switch is S_r > threshold. Effect sizes, since with thousands of examples a z-test fires at any change at all.

The reference is the observation before, not a slow mean, for two reasons (tests/methods/test_drift.py simulates
both). A network that learns leaves a slow mean far above itself, where a jump hides. And a harmless rise that stays
would be counted anew each round, whereas increments add up to the height above the lowest point so far, less
``slack`` a round: a rise is counted once, a dip and its recovery cancel, and a creep below ``slack`` is nothing.

Limit: data that the network predicts well already are no new task. Where all clients share one network, a task that
others have taught it goes unnoticed; a network of the device's own jumps.

numpy only.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, final

import numpy as np
import numpy.typing as npt

SLACK, THRESHOLD, FLOOR, FEWEST = 0.2, 1.0, 0.5, 3
Losses = npt.NDArray[np.floating[Any]]


@final
@dataclass(frozen=True, slots=True)
class Drift:
    """A detector between two observations; the default is one that has seen nothing.

    Parameters
    ----------
    mean, std : float
        Of the observation before, nats an example.
    rounds : int
        Observations of the current task.
    cusum : float
        S, in standard deviations; 0 until ``fewest`` - 1 observations are there.
    slack : float
        Rise in a round that is not counted, standard deviations.
    threshold : float
        What S must pass: about the smallest jump that counts, less ``slack``.
    floor : float
        The least standard deviation to divide by, nats. It keeps a fitted classifier, whose losses are all nearly
        0, from taking any merge for a switch.
    fewest : int
        Observations of a task, 2 or more, before which it cannot have ended; the first only sets the reference.
        An untrained network is equally unsure of all examples, so early standard deviations may be far too small.

    Raises
    ------
    ValueError
        A parameter is out of its range, or the state is of no detector.
    """

    mean: float = 0.0
    std: float = 0.0
    rounds: int = 0
    cusum: float = 0.0
    slack: float = SLACK
    threshold: float = THRESHOLD
    floor: float = FLOOR
    fewest: int = FEWEST

    def __post_init__(self) -> None:
        if not (0 <= self.slack < np.inf and 0 < self.threshold < np.inf and 0 < self.floor < np.inf):
            raise ValueError("slack must be 0 or more, threshold and floor above 0, all finite")
        if self.fewest < 2:
            raise ValueError(
                f"fewest is {self.fewest}: the first observation only sets the reference, give 2 or more"
            )
        state = (self.mean, self.std, self.rounds, self.cusum)
        if not np.isfinite(state).all() or min(self.std, self.rounds, self.cusum) < 0:
            raise ValueError(f"{state} is no detector's state: delete the device's memory, or start a new one")

    def observe(self, losses: Losses) -> tuple[Drift, bool]:
        """Take one round's losses, (n,) nats, measured before training; say whether they are of a new task.

        When they are, the detector that is returned has begun anew, with them as its first observation.

        Raises
        ------
        ValueError
            No losses, more than one dimension, or one that is not finite.
        """
        values = np.asarray(losses, np.float64)
        if values.ndim != 1 or not values.size:
            raise ValueError(f"losses must be a vector of at least one example, not of shape {values.shape}")
        if not np.isfinite(values).all():
            raise ValueError("a loss is not finite: the network has diverged, lower its learning rate")
        seen = replace(self, mean=float(values.mean()), std=float(values.std()), rounds=self.rounds + 1, cusum=0.0)
        if seen.rounds < self.fewest:
            return seen, False
        effect = (seen.mean - self.mean) / max(self.std, self.floor)
        cusum = max(0.0, self.cusum + effect - self.slack)
        if cusum > self.threshold:
            return replace(seen, rounds=1), True
        return replace(seen, cusum=cusum), False

    def to_array(self) -> npt.NDArray[np.float64]:
        """What a device keeps: mean, std, rounds and S, (4,). The parameters are the run's, not kept."""
        return np.array([self.mean, self.std, self.rounds, self.cusum], np.float64)

    @classmethod
    def from_array(
        cls,
        kept: npt.NDArray[np.float64],
        *,
        slack: float = SLACK,
        threshold: float = THRESHOLD,
        floor: float = FLOOR,
        fewest: int = FEWEST,
    ) -> Drift:
        """Read ``to_array`` back.

        Raises
        ------
        ValueError
            It is none.
        """
        if kept.shape != (4,) or not np.isfinite(kept).all():
            raise ValueError("these are not the 4 finite numbers of a detector: delete the device's memory")
        mean, std, rounds, cusum = map(float, kept)
        return cls(mean, std, int(rounds), cusum, slack, threshold, floor, fewest)
