"""KLMS: send the number of a candidate mask that both ends can draw.

Papers: Isik, Pase, Gunduz, Koyejo, Weissman, Zorzi, "Adaptive Compression in Federated Learning via Side
Information", arXiv 2306.12625 (KLMS); its code of masks is Havasi et al., arXiv 1810.00440. As in "BiCompFL",
arXiv 2502.00206, what all ends know is the global theta itself.

Both ends draw N = 2^b candidates of every block of positions from Bern(theta_g); the client sends which of them is
its sample of Bern(theta_k) (`fedmask_flwr.masks.sampled`). What it costs is the divergence KL(theta_k || theta_g),
which is the square of the change, where DeltaMask's flips cost the change itself.

Travels: up, b bits a block, about KL * b / (b - margin) bits in all and at most 1 bit a parameter; never more than
``target-bpp``, where that is set. Down, as FedPM; with ``downlink = "relay"`` the replies of the others, which are
so short that K of them are less than the counts.

Settings: as FedPM; 2^8 candidates, 2 bits above a block's divergence. Fewer bits than the
divergence asks for (``target-bpp``) shrink the step instead of failing. ``code = "trellis"`` sends a bit a block, a
path through all of them (`fedmask_flwr.masks.trellis`): fewer bits for the same change; not in the papers.

Limits: the client hashes N numbers for each weight that changed, without numba seconds a million. Blocks are
drawn by lot and equally large, which wastes little: a block's divergence hardly differs from another's.
"""

from __future__ import annotations

import math
from abc import ABC
from collections.abc import Iterable, Iterator
from typing import Any, ClassVar, Literal, final

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator
from torch import nn
from torch.optim import Optimizer

from fedmask_flwr.masks import (
    Change,
    Draws,
    MaskSpec,
    derive,
    path_candidates,
    pick,
    replay,
    thresholds,
    trace_path,
)
from fedmask_flwr.wire import Counts, Payload, SideInfo, WireError, pack_bits

from .base import Fields, Memory, Turn, Update
from .beta import BetaState, trained_theta
from .following import FollowedConfig, FollowedMethod
from .rates import FRAME

START = 3.0  # bits that a path pays for its start, whose register holds zeros
PART = 1 << 16  # positions whose theta_k is float64 at a time
REST = 1e-3  # share of the divergence that is left to chance: half the work, nothing of the change


class KlmsConfig(FollowedConfig):
    """FedPM's settings and the size of the code; ``coding`` is the method's own."""

    coding: ClassVar[str] = "blocks"

    index_bits: int = Field(0, ge=0, le=16, description="b, log2 of a block's candidates; 0: 8, with a trellis 10")
    margin: float = Field(
        -1.0, ge=-1.0, description="b / (b - margin) bits are sent for one of divergence; -1: 2, with a trellis 1"
    )
    code: Literal["own", "blocks", "trellis"] = Field(
        "own", description="numbers of blocks, or a path through a trellis; own: klms's blocks, drawstep's trellis"
    )
    target_bpp: float = Field(0.0, ge=0.0, description="uplink bits a parameter; 0: as many as needed")

    @property
    def trellis(self) -> bool:
        """Whether a path is sent, not numbers."""
        return (self.coding if self.code == "own" else self.code) == "trellis"

    @property
    def size(self) -> int:
        """b, log2 of the number of candidates of a block."""
        return self.index_bits or (10 if self.trellis else 8)

    @property
    def spare(self) -> float:
        """Bits of b above a block's divergence."""
        return self.margin if self.margin >= 0.0 else (1.0 if self.trellis else 2.0)

    @model_validator(mode="after")
    def _margin(self) -> KlmsConfig:
        if self.margin == -1.0 and self.spare > self.size - 1:
            raise ValueError(f"index_bits {self.index_bits} needs a margin of its own, 0 to {self.size - 1}")
        if -1.0 < self.margin < 0.0 or self.spare > self.size - 1:
            raise ValueError(f"margin {self.margin:g} does not fit index_bits {self.size}: 0 to {self.size - 1}")
        return self


class Sampling(FollowedMethod, ABC):
    """A method whose clients send the numbers of candidates."""

    Config: ClassVar[type[FollowedConfig]] = KlmsConfig

    def __init__(self, spec: MaskSpec, model: nn.Module, config: Any = None, *, fraction: float = 1.0) -> None:
        super().__init__(spec, model, config, fraction=fraction)
        self._cuts: tuple[Payload | None, NDArray[np.int32]] = (None, np.empty(0, np.int32))

    def up(self, got: Payload, shared: Memory) -> tuple[Fields, ...]:
        """A number a block."""
        return ({"index": ("counts", range(1, self.numel + 1))},)

    def known(self, got: Payload, turn: Turn, shared: Memory) -> SideInfo | None:
        """Nothing that would help to code an index."""
        return None

    def finish(self, got: Payload, model: nn.Module, optimizer: Optimizer, turn: Turn, memory: Memory) -> Payload:
        """The candidates chosen for the trained theta."""
        change = Change.of(self.numel, self._parts(got, trained_theta(optimizer), turn), REST)
        draws = self._draws(turn, self.blocks(change.bits))
        if self.config.trellis:
            return Payload(counts={"index": Counts(trace_path(draws, change), 1)})
        chosen = pick(draws, change, derive(turn.seed, "choose", turn.round, turn.client))
        return Payload(counts={"index": Counts(chosen, draws.size - 1)})

    def _parts(
        self, got: Payload, theta_k: NDArray[np.float32], turn: Turn
    ) -> Iterator[tuple[int, NDArray[np.float64], NDArray[np.float64]]]:
        """First position, theta_g and what is sampled there, in parts that are short whatever d is."""
        for first, theta_g in self._blocks(got, lambda theta: theta):
            for a in range(0, theta_g.size, PART):
                at, g = first + a, theta_g[a : a + PART]
                yield at, g, self.sampled(g, theta_k[at : at + g.size], turn)

    def sampled(
        self, theta_g: NDArray[np.float64], theta_k: NDArray[np.floating[Any]], turn: Turn
    ) -> NDArray[np.float64]:
        """(n,) the probabilities that a client samples, of some positions: as trained."""
        return theta_k.astype(np.float64)

    def blocks(self, bits: float) -> int:
        """Number of blocks for a divergence of so many bits."""
        size, margin, each = int(self.config.size), float(self.config.spare), self.each
        most = self.numel / each
        if self.config.target_bpp > 0.0:
            most = min(most, (self.config.target_bpp * self.numel - 8 * FRAME) / each)
        start = min(START, bits) if self.config.trellis else 0.0
        return max(1, math.floor(min(math.ceil((bits * size / (size - margin) + start) / each), most)))

    @property
    def each(self) -> int:
        """Bits that a block takes in a reply."""
        return 1 if self.config.trellis else int(self.config.size)

    def reconstruct(self, got: Payload, reply: Payload, turn: Turn) -> Payload:
        """The mask that the indices stand for."""
        index = reply.counts["index"]
        if index.top != (1 << self.each) - 1:
            raise WireError(f"indices up to {index.top}, expected {self.each} bits each")
        draws = self._draws(turn, index.values.size)
        kept = self._cuts
        if kept[0] is not got:  # all replies of a round are to the same broadcast, and understood as one
            kept = self._cuts = got, self.of_theta(got, thresholds)
        chosen = path_candidates(index.values, draws.size) if self.config.trellis else index.values
        return Payload(bits={"mask": pack_bits(replay(draws, kept[1], chosen))})

    def aggregate(self, state: BetaState, updates: Iterable[Update]) -> BetaState:
        """As ever, and let go of what the replies were read with."""
        after = super().aggregate(state, updates)
        self._cuts = None, np.empty(0, np.int32)
        return after

    def _draws(self, turn: Turn, blocks: int) -> Draws:
        return Draws(derive(turn.seed, "candidates", turn.round, turn.client), blocks, 1 << self.config.size)


@final
class Klms(Sampling):
    """See the module's card."""

    name: ClassVar[str] = "klms"
