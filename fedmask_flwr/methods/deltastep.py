"""DeltaStep: send few of the flips, let theta step by many times their mean.

Ours: the seeded differences of DeltaMask (arXiv 2311.17299), a sampled share of the change as in unbiased
sparsification (Wangni et al., arXiv 1710.09854), and the guess as a control variate of the vote.

Both ends draw m_g = 1[u < theta_g] from the same keyed uniforms u of (round, client). The client samples a share
1/step of its change, m_k = 1[u < theta_g + (theta_k - theta_g)/step], which differs from m_g at
|theta_k - theta_g|/step of the positions. The server moves theta, it does not vote anew:

    theta <- clip(theta + step * mean_k(m_k - m_g,k), epsilon, 1 - epsilon)

In expectation, but for the clip, that is the mean of theta_k. The variance that FedPM adds in each round by drawing
all bits anew, theta (1 - theta)/K, is gone; that of the flips, about step * |theta_k - theta_g|/K, is there.

Travels: up, an exact code of the flips, about 1/step of what DeltaMask sends; never more than ``target-bpp``, where
that is set. Down, theta in integers, or the replies of others. Both exclude the frame (about 50 bytes).

Settings: as FedPM; step from 4 to ``step-min`` 1.25 on a cosine over the run, as the last rounds want little noise.
There is no posterior, so no prior, window or estimator. A larger step sends less in a round and takes more rounds;
by its variance, the fewer devices in a round, the smaller it should be.

Limits: steps are as noisy as flips are few. The server must decode each client by itself, so secure aggregation of
sums does not apply.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from threading import local
from typing import Any, ClassVar, final

import numpy as np
import numpy.typing as npt
from pydantic import Field
from torch import nn
from torch.optim import Optimizer

from fedmask_flwr.masks import MaskSpec, words
from fedmask_flwr.wire import Bits, Payload, pack_bits, unpack_bits

from .base import Memory, Turn, Update
from .beta import BetaState, trained_theta
from .following import FollowedConfig
from .rates import affordable
from .stepping import LEVELS, SteppingConfig, SteppingMethod, Theta


class DeltaStepConfig(SteppingConfig):
    """The step's settings, and a budget."""

    target_bpp: float = Field(
        0.0, ge=0.0, description="uplink bits a parameter that no round exceeds (codec auto); 0: any"
    )


@final
class DeltaStep(SteppingMethod):
    """See the module's card."""

    name: ClassVar[str] = "deltastep"
    priced: ClassVar[bool] = True
    exact: ClassVar[bool] = True
    counted: ClassVar[tuple[str, ...]] = ("mask", "guess")
    first: ClassVar[float] = 4.0
    last: ClassVar[float] = 1.25
    Config: ClassVar[type[FollowedConfig]] = DeltaStepConfig

    def __init__(self, spec: MaskSpec, model: nn.Module, config: Any = None, *, fraction: float = 1.0) -> None:
        super().__init__(spec, model, config, fraction=fraction)
        self._last = local()  # a server may decode in several threads

    def guess(self, got: Payload, turn: Turn) -> Bits:
        """m_g, packed; the last one is kept, as a reply is read with it and then counted against it."""
        kept: tuple[Payload, Turn, Bits] | None = getattr(self._last, "guess", None)
        if kept is None or kept[0] is not got or kept[1] != turn:
            kept = self._last.guess = got, turn, super().guess(got, turn)
        return kept[2]

    def finish(self, got: Payload, model: nn.Module, optimizer: Optimizer, turn: Turn, memory: Memory) -> Payload:
        """m_g with the flips that a share of the change asks for."""
        theta_g, mask = self.theta(got), unpack_bits(self.guess(got, turn), self.numel)
        theta = self.sampled(theta_g, trained_theta(optimizer), turn)
        flips = np.flatnonzero(mask != self.draw(theta, turn))
        if self.config.target_bpp > 0.0:
            flips = flips[np.argsort(self._share(theta_g, theta, flips, turn), kind="stable")]
            flips = flips[: affordable(mask, flips, self.guessed(got, turn), self.config.target_bpp)]
        mask[flips] ^= True
        return Payload(bits={"mask": pack_bits(mask)})

    def _share(self, theta_g: Theta, theta: Theta, flips: npt.NDArray[np.int64], turn: Turn) -> Theta:
        """(flips,) of the change that each flip needs, in [0, 1]: those with the least sample a smaller share."""
        u = (words(self._key(turn), self.numel)[flips].astype(np.float64) + (2.0**31 + 0.5)) * 2.0**-32
        return np.asarray((u - theta_g[flips]) / (theta - theta_g)[flips])

    def reconstruct(self, got: Payload, reply: Payload, turn: Turn) -> Payload:
        """The mask, the one that it is counted against, and the step."""
        return self.stepped(Payload(bits={**reply.bits, "guess": self.guess(got, turn)}), turn)

    def aggregate(self, state: BetaState, updates: Iterable[Update]) -> BetaState:
        """As ever, and let go of the last guess."""
        after = super().aggregate(state, updates)
        self._last = local()
        return after

    def change(self, start: Theta, votes: Mapping[str, npt.NDArray[np.uint32]], masks: int) -> Theta:
        """The mean of the flips."""
        return LEVELS * (votes["mask"].astype(np.float64) - votes["guess"]) / masks
