"""What a server does with N masks, as streams of packed bits, and with what tasks teach. Numpy only."""

from .knowledge import Attention as Attention
from .knowledge import KnowledgeBase as KnowledgeBase
from .overlap import OverlapMean as OverlapMean
from .posterior import ESTIMATORS as ESTIMATORS
from .posterior import beta_theta as beta_theta
from .quota import cubic as cubic
from .quota import lowest as lowest
from .quota import quota as quota
from .quota import released as released
from .quota import targets as targets
from .quota import threshold as threshold
from .sketches import densify as densify
from .sketches import sketch as sketch
from .sketches import sparsify as sparsify
from .votes import VoteCounter as VoteCounter

__all__ = [
    "ESTIMATORS",
    "Attention",
    "KnowledgeBase",
    "OverlapMean",
    "VoteCounter",
    "beta_theta",
    "cubic",
    "densify",
    "lowest",
    "quota",
    "released",
    "sketch",
    "sparsify",
    "targets",
    "threshold",
]
