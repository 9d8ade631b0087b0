"""SignSGD with majority vote: a bit a parameter says which way it wants to move, and the majority decides.

Papers: Bernstein, Wang, Azizzadenesheli, Anandkumar, "signSGD: Compressed Optimisation for Non-Convex Problems",
ICML 2018, arXiv 1802.04434; Bernstein, Zhao, Azizzadenesheli, Anandkumar, "signSGD with Majority Vote is
Communication Efficient and Fault Tolerant", ICLR 2019, arXiv 1810.05291.

The papers send the sign of a gradient each step; here, as in federated learning, of Delta after local training.
The server moves each parameter by ``server-lr`` in the direction of sum_k sign(Delta_k); a tie moves nothing.

Travels: up, 1 bit a parameter; down, 32.

Settings: ``server-lr``: a weight moves by that much in each round, whatever the clients' own learning rate. 0.003
learned most in 20 rounds on the digits (0.001 is too slow, 0.03 never settles); smaller for longer runs. The rest
as FedAvg.

Limits: one client, one vote, whatever its examples. The size of a change is lost, so the network never settles
closer than ``server-lr``. A change of exactly 0 votes by a keyed coin, as a bit has no third value.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar, final

import numpy as np
from pydantic import Field

from fedmask_flwr.aggregate import VoteCounter
from fedmask_flwr.masks import derive, words
from fedmask_flwr.wire import Payload, pack_bits, unpack_bits

from .base import Fields, Memory, MethodConfig, Turn, Update
from .compressed import Compressed, Floats
from .dense import DenseState


class SignConfig(MethodConfig):
    """How far the server goes."""

    server_lr: float = Field(0.003, gt=0.0, description="step of every parameter in a round")


@final
class SignSGD(Compressed):
    """See the module's card."""

    name: ClassVar[str] = "signsgd"
    Config: ClassVar[type[MethodConfig]] = SignConfig

    def code(self) -> Fields:
        """Signs: 1 is up."""
        return {"signs": ("bits", self.d)}

    def encode(self, got: Payload, delta: Floats, turn: Turn, memory: Memory) -> Payload:
        """1[Delta > 0]; a keyed coin where Delta is 0."""
        coin = words(derive(turn.seed, "signsgd", turn.round, turn.client), self.d) < 0
        return Payload(bits={"signs": pack_bits((delta > 0.0) | ((delta == 0.0) & coin))})

    def decode(self, got: Payload, payload: Payload) -> Floats:
        """+1 and -1."""
        return np.where(unpack_bits(payload.bits["signs"], self.d), 1.0, -1.0)

    def aggregate(self, state: DenseState, updates: Iterable[Update]) -> DenseState:
        """w + server_lr sign(sum_k sign(Delta_k)); the statistics' mean is weighted by examples."""
        votes, total, statistics = VoteCounter(self.d), 0.0, np.zeros(self.start.size - self.d)
        for update in updates:
            votes.add(update.payload.bits["signs"])
            if statistics.size:
                statistics += update.weight * update.payload.dense["statistics"].astype(np.float64)
            total += update.weight
            del update  # before the next one is decoded
        if votes.masks == 0:
            return state
        majority = np.sign(2 * votes.votes().astype(np.int64) - votes.masks)
        return self.moved(state, self.config.server_lr * majority, statistics / total)
