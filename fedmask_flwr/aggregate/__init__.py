"""What a server does with N masks: votes and the Beta posterior, as streams of packed bits. Numpy only."""

from .posterior import ESTIMATORS as ESTIMATORS
from .posterior import beta_theta as beta_theta
from .votes import VoteCounter as VoteCounter

__all__ = ["ESTIMATORS", "VoteCounter", "beta_theta"]
