"""MPFL: nodes vote, one bit a filter, on what the network can do without; then the slim network is trained.

Paper: Gez, Cohen, "Masked Pruning Federated Learning", arXiv 2312.03889.

In a search round a node trains the network that is left from the initial weights (``rewind = "initial"``: they are
named, so they never travel), ranks each layer's filters by their L2 norm, and votes to keep all but the budget of
the round. The server counts the votes and prunes by consensus: ``rule = "quota"`` takes exactly the budget, the
filters with the fewest keep-votes; "threshold" keeps what the share ``consensus`` of the voters keeps; "released"
is the paper's published code, in which a single node decides. Layers whose outputs are added vote as one, so what
is left can be cut out. After ``search-rounds`` the slim network is trained by federated averaging.

Travels: in a search round one bit a filter each way, coded against the filters that are left, and no weight; then
32 bits a weight of the slim network each way.

Settings: prune-to 0.5, search-rounds 8, keep-min 8; Adam 1e-3. Give ``num-server-rounds`` more than search-rounds.

Limits: the full network trains in the first search round. The last layer's outputs and layers that the trace does
not understand keep their filters. Votes of a node beyond its budget are refused, not clipped; so are votes in a
codec that is not exact. From a seed's signed constants all norms begin equal, and honest nodes agree less.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar, Literal, final

import numpy as np
import numpy.typing as npt
from pydantic import Field
from torch import nn
from torch.optim import Optimizer

from fedmask_flwr.aggregate import VoteCounter, lowest, quota, released, threshold
from fedmask_flwr.masks import gather, scatter
from fedmask_flwr.wire import Payload, SideInfo, WireError, pack_bits, unpack_bits

from .base import Fields, Known, Memory, MethodConfig, Training, Turn, Update
from .dense import Vector
from .fedavg import weighted_mean
from .slimming import Flags, Slimming, SlimmingConfig


class MPFLConfig(SlimmingConfig):
    """The vote's rule and where nodes train from."""

    rule: Literal["quota", "threshold", "released"] = "quota"
    consensus: float = Field(0.5, gt=0.0, le=1.0, description='share of keep-votes for the rule "threshold"')
    rewind: Literal["initial", "never"] = Field(
        "initial", description="what a search round trains from: the initial weights, or the node's own last ones"
    )


@dataclass(frozen=True, slots=True)
class MPFLState:
    """Filters that are left (packed), keep-votes of all rounds (d,), searches done, slim weights once trained."""

    keep: npt.NDArray[np.uint8]
    history: npt.NDArray[np.uint32]
    searched: int
    weights: Vector


@final
class MPFL(Slimming[MPFLState]):
    """See the module's card."""

    name: ClassVar[str] = "mpfl"
    exact: ClassVar[bool] = True
    State = MPFLState
    Config: ClassVar[type[MethodConfig]] = MPFLConfig

    # What travels

    def searched(self, got: Payload) -> int:
        """Searches done before this round."""
        done = got.meta.get("searched", 0)
        if not isinstance(done, int) or not 0 <= done <= self.config.search_rounds:
            raise WireError(f"broadcast says {done!r} searches of {self.config.search_rounds} are done")
        return done

    def searching(self, got: Payload) -> bool:
        """Say whether this round is a search."""
        return self.searched(got) < int(self.config.search_rounds)

    def up(self, got: Payload, shared: Memory) -> tuple[Fields, ...]:
        """Votes; after the search, the slim network's weights."""
        if self.searching(got):
            return ({"vote": ("bits", self.spec.numel)},)
        return ({"weights": ("dense", self.slim_numel(self.keep(got)))},)

    def known(self, got: Payload, turn: Turn, shared: Memory) -> Known:
        """The filters that are left: a vote differs from them by its budget."""
        return SideInfo(self.spec.sizes, pack_bits(self.keep(got)))

    # Server

    def init(self) -> MPFLState:
        """Every filter, no vote."""
        d = self.spec.numel
        return MPFLState(pack_bits(np.ones(d, np.bool_)), np.zeros(d, np.uint32), 0, np.zeros(0, np.float32))

    def broadcast(self, state: MPFLState, client: int | None = None) -> Payload:
        """The filters that are left; nothing before the first consensus."""
        if state.searched == 0:
            return Payload()
        dense = {"weights": state.weights} if state.weights.size else {}
        return Payload(bits={"keep": state.keep}, dense=dense, meta={"searched": state.searched})

    def result(self, state: MPFLState) -> Payload:
        """The filters that are left and the slim network's weights."""
        keep = unpack_bits(state.keep, self.spec.numel)
        weights = state.weights if state.weights.size else self.slim_start(keep)
        return Payload(bits={"keep": state.keep}, dense={"weights": weights})

    def check(self, state: MPFLState, update: Update) -> None:
        """A vote drops no more than its budget, and keeps nothing that is gone."""
        if "vote" not in update.payload.bits:
            return
        if update.flip_rate:
            raise WireError("the vote came in a codec that adds flips: use an exact one, such as codec=auto")
        vote, keep = (unpack_bits(b, self.spec.numel) for b in (update.payload.bits["vote"], state.keep))
        if (vote & ~keep).any():
            raise WireError("the vote keeps filters that are pruned already")
        ends = np.cumsum(self.spec.sizes)[:-1]
        budgets = self.lost(state.searched + 1)
        for voted, left, budget in zip(np.split(vote, ends), np.split(keep, ends), budgets, strict=True):
            drops, allowed = int((~voted).sum()), max(budget, int((~left).sum()))
            if drops > allowed:
                raise WireError(f"the vote drops {drops} filters of {voted.size}, allowed {allowed}")

    def aggregate(self, state: MPFLState, updates: Iterable[Update]) -> MPFLState:
        """Count the votes and prune; after the search, average the slim weights."""
        if state.searched >= self.config.search_rounds:
            mean = weighted_mean((u.weight, u.payload.dense["weights"]) for u in updates)
            return state if mean is None else MPFLState(state.keep, state.history, state.searched, mean)
        counter = VoteCounter(self.spec.numel)
        for update in updates:
            counter.add(update.payload.bits["vote"])
        if not counter.masks:
            return state
        votes, done = counter.votes(), state.searched + 1
        history = state.history + votes
        keep = self.consensus(votes, history, counter.masks, unpack_bits(state.keep, self.spec.numel), done)
        return MPFLState(pack_bits(keep), history, done, state.weights)

    def consensus(
        self,
        votes: npt.NDArray[np.uint32],
        history: npt.NDArray[np.uint32],
        voters: int,
        keep: Flags,
        done: int,
    ) -> Flags:
        """Filters that are left (d,) after search ``done``, by the rule."""
        config, sizes = self.config, self.spec.sizes
        if config.rule == "threshold":
            return threshold(votes, voters, keep, sizes, config.keep_min, config.consensus)
        if config.rule == "released":
            return released(votes, voters, keep, sizes, self.lost(done), config.keep_min)
        return quota(votes, history, keep, sizes, self.lost(done))

    # Node

    def begin(self, got: Payload, model: nn.Module, training: Training, turn: Turn, memory: Memory) -> Optimizer:
        """Train the slim network, in a search from the initial weights or the node's own."""
        if self.searching(got) and self.config.rewind == "never" and "weights" in memory:
            keep, then = self.keep(got), unpack_bits(memory["keep"], self.spec.numel)
            if not (keep & ~then).any():  # else it is of another run, and some filters would be empty
                full = scatter(memory["weights"], self.coupling, self.spec, then)
                own = gather(full, self.coupling, self.spec, keep)
                got = Payload(bits=got.bits, dense={"weights": own}, meta=got.meta)
        return super().begin(got, model, training, turn, memory)

    def finish(self, got: Payload, model: nn.Module, optimizer: Optimizer, turn: Turn, memory: Memory) -> Payload:
        """The vote: keep all but the lowest filters; after the search, the weights."""
        weights = self.read(model)
        if not self.searching(got):
            return Payload(dense={"weights": weights})
        keep = self.keep(got)
        if self.config.rewind == "never":
            memory.update(weights=weights, keep=pack_bits(keep))
        scores = self.norms(scatter(weights, self.coupling, self.spec, keep))
        vote = lowest((scores,), keep, self.spec.sizes, self.lost(self.searched(got) + 1))
        return Payload(bits={"vote": pack_bits(vote)})
