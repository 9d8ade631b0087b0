"""DrawStep: send a path to a candidate mask, let theta step by more than the candidates.

Ours: the candidates of KLMS (arXiv 2306.12625) for a share of the change, named by a path through a trellis
(`fedmask_flwr.masks.trellis`), and a server that takes that share many times, as over-relaxation does.

The client samples theta_g + (theta_k - theta_g)/step by minimal random coding and sends the path to its candidates.
The server moves theta, it does not vote anew:

    theta <- clip(theta + step * (mean_k(m_k) - theta), epsilon, 1 - epsilon)

In expectation, but for the clip, that is the mean of theta_k, as with KLMS, whose server is this one at step 1. But
candidates cost the divergence, which is the square of the change: half of the change, taken twice, costs a quarter.
The price is variance, step^2 theta (1 - theta)/K, which drives theta to 0 and 1 sooner: too soon if the step
is large.

Travels: up, a bit a block, about KL/step^2 * b / (b - 1) bits in all for a register of b; never more than
``target-bpp``, where that is set. Down, theta in integers, or the replies of others. Both exclude the frame (about
50 bytes).

Settings: step from 1.5 to ``step-min`` 1 on a cosine over the run; registers of 10 bits. There is no posterior, so
no prior, window or estimator. By its variance, the fewer devices in a round, the nearer to 1 the step should be.
``code = "blocks"`` sends numbers of separate blocks, as KLMS does.

Limits: the client hashes 2^b numbers for each weight that changed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, final

import numpy as np
import numpy.typing as npt

from fedmask_flwr.wire import Payload

from .base import Turn
from .following import FollowedConfig
from .klms import KlmsConfig, Sampling
from .stepping import LEVELS, SteppingConfig, SteppingMethod, Theta


class DrawStepConfig(SteppingConfig, KlmsConfig):
    """The step's settings, and those of the code."""

    coding: ClassVar[str] = "trellis"


@final
class DrawStep(SteppingMethod, Sampling):
    """See the module's card."""

    name: ClassVar[str] = "drawstep"
    first: ClassVar[float] = 1.5
    last: ClassVar[float] = 1.0
    Config: ClassVar[type[FollowedConfig]] = DrawStepConfig

    def reconstruct(self, got: Payload, reply: Payload, turn: Turn) -> Payload:
        """The mask that the indices stand for, and the step."""
        return self.stepped(super().reconstruct(got, reply, turn), turn)

    def change(self, start: Theta, votes: Mapping[str, npt.NDArray[np.uint32]], masks: int) -> Theta:
        """The mean of the candidates, less theta."""
        return LEVELS * votes["mask"].astype(np.float64) / masks - start
