"""The Beta posterior of keep-probabilities from integer votes (FedPM, arXiv 2209.15328, section 3)."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

ESTIMATORS = ("mode", "mean")


def beta_theta(
    ones: npt.NDArray[np.uint32],
    total: int,
    *,
    prior: float = 1.0,
    epsilon: float = 0.01,
    flip_rate: float = 0.0,
    estimator: str = "mode",
) -> npt.NDArray[np.float64]:
    """Keep-probabilities theta, shape (d,), from ``ones`` of ``total`` votes a position.

    alpha = prior + ones, beta = prior + total - ones. ``mode`` is (alpha - 1)/(alpha + beta - 2), ``mean`` is
    alpha/(alpha + beta); the mean shrinks to 1/2 at every reset, so the mode is the default. ``flip_rate`` f is
    the mean probability that a lossy codec flipped a vote; (theta - f)/(1 - 2f) undoes it in expectation. The
    result lies in [epsilon, 1 - epsilon], so no score is ever infinite.

    Only additions, divisions and comparisons of float64 are used: both ends get the same bits from the same
    integers on any IEEE machine.

    Raises
    ------
    ValueError
        Without a vote, or for settings outside their range.
    """
    if total < 1:
        raise ValueError("theta needs at least one vote: keep the previous theta when a round brings none")
    if estimator not in ESTIMATORS:
        raise ValueError(f"estimator must be one of {', '.join(ESTIMATORS)}, not {estimator!r}")
    if prior < 1.0 or not 0.0 < epsilon < 0.5 or not 0.0 <= flip_rate < 0.5:
        raise ValueError(
            f"need prior >= 1, 0 < epsilon < 0.5, 0 <= flip_rate < 0.5: {prior}, {epsilon}, {flip_rate}"
        )
    pseudo = prior - 1.0 if estimator == "mode" else prior
    theta = (ones + pseudo) / (total + 2.0 * pseudo)
    if flip_rate > 0.0:
        theta = (theta - flip_rate) / (1.0 - 2.0 * flip_rate)
    return np.clip(theta, epsilon, 1.0 - epsilon)
