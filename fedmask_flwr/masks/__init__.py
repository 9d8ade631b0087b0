"""What a mask is: where its bits live, how they are drawn and trained, and what they are drawn over."""

from __future__ import annotations

from .apply import Mode as Mode
from .apply import frozen_weights as frozen_weights
from .apply import mask_values as mask_values
from .apply import write_mask as write_mask
from .backbone import Backbone as Backbone
from .backbone import freeze as freeze
from .backbone import initialise as initialise
from .backbone import model_digest as model_digest
from .backbone import weights_digest as weights_digest
from .keyed import Key as Key
from .keyed import bernoulli as bernoulli
from .keyed import derive as derive
from .keyed import permutation as permutation
from .keyed import thresholds as thresholds
from .keyed import words as words
from .keyed import words_torch as words_torch
from .optim import MaskAdam as MaskAdam
from .optim import MaskOptimizer as MaskOptimizer
from .optim import MaskSGD as MaskSGD
from .optim import Ste as Ste
from .spec import Granularity as Granularity
from .spec import MaskSpec as MaskSpec

__all__ = [
    "Backbone",
    "Granularity",
    "Key",
    "MaskAdam",
    "MaskOptimizer",
    "MaskSGD",
    "MaskSpec",
    "Mode",
    "Ste",
    "bernoulli",
    "derive",
    "freeze",
    "frozen_weights",
    "initialise",
    "mask_values",
    "model_digest",
    "permutation",
    "thresholds",
    "weights_digest",
    "words",
    "words_torch",
    "write_mask",
]
