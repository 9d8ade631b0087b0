"""Pruning-FL: federated averaging, and the server prunes the filters of the average that have the smallest norm.

The baseline that MPFL (Gez, Cohen, arXiv 2312.03889) compares with; filter norms as in Li, Kadav, Durdanovic,
Samet, Graf, "Pruning Filters for Efficient ConvNets", ICLR 2017, arXiv 1608.08710.

Travels: 32 bits a weight of the network that is left, each way, and down which filters are left.

Settings: as MPFL: prune-to 0.5 over the first search-rounds 8, keep-min 8; Adam 1e-3.

Limits: weights travel from the first round on. A pruned filter never comes back.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar, final

import numpy as np
import numpy.typing as npt
from torch import nn
from torch.optim import Optimizer

from fedmask_flwr.aggregate import lowest
from fedmask_flwr.masks import gather, scatter
from fedmask_flwr.wire import Payload, pack_bits, unpack_bits

from .base import Fields, Known, Memory, Turn, Update
from .dense import Vector
from .fedavg import weighted_mean
from .slimming import Slimming


@dataclass(frozen=True, slots=True)
class PruningState:
    """Filters that are left (packed), the slim network's weights once there are any, rounds that pruned."""

    keep: npt.NDArray[np.uint8]
    weights: Vector
    pruned: int


@final
class PruningFL(Slimming[PruningState]):
    """See the module's card."""

    name: ClassVar[str] = "pruning-fl"
    State = PruningState

    def up(self, got: Payload, shared: Memory) -> tuple[Fields, ...]:
        """The slim network's weights."""
        return ({"weights": ("dense", self.slim_numel(self.keep(got)))},)

    def known(self, got: Payload, turn: Turn, shared: Memory) -> Known:
        """Nothing."""
        return None

    def init(self) -> PruningState:
        """Every filter."""
        return PruningState(pack_bits(np.ones(self.spec.numel, np.bool_)), np.zeros(0, np.float32), 0)

    def broadcast(self, state: PruningState, client: int | None = None) -> Payload:
        """The filters that are left and their weights; nothing before the first round."""
        return self.result(state) if state.weights.size else Payload()

    def result(self, state: PruningState) -> Payload:
        """The filters that are left and their weights."""
        keep = unpack_bits(state.keep, self.spec.numel)
        weights = state.weights if state.weights.size else self.slim_start(keep)
        return Payload(bits={"keep": state.keep}, dense={"weights": weights})

    def aggregate(self, state: PruningState, updates: Iterable[Update]) -> PruningState:
        """Average, then prune the average to the round's size."""
        mean = weighted_mean((u.weight, u.payload.dense["weights"]) for u in updates)
        if mean is None:
            return state
        if state.pruned >= self.config.search_rounds:
            return PruningState(state.keep, mean, state.pruned)
        keep, done = unpack_bits(state.keep, self.spec.numel), state.pruned + 1
        full = scatter(mean, self.coupling, self.spec, keep)
        keep = lowest((self.norms(full),), keep, self.spec.sizes, self.lost(done))
        return PruningState(pack_bits(keep), gather(full, self.coupling, self.spec, keep), done)

    def finish(self, got: Payload, model: nn.Module, optimizer: Optimizer, turn: Turn, memory: Memory) -> Payload:
        """All floats of the slim network."""
        return Payload(dense={"weights": self.read(model)})
