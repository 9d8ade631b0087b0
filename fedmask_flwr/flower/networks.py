"""The networks that a state stands for, read from the arrays that a strategy hands out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from flwr.app import ArrayRecord
from torch import Tensor, nn

from fedmask_flwr.masks import Mode, derive, initialise
from fedmask_flwr.methods import Method, View
from fedmask_flwr.plan import AS_BUILT, Plan
from fedmask_flwr.wire import Frame, Payload

from .records import frame_of, read_broadcast

Heard = tuple[int, Payload]
"""A round and what it broadcast."""


@dataclass(frozen=True)
class Networks:
    """What it takes to build them: method, plan, the model's digest and its frozen weights (spec.weights,)."""

    method: Method[Any]
    plan: Plan
    digest: bytes
    frozen: Tensor

    def read(self, arrays: ArrayRecord) -> Heard:
        """Decode ``arrays`` once, to `install` several networks from.

        Raises
        ------
        ValueError
            The method has no network on the server.
        WireError
            The arrays are of another model, or damaged.
        """
        if not self.method.modes:
            raise ValueError(
                f"method {self.plan.method} has no network that the server could evaluate: let devices do it, with "
                "fraction_evaluate above 0"
            )
        frame = frame_of(arrays)
        got = read_broadcast(frame, self.method, {}, digest=self.digest, round_=None)
        return Frame.parse(frame).round_, got

    def install(self, heard: Heard, model: nn.Module, mode: Mode = "threshold", sample: int = 0) -> nn.Module:
        """Write a network of what was `read` into ``model`` (the method's first mode if it lacks this one)."""
        server_round, got = heard
        mode = mode if mode in self.method.modes else self.method.modes[0]
        if self.plan.weights != AS_BUILT:
            initialise(model, self.plan.weights)
        key = derive(self.plan.seed, "evaluate", server_round, "server", sample)
        self.method.install(got, model, self.frozen.to(next(model.parameters()).device), View(mode, key))
        return model
