"""LTH: iterative magnitude pruning with rewinding, the reference that mask methods are measured against.

Paper: Frankle, Carbin, "The Lottery Ticket Hypothesis: Finding Sparse, Trainable Neural Networks", ICLR 2019,
arXiv 1803.03635. With ``--clients 1 -c min-nodes=1`` it is the paper's central algorithm, since one client then has
all data; with more, the average is what is pruned.

After every ``cycle`` rounds the share ``prune-each`` of each layer's remaining weights with the smallest magnitude
goes, and the others return to their initial values, ``cycles`` times; the rounds after that train the last ticket.

Travels: 32 bits a remaining weight each way, and down a bit a weight, coded; nothing before round 1.

Settings: cycle 5, cycles 3, prune-each 0.2; Adam 1e-3. Give ``num-server-rounds`` more than cycle * cycles.

Limits: a reference for accuracy at a sparsity, not a method that saves bytes while it searches. All layers lose the
same share; the paper prunes the output layer half as fast.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, final

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field
from torch import nn
from torch.optim import Optimizer

from fedmask_flwr.masks import MaskSpec
from fedmask_flwr.wire import Payload, SideInfo, WireError, pack_bits, unpack_bits

from .base import Fields, Known, Memory, MethodConfig, Training, Turn, Update
from .dense import DenseClient, Vector, float_entries, hold_zeros
from .fedavg import weighted_mean

Flags = npt.NDArray[np.bool_]


class LTHConfig(MethodConfig):
    """How often and how much."""

    cycle: int = Field(5, ge=1, description="rounds of training before weights are pruned")
    cycles: int = Field(3, ge=1, description="how often weights are pruned")
    prune_each: float = Field(0.2, gt=0.0, lt=1.0, description="share of the remaining weights that goes each time")


@dataclass(frozen=True, slots=True)
class LTHState:
    """Weights that are left (packed bits of the spec), their values, rounds that were trained."""

    keep: npt.NDArray[np.uint8]
    weights: Vector
    rounds: int


@final
class LTH(DenseClient[LTHState]):
    """See the module's card."""

    name: ClassVar[str] = "lth"
    State = LTHState
    Config: ClassVar[type[MethodConfig]] = LTHConfig

    def __init__(self, spec: MaskSpec, model: nn.Module, config: Any = None, *, fraction: float = 1.0) -> None:
        super().__init__(spec, model, config, fraction=fraction)
        if len(list(model.parameters())) != len(list(model.named_parameters(remove_duplicate=False))):
            raise ValueError("lth prunes a weight by its name, and this network has tied ones: untie them")
        at, start = {}, 0
        for name, tensor in float_entries(model):
            at[name.replace("_orig_mod.", "")] = start
            start += tensor.numel()
        spans = zip(spec.names, spec.sizes, strict=True)
        self.positions = np.concatenate([np.arange(at[name], at[name] + size) for name, size in spans])

    # What travels

    def down(self, shared: Memory) -> Fields:
        """The weights that are left, which and what."""
        return {"keep": ("bits", self.spec.numel), "weights": ("dense", range(self.floats + 1))}

    def up(self, got: Payload, shared: Memory) -> tuple[Fields, ...]:
        """Every float but the pruned weights."""
        return ({"weights": ("dense", int(self.there(self.keep(got)).sum()))},)

    def known(self, got: Payload, turn: Turn, shared: Memory) -> Known:
        """Nothing."""
        return None

    def heard(self, shared: Memory) -> SideInfo:
        """The layers; most weights are left, so what is coded is which are gone."""
        return SideInfo(self.spec.sizes, pack_bits(np.ones(self.spec.numel, np.bool_)))

    def keep(self, got: Payload) -> Flags:
        """Weights that are left, (d,)."""
        bits = got.bits.get("keep")
        return np.ones(self.spec.numel, np.bool_) if bits is None else unpack_bits(bits, self.spec.numel)

    def there(self, keep: Flags) -> Flags:
        """Floats of the state dict that are left, (n,)."""
        flags = np.ones(self.floats, np.bool_)
        flags[self.positions] = keep
        return flags

    def full(self, values: Vector, keep: Flags) -> Vector:
        """All floats (n,), 0 where pruned, from those that are left."""
        out = np.zeros(self.floats, np.float32)
        out[self.there(keep)] = values
        return out

    def weights(self, got: Payload) -> Vector:
        """All floats of the network, (n,).

        Raises
        ------
        WireError
            When there are not as many as the mask says.
        """
        keep = self.keep(got)
        if "weights" not in got.dense:
            return np.where(self.there(keep), self.start, np.float32(0))
        if got.dense["weights"].size != (n := int(self.there(keep).sum())):
            raise WireError(f"{got.dense['weights'].size} weights for a network with {n} left")
        return self.full(got.dense["weights"], keep)

    # Server

    def init(self) -> LTHState:
        """Every weight, at its initial value."""
        return LTHState(pack_bits(np.ones(self.spec.numel, np.bool_)), np.zeros(0, np.float32), 0)

    def broadcast(self, state: LTHState, client: int | None = None) -> Payload:
        """The ticket: its mask, and its weights unless they are the initial ones."""
        if state.rounds == 0:
            return Payload()
        dense = {"weights": state.weights} if state.weights.size else {}
        return Payload(bits={"keep": state.keep}, dense=dense)

    def result(self, state: LTHState) -> Payload:
        """The ticket, with its weights."""
        keep = unpack_bits(state.keep, self.spec.numel)
        weights = state.weights if state.weights.size else self.start[self.there(keep)]
        return Payload(bits={"keep": state.keep}, dense={"weights": weights})

    def aggregate(self, state: LTHState, updates: Iterable[Update]) -> LTHState:
        """Average; at the end of a cycle prune the average and rewind."""
        mean = weighted_mean((u.weight, u.payload.dense["weights"]) for u in updates)
        if mean is None:
            return state
        done, config = state.rounds + 1, self.config
        if done % config.cycle or done > config.cycle * config.cycles:
            return LTHState(state.keep, mean, done)
        keep = unpack_bits(state.keep, self.spec.numel)
        magnitude = np.abs(self.full(mean, keep)[self.positions])
        return LTHState(pack_bits(self.pruned(keep, magnitude)), np.zeros(0, np.float32), done)

    def pruned(self, keep: Flags, magnitude: Vector) -> Flags:
        """Keep without the smallest of each layer, (d,); ties go by position."""
        out, start = keep.copy(), 0
        for size in self.spec.sizes:
            left = start + np.flatnonzero(keep[start : start + size])
            order = np.argsort(magnitude[left], kind="stable")
            out[left[order[: int(self.config.prune_each * left.size)]]] = False
            start += size
        return out

    # Client

    def begin(self, got: Payload, model: nn.Module, training: Training, turn: Turn, memory: Memory) -> Optimizer:
        """Train what is left."""
        self.write(model, self.weights(got))
        return self.train_kept(got, model, training)

    def train_kept(self, got: Payload, model: nn.Module, training: Training) -> Optimizer:
        """Ordinary training in which pruned weights stay 0."""
        optimizer = self.train_from_here(model, training)
        kept = torch.from_numpy(self.keep(got)).to(next(model.parameters()).device)
        hold_zeros(model, self.spec, kept)
        return optimizer

    def adapt(
        self, got: Payload, model: nn.Module, training: Training, turn: Turn, memory: Memory
    ) -> Optimizer | None:
        """Ordinary training of the installed ticket."""
        return self.train_kept(got, model, training)

    def finish(self, got: Payload, model: nn.Module, optimizer: Optimizer, turn: Turn, memory: Memory) -> Payload:
        """The floats that are left."""
        return Payload(dense={"weights": self.read(model)[self.there(self.keep(got))]})

    def report(self, got: Payload, memory: Memory) -> Mapping[str, float]:
        """32 bits a weight that is left, and a bit a weight to say which."""
        keep = self.keep(got)
        bits = 32.0 * float(self.there(keep).sum()) + self.spec.numel
        return {"model_bits": bits, "kept": float(keep.mean())}
