"""CONFEDMADE: federated continual density estimation, FedWeIT inside the masks of a MADE.

Papers: CONFEDMADE, CoLLAs 2024 (PMLR 274:70-85); FedWeIT, arXiv 2003.03196; MADE: Germain, Gregor, Murray,
Larochelle, ICML 2015, arXiv 1502.03509. theta = (B*sigma(m) + A + sum_n alpha_n KB_n) * M.

Travels: as FedWeIT, but only the weights that some of the shared autoregressive masks M lets through: half of them,
for one mask. Both ends build M from the model's seed, so no position travels; a device with other masks is refused.

Settings: see ``WeitConfig``; model ``made``.

Limits: as FedWeIT. With several masks to cycle, their union travels: "half" holds for one mask, or one order.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, final

from torch import Tensor, nn

from .weit import Weit


@final
class ConfedMADE(Weit):
    """See the module's card."""

    name: ClassVar[str] = "confedmade"
    packed: ClassVar[bool] = True

    @staticmethod
    def structural(model: nn.Module) -> Mapping[str, Tensor] | None:
        """The union of the model's masks.

        Raises
        ------
        ValueError
            When it has none.
        """
        structure = getattr(model, "structure", None)
        if structure is None:
            raise ValueError("confedmade needs a network with structural masks: use model made, or method fedweit")
        found: Mapping[str, Tensor] = structure()
        return found
