"""What is learned: one method is one file with both halves. No Flower here.

``resolve("fedpm")`` finds a method by name; ``resolve("their_pkg.mine:Mine")`` finds one outside the package.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from .base import Fields as Fields
from .base import Known as Known
from .base import Memory as Memory
from .base import Method as Method
from .base import MethodConfig as MethodConfig
from .base import Training as Training
from .base import Turn as Turn
from .base import Update as Update
from .base import View as View

# Lazy: a missing optional dependency breaks only the method that needs it.
BUILTIN = {
    "bnn-fedavg": "fedmask_flwr.methods.bnn_fedavg:BnnFedAvg",
    "confedmade": "fedmask_flwr.methods.confedmade:ConfedMADE",
    "deltamask": "fedmask_flwr.methods.deltamask:DeltaMask",
    "deltastep": "fedmask_flwr.methods.deltastep:DeltaStep",
    "drawstep": "fedmask_flwr.methods.drawstep:DrawStep",
    "eden": "fedmask_flwr.methods.eden:Eden",
    "fedavg": "fedmask_flwr.methods.fedavg:FedAvg",
    "fedcode": "fedmask_flwr.methods.fedcode:FedCode",
    "fedmask": "fedmask_flwr.methods.fedmask:FedMask",
    "fedpm": "fedmask_flwr.methods.fedpm:FedPM",
    "fedprox": "fedmask_flwr.methods.fedprox:FedProx",
    "fedweit": "fedmask_flwr.methods.fedweit:FedWeIT",
    "finetune": "fedmask_flwr.methods.finetune:FineTune",
    "klms": "fedmask_flwr.methods.klms:Klms",
    "lg-fedavg": "fedmask_flwr.methods.lg_fedavg:LgFedAvg",
    "linear-probe": "fedmask_flwr.methods.linear_probe:LinearProbe",
    "lth": "fedmask_flwr.methods.lth:LTH",
    "mpfl": "fedmask_flwr.methods.mpfl:MPFL",
    "per-fedavg": "fedmask_flwr.methods.per_fedavg:PerFedAvg",
    "pruning-fl": "fedmask_flwr.methods.pruning_fl:PruningFL",
    "qsgd": "fedmask_flwr.methods.qsgd:QSGD",
    "signsgd": "fedmask_flwr.methods.signsgd:SignSGD",
    "standalone": "fedmask_flwr.methods.standalone:Standalone",
    "topk": "fedmask_flwr.methods.topk:TopK",
}

__all__ = [
    "BUILTIN",
    "Fields",
    "Known",
    "Memory",
    "Method",
    "MethodConfig",
    "Training",
    "Turn",
    "Update",
    "View",
    "resolve",
]


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
