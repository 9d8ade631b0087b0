"""Theta that is moved by replies instead of being voted on anew."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar, Literal, TypeAlias

import numpy as np
import numpy.typing as npt
from pydantic import Field, field_validator

from fedmask_flwr.wire import Payload

from .base import Turn
from .beta import BLOCK, BetaState, Tally
from .following import FollowedConfig, FollowedMethod
from .rates import cosine

Theta: TypeAlias = npt.NDArray[np.float64]
LEVELS = 2520
"""Steps of theta between 0 and 1: exact for up to ten devices, and one flip among 10,000 still counts."""


class SteppingConfig(FollowedConfig):
    """FedPM's settings of training, and the step."""

    prior: float = Field(1.0, ge=1.0, le=1.0, description="there is no posterior")
    reset: int = Field(0, ge=0, le=0, description="there is no window")
    estimator: Literal["mode"] = "mode"
    step: float = Field(0.0, ge=0.0, description="in round 1; 1/step of the change is sampled. 0: the method's own")
    step_min: float = Field(0.0, ge=0.0, description="the last round's, no more than `step`; 0: the method's own")

    @field_validator("step", "step_min")
    @classmethod
    def _step(cls, step: float) -> float:
        if 0.0 < step < 1.0:
            raise ValueError("a step is 1 or more, or 0 for the method's own")
        return step


class SteppingMethod(FollowedMethod, ABC):
    """theta <- clip(theta + step * (mean of the masks - what it is counted against), epsilon, 1 - epsilon).

    Clients sample theta_g + (theta_k - theta_g)/step, so in expectation theta goes to the mean of theta_k.
    """

    Config: ClassVar[type[FollowedConfig]] = SteppingConfig
    first: ClassVar[float]  # the step of round 1, unless it is set
    last: ClassVar[float]  # that of the last round

    @abstractmethod
    def change(self, start: Theta, votes: Mapping[str, npt.NDArray[np.uint32]], masks: int) -> Theta:
        """(n,) what ``masks`` replies move a block of theta by, times 1/step, in `LEVELS`, as ``start`` is."""

    def step(self, turn: Turn) -> float:
        """From ``step`` to ``step_min`` on a cosine, in 64ths: machines differ in a cosine's last bit."""
        first = float(self.config.step) or self.first
        last = float(self.config.step_min) or self.last
        return round(64.0 * cosine(first, min(first, last), turn)) / 64.0

    def sampled(self, theta_g: Theta, theta_k: npt.NDArray[np.floating[Any]], turn: Turn) -> Theta:
        """(d,) the probabilities that a client samples."""
        return np.asarray(theta_g + (theta_k - theta_g) / self.step(turn))

    def stepped(self, reply: Payload, turn: Turn) -> Payload:
        """A reply that says how often it counts."""
        return replace(reply, meta={"step": self.step(turn)})

    def moved(self, state: BetaState, tally: Tally, anew: bool) -> BetaState:
        """Theta after a round: float64 +, -, * and /, rounded once, so all ends get the same integers."""
        before = 0 if state.total else round(self.config.theta0 * LEVELS)
        low, step, votes = math.ceil(self.config.epsilon * LEVELS), float(tally.meta["step"]), tally.votes()
        found = np.empty(self.numel, np.uint32)
        for a in range(0, self.numel, BLOCK):
            part = slice(a, a + BLOCK)
            start = state.ones[part].astype(np.float64) + before
            change = self.change(start, {name: m[part] for name, m in votes.items()}, tally.masks)
            found[part] = np.clip(np.rint(start + step * change), low, LEVELS - low)
        return BetaState(found, LEVELS, 1, 0.0)

    def anew(self, state: BetaState) -> bool:
        """Always: theta is all there is."""
        return True
