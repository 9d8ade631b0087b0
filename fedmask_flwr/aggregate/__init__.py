"""What a server does with N masks: votes and the Beta posterior, as streams of packed bits. Numpy only."""

from .overlap import OverlapMean as OverlapMean
from .posterior import ESTIMATORS as ESTIMATORS
from .posterior import beta_theta as beta_theta
from .quota import cubic as cubic
from .quota import lowest as lowest
from .quota import quota as quota
from .quota import released as released
from .quota import targets as targets
from .quota import threshold as threshold
from .votes import VoteCounter as VoteCounter

__all__ = [
    "ESTIMATORS",
    "OverlapMean",
    "VoteCounter",
    "beta_theta",
    "cubic",
    "lowest",
    "quota",
    "released",
    "targets",
    "threshold",
]
