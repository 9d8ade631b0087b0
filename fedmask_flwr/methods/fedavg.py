"""FedAvg: the dense baseline, through the same path and the same frames.

Paper: McMahan, Moore, Ramage, Hampson, Aguera y Arcas, "Communication-Efficient Learning of Deep Networks
from Decentralized Data", AISTATS 2017, arXiv 1602.05629.

Travels: 32 bits a parameter each way, 16 with ``weights-codec = "float16"`` (nothing down before round 1: the
initial weights are named by a seed).

Settings: Adam 1e-3 or SGD, learning rate by ``learning-rate``; the mean is weighted by examples.

Limits: float sums depend on order in the last bit; the server folds clients in the order of their numbers, so
a run repeats exactly.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar, Literal, final

import numpy as np
from pydantic import Field
from torch import nn
from torch.optim import Optimizer

from fedmask_flwr.masks import MaskSpec
from fedmask_flwr.wire import Payload, WireError

from .base import Memory, MethodConfig, Turn, Update
from .dense import DenseMethod, DenseState, Vector

LARGEST = float(np.finfo(np.float16).max)


class AveragingConfig(MethodConfig):
    """How weights travel."""

    weights_codec: Literal["float32", "float32+zstd", "float16", "float16+zstd"] = Field(
        "float32", description="both ways; float16 rounds to 11 bits of mantissa and refuses beyond 65504"
    )


class Averaging(DenseMethod):
    """Clients send weights, the server takes their mean: what FedAvg's relatives share."""

    Config: ClassVar[type[MethodConfig]] = AveragingConfig

    def __init__(self, spec: MaskSpec, model: nn.Module, config: Any = None, *, fraction: float = 1.0) -> None:
        super().__init__(spec, model, config, fraction=fraction)
        self.codecs = {**self.codecs, "dense": self.config.weights_codec}

    def check(self, state: DenseState, update: Update) -> None:
        """Refuse weights that the run's codec cannot hold, whatever codec they came in: the mean must travel."""
        if self.config.weights_codec.startswith("float16"):
            top = float(np.abs(update.payload.dense["weights"]).max(initial=0.0))
            if top > LARGEST:
                raise WireError(
                    f"a weight of {top:g} is beyond {LARGEST:g}, the largest of {self.config.weights_codec}"
                )

    def aggregate(self, state: DenseState, updates: Iterable[Update]) -> DenseState:
        """sum_k n_k w_k / sum_k n_k in float64."""
        mean = weighted_mean((u.weight, u.payload.dense["weights"]) for u in updates)
        return state if mean is None else DenseState(mean)

    def finish(self, got: Payload, model: nn.Module, optimizer: Optimizer, turn: Turn, memory: Memory) -> Payload:
        """The federated weights of the trained model."""
        return Payload(dense={"weights": self.read(model)})


@final
class FedAvg(Averaging):
    """See the module's card."""

    name: ClassVar[str] = "fedavg"


def weighted_mean(pairs: Iterable[tuple[float, Vector]]) -> Vector | None:
    """sum_k n_k x_k / sum_k n_k in float64, one vector at a time; None of nothing."""
    total, sums = 0.0, None
    for weight, values in pairs:
        if sums is None:
            sums = np.zeros(values.size)
        sums += weight * values.astype(np.float64)
        total += weight
    return None if sums is None else (sums / total).astype(np.float32)
