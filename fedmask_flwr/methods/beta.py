"""The half that FedPM and DeltaMask share: a Beta posterior over mask bits, counts on the downlink."""

from __future__ import annotations

import math
from abc import ABC
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field
from torch import Tensor, nn
from torch.optim import Optimizer

from fedmask_flwr.aggregate import VoteCounter, beta_theta
from fedmask_flwr.masks import (
    MaskAdam,
    MaskOptimizer,
    MaskSGD,
    bernoulli,
    derive,
    mask_values,
    thresholds,
    write_mask,
)
from fedmask_flwr.wire import Counts, Payload, WireError, pack_bits

from .base import Fields, Memory, Method, MethodConfig, Training, Turn, Update, View

LEARNING_RATE = 0.1  # s must travel about +-4; at 0.01 nothing is learned (papers: FedPM's own code)


class BetaConfig(MethodConfig):
    """Settings of the Beta posterior and of the client's mask training."""

    theta0: float = Field(0.5, gt=0.0, lt=1.0, description="keep-probability before round 1; 0.95 if pretrained")
    epsilon: float = Field(0.01, gt=0.0, lt=0.5, description="theta stays in [epsilon, 1 - epsilon]")
    prior: float = Field(1.0, ge=1.0, description="lambda_0, the Beta prior of every bit")
    reset: int = Field(0, ge=0, description="rounds between resets of the posterior; 0 means ceil(1/rho)")
    estimator: Literal["mode", "mean"] = "mode"
    ste: Literal["identity", "p"] = Field("identity", description='straight-through rule; "p" as FedPM\'s code')
    adam_eps: float = Field(
        1e-5,
        gt=0.0,
        description="Adam's epsilon; at 1e-8 a weight with hardly any gradient moves as far as the others, and its "
        "flips cost bits for nothing",
    )
    sparsity: float = Field(0.0, ge=0.0, description="lambda of the penalty lambda * mean(theta)")
    seed_scope: Literal["client", "global"] = Field(
        "client", description='"global" draws one u for all clients and collapses theta'
    )


@dataclass(frozen=True, slots=True)
class BetaState:
    """Votes since the last reset: M (d,) of ``total`` masks over ``age`` rounds; ``flips`` sums flip rates."""

    ones: npt.NDArray[np.uint32]
    total: int
    age: int
    flips: float


class BetaMethod(Method[BetaState], ABC):
    """Server half, client training and evaluation of a method that keeps a Beta posterior over each bit."""

    State = BetaState
    Config: ClassVar[type[BetaConfig]] = BetaConfig
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
        if "ones" not in got.counts:
            return np.full(self.numel, self.config.theta0)
        flips = got.meta.get("flips", 0.0)
        counts = got.counts["ones"]
        if not isinstance(flips, float) or not 0.0 <= flips < 0.5 or counts.top < 1:
            raise WireError(f"broadcast of {counts.top} votes with flip rate {flips!r}: not a state of {self.name}")
        config = self.config
        return beta_theta(
            counts.values,
            counts.top,
            prior=config.prior,
            epsilon=config.epsilon,
            flip_rate=flips,
            estimator=config.estimator,
        )

    def draw(self, theta: npt.NDArray[np.float64], turn: Turn) -> npt.NDArray[np.bool_]:
        """m = 1[u < theta], shape (d,), with the turn's keyed uniforms u: equal turns share their randomness."""
        who = turn.client if self.config.seed_scope == "client" else "all"
        return bernoulli(derive(turn.seed, "upload", turn.round, who), thresholds(theta))

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
        votes, flips = VoteCounter(self.numel), 0.0
        for update in updates:
            votes.add(update.payload.bits["mask"])
            flips += update.flip_rate
        if votes.masks == 0:
            return state
        if state.age >= (self.config.reset or math.ceil(1.0 / self.fraction)):
            state = self.init()
        return BetaState(state.ones + votes.votes(), state.total + votes.masks, state.age + 1, state.flips + flips)

    def result(self, state: BetaState) -> Payload:
        """The thresholded mask 1[theta >= 1/2]."""
        return Payload(bits={"mask": pack_bits(self.theta(self.broadcast(state)) >= 0.5)})

    def install(self, got: Payload, model: nn.Module, frozen: Tensor, view: View) -> None:
        """Write w * m into ``model`` (m sampled, thresholded, or theta itself)."""
        values = torch.from_numpy(mask_values(self.theta(got), view.mode, view.key))
        write_mask(model, self.spec, frozen, values.to(frozen.device))

    def begin(self, got: Payload, model: nn.Module, training: Training, turn: Turn, memory: Memory) -> Optimizer:
        """Scores from theta_g, a fresh optimiser each round."""
        settings: dict[str, Any] = {
            "lr": LEARNING_RATE if training.lr is None else training.lr,
            "theta": torch.from_numpy(self.theta(got).astype(np.float32)),
            "key": derive(turn.seed, "train", turn.round, turn.client),
            "ste": self.config.ste,
            "sparsity": self.config.sparsity,
        }
        if training.optimizer == "sgd":
            return MaskSGD(model, self.spec, **settings)
        return MaskAdam(model, self.spec, eps=self.config.adam_eps, **settings)

    def report(self, got: Payload, memory: Memory) -> Mapping[str, float]:
        """A bit a masked weight; the weights are a seed."""
        return {"model_bits": float(self.numel), "kept": float((self.theta(got) >= 0.5).mean())}


def trained_theta(optimizer: Optimizer) -> npt.NDArray[np.float64]:
    """theta_k, shape (d,), of a mask optimiser.

    Raises
    ------
    TypeError
        When the training loop used an optimiser of its own.
    """
    if not isinstance(optimizer, MaskOptimizer):
        raise TypeError(f"train with the optimiser that the turn handed out, not {type(optimizer).__name__}")
    return optimizer.theta().cpu().numpy().astype(np.float64)
