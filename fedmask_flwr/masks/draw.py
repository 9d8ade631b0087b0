"""How scores become probabilities and bits: the rule that a mask optimiser is built with."""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import blake2b
from math import log
from typing import Any, Literal, final, get_args

import numpy as np
import torch
from torch import Tensor

from .kernels import Room, probabilities, sample_
from .keyed import Key

Draw = Literal["bernoulli", "threshold"]


@final
@dataclass(frozen=True, slots=True, eq=False)
class DrawRule:
    """Which bit a score stands for.

    Attributes
    ----------
    draw
        ``"bernoulli"``: a keyed sample of theta = sigmoid(s). ``"threshold"``: 1[theta >= tau].
    tau
        In (0, 1); only ``"threshold"`` uses it.
    pruned
        (d,) bool on the device of the scores: theta and the bit are 0 here. None prunes nothing.

    Raises
    ------
    ValueError
        Unknown `draw`, or `tau` outside (0, 1).
    """

    draw: Draw = "bernoulli"
    tau: float = 0.5
    pruned: Tensor | None = None

    def __post_init__(self) -> None:
        if self.draw not in get_args(Draw):
            raise ValueError(f"draw must be 'bernoulli' or 'threshold', not {self.draw!r}")
        if not 0 < self.tau < 1:
            raise ValueError(f"tau must lie in (0, 1), got {self.tau}")

    @property
    def cut(self) -> float:
        """logit(tau), rounded to float32: the score from which on a thresholded bit is 1.

        Scores are compared, not probabilities, so no machine's exponential has a say in a bit.
        """
        return float(np.float32(log(self.tau / (1 - self.tau))))

    def theta(self, scores: Tensor) -> Tensor:
        """Keep-probabilities sigmoid(s), 0 where pruned: (d,) float32."""
        theta = probabilities(scores)
        return theta if self.pruned is None else theta.masked_fill_(self.pruned, 0.0)

    def write_(self, scores: Tensor, key: Key, out: Tensor, start: int = 0, room: Room | None = None) -> None:
        """Write the mask into `out`, as float32 zeros and ones; `key` is for sampling only.

        `scores` and `out` are (n,), those from position `start` on.
        """
        if self.draw == "threshold":
            torch.ge(scores, self.cut, out=out)
        else:
            sample_(scores, key, out, start, room)
        if self.pruned is not None:
            out.masked_fill_(self.pruned[start : start + len(out)], 0.0)

    def state(self) -> dict[str, Any]:
        """What a saved state must share with the optimiser that takes it up; `support` is a digest."""
        support = ""
        if self.pruned is not None:
            support = blake2b(np.packbits(self.pruned.cpu().numpy()).tobytes(), digest_size=8).hexdigest()
        tau = float(self.tau) if self.draw == "threshold" else None
        return {"draw": self.draw, "tau": tau, "support": support}

    def check_state(self, saved: dict[str, Any]) -> None:
        """Raise ValueError unless `saved` is the `state` of an equal rule."""
        have = self.state()
        if (saved["draw"], saved["tau"]) != (have["draw"], have["tau"]):
            raise ValueError(
                f"the optimiser state was made with draw={saved['draw']!r}, tau={saved['tau']}, "
                f"this optimiser has draw={have['draw']!r}, tau={have['tau']}: build it with the same settings"
            )
        if saved["support"] != have["support"]:
            raise ValueError(
                "the optimiser state was made with another support: build the optimiser with the same one"
            )


def pruned_off(support: Tensor | None, d: int, device: torch.device) -> Tensor | None:
    """Positions off the support, (d,) bool on `device`; None where there is none.

    Raises
    ------
    ValueError
        The support is not (d,) bool.
    """
    if support is None:
        return None
    if support.dtype != torch.bool or support.shape != (d,):
        raise ValueError(f"support must be ({d},) bool, got {tuple(support.shape)} {support.dtype}")
    pruned = ~support.to(device)
    return pruned if bool(pruned.any()) else None


def check_theta(theta: float | Tensor, d: int) -> Tensor:
    """Give probabilities as a tensor, (d,) or of one number.

    Raises
    ------
    ValueError
        The wrong number of probabilities, or one outside [0, 1].
    """
    p = torch.as_tensor(theta, dtype=None if isinstance(theta, Tensor) else torch.float64)
    if p.shape not in ((), (d,)):
        raise ValueError(f"theta must be a number or {d} of them, got {tuple(p.shape)}")
    low, high = p.aminmax()  # NaN if there is one
    if not bool((low >= 0) & (high <= 1)):
        raise ValueError("theta must lie in [0, 1]")
    return p


def check_scores(scores: Tensor, d: int) -> None:
    """Raise ValueError unless `scores` is (d,) float32 without NaN."""
    if scores.shape != (d,) or scores.dtype != torch.float32:
        raise ValueError(f"scores must be ({d},) float32, got {tuple(scores.shape)} {scores.dtype}")
    if bool(scores.isnan().any()):
        raise ValueError("scores hold NaN: give the finite scores that an optimiser had, or start from theta")
