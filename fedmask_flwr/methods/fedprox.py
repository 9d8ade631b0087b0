"""FedProx: FedAvg whose clients are held near the weights that they were sent.

Paper: Li, Sahu, Zaheer, Sanjabi, Talwalkar, Smith, "Federated Optimization in Heterogeneous Networks", MLSys 2020,
arXiv 1812.06127. A client minimises h(w) = F(w) + mu/2 ||w - w_t||^2, w_t the broadcast weights.

Travels: 32 bits a parameter each way (nothing down before round 1).

Settings: ``mu`` 0.01; 0 is FedAvg, bit for bit. The paper tries 0.001 to 1. The optimiser adds the term's gradient,
mu (w - w_t), as it steps, so the training loop stays plain and the loss that it sees is F.

Limits: a loop that clips gradients clips those of F alone. With Adam the term goes through Adam's scaling. The
paper's stragglers, which send what part of their epochs they got done, are not simulated: epochs are the run's.
BatchNorm's statistics are averaged and are not in the term.
"""

from __future__ import annotations

from typing import Any, ClassVar, final

import torch
from pydantic import Field
from torch import nn
from torch.optim import Optimizer

from fedmask_flwr.wire import Payload

from .base import Memory, MethodConfig, Training, Turn
from .fedavg import Averaging, AveragingConfig


class FedProxConfig(AveragingConfig):
    """How firmly clients are held."""

    mu: float = Field(0.01, ge=0.0, allow_inf_nan=False, description="weight of the proximal term; 0: FedAvg")


@final
class FedProx(Averaging):
    """See the module's card."""

    name: ClassVar[str] = "fedprox"
    Config: ClassVar[type[MethodConfig]] = FedProxConfig
    config: Any

    def begin(self, got: Payload, model: nn.Module, training: Training, turn: Turn, memory: Memory) -> Optimizer:
        """Ordinary training from the broadcast weights, and towards them."""
        optimizer = super().begin(got, model, training, turn, memory)
        if self.config.mu:
            hold(optimizer, self.config.mu)
        return optimizer


def hold(optimizer: Optimizer, mu: float) -> None:
    """Add the gradient of mu/2 ||w - w_t||^2 in every step; w_t are the weights as they are now.

    A parameter that has no gradient in a step is one that the optimiser leaves alone, and so is left out.
    """
    pairs = [(p, p.detach().clone()) for group in optimizer.param_groups for p in group["params"]]

    @torch.no_grad()
    def pull() -> None:
        for p, start in pairs:
            if p.grad is not None:
                p.grad.add_(p - start, alpha=mu)

    def before(own: Optimizer, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)  # args[0] is the optimiser
        if closure is None:
            pull()
            return None

        def closed() -> Any:  # a closure makes its gradients inside the step
            loss = closure()
            pull()
            return loss

        return args[:1], {**kwargs, "closure": closed}

    optimizer.register_step_pre_hook(before)
