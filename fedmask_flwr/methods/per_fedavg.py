"""Per-FedAvg: the server learns a network that is good after one step of adaptation on a device.

Paper: Fallah, Mokhtari, Ozdaglar, "Personalized Federated Learning with Theoretical Guarantees: A Model-Agnostic
Meta-Learning Approach", NeurIPS 2020, arXiv 2002.07948; its first-order variant.

Travels: 32 bits a parameter each way (nothing down before round 1).

Settings: alpha is ``inner-lr`` (0.003), beta the run's learning rate (1e-3). A training step is a pair of batches:
the gradient that moves w is taken at w - alpha * g, g on the batch before. With SGD the move is the paper's
w - beta * g'; with Adam, the run's default, g' goes through Adam. Before a device evaluates it takes plain SGD
steps of alpha over its own data, for ``adapt-epochs`` (1).

Limits: an odd batch at the end of a round is dropped, so a device with one batch a round learns nothing. The
Hessian term is left out. The server evaluates the network that nobody has adapted.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, final, overload

import torch
from pydantic import Field
from torch import nn
from torch.optim import Optimizer

from fedmask_flwr.wire import Payload

from .base import Memory, MethodConfig, Training, Turn
from .fedavg import Averaging, AveragingConfig


class PerFedAvgConfig(AveragingConfig):
    """The step of adaptation."""

    inner_lr: float = Field(0.003, gt=0.0, description="alpha, the step size of the adaptation, by plain SGD")


@final
class PerFedAvg(Averaging):
    """See the module's card."""

    name: ClassVar[str] = "per-fedavg"
    Config: ClassVar[type[MethodConfig]] = PerFedAvgConfig
    adapt_epochs: ClassVar[int] = 1
    config: Any

    def begin(self, got: Payload, model: nn.Module, training: Training, turn: Turn, memory: Memory) -> Optimizer:
        """Pairs of batches from the broadcast weights."""
        self.write(model, self.weights(got))
        return PairedSteps(self.train_from_here(model, training), self.config.inner_lr)

    def finish(self, got: Payload, model: nn.Module, optimizer: Optimizer, turn: Turn, memory: Memory) -> Payload:
        """The weights after the last whole pair."""
        if not isinstance(optimizer, PairedSteps):
            raise TypeError(f"train with the optimiser that the turn handed out, not {type(optimizer).__name__}")
        optimizer.settle()
        return super().finish(got, model, optimizer, turn, memory)

    def adapt(self, got: Payload, model: nn.Module, training: Training, turn: Turn, memory: Memory) -> Optimizer:
        """Plain SGD with alpha; the run's learning rate is beta, so it does not count here."""
        return self.train_from_here(model, Training("sgd", self.config.inner_lr))


@final
class PairedSteps(Optimizer):
    """First-order MAML around ``outer``: its every move takes two calls of ``step``, on two batches.

    The first takes p - alpha * grad; the second goes back to p and moves it by ``outer`` with the gradient that
    was found at the adapted point.
    """

    def __init__(self, outer: Optimizer, alpha: float) -> None:
        super().__init__(outer.param_groups, {})
        self.param_groups = outer.param_groups  # the same, so that a scheduler of the user's loop reaches it
        self._outer, self._alpha = outer, alpha
        self._before: list[torch.Tensor] = []

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Adapt (calls 1, 3, ...), or go back and move (calls 2, 4, ...)."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self._before:
            self.settle()
            self._outer.step()
            return loss
        parameters = self._parameters()
        self._before = [p.clone() for p in parameters]
        for p in parameters:
            if p.grad is not None:
                p.sub_(p.grad, alpha=self._alpha)
        return loss

    @torch.no_grad()
    def settle(self) -> None:
        """Undo the adaptation of a pair that is not complete."""
        for p, before in zip(self._parameters(), self._before, strict=bool(self._before)):
            p.copy_(before)
        self._before = []

    def _parameters(self) -> list[torch.Tensor]:
        return [p for group in self.param_groups for p in group["params"]]
