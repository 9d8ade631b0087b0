"""What the dense baselines share: a vector of weights on the server, ordinary training on the client."""

from __future__ import annotations

from abc import ABC
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fedmask_flwr.masks import MaskSpec, Mode
from fedmask_flwr.masks.lean import SGD, Adam
from fedmask_flwr.wire import Payload

from .base import Fields, Known, Memory, Method, MethodConfig, Training, Turn, View

LEARNING_RATE = 1e-3
Vector = npt.NDArray[np.float32]


S = TypeVar("S")


@dataclass(frozen=True, slots=True)
class DenseState:
    """The server's weights, shape (n,), float32; empty before the first round."""

    weights: Vector


class DenseClient(Method[S], ABC):
    """The client half: ordinary training of n floats, those state-dict entries for which ``travels`` says so.

    ``numel`` stays the number of all floats, so that bits per parameter compare. ``start`` holds the n initial
    weights, which both ends know by their name (a seed or a checkpoint).
    """

    Config: ClassVar[type[MethodConfig]] = MethodConfig
    modes: ClassVar[tuple[Mode, ...]] = ("expected",)

    def __init__(self, spec: MaskSpec, model: nn.Module, config: Any = None, *, fraction: float = 1.0) -> None:
        super().__init__(spec, model, config, fraction=fraction)
        self.start = self.read(model)

    @property
    def numel(self) -> int:
        """Every float of the model's state dict."""
        return self.floats

    def travels(self, name: str) -> bool:
        """Say whether the state-dict entry ``name`` is federated."""
        return True

    def trains(self, name: str) -> bool:
        """Say whether a client trains the parameter ``name``."""
        return True

    def entries(self, model: nn.Module) -> Iterator[Tensor]:
        """The federated tensors, in the order of their names."""
        return (t for name, t in float_entries(model) if self.travels(name))

    def read(self, model: nn.Module) -> Vector:
        """The federated floats of ``model``, (n,)."""
        return read_tensors(self.entries(model))

    def write(self, model: nn.Module, weights: Vector) -> None:
        """Write (n,) floats into ``model``, in place."""
        write_tensors(self.entries(model), weights)

    def down(self, shared: Memory) -> Fields:
        """The weights."""
        return {"weights": ("dense", self.start.size)}

    def up(self, got: Payload, shared: Memory) -> tuple[Fields, ...]:
        """The weights."""
        return ({"weights": ("dense", self.start.size)},)

    def known(self, got: Payload, turn: Turn, shared: Memory) -> Known:
        """Nothing."""
        return None

    def weights(self, got: Payload) -> Vector:
        """What the client was told, or the initial weights."""
        return got.dense.get("weights", self.start)

    def install(self, got: Payload, model: nn.Module, frozen: Tensor, view: View) -> None:
        """Write the weights into ``model``."""
        self.write(model, self.weights(got))

    def begin(self, got: Payload, model: nn.Module, training: Training, turn: Turn, memory: Memory) -> Optimizer:
        """Ordinary training from the broadcast weights."""
        self.write(model, self.weights(got))
        return self.train_from_here(model, training)

    def train_from_here(self, model: nn.Module, training: Training) -> Optimizer:
        """Adam 1e-3 or SGD on the parameters that train; the others are frozen."""
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(self.trains(name))
        trained = [p for p in model.parameters() if p.requires_grad]
        lr = LEARNING_RATE if training.lr is None else training.lr
        return Adam(trained, lr) if training.optimizer == "adam" else SGD(trained, lr)

    def adapt(
        self, got: Payload, model: nn.Module, training: Training, turn: Turn, memory: Memory
    ) -> Optimizer | None:
        """Ordinary training of the installed network."""
        return self.train_from_here(model, training)


class DenseMethod(DenseClient[DenseState], ABC):
    """A method whose server keeps the n weights, and sends them."""

    State = DenseState

    def init(self) -> DenseState:
        """Nothing learned: clients start from the backbone's own weights."""
        return DenseState(np.zeros(0, np.float32))

    def current(self, state: DenseState) -> Vector:
        """The server's weights, (n,)."""
        return state.weights if state.weights.size else self.start

    def broadcast(self, state: DenseState, client: int | None = None) -> Payload:
        """The weights; nothing before the first round."""
        return Payload(dense={"weights": state.weights}) if state.weights.size else Payload()

    def result(self, state: DenseState) -> Payload:
        """The weights."""
        return Payload(dense={"weights": self.current(state)})


def hold_zeros(model: nn.Module, spec: MaskSpec, active: Tensor) -> None:
    """Let no gradient through to covered weights that are not ``active``, (spec.weights,) bool: they stay 0."""
    for parameter, flags in zip(spec.params(model), spec.split_weights(active.float()).values(), strict=True):
        parameter.register_hook(flags.mul)  # type: ignore[no-untyped-call]


def float_entries(model: nn.Module) -> list[tuple[str, Tensor]]:
    """The floating tensors of the state dict, by name: parameters and statistics."""
    return [(name, tensor) for name, tensor in sorted(model.state_dict().items()) if tensor.is_floating_point()]


def read_tensors(tensors: Iterator[Tensor]) -> Vector:
    """All values as one float32 vector, shape (n,)."""
    return torch.cat([torch.zeros(0), *(t.detach().reshape(-1).float().cpu() for t in tensors)]).numpy()


def write_tensors(tensors: Iterator[Tensor], values: Vector) -> None:
    """Write a vector of ``read_tensors`` back, in place."""
    start = 0
    with torch.no_grad():
        for tensor in tensors:
            part = values[start : start + tensor.numel()]
            tensor.copy_(torch.from_numpy(part).reshape(tensor.shape))
            start += tensor.numel()
