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
from typing import Any, ClassVar, Literal, final

import numpy as np
from numpy.typing import NDArray
from pydantic import Field
from torch import nn
from torch.optim import Optimizer

from fedmask_flwr.masks import (
    Draws,
    MaskSpec,
    derive,
    divergence,
    path_candidates,
    pick,
    replay,
    thresholds,
    trace_path,
)
from fedmask_flwr.wire import Counts, Payload, SideInfo, WireError, pack_bits

from .base import Fields, Memory, Turn
from .beta import trained_theta
from .following import FollowedConfig, FollowedMethod
from .rates import FRAME

START = 3.0  # bits that a path pays for its start, whose register holds zeros
REST = 1e-3  # share of the divergence that is left to chance: half the work, nothing of the change


class KlmsConfig(FollowedConfig):
    """FedPM's settings and the size of the code."""

    index_bits: int = Field(8, ge=1, le=16, description="b, log2 of the number of candidates of a block")
    margin: float = Field(2.0, ge=0.0, description="bits of an index above its block's divergence")
    code: Literal["blocks", "trellis"] = Field("blocks", description="blocks with numbers of their own, or a path")
    target_bpp: float = Field(0.0, ge=0.0, description="uplink bits a parameter; 0: as many as needed")


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
        theta_g = self.theta(got)
        theta_k = self.sampled(theta_g, trained_theta(optimizer), turn)
        draws = self._draws(turn, self.blocks(float(divergence(theta_k, theta_g).sum())))
        if self.config.code == "trellis":
            return Payload(counts={"index": Counts(trace_path(draws, theta_g, theta_k, REST), 1)})
        chosen = pick(draws, theta_g, theta_k, derive(turn.seed, "choose", turn.round, turn.client), REST)
        return Payload(counts={"index": Counts(chosen, draws.size - 1)})

    def sampled(
        self, theta_g: NDArray[np.float64], theta_k: NDArray[np.floating[Any]], turn: Turn
    ) -> NDArray[np.float64]:
        """(d,) the probabilities that a client samples: as trained."""
        return theta_k.astype(np.float64)

    def blocks(self, bits: float) -> int:
        """Number of blocks for a divergence of so many bits."""
        size, margin, each = int(self.config.index_bits), float(self.config.margin), self.each
        most = self.numel / each
        if self.config.target_bpp > 0.0:
            most = min(most, (self.config.target_bpp * self.numel - 8 * FRAME) / each)
        start = min(START, bits) if self.config.code == "trellis" else 0.0
        return max(1, math.floor(min(math.ceil((bits * size / max(size - margin, 0.5) + start) / each), most)))

    @property
    def each(self) -> int:
        """Bits that a block takes in a reply."""
        return 1 if self.config.code == "trellis" else int(self.config.index_bits)

    def reconstruct(self, got: Payload, reply: Payload, turn: Turn) -> Payload:
        """The mask that the indices stand for."""
        index = reply.counts["index"]
        if index.top != (1 << self.each) - 1:
            raise WireError(f"indices up to {index.top}, expected {self.each} bits each")
        draws = self._draws(turn, index.values.size)
        kept = self._cuts
        if kept[0] is not got:  # all replies of a round are to the same broadcast
            kept = self._cuts = got, self.of_theta(got, thresholds)
        chosen = path_candidates(index.values, draws.size) if self.config.code == "trellis" else index.values
        return Payload(bits={"mask": pack_bits(replay(draws, kept[1], chosen))})

    def _draws(self, turn: Turn, blocks: int) -> Draws:
        return Draws(derive(turn.seed, "candidates", turn.round, turn.client), blocks, 1 << self.config.index_bits)


@final
class Klms(Sampling):
    """See the module's card."""

    name: ClassVar[str] = "klms"
