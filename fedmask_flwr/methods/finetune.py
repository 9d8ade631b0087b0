"""Full fine-tuning: FedAvg of the layers that a mask would cover, with their biases and norms.

The dense counterpart of a mask over a part of a pretrained network: same ``include`` and ``exclude``, same
frozen rest. FedAvg's paper: see ``fedavg``.

Travels: the selected weights and the vectors that belong to them, 32 bits each, both ways: 32 * selected / all
bits a parameter (nothing down before round 1).

Settings: as FedAvg. With the default patterns everything is selected, and this *is* FedAvg, bit for bit.

Limits: what belongs to a selection is found by position in the model. A bias goes with the weight in its own
module. Another vector (a norm's) goes with the weights of its parent module: if all of those are selected it
trains, if none it stays frozen, and if only some (a flat ``Sequential``) it goes with the weight before it. In a
partial selection BatchNorm's stored statistics stay frozen everywhere, as they do under a mask.
"""

from __future__ import annotations

from typing import ClassVar, final

from torch import nn
from torch.optim import Optimizer

from fedmask_flwr.masks import MaskSpec, freeze

from .base import MethodConfig, Training
from .fedavg import Averaging
from .layers import names_of, plain


@final
class FineTune(Averaging):
    """See the module's card."""

    name: ClassVar[str] = "finetune"

    def __init__(
        self, spec: MaskSpec, model: nn.Module, config: MethodConfig | None = None, *, fraction: float = 1.0
    ) -> None:
        self._names = None if spec.names == MaskSpec.of(model).names else selection(spec, model)
        super().__init__(spec, model, config, fraction=fraction)

    def travels(self, name: str) -> bool:
        """The selected parameters, or every float."""
        return self._names is None or plain(name) in self._names

    def trains(self, name: str) -> bool:
        """The selected parameters."""
        return self.travels(name)

    def train_from_here(self, model: nn.Module, training: Training) -> Optimizer:
        """Ordinary training of the selected parameters."""
        if self._names is not None:
            freeze(model)
        return super().train_from_here(model, training)


def selection(spec: MaskSpec, model: nn.Module) -> frozenset[str]:
    """Names of the parameters of ``spec`` and of the vectors that belong to them."""
    taken, weights = set(spec.names), MaskSpec.of(model).names
    chosen, before = [], ""
    for name, p in model.named_parameters():
        own = plain(name)
        if own in weights:
            before = own
            belongs = own in taken
        else:
            belongs = _belongs(own, before, taken, weights)
        if belongs:
            chosen.append(p)
    return names_of(model, chosen)


def _belongs(vector: str, before: str, taken: set[str], weights: tuple[str, ...]) -> bool:
    """Say whether a vector goes with the taken weights; ``before`` is the last weight before it, or ""."""
    module = vector.rpartition(".")[0]
    for scope in (module, module.rpartition(".")[0]):
        inside = [name in taken for name in weights if not scope or name.startswith(f"{scope}.")]
        if inside:
            return inside[0] if len(set(inside)) == 1 else before in taken
    return before in taken
