"""What structured methods share: a network that loses whole filters, and is trained at the size that is left."""

from __future__ import annotations

from abc import ABC
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
from pydantic import Field
from torch import Tensor, nn
from torch.optim import Optimizer

from fedmask_flwr.aggregate import cubic, targets
from fedmask_flwr.masks import (
    Coupling,
    MaskSpec,
    couple,
    gather,
    scatter,
    slim_,
    slim_numel,
)
from fedmask_flwr.wire import Payload, SideInfo, WireError, pack_bits, unpack_bits

from .base import Fields, Memory, MethodConfig, Training, Turn, View
from .dense import DenseClient, S, Vector

Flags = npt.NDArray[np.bool_]


class SlimmingConfig(MethodConfig):
    """How much goes, and how fast."""

    prune_to: float = Field(0.5, gt=0.0, lt=1.0, description="share of the filters that are gone in the end")
    search_rounds: int = Field(8, ge=1, description="rounds over which they go, on a cubic schedule")
    keep_min: int = Field(8, ge=1, description="filters of a layer (or coupled layers) that always stay")


class Slimming(DenseClient[S], ABC):
    """Bits are filters (coupled layers share them); what is broadcast is the filters that are left, and weights.

    ``start`` holds all floats of the full network; dense fields hold the floats of the slim one.
    """

    Config: ClassVar[type[MethodConfig]] = SlimmingConfig

    def __init__(self, spec: MaskSpec, model: nn.Module, config: Any = None, *, fraction: float = 1.0) -> None:
        super().__init__(spec, model, config, fraction=fraction)
        self.coupling: Coupling = couple(model)
        if not any(self.lost(self.config.search_rounds)):
            raise ValueError(
                f"nothing would be pruned: layers have {', '.join(map(str, spec.sizes))} filters, and keep-min "
                f"{self.config.keep_min} always stay; lower keep-min or raise prune-to"
            )

    @classmethod
    def layout(cls, model: nn.Module, include: Sequence[str] = ("*",), exclude: Sequence[str] = ()) -> MaskSpec:
        """A bit a filter; coupled layers share theirs, the network's outputs have none.

        Raises
        ------
        ValueError
            When no filter of the network can go, or the patterns leave none.
        """
        coupling = couple(model)
        if not any(e.unit is not None and coupling.prunable[e.unit] for e in coupling.entries):
            raise ValueError(
                "no filter of this network can be pruned: each belongs to the outputs or enters an operation that "
                "is not understood; use another method, such as lth"
            )
        return coupling.spec(include, exclude)

    def down(self, shared: Memory) -> Fields:
        """The filters that are left, and the weights of a network of that size."""
        return {"keep": ("bits", self.spec.numel), "weights": ("dense", range(1, self.floats + 1))}

    def heard(self, shared: Memory) -> SideInfo:
        """The units of the mask; most filters are left, so what is coded is which are gone."""
        return SideInfo(self.spec.sizes, pack_bits(np.ones(self.spec.numel, np.bool_)))

    def keep(self, got: Payload) -> Flags:
        """The filters that are left, (d,): all of them before the first broadcast.

        Raises
        ------
        WireError
            When a unit has none.
        """
        if "keep" not in got.bits:
            return np.ones(self.spec.numel, np.bool_)
        flags = unpack_bits(got.bits["keep"], self.spec.numel)
        if not all(part.any() for part in np.split(flags, np.cumsum(self.spec.sizes)[:-1])):
            raise WireError("the broadcast leaves a layer without filters")
        return flags

    def slim_start(self, keep: Flags) -> Vector:
        """The initial weights of the network of that size."""
        return gather(self.start, self.coupling, self.spec, keep)

    def weights(self, got: Payload) -> Vector:
        """The slim network's weights: the broadcast ones, or the initial ones.

        Raises
        ------
        WireError
            When they are not of the size that the filters say.
        """
        keep = self.keep(got)
        if "weights" not in got.dense:
            return self.slim_start(keep)
        weights = got.dense["weights"]
        if weights.size != (n := self.slim_numel(keep)):
            raise WireError(f"{weights.size} weights for a slim network of {n}")
        return weights

    def slim_numel(self, keep: Flags) -> int:
        """Floats of the slim network."""
        return slim_numel(self.coupling, self.spec, keep)

    def norms(self, full: Vector) -> npt.NDArray[np.float64]:
        """L2 norm of each filter (d,) of a full network given as its floats (n,): as ``filter_scores``."""
        unit_of = dict(zip(self.spec.names, self.spec.units, strict=True))
        squares, at = [np.zeros(size) for size in self.spec.sizes], 0
        for entry in sorted(self.coupling.entries, key=lambda e: e.name):
            if entry.name in unit_of:
                rows = full[at : at + entry.numel].reshape(entry.shape[0], -1).astype(np.float64)
                squares[unit_of[entry.name]] += (rows**2).sum(1)
            at += entry.numel
        return np.sqrt(np.concatenate(squares))

    def lost(self, done: int) -> list[int]:
        """Channels that each unit has lost after ``done`` searches."""
        config = self.config
        share = cubic(config.prune_to, done, config.search_rounds)
        return targets(self.spec.sizes, share, config.keep_min)

    def install(self, got: Payload, model: nn.Module, frozen: Tensor, view: View) -> None:
        """Write the slim network into the full one: pruned channels are 0."""
        self.write_slim(model, self.weights(got), self.keep(got))

    def begin(self, got: Payload, model: nn.Module, training: Training, turn: Turn, memory: Memory) -> Optimizer:
        """Cut the model to size, in place, and train it from the broadcast weights."""
        keep = self.keep(got)
        self.write_slim(model, self.weights(got), keep)
        slim_(model, self.coupling, self.spec, keep)
        return self.train_from_here(model, training)

    def write_slim(self, model: nn.Module, weights: Vector, keep: Flags) -> None:
        """Write a slim network's floats into the full network; pruned channels are 0."""
        self.write(model, scatter(weights, self.coupling, self.spec, keep))

    def report(self, got: Payload, memory: Memory) -> Mapping[str, float]:
        """32 bits a float of the slim network; ``kept`` is the share of filters."""
        keep = self.keep(got)
        return {"model_bits": 32.0 * self.slim_numel(keep), "kept": float(keep.mean())}
