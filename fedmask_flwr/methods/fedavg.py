"""FedAvg: the dense baseline, through the same path and the same frames.

Paper: McMahan, Moore, Ramage, Hampson, Aguera y Arcas, "Communication-Efficient Learning of Deep Networks
from Decentralized Data", AISTATS 2017, arXiv 1602.05629.

Travels: 32 bits a parameter each way (nothing down before round 1: the initial weights are named by a seed).

Settings: Adam 1e-3 or SGD, learning rate by ``learning-rate``; the mean is weighted by examples.

Limits: float sums depend on order in the last bit; the server folds clients in the order of their numbers, so
a run repeats exactly.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import ClassVar, final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, Optimizer

from fedmask_flwr.masks import Key, Mode
from fedmask_flwr.wire import Payload, SideInfo

from .base import Direction, Kind, Method, MethodConfig, Training, Turn, Update

LEARNING_RATE = 1e-3


class FedAvgConfig(MethodConfig):
    """FedAvg has no settings of its own."""


@dataclass(frozen=True, slots=True)
class DenseState:
    """The averaged weights, shape (n,), float32; empty before the first round."""

    weights: npt.NDArray[np.float32]


@final
class FedAvg(Method[DenseState]):
    """See the module's card."""

    name: ClassVar[str] = "fedavg"
    State = DenseState
    Config = FedAvgConfig
    modes: ClassVar[tuple[Mode, ...]] = ("expected",)

    @property
    def numel(self) -> int:
        """n, every float of the model's state dict."""
        return self.floats

    def fields(self, direction: Direction) -> Mapping[str, tuple[Kind, int]]:
        """The weights, either way."""
        return {"weights": ("dense", self.floats)}

    def known(self, got: Payload, turn: Turn) -> SideInfo | None:
        """Nothing."""
        return None

    def init(self) -> DenseState:
        """Nothing learned: clients start from the backbone's own weights."""
        return DenseState(np.zeros(0, np.float32))

    def broadcast(self, state: DenseState, client: int | None = None) -> Payload:
        """The averaged weights."""
        return Payload(dense={"weights": state.weights}) if state.weights.size else Payload()

    def aggregate(self, state: DenseState, updates: Iterable[Update]) -> DenseState:
        """sum_k n_k w_k / sum_k n_k in float64."""
        total, sums = 0.0, np.zeros(self.floats)
        for update in updates:
            sums += update.weight * update.payload.dense["weights"].astype(np.float64)
            total += update.weight
        return DenseState((sums / total).astype(np.float32)) if total else state

    def result(self, state: DenseState) -> Payload:
        """The averaged weights."""
        return self.broadcast(state)

    def install(self, got: Payload, model: nn.Module, frozen: Tensor, mode: Mode, key: Key | None = None) -> None:
        """Write the weights into ``model``; without any, the backbone's own stay."""
        if "weights" in got.dense:
            write_floats(model, got.dense["weights"])

    def begin(self, got: Payload, model: nn.Module, training: Training, turn: Turn) -> Optimizer:
        """Ordinary training from the broadcast weights."""
        if "weights" in got.dense:
            write_floats(model, got.dense["weights"])
        for parameter in model.parameters():
            parameter.requires_grad_(True)
        lr = LEARNING_RATE if training.lr is None else training.lr
        return Adam(model.parameters(), lr) if training.optimizer == "adam" else SGD(model.parameters(), lr)

    def finish(self, got: Payload, model: nn.Module, optimizer: Optimizer, turn: Turn) -> Payload:
        """All floats of the trained model."""
        return Payload(dense={"weights": read_floats(model)})


def float_entries(model: nn.Module) -> list[Tensor]:
    """The floating tensors of the state dict, by name: parameters and statistics."""
    return [tensor for _, tensor in sorted(model.state_dict().items()) if tensor.is_floating_point()]


def read_floats(model: nn.Module) -> npt.NDArray[np.float32]:
    """All floats of ``model`` as one vector, shape (n,)."""
    return torch.cat([t.detach().reshape(-1).float().cpu() for t in float_entries(model)]).numpy()


def write_floats(model: nn.Module, weights: npt.NDArray[np.float32]) -> None:
    """Write a vector of ``read_floats`` back, in place."""
    start = 0
    with torch.no_grad():
        for tensor in float_entries(model):
            part = weights[start : start + tensor.numel()]
            tensor.copy_(torch.from_numpy(part).reshape(tensor.shape))
            start += tensor.numel()
