"""Linear probe: only the head trains and travels, the backbone stays as it was named.

The usual floor for pretrained backbones; it has no paper of its own.

Travels: weight and bias of the last layer, 32 bits each, both ways: 32 * head / all bits a parameter (nothing
down before round 1).

Settings: as FedAvg; ``include`` and ``exclude`` are not used.

Limits: as good as the backbone's features: on a seeded one those of a random network. The head is the last
module with a ``weight`` of 2 or more dimensions, in the order in which the model registers its modules. Frozen
norm layers that store statistics use them and never update them, in training too.
"""

from __future__ import annotations

from typing import ClassVar, final

from torch import nn
from torch.optim import Optimizer

from fedmask_flwr.masks import MaskSpec, freeze

from .base import MethodConfig, Training
from .fedavg import Averaging
from .layers import last_layers, plain


@final
class LinearProbe(Averaging):
    """See the module's card."""

    name: ClassVar[str] = "linear-probe"

    def __init__(
        self, spec: MaskSpec, model: nn.Module, config: MethodConfig | None = None, *, fraction: float = 1.0
    ) -> None:
        self._head = last_layers(model, 1)
        super().__init__(spec, model, config, fraction=fraction)

    def travels(self, name: str) -> bool:
        """The head."""
        return plain(name) in self._head

    def trains(self, name: str) -> bool:
        """The head."""
        return self.travels(name)

    def train_from_here(self, model: nn.Module, training: Training) -> Optimizer:
        """Ordinary training of the head over a frozen backbone."""
        freeze(model)
        return super().train_from_here(model, training)
