"""The update rules that train a mask: Adam and SGD on its scores."""

from __future__ import annotations

from typing import Any, final

from torch import nn

from .kernels import AdamRates, SgdRates, adam_, adam_rates, sgd_, single
from .optim import MaskOptimizer
from .spec import MaskSpec


@final
class MaskAdam(MaskOptimizer):
    """Adam on the scores; see `MaskOptimizer` for the other parameters.

    Raises
    ------
    ValueError
        `betas` outside [0, 1) or `eps` not positive.
    """

    def __init__(
        self,
        model: nn.Module,
        spec: MaskSpec | None = None,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        **settings: Any,
    ) -> None:
        if not (0 <= betas[0] < 1 and 0 <= betas[1] < 1 and eps > 0):
            raise ValueError(f"betas must lie in [0, 1) and eps must be positive, got {betas} and {eps}")
        super().__init__(model, spec, betas=betas, eps=eps, **settings)

    def _moment_names(self) -> tuple[str, ...]:
        return ("m", "v")

    def _rates(self, group: dict[str, Any]) -> AdamRates:
        return adam_rates(float(group["lr"]), group["betas"], group["eps"], self._updates)

    def _update(self, s: Any, g: Any, moments: list[Any], scratch: Any, rates: tuple[float, ...]) -> None:
        adam_(s, g, moments[0], moments[1], scratch, AdamRates(*rates))


@final
class MaskSGD(MaskOptimizer):
    """SGD on the scores, with momentum if asked; see `MaskOptimizer` for the other parameters.

    Raises
    ------
    ValueError
        `momentum` outside [0, 1).
    """

    def __init__(
        self, model: nn.Module, spec: MaskSpec | None = None, *, momentum: float = 0.0, **settings: Any
    ) -> None:
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum must lie in [0, 1), got {momentum}")
        self._momentum = momentum
        super().__init__(model, spec, momentum=momentum, **settings)

    def _moment_names(self) -> tuple[str, ...]:
        return ("velocity",) if self._momentum else ()

    def _rates(self, group: dict[str, Any]) -> SgdRates:
        return SgdRates(single(group["momentum"]), single(group["lr"]))

    def _update(self, s: Any, g: Any, moments: list[Any], scratch: Any, rates: tuple[float, ...]) -> None:
        del scratch
        sgd_(s, g, moments[0] if moments else None, SgdRates(*rates))
