"""One protocol for every method: both halves, arrays in and arrays out, no Flower.

A round, as a method sees it::

    state -> broadcast(state) -> Payload -> [wire] -> begin(got, model) -> optimiser -> the user's training loop
          -> finish(got, model, optimiser) -> Payload -> [wire] -> aggregate(state, stream of updates) -> state'

What both ends know is what was broadcast, and what the client told the server of its memory before:
``known(got, turn, shared)`` is computed from those on the client and on the server, so the two agree by
construction.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, Literal, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn
from torch.optim import Optimizer

from fedmask_flwr.masks import Key, MaskSpec, Mode
from fedmask_flwr.wire import Field as Coded
from fedmask_flwr.wire import Payload, Scalar, SideInfo

Kind = Literal["bits", "counts", "dense"]
Fields: TypeAlias = Mapping[str, tuple[Kind, int | range]]
"""Kind and number of elements of each field, by name; a range where the frame itself says how many."""
Known: TypeAlias = SideInfo | Mapping[str, SideInfo] | None
"""What both ends know of all fields, or of each by name."""
Memory: TypeAlias = dict[str, npt.NDArray[Any]]
"""What a device keeps between rounds, on its own disk: arrays by name."""


class MethodConfig(BaseModel):
    """Settings of one method; an unknown key or a value out of range is an error."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        allow_inf_nan=False,
        populate_by_name=True,
        alias_generator=lambda name: name.replace("_", "-"),  # Flower's run config is kebab-case
    )


@dataclass(frozen=True, slots=True)
class Turn:
    """One client's turn in one round: what keys its randomness.

    ``round`` counts from 1 to ``rounds``; ``client`` is the device's own stable number, not Flower's node id,
    which is drawn anew at each start of a simulation. ``private``: the device wants nothing of its own handed on
    to other devices, beyond what is averaged.
    """

    seed: int
    round: int
    rounds: int
    client: int
    private: bool = False


@dataclass(frozen=True, slots=True)
class Training:
    """How a client trains: optimiser ("adam" | "sgd") and learning rate (None: the method's own)."""

    optimizer: Literal["adam", "sgd"] = "adam"
    lr: float | None = None


@dataclass(frozen=True, slots=True)
class View:
    """Which network of a method is wanted.

    ``mode``: one of the method's; "sampled" draws with ``key``. ``memory``: the device whose network it is (None:
    the server's). ``task``: the device's network for that task (None: the latest).
    """

    mode: Mode = "threshold"
    key: Key | None = None
    memory: Memory | None = None
    task: int | None = None


@dataclass(frozen=True, slots=True)
class Update:
    """One decoded reply: who, what, how many examples it stands for, and how often its codec lied.

    ``flip_rate`` is the probability that the codec flipped a bit it should have left (0 for exact codecs).
    ``fields`` are its fields as they came, coded.
    """

    client: int
    payload: Payload
    weight: float
    flip_rate: float
    fields: tuple[Coded, ...] = ()


S = TypeVar("S")


class Method(ABC, Generic[S]):
    """A federated method. ``State`` is a frozen dataclass of numpy arrays and plain numbers (it is checkpointed).

    Parameters
    ----------
    spec
        Where each mask bit lives.
    model
        The network, or one of the same shape: read for its layout, not kept.
    config
        An instance of ``Config``.
    fraction
        rho, the share of clients that train in a round.
    """

    name: ClassVar[str]
    State: ClassVar[type[Any]]
    Config: ClassVar[type[MethodConfig]]
    personal: bool = False  # True: every node is asked for its client number before it is told anything
    modes: ClassVar[tuple[Mode, ...]] = ("sampled", "threshold", "expected")  # (): only devices can evaluate
    codecs: Mapping[str, str] = {"bits": "auto", "counts": "counts", "dense": "float32"}
    priced: ClassVar[bool] = False  # True: what `target_bpp` pays for is counted as codec "auto" codes it
    exact: ClassVar[bool] = False  # True: its bits must not be coded by a codec that may flip some
    packed: ClassVar[bool] = False  # True: what travels has the order of the structural masks, so all need the same
    adapt_epochs: ClassVar[int] = 0  # epochs a device trains on its own data before it evaluates

    def __init__(self, spec: MaskSpec, model: nn.Module, config: Any = None, *, fraction: float = 1.0) -> None:
        self.spec = spec
        self.floats = count_floats(model)
        self.config: Any = self.Config() if config is None else config
        self.fraction = fraction

    # Both ends

    @classmethod
    def layout(cls, model: nn.Module, include: Sequence[str] = ("*",), exclude: Sequence[str] = ()) -> MaskSpec:
        """Say where the mask bits of ``model`` live: a bit a weight, unless the method says otherwise."""
        return MaskSpec.of(model, include, exclude)

    @property
    @abstractmethod
    def numel(self) -> int:
        """Number of parameters that "bits per parameter" divides by."""

    @abstractmethod
    def down(self, shared: Memory) -> Fields:
        """Fields that a broadcast may hold; it may lack some (before round 1 there is nothing to tell)."""

    @abstractmethod
    def up(self, got: Payload, shared: Memory) -> tuple[Fields, ...]:
        """Field sets that a reply may consist of: one of them, whole. A name means the same field in all."""

    def heard(self, shared: Memory) -> Known:
        """Return what both ends know before a broadcast is written: the layers, unless there is more."""
        return SideInfo(self.spec.sizes)

    @abstractmethod
    def known(self, got: Payload, turn: Turn, shared: Memory) -> Known:
        """Return what both ends know before the client's reply is written.

        ``shared`` is the client's memory on the client and ``recall`` on the server: use only what both hold.
        """

    def in_step(self, meta: Mapping[str, Scalar], memory: Memory) -> bool:
        """Say whether the device remembers what the server thinks it does.

        Otherwise it cannot read the broadcast's fields: it is handed a payload of ``meta`` alone and begins anew.
        """
        return True

    def complete(self, got: Payload, turn: Turn, memory: Memory) -> Payload:
        """Return a broadcast as all other hooks see it, where the device's memory has a part of it.

        Raises
        ------
        WireError
            The memory does not fit; the server hears it as a failed reply.
        """
        return got

    def reconstruct(self, got: Payload, reply: Payload, turn: Turn) -> Payload:
        """Return what a decoded reply stands for, given what the client was told: itself, unless it says less.

        Raises
        ------
        WireError
            It stands for nothing.
        """
        return reply

    @abstractmethod
    def install(self, got: Payload, model: nn.Module, frozen: Tensor, view: View) -> None:
        """Write the network that ``view`` asks for into ``model``; ``frozen`` is w of the spec, (spec.weights,)."""

    # Server

    @abstractmethod
    def init(self) -> S:
        """Return the state before round 1."""

    @abstractmethod
    def broadcast(self, state: S, client: int | None = None) -> Payload:
        """Return what a client is told: the same for all, unless the method is ``personal``.

        None stands for the server itself, which evaluates what it is told.
        """

    def understood(self, state: S, client: int) -> Payload:
        """Return what a client knows once it has read its broadcast (see ``complete``)."""
        return self.broadcast(state, client)

    def missed(self, state: S, clients: Sequence[int]) -> S:
        """Return the state once these clients were asked and gave no usable reply."""
        return state

    def inquire(self, state: S, client: int) -> Payload:
        """Return what a client is told so that it can evaluate: what a broadcast says, unless it needs less."""
        return self.broadcast(state, client)

    def advance(self, state: S, turn: Turn) -> S:
        """Return the state in which ``turn.round`` begins: what changes with time alone."""
        return state

    def figures(self, state: S) -> Mapping[str, Any]:
        """What a round's line of metrics says of the state; anything that JSON can hold."""
        return {}

    def recall(self, state: S, client: int) -> Memory:
        """Return the part of a client's memory that the server holds too."""
        return {}

    def check(self, state: S, update: Update) -> None:
        """Refuse a reply that is readable but not allowed; it is counted as a failure.

        Raises
        ------
        WireError
            With the reason.
        """

    @abstractmethod
    def aggregate(self, state: S, updates: Iterable[Update]) -> S:
        """Fold a round's updates, one at a time; no update leaves the state as it was."""

    @abstractmethod
    def result(self, state: S) -> Payload:
        """Return what is exported: the thresholded mask, or dense weights."""

    # Client

    @abstractmethod
    def begin(self, got: Payload, model: nn.Module, training: Training, turn: Turn, memory: Memory) -> Optimizer:
        """Write the round's start into ``model`` and return the optimiser for the user's loop.

        ``memory`` is what the device kept of its last turn, empty at first.
        """

    @abstractmethod
    def finish(self, got: Payload, model: nn.Module, optimizer: Optimizer, turn: Turn, memory: Memory) -> Payload:
        """Return the client's reply after training; what is put into ``memory`` stays on the device."""

    def observe(self, losses: npt.NDArray[np.float64], turn: Turn, memory: Memory) -> bool:
        """Hear the losses, (n,) in nats, of the installed network on what the device is about to train on.

        Called before ``begin`` where devices find out by themselves that another task has begun; True if so.
        """
        return False

    def tasks(self, memory: Memory) -> tuple[int, ...]:
        """Tasks for which a device with that memory has a network, ascending; (): it has one for all."""
        return ()

    def adapt(
        self, got: Payload, model: nn.Module, training: Training, turn: Turn, memory: Memory
    ) -> Optimizer | None:
        """Return an optimiser to fine-tune the installed network with before this device evaluates it.

        None: the method has no such step.
        """
        return None

    def report(self, got: Payload, memory: Memory) -> Mapping[str, float]:
        """Figures of this device's network: "model_bits", the size it is stored in, and the like."""
        return {"model_bits": 32.0 * self.floats}


def count_floats(model: nn.Module) -> int:
    """Number of floats in the state dict: what a dense method sends."""
    return sum(t.numel() for t in model.state_dict().values() if t.is_floating_point())
