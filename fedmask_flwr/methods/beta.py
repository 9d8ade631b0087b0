"""The half that FedPM and DeltaMask share: a Beta posterior over mask bits, counts on the downlink."""

from __future__ import annotations

import math
from abc import ABC
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar, Literal, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field
from torch import Tensor, nn
from torch.optim import Optimizer

from fedmask_flwr.aggregate import VoteCounter, beta_theta
from fedmask_flwr.masks import (
    Key,
    MaskAdam,
    MaskOptimizer,
    MaskSGD,
    bernoulli,
    closeness,
    derive,
    mask_values,
    taken,
    thresholds,
    write_mask,
)
from fedmask_flwr.wire import Bits, Counts, Payload, Scalar, WireError, pack_bits

from .base import Fields, Memory, Method, MethodConfig, Training, Turn, Update, View
from .trail import Trail

BLOCK = 1 << 20  # positions whose theta is there as floats at a time: 8 MB, whatever d is
LEARNING_RATE = 0.1  # s must travel about +-4; at 0.01 nothing is learned (papers: FedPM's own code)


class BetaConfig(MethodConfig):
    """Settings of the Beta posterior and of the client's mask training."""

    theta0: float = Field(0.5, gt=0.0, lt=1.0, description="keep-probability before round 1; 0.95 if pretrained")
    epsilon: float = Field(0.01, gt=0.0, lt=0.5, description="theta stays in [epsilon, 1 - epsilon]")
    prior: float = Field(1.0, ge=1.0, description="lambda_0, the Beta prior of every bit")
    reset: int = Field(0, ge=0, description="rounds between resets of the posterior; 0 means ceil(1/rho)")
    estimator: Literal["mode", "mean"] = "mode"
    ste: Literal["identity", "p"] = Field("identity", description='straight-through rule; "p" as FedPM\'s code')
    adam_eps: float = Field(1e-5, gt=0.0, description="Adam's epsilon: larger moves less, and sends less")
    sparsity: float = Field(0.0, ge=0.0, description="lambda of the penalty lambda * mean(theta)")
    seed_scope: Literal["client", "global"] = Field(
        "client", description='"global" draws one u for all clients and collapses theta'
    )


D = TypeVar("D", bound=np.generic)


class Tally:
    """Votes on each bit of what replies hold, one reply at a time."""

    def __init__(self, numel: int, names: Iterable[str]) -> None:
        self._counters = {name: VoteCounter(numel) for name in names}
        self.masks, self.flips = 0, 0.0
        self.meta: Mapping[str, Scalar] = {}  # of the last reply

    def add(self, payload: Payload, flip_rate: float = 0.0) -> None:
        """Count a reply, whose codec flipped each bit with probability ``flip_rate``."""
        for name, counter in self._counters.items():
            counter.add(payload.bits[name])
        self.masks += 1
        self.flips += flip_rate
        self.meta = payload.meta

    def votes(self) -> dict[str, npt.NDArray[np.uint32]]:
        """M (d,) of each name."""
        return {name: counter.votes() for name, counter in self._counters.items()}


@dataclass(frozen=True, slots=True)
class BetaState:
    """Votes since the last reset: M (d,) of ``total`` masks over ``age`` rounds; ``flips`` sums flip rates."""

    ones: npt.NDArray[np.uint32]
    total: int
    age: int
    flips: float
    trail: Trail = field(default_factory=Trail)


class BetaMethod(Method[BetaState], ABC):
    """Server half, client training and evaluation of a method that keeps a Beta posterior over each bit."""

    State = BetaState
    Config: ClassVar[type[BetaConfig]] = BetaConfig
    counted: ClassVar[tuple[str, ...]] = ("mask",)  # bits of a reply that are voted on
    config: Any

    @property
    def numel(self) -> int:
        """d, the number of mask bits."""
        return self.spec.numel

    def down(self, shared: Memory) -> Fields:
        """Vote counts."""
        return {"ones": ("counts", self.numel)}

    def up(self, got: Payload, shared: Memory) -> tuple[Fields, ...]:
        """A mask."""
        return ({"mask": ("bits", self.numel)},)

    def theta(self, got: Payload) -> npt.NDArray[np.float64]:
        """theta_g, shape (d,), as both ends compute it from the broadcast integers."""
        return self.of_theta(got, lambda theta: theta)

    def of_theta(
        self, got: Payload, function: Callable[[npt.NDArray[np.float64]], npt.NDArray[D]]
    ) -> npt.NDArray[D]:
        """``function`` of theta_g, elementwise, shape (d,), with no more than a block of theta itself in memory."""
        out: npt.NDArray[D] = np.empty(self.numel, function(np.full(1, 0.5)).dtype)
        for at, values in self._blocks(got, function):
            out[at : at + values.size] = values
        return out

    def _blocks(
        self, got: Payload, function: Callable[[npt.NDArray[np.float64]], npt.NDArray[D]]
    ) -> Iterator[tuple[int, npt.NDArray[D]]]:
        """(start, function of theta from there on), block by block."""
        theta: Callable[[npt.NDArray[np.uint32]], npt.NDArray[np.float64]]
        if "ones" in got.counts:
            values, top = got.counts["ones"].values, got.counts["ones"].top
            theta = partial(self._posterior, top, got.meta.get("flips", 0.0))
        else:
            values, top = np.broadcast_to(np.uint32(0), self.numel), 0
            theta = partial(np.full_like, fill_value=self.config.theta0, dtype=np.float64)
        # As many thetas as there are counts, unless a device is told of more votes than could have been cast.
        table = function(theta(np.arange(top + 1, dtype=np.uint32))) if top < self.numel else None
        for at in range(0, self.numel, BLOCK):
            part = values[at : at + BLOCK]
            yield at, function(theta(part)) if table is None else taken(table, part)

    def _posterior(self, top: int, flips: object, ones: npt.NDArray[np.uint32]) -> npt.NDArray[np.float64]:
        config = self.config
        if not isinstance(flips, float) or not 0.0 <= flips < 0.5 or top < 1:
            raise WireError(f"broadcast of {top} votes with flip rate {flips!r}: not a state of {self.name}")
        return beta_theta(
            ones, top, prior=config.prior, epsilon=config.epsilon, flip_rate=flips, estimator=config.estimator
        )

    def draw(self, theta: npt.NDArray[np.floating[Any]], turn: Turn) -> npt.NDArray[np.bool_]:
        """m = 1[u < theta], shape (d,), with the turn's keyed uniforms u: equal turns share their randomness."""
        return bernoulli(self._key(turn), thresholds(theta))

    def guess(self, got: Payload, turn: Turn) -> Bits:
        """m_g, packed: what ``draw`` makes of theta_g, a block at a time."""
        return pack_bits(self._sample(got, self._key(turn)))

    def near(self, got: Payload, turn: Turn) -> npt.NDArray[np.uint8]:
        """Class of each position by how far its u is from theta_g, (d,) (see `closeness`)."""
        key, out = self._key(turn), np.empty(self.numel, np.uint8)
        for at, theta in self._blocks(got, lambda theta: theta):
            out[at : at + theta.size] = closeness(theta, key, at)
        return out

    def _key(self, turn: Turn) -> Key:
        who = turn.client if self.config.seed_scope == "client" else "all"
        return derive(turn.seed, "upload", turn.round, who)

    def _sample(self, got: Payload, key: Key) -> npt.NDArray[np.bool_]:
        out = np.empty(self.numel, np.bool_)
        for at, cuts in self._blocks(got, thresholds):
            out[at : at + cuts.size] = bernoulli(key, cuts, at)
        return out

    def init(self) -> BetaState:
        """No votes: theta is theta0."""
        return BetaState(np.zeros(self.numel, np.uint32), 0, 0, 0.0)

    def broadcast(self, state: BetaState, client: int | None = None) -> Payload:
        """Integer counts, never floats; nothing at all before the first votes."""
        if state.total == 0:
            return Payload()
        flips = state.flips / state.total
        return Payload(
            counts={"ones": Counts(state.ones, state.total)}, meta={"flips": flips} if flips > 0.0 else {}
        )

    def aggregate(self, state: BetaState, updates: Iterable[Update]) -> BetaState:
        """alpha += M, beta += K - M; reset first when the window of ceil(1/rho) rounds is over."""
        tally = Tally(self.numel, self.counted)
        for update in updates:
            tally.add(update.payload, update.flip_rate)
        return self.moved(state, tally, self.anew(state)) if tally.masks else state

    def moved(self, state: BetaState, tally: Tally, anew: bool) -> BetaState:
        """The state after a round's replies, of which there was at least one."""
        return self.cast(state, tally.votes()["mask"], tally.masks, tally.flips, anew)

    def anew(self, state: BetaState) -> bool:
        """Whether the next votes replace the present ones."""
        return state.age >= (self.config.reset or math.ceil(1.0 / self.fraction))

    def cast(
        self, state: BetaState, votes: npt.NDArray[np.uint32], masks: int, flips: float, anew: bool
    ) -> BetaState:
        """The state after ``masks`` more masks, ``votes`` (d,) of which have each bit."""
        if anew:
            return BetaState(votes, masks, 1, flips)
        return BetaState(votes + state.ones, state.total + masks, state.age + 1, state.flips + flips)

    def result(self, state: BetaState) -> Payload:
        """The thresholded mask 1[theta >= 1/2]."""
        return Payload(bits={"mask": pack_bits(self.of_theta(self.broadcast(state), kept))})

    def install(self, got: Payload, model: nn.Module, frozen: Tensor, view: View) -> None:
        """Write w * m into ``model`` (m sampled, thresholded, or theta itself)."""
        if view.mode == "sampled" and view.key is not None:
            values = self._sample(got, view.key)
        else:
            values = self.of_theta(got, lambda theta: mask_values(theta, view.mode, view.key))
        write_mask(model, self.spec, frozen, torch.from_numpy(values).to(frozen.device))

    def begin(self, got: Payload, model: nn.Module, training: Training, turn: Turn, memory: Memory) -> Optimizer:
        """Scores from theta_g, a fresh optimiser each round."""
        settings: dict[str, Any] = {
            "lr": LEARNING_RATE if training.lr is None else training.lr,
            "theta": torch.from_numpy(self.of_theta(got, lambda theta: theta.astype(np.float32))),
            "key": derive(turn.seed, "train", turn.round, turn.client),
            "ste": self.config.ste,
            "sparsity": self.config.sparsity,
        }
        if training.optimizer == "sgd":
            return MaskSGD(model, self.spec, **settings)
        return MaskAdam(model, self.spec, eps=self.config.adam_eps, **settings)

    def report(self, got: Payload, memory: Memory) -> Mapping[str, float]:
        """A bit a masked weight; the weights are a seed."""
        return {"model_bits": float(self.numel), "kept": float(self.of_theta(got, kept).mean())}


def kept(theta: npt.NDArray[np.float64]) -> npt.NDArray[np.bool_]:
    """1[theta >= 1/2]."""
    return np.asarray(theta >= 0.5)


def trained_theta(optimizer: Optimizer) -> npt.NDArray[np.float32]:
    """theta_k, shape (d,), of a mask optimiser, as it is sampled.

    Raises
    ------
    TypeError
        When the training loop used an optimiser of its own.
    """
    if not isinstance(optimizer, MaskOptimizer):
        raise TypeError(f"train with the optimiser that the turn handed out, not {type(optimizer).__name__}")
    theta: npt.NDArray[np.float32] = optimizer.theta().cpu().numpy()
    return theta
