"""One protocol for every method: both halves, arrays in and arrays out, no Flower.

A round, as a method sees it::

    state -> broadcast(state) -> Payload -> [wire] -> begin(got, model) -> optimiser -> the user's training loop
          -> finish(got, model, optimiser) -> Payload -> [wire] -> aggregate(state, stream of updates) -> state'

What both ends know is what was broadcast: ``known(got, turn)`` is computed from the broadcast payload on the
client and on the server, so the two agree by construction.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, Literal, TypeVar

from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn
from torch.optim import Optimizer

from fedmask_flwr.masks import Key, MaskSpec, Mode
from fedmask_flwr.wire import Payload, SideInfo

Direction = Literal["up", "down"]
Kind = Literal["bits", "counts", "dense"]


class MethodConfig(BaseModel):
    """Settings of one method; an unknown key or a value out of range is an error."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        populate_by_name=True,
        alias_generator=lambda name: name.replace("_", "-"),  # Flower's run config is kebab-case
    )


@dataclass(frozen=True, slots=True)
class Turn:
    """One client's turn in one round: what keys its randomness.

    ``round`` counts from 1 to ``rounds``; ``client`` is the device's own stable number, not Flower's node id,
    which is drawn anew at each start of a simulation.
    """

    seed: int
    round: int
    rounds: int
    client: int


@dataclass(frozen=True, slots=True)
class Training:
    """How a client trains: optimiser ("adam" | "sgd") and learning rate (None: the method's own)."""

    optimizer: Literal["adam", "sgd"] = "adam"
    lr: float | None = None


@dataclass(frozen=True, slots=True)
class Update:
    """One decoded reply: who, what, how many examples it stands for, and how often its codec lied.

    ``flip_rate`` is the probability that the codec flipped a bit it should have left (0 for exact codecs).
    """

    client: int
    payload: Payload
    weight: float
    flip_rate: float


S = TypeVar("S")


class Method(ABC, Generic[S]):
    """A federated method. ``State`` is a frozen dataclass of numpy arrays and plain numbers (it is checkpointed).

    Parameters
    ----------
    spec
        Where each mask bit lives.
    floats
        Number of floats in the model's state dict; what a dense method sends.
    config
        An instance of ``Config``.
    fraction
        rho, the share of clients that train in a round.
    """

    name: ClassVar[str]
    State: ClassVar[type[Any]]
    Config: ClassVar[type[MethodConfig]]
    personal: ClassVar[bool] = False  # True: every node is asked for its client number before it is told anything
    modes: ClassVar[tuple[Mode, ...]] = ("sampled", "threshold", "expected")
    codecs: ClassVar[Mapping[str, str]] = {"bits": "auto", "counts": "counts", "dense": "float32"}

    def __init__(self, spec: MaskSpec, floats: int, config: Any = None, *, fraction: float = 1.0) -> None:
        self.spec = spec
        self.floats = floats
        self.config = self.Config() if config is None else config
        self.fraction = fraction

    # Both ends

    @property
    @abstractmethod
    def numel(self) -> int:
        """Number of parameters that "bits per parameter" divides by."""

    @abstractmethod
    def fields(self, direction: Direction) -> Mapping[str, tuple[Kind, int]]:
        """Kind and length of every field that may travel in ``direction``; anything else is refused.

        All of them must be in a reply; a broadcast may lack some (before round 1 there is nothing to tell).
        """

    @abstractmethod
    def known(self, got: Payload, turn: Turn) -> SideInfo | None:
        """Return what both ends know before the client's reply is written, from the broadcast payload."""

    @abstractmethod
    def install(self, got: Payload, model: nn.Module, frozen: Tensor, mode: Mode, key: Key | None = None) -> None:
        """Write the broadcast network into ``model``, in one of ``modes`` ("sampled" draws with ``key``)."""

    # Server

    @abstractmethod
    def init(self) -> S:
        """Return the state before round 1."""

    @abstractmethod
    def broadcast(self, state: S, client: int | None = None) -> Payload:
        """Return what a client is told: the same for all, unless the method is ``personal``.

        None stands for the server itself, which evaluates what it is told.
        """

    @abstractmethod
    def aggregate(self, state: S, updates: Iterable[Update]) -> S:
        """Fold a round's updates, one at a time; no update leaves the state as it was."""

    @abstractmethod
    def result(self, state: S) -> Payload:
        """Return what is evaluated and exported: the thresholded mask, or dense weights."""

    # Client

    @abstractmethod
    def begin(self, got: Payload, model: nn.Module, training: Training, turn: Turn) -> Optimizer:
        """Write the round's start into ``model`` and return the optimiser for the user's loop."""

    @abstractmethod
    def finish(self, got: Payload, model: nn.Module, optimizer: Optimizer, turn: Turn) -> Payload:
        """Return the client's reply after training."""
