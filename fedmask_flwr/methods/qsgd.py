"""QSGD: each change is rounded at random to one of a few levels of its bucket's norm, without bias.

Paper: Alistarh, Grubic, Li, Tomioka, Vojnovic, "QSGD: Communication-Efficient SGD via Gradient Quantization and
Encoding", NeurIPS 2017, arXiv 1610.02132.

With x a bucket of Delta and s levels, l = floor(s |x_i| / ||x||_2 + u), u uniform in [0, 1): the server reads
||x||_2 sign(x_i) l / s, whose mean is x_i. Integers sign l + s in 0..2s are entropy-coded tensor by tensor
instead of the paper's Elias code.

Travels: up, at most log2(2s + 1) bits a parameter and 32 bits a bucket: below 3.8 with the defaults, about 1 as
most levels are 0. Down, 32 bits a parameter.

Settings: ``levels`` s; ``bucket``, the values that share a norm, never across tensors (0: a whole tensor). The
rest as FedAvg.

Limits: the variance is min(b / s^2, sqrt(b) / s) ||x||^2 for buckets of b values: with whole large tensors the
noise drowns the update.
"""

from __future__ import annotations

from typing import ClassVar, final

import numpy as np
from pydantic import Field
from torch import nn

from fedmask_flwr.masks import MaskSpec, derive
from fedmask_flwr.wire import Counts, Payload, WireError

from .base import Fields, Memory, MethodConfig, Turn, Update
from .compressed import Compressed, Floats, uniforms
from .dense import DenseState


class QSGDConfig(MethodConfig):
    """How coarse."""

    levels: int = Field(6, ge=1, le=1000, description="s, steps from 0 to the norm of a bucket")
    bucket: int = Field(512, ge=0, description="values that share a norm; 0: a tensor each")


@final
class QSGD(Compressed):
    """See the module's card."""

    name: ClassVar[str] = "qsgd"
    Config: ClassVar[type[MethodConfig]] = QSGDConfig

    def __init__(
        self, spec: MaskSpec, model: nn.Module, config: MethodConfig | None = None, *, fraction: float = 1.0
    ) -> None:
        super().__init__(spec, model, config, fraction=fraction)
        self.buckets = np.array([b for size in self.sizes for b in split(size, self.config.bucket)], np.int64)

    def code(self) -> Fields:
        """Levels of the values, norms of the buckets."""
        return {"levels": ("counts", self.d), "norms": ("dense", self.buckets.size)}

    def encode(self, got: Payload, delta: Floats, turn: Turn, memory: Memory) -> Payload:
        """Round at random, keyed by the turn."""
        s = self.config.levels
        norms = np.sqrt(np.add.reduceat(delta**2, np.cumsum(self.buckets) - self.buckets)).astype(np.float32)
        unit = np.repeat(np.where(norms > 0, norms, 1.0).astype(np.float64), self.buckets)
        u = uniforms(derive(turn.seed, "qsgd", turn.round, turn.client), self.d)
        level = np.minimum(np.floor(s * np.abs(delta) / unit + u), s)
        values = (np.sign(delta) * level + s).astype(np.uint32)
        return Payload(counts={"levels": Counts(values, 2 * s)}, dense={"norms": norms})

    def decode(self, got: Payload, payload: Payload) -> Floats:
        """||x|| sign l / s."""
        norms = np.repeat(payload.dense["norms"].astype(np.float64), self.buckets)
        s: int = self.config.levels
        return norms * (payload.counts["levels"].values.astype(np.float64) - s) / s

    def check(self, state: DenseState, update: Update) -> None:
        """Refuse another number of levels, and norms below 0."""
        super().check(state, update)
        top, norms = update.payload.counts["levels"].top, update.payload.dense["norms"]
        if top != 2 * self.config.levels or (norms < 0).any():
            raise WireError(f"levels 0..{top} and a norm of {norms.min()}: expected 0..{2 * self.config.levels}")


def split(size: int, bucket: int) -> list[int]:
    """Lengths of the buckets of a tensor: ``bucket`` each and the rest."""
    bucket = bucket or size
    return [min(bucket, size - start) for start in range(0, size, bucket)] if size else []
