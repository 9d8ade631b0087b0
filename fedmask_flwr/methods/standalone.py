"""Standalone: every device trains alone, from the same named weights; the floor under all personal methods.

Travels: nothing but an empty frame each way.

Settings: as FedAvg.

Limits: there is no network on the server; only devices evaluate. Their weights live in their own memory.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar, final

from torch import Tensor, nn
from torch.optim import Optimizer

from fedmask_flwr.masks import Mode
from fedmask_flwr.wire import Payload

from .base import Fields, Memory, Training, Turn, Update, View
from .dense import DenseMethod, DenseState


@final
class Standalone(DenseMethod):
    """See the module's card."""

    name: ClassVar[str] = "standalone"
    modes: ClassVar[tuple[Mode, ...]] = ()

    def down(self, shared: Memory) -> Fields:
        """Nothing."""
        return {}

    def up(self, got: Payload, shared: Memory) -> tuple[Fields, ...]:
        """Nothing."""
        return ({},)

    def aggregate(self, state: DenseState, updates: Iterable[Update]) -> DenseState:
        """Nothing is learned here."""
        for _ in updates:
            pass
        return state

    def install(self, got: Payload, model: nn.Module, frozen: Tensor, view: View) -> None:
        """Write the device's own weights."""
        self.write(model, (view.memory or {}).get("weights", self.start))

    def begin(self, got: Payload, model: nn.Module, training: Training, turn: Turn, memory: Memory) -> Optimizer:
        """Go on from the device's own weights."""
        self.write(model, memory.get("weights", self.start))
        return self.train_from_here(model, training)

    def finish(self, got: Payload, model: nn.Module, optimizer: Optimizer, turn: Turn, memory: Memory) -> Payload:
        """Keep the weights; say nothing."""
        memory["weights"] = self.read(model)
        return Payload()
