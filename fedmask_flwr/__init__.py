"""Ship masks, not weights: federated learning of binary masks over frozen networks, on Flower.

Importing this package imports neither torch nor flwr: a small device pays only for what it uses. The public
names below are loaded on first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .flower import MaskStrategy as MaskStrategy
    from .flower import MaskTurn as MaskTurn
    from .masks import Backbone as Backbone
    from .masks import MaskAdam as MaskAdam
    from .masks import MaskSGD as MaskSGD
    from .masks import MaskSpec as MaskSpec

_HOME = {
    "Backbone": "masks",
    "MaskAdam": "masks",
    "MaskSGD": "masks",
    "MaskSpec": "masks",
    "MaskStrategy": "flower",
    "MaskTurn": "flower",
}

__version__ = "0.1.0"
__all__ = ["Backbone", "MaskAdam", "MaskSGD", "MaskSpec", "MaskStrategy", "MaskTurn"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
