"""FedPM: clients learn stochastic masks of a random network, the server keeps their Beta posterior.

Paper: Isik, Pase, Gunduz, Weissman, Zorzi, "Sparse Random Networks for Communication-Efficient Federated
Learning", ICLR 2023, arXiv 2209.15328.

Travels: up, one fresh sample m_k ~ Bern(theta_k), at most 1 bit a parameter; down, integer vote counts, at
most log2(K + 1) bits a parameter. Both exclude the frame (about 50 bytes).

Settings: Adam 0.1 fresh each round, 3 local epochs, batch 128, posterior mode with prior 1, epsilon 0.01,
reset every ceil(1/rho) rounds. A learning rate below 0.03 is the commonest reason for "it does not learn".

Limits: weights stay at +-e/sqrt(fan_in); the uplink cannot fall below the entropy of the sample, so about
1 bit while theta is near 1/2. The official code differs from the paper (extra factor theta in the gradient:
``ste = "p"``); neither entropy-codes anything it sends.
"""

from __future__ import annotations

from typing import ClassVar, final

from torch import nn
from torch.optim import Optimizer

from fedmask_flwr.wire import Payload, SideInfo, pack_bits

from .base import Memory, Turn
from .beta import trained_theta
from .following import FollowedMethod


@final
class FedPM(FollowedMethod):
    """See the module's card."""

    name: ClassVar[str] = "fedpm"

    def known(self, got: Payload, turn: Turn, shared: Memory) -> SideInfo:
        """Nothing but the layer sizes: FedPM codes the mask itself."""
        return SideInfo(self.spec.sizes)

    def finish(self, got: Payload, model: nn.Module, optimizer: Optimizer, turn: Turn, memory: Memory) -> Payload:
        """One fresh sample of theta_k, not the last training mask."""
        return Payload(bits={"mask": pack_bits(self.draw(trained_theta(optimizer), turn))})
