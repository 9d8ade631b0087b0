"""LG-FedAvg: each device keeps its lower layers, only the upper ones are averaged.

Paper: Liang, Liu, Ziyin, Allen, Auerbach, Brent, Salakhutdinov, Morency, "Think Locally, Act Globally:
Federated Learning with Local and Global Representations", arXiv 2001.01523.

Travels: weight and bias of the last ``shared-layers`` layers, 32 bits each, both ways: 32 * shared / all bits a
parameter (nothing down before round 1).

Settings: ``shared-layers`` 2; training as FedAvg, of both parts at once.

Limits: there is no whole network on the server, so only devices evaluate, and one that has never trained does so
with the initial lower layers. A layer is a module with a ``weight`` of 2 or more dimensions, counted in the order
in which the model registers its modules; norms and their statistics stay on the device. A device that loses its
memory begins again from the initial lower layers.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar, final

from pydantic import Field
from torch import Tensor, nn
from torch.optim import Optimizer

from fedmask_flwr.masks import MaskSpec, Mode
from fedmask_flwr.wire import Payload

from .base import Memory, MethodConfig, Training, Turn, View
from .dense import float_entries, read_tensors, write_tensors
from .fedavg import Averaging, AveragingConfig
from .layers import last_layers, plain


class LgFedAvgConfig(AveragingConfig):
    """How much of the network is everybody's."""

    shared_layers: int = Field(2, ge=1, description="how many of the last layers are averaged")


@final
class LgFedAvg(Averaging):
    """See the module's card."""

    name: ClassVar[str] = "lg-fedavg"
    Config: ClassVar[type[MethodConfig]] = LgFedAvgConfig
    modes: ClassVar[tuple[Mode, ...]] = ()

    def __init__(self, spec: MaskSpec, model: nn.Module, config: Any = None, *, fraction: float = 1.0) -> None:
        config = self.Config() if config is None else config
        self._shared = last_layers(model, config.shared_layers)
        super().__init__(spec, model, config, fraction=fraction)
        self._local_start = read_tensors(self._local(model))

    def travels(self, name: str) -> bool:
        """The upper layers."""
        return plain(name) in self._shared

    def _local(self, model: nn.Module) -> Iterator[Tensor]:
        return (t for name, t in float_entries(model) if not self.travels(name))

    def _write_all(self, got: Payload, model: nn.Module, memory: Memory | None) -> None:
        write_tensors(self._local(model), (memory or {}).get("local", self._local_start))
        self.write(model, self.weights(got))

    def install(self, got: Payload, model: nn.Module, frozen: Tensor, view: View) -> None:
        """Write the device's lower layers and everybody's upper ones."""
        self._write_all(got, model, view.memory)

    def begin(self, got: Payload, model: nn.Module, training: Training, turn: Turn, memory: Memory) -> Optimizer:
        """Ordinary training of both parts together."""
        self._write_all(got, model, memory)
        return self.train_from_here(model, training)

    def finish(self, got: Payload, model: nn.Module, optimizer: Optimizer, turn: Turn, memory: Memory) -> Payload:
        """Keep the lower layers; send the upper ones."""
        memory["local"] = read_tensors(self._local(model))
        return super().finish(got, model, optimizer, turn, memory)
