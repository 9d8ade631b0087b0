"""DeltaMask: send only the mask bits that the server could not already guess.

Paper: Tsouvalas, Asano, Saeed, "Federated Fine-Tuning of Foundation Models via Probabilistic Masking",
arXiv 2311.17299.

Both ends draw m_g = 1[u < theta_g] from the same keyed uniforms u of (round, client); the client also draws
m_k = 1[u < theta_k], so the two differ at |theta_k - theta_g| of the positions. The ceil(kappa |Delta|) flips
with the largest KL(theta_k || theta_g) travel, coded against m_g; the rest of m_k is guessed.

Travels: up, an exact code of the kept flips (``codec = "auto"``), about d*H2(p) bits at flip density p, never
more than 1 bit a parameter; or the paper's filter and picture (``codec = "fuse8+png"``), about 9 bits a flip.
Down, integer vote counts, at most log2(K + 1) bits a parameter. Both exclude the frame (about 50 bytes).

Settings: as FedPM, with kappa from ``kappa`` to ``kappa-min`` on a cosine over the run. The paper's end value is
not known; both are 0.8 here, which is constant. theta0 0.95 on a pretrained backbone. kappa 1 with an exact
codec is FedPM, bit for bit, at a fraction of the bytes.

Limits: kappa < 1 biases towards the old mask. Filters flip 2^-8 of all other bits; the server removes that in
expectation, not in variance. One u for all clients (``seed-scope = "global"``) collapses theta onto one
sample: it is offered to show that. The server must decode each client by itself, so secure aggregation of
sums does not apply.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar, final

import numpy as np
import numpy.typing as npt
from pydantic import Field
from torch import nn
from torch.optim import Optimizer

from fedmask_flwr.wire import Payload, pack_bits, unpack_bits

from .base import Memory, Turn
from .beta import trained_theta
from .following import FollowedConfig, FollowedMethod
from .rates import affordable, cosine


class DeltaMaskConfig(FollowedConfig):
    """FedPM's settings and the share of flips that travels."""

    kappa: float = Field(0.8, gt=0.0, le=1.0, description="share of the flips sent in round 1")
    kappa_min: float = Field(0.8, gt=0.0, le=1.0, description="share sent in the last round")
    target_bpp: float = Field(
        0.0, ge=0.0, description="uplink bits a parameter that no round exceeds (codec auto); 0: what kappa says"
    )


@final
class DeltaMask(FollowedMethod):
    """See the module's card."""

    name: ClassVar[str] = "deltamask"
    priced: ClassVar[bool] = True
    Config: ClassVar[type[FollowedConfig]] = DeltaMaskConfig

    def finish(self, got: Payload, model: nn.Module, optimizer: Optimizer, turn: Turn, memory: Memory) -> Payload:
        """m_g with the kept flips applied."""
        theta_k, mask = trained_theta(optimizer), unpack_bits(self.guess(got, turn), self.numel)
        flips = np.flatnonzero(mask != self.draw(theta_k, turn))
        kappa = cosine(self.config.kappa, self.config.kappa_min, turn)
        flips = by_kl(flips, theta_k, self.theta(got))[: math.ceil(kappa * flips.size)]
        keep = flips.size
        if self.config.target_bpp > 0.0:
            keep = affordable(mask, flips, self.guessed(got, turn), self.config.target_bpp)
        mask[flips[:keep]] ^= True
        return Payload(bits={"mask": pack_bits(mask)})


def by_kl(
    flips: npt.NDArray[np.int64], theta_k: npt.NDArray[np.floating[Any]], theta_g: npt.NDArray[np.float64]
) -> npt.NDArray[np.int64]:
    """Flip positions, those with the largest KL(Bern(theta_k) || Bern(theta_g)) first."""
    k = np.clip(theta_k[flips].astype(np.float64), 1e-12, 1.0 - 1e-12)
    g = theta_g[flips]
    kl = k * np.log(k / g) + (1.0 - k) * np.log((1.0 - k) / (1.0 - g))
    return flips[np.argsort(-kl, kind="stable")]
