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
from .change import Change as Change
from .change import divergence as divergence
from .closeness import closeness as closeness
from .cost import count_macs as count_macs
from .cost import count_parameters as count_parameters
from .coupling import Coupling as Coupling
from .coupling import Entry as Entry
from .coupling import Segment as Segment
from .coupling import couple as couple
from .draw import Draw as Draw
from .keyed import Key as Key
from .keyed import bernoulli as bernoulli
from .keyed import derive as derive
from .keyed import permutation as permutation
from .keyed import thresholds as thresholds
from .keyed import words as words
from .keyed import words_torch as words_torch
from .lookup import taken as taken
from .optim import MaskOptimizer as MaskOptimizer
from .optim import Ste as Ste
from .sampled import Draws as Draws
from .sampled import pick as pick
from .sampled import replay as replay
from .slim import filter_scores as filter_scores
from .slim import gather as gather
from .slim import mask_filters as mask_filters
from .slim import scatter as scatter
from .slim import slim_ as slim_
from .slim import slim_numel as slim_numel
from .solvers import MaskAdam as MaskAdam
from .solvers import MaskSGD as MaskSGD
from .spec import Granularity as Granularity
from .spec import MaskSpec as MaskSpec
from .structure import Parts as Parts
from .structure import Structure as Structure
from .structure import compose as compose
from .trellis import path_candidates as path_candidates
from .trellis import trace_path as trace_path
from .weit import Retroactive as Retroactive
from .weit import WeitOptimizer as WeitOptimizer
from .weit import settle as settle

__all__ = [
    "Backbone",
    "Change",
    "Coupling",
    "Draw",
    "Draws",
    "Entry",
    "Granularity",
    "Key",
    "MaskAdam",
    "MaskOptimizer",
    "MaskSGD",
    "MaskSpec",
    "Mode",
    "Parts",
    "Retroactive",
    "Segment",
    "Ste",
    "Structure",
    "WeitOptimizer",
    "bernoulli",
    "closeness",
    "compose",
    "count_macs",
    "count_parameters",
    "couple",
    "derive",
    "divergence",
    "filter_scores",
    "freeze",
    "frozen_weights",
    "gather",
    "initialise",
    "mask_filters",
    "mask_values",
    "model_digest",
    "path_candidates",
    "permutation",
    "pick",
    "replay",
    "scatter",
    "settle",
    "slim_",
    "slim_numel",
    "taken",
    "thresholds",
    "trace_path",
    "weights_digest",
    "words",
    "words_torch",
    "write_mask",
]
