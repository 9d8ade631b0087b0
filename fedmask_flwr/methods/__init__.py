"""What is learned: one method is one file with both halves. No Flower here.

``resolve("fedpm")`` finds a method by name; ``resolve("their_pkg.mine:Mine")`` finds one outside the package.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from .base import Direction as Direction
from .base import Method as Method
from .base import MethodConfig as MethodConfig
from .base import Training as Training
from .base import Turn as Turn
from .base import Update as Update

# Lazy: a missing optional dependency breaks only the method that needs it.
BUILTIN = {
    "deltamask": "fedmask_flwr.methods.deltamask:DeltaMask",
    "fedavg": "fedmask_flwr.methods.fedavg:FedAvg",
    "fedpm": "fedmask_flwr.methods.fedpm:FedPM",
}

__all__ = ["BUILTIN", "Direction", "Method", "MethodConfig", "Training", "Turn", "Update", "resolve"]


def resolve(name: str) -> type[Method[Any]]:
    """Return the method class that ``name`` stands for.

    Raises
    ------
    ValueError
        When there is no such method; the message lists the built-in ones.
    """
    module, _, attribute = BUILTIN.get(name, name).partition(":")
    try:
        found = getattr(import_module(module), attribute) if attribute else None
    except (ImportError, AttributeError) as error:
        raise ValueError(f"cannot import method {name!r}: {error}") from error
    if not (isinstance(found, type) and issubclass(found, Method)):
        raise ValueError(
            f"no method {name!r}: use one of {', '.join(sorted(BUILTIN))}, or your own as 'package.module:Class'"
        )
    return found
