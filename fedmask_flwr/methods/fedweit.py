"""FedWeIT: federated continual learning with weighted inter-client transfer, for any classifier.

Paper: Yoon, Jeong, Lee, Yang, Hwang, "Federated Continual Learning with Weighted Inter-client Transfer", ICML 2021,
arXiv 2003.03196. theta = B*sigma(m) + A + sum_n alpha_n KB_n.

Travels: up, 32 bits for each weight of the columns of B that are sent (``client-sparsity`` keeps the others back),
every round, and once a task the values of A that are not small, with a coded bit each for where they are; down, the
mean of B and, once, each entry of others' knowledge that the device is to use.

Settings: see ``WeitConfig``; the last layer is each task's own (``local-layers``).

Limits: devices need B, an A for every task and Adam's moments on disk. There is no network on the server, so only
devices evaluate, with the B that they trained. Unlike the released code, masks get the task's gradient, earlier A
do follow B, columns are chosen by sigma(m), and a column that nobody sends stays what it was.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, final

from torch import Tensor, nn

from .weit import Weit


@final
class FedWeIT(Weit):
    """See the module's card."""

    name: ClassVar[str] = "fedweit"

    @staticmethod
    def structural(model: nn.Module) -> Mapping[str, Tensor] | None:
        """Every weight matters; on a MADE that is the naive combination of the two."""
        return None
