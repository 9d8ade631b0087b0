"""One row a method: the row buys the contract suite (tests/methods/test_contract.py, tests/flower).

A registered method without a row fails the suite.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import oracles_methods as oracles


@dataclass(frozen=True)
class Case:
    """How the suite runs a method and which slow twin it must equal."""

    method: str
    oracle: Callable[..., Any]
    settings: Mapping[str, Any] = field(default_factory=dict)
    exact: bool = True  # aggregation does not depend on order in any bit; float sums do in the last
    accuracy: float = 0.8  # reached by two clients in 12 rounds of the tiny task (chance: 0.33)
    bpp_up: float = 1.0  # bits a parameter that the method's card promises at most, frame apart


CASES = {
    "fedpm": Case("fedpm", oracles.beta),
    "fedpm-window": Case("fedpm", oracles.beta, {"reset": 3, "prior": 2.0, "estimator": "mean"}, accuracy=0.5),
    "deltamask": Case("deltamask", oracles.beta),
    "deltamask-filter": Case("deltamask", oracles.beta, {"codec": "fuse8+png", "kappa": 1.0}, bpp_up=9.5),
    "fedavg": Case("fedavg", oracles.fedavg, exact=False, bpp_up=32.0),
}
