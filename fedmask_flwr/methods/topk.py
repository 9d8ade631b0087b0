"""Top-k: only the largest changes travel; a device remembers the others and adds them next time.

Papers: Aji, Heafield, "Sparse Communication for Distributed Gradient Descent", EMNLP 2017, arXiv 1704.05021;
error feedback: Stich, Cordonnier, Jaggi, "Sparsified SGD with Memory", NeurIPS 2018, arXiv 1809.07599.

With a = Delta + residual, the k = ceil(share d) largest |a_i| travel and become 0 in the residual.

Travels: up, where they are (an entropy-coded bit vector) and their values as float32:
share (32 + log2(1 / share) + 1.44) bits a parameter, 0.40 at 1 %. Down, 32 bits a parameter.

Settings: ``share``. The rest as FedAvg.

Limits: d floats of memory on the device; a device that loses them goes on from zeros, and what it had not said
is lost. A reply that never arrives is lost too. With few large steps the network moves late: give it rounds.
"""

from __future__ import annotations

import math
from typing import ClassVar, final

import numpy as np
import numpy.typing as npt
from pydantic import Field
from torch import nn

from fedmask_flwr.masks import MaskSpec
from fedmask_flwr.wire import Payload, WireError, from_positions, popcount, positions

from .base import Fields, Memory, MethodConfig, Turn, Update
from .compressed import Compressed, Floats
from .dense import DenseState


class TopKConfig(MethodConfig):
    """How much travels."""

    share: float = Field(0.01, gt=0.0, le=1.0, description="share of the parameters whose change travels")


@final
class TopK(Compressed):
    """See the module's card."""

    name: ClassVar[str] = "topk"
    Config: ClassVar[type[MethodConfig]] = TopKConfig

    def __init__(
        self, spec: MaskSpec, model: nn.Module, config: MethodConfig | None = None, *, fraction: float = 1.0
    ) -> None:
        super().__init__(spec, model, config, fraction=fraction)
        self.k = math.ceil(self.config.share * self.d)

    def code(self) -> Fields:
        """Positions and values."""
        return {"where": ("bits", self.d), "values": ("dense", self.k)}

    def encode(self, got: Payload, delta: Floats, turn: Turn, memory: Memory) -> Payload:
        """The k largest of Delta and what was never said, as float32."""
        said = (delta + memory.get("residual", 0.0)).astype(np.float32)
        where = largest(np.abs(said), self.k)
        values = said[where]
        said[where] = 0.0
        memory["residual"] = said
        return Payload(bits={"where": from_positions(where, self.d)}, dense={"values": values})

    def decode(self, got: Payload, payload: Payload) -> Floats:
        """The values at their positions, zeros elsewhere."""
        delta = np.zeros(self.d)
        delta[positions(payload.bits["where"], self.d)] = payload.dense["values"]
        return delta

    def check(self, state: DenseState, update: Update) -> None:
        """Refuse another number of positions than k."""
        super().check(state, update)
        if (ones := popcount(update.payload.bits["where"])) != self.k:
            raise WireError(f"{ones} positions for {self.k} values")


def largest(x: npt.NDArray[np.float32], k: int) -> npt.NDArray[np.int64]:
    """Sorted positions of the k largest of (d,) values; of equal ones the first."""
    cut = np.partition(x, x.size - k)[x.size - k]
    above = np.flatnonzero(x > cut)
    equal = np.flatnonzero(x == cut)[: k - above.size]
    return np.sort(np.concatenate([above, equal])).astype(np.int64)
