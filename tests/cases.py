"""One row a method: the row buys the contract suite (tests/methods/test_contract.py, tests/flower).

A registered method without a row fails the suite.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import oracles_baselines as baselines
import oracles_compressed as compressed
import oracles_fedmask as fedmask
import oracles_methods as oracles
import oracles_slimming as slimming
import weit_cases as weit

from fedmask_flwr.methods import resolve


@dataclass(frozen=True)
class Case:
    """How the suite runs a method and which slow twin it must equal."""

    method: str
    oracle: Callable[..., Any]
    settings: Mapping[str, Any] = field(default_factory=dict)
    exact: bool = True  # aggregation does not depend on order in any bit; float sums do in the last
    accuracy: float = 0.8  # reached by two clients in 12 rounds of the tiny task (chance: 0.33)
    bpp_up: float = 1.0  # bits a parameter that the method's card promises at most, frame apart
    lr: float = 0.05
    reply: Callable[..., Any] | None = None  # (method, state, client, rng) -> payload, where not any bits will do
    net: str = "net"  # of tiny
    visible: Callable[..., Any] | None = None  # (method, state) -> what the oracle predicts
    flip_rate: float = 2.0**-8  # of every other reply

    def config(self):
        """The method's own settings, without the codec."""
        return {k: v for k, v in self.settings.items() if k != "codec"}

    @property
    def personal(self):
        """Whether nodes are asked for their client numbers."""
        return resolve(self.method).personal or self.settings.get("downlink", "whole") != "whole"


CASES = {
    "fedpm": Case("fedpm", oracles.beta),
    "fedpm-window": Case("fedpm", oracles.beta, {"reset": 3, "prior": 2.0, "estimator": "mean"}, accuracy=0.5),
    "deltamask": Case("deltamask", oracles.beta),
    "deltamask-filter": Case("deltamask", oracles.beta, {"codec": "fuse8+png", "kappa": 1.0}, bpp_up=9.5),
    "deltamask-relay": Case(
        "deltamask", oracles.beta, {"downlink": "relay", "reset": 2}, accuracy=0.7, flip_rate=0.0
    ),
    "deltamask-votes": Case(
        "deltamask", oracles.beta, {"downlink": "votes", "reset": 2}, accuracy=0.7, flip_rate=0.0
    ),
    "klms": Case("klms", oracles.beta, reply=oracles.klms_reply, flip_rate=0.0),
    "klms-relay": Case(
        "klms",
        oracles.beta,
        {"downlink": "relay", "reset": 2, "target_bpp": 0.25},
        accuracy=0.7,
        bpp_up=0.25,
        reply=oracles.klms_reply,
        flip_rate=0.0,
    ),
    "deltastep": Case("deltastep", oracles.deltastep, {"step": 2.0}, flip_rate=0.0),
    "deltastep-relay": Case(
        "deltastep",
        oracles.deltastep,
        {"step": 3.0, "downlink": "relay"},
        accuracy=0.7,
        flip_rate=0.0,
    ),
    "drawstep": Case(  # a reply here is a byte, so seeds differ much
        "drawstep", oracles.drawstep, {"step": 1.5}, accuracy=0.5, reply=oracles.klms_reply, flip_rate=0.0
    ),
    "drawstep-relay": Case(
        "drawstep",
        oracles.drawstep,
        {"step": 1.5, "downlink": "relay"},
        accuracy=0.5,
        reply=oracles.klms_reply,
        flip_rate=0.0,
    ),
    "fedavg": Case("fedavg", oracles.fedavg, exact=False, bpp_up=32.0),
    "fedmask": Case("fedmask", fedmask.fedmask, bpp_up=1.6, lr=0.1, reply=fedmask.reply, visible=fedmask.visible),
    "fedmask-bit": Case(
        "fedmask",
        fedmask.fedmask,
        {"returns": "bit", "prune_by": "neuron", "codec": "fuse8+png"},
        accuracy=0.6,
        bpp_up=9.5,
        lr=0.1,
        reply=fedmask.reply,
        visible=fedmask.visible,
    ),
    "standalone": Case("standalone", oracles.standalone, bpp_up=0.0),
    "bnn-fedavg": Case("bnn-fedavg", baselines.signs, exact=False, bpp_up=3.81, lr=0.1),
    "finetune": Case("finetune", baselines.mean_of_weights, exact=False, bpp_up=32.0),
    "lg-fedavg": Case("lg-fedavg", baselines.mean_of_weights, {"shared_layers": 1}, exact=False, bpp_up=8.2),
    "linear-probe": Case("linear-probe", baselines.mean_of_weights, exact=False, bpp_up=8.2),
    "per-fedavg": Case("per-fedavg", baselines.mean_of_weights, exact=False, bpp_up=32.0),
    "topk": Case("topk", compressed.topk, {"share": 0.1}, exact=False, bpp_up=3.8, reply=compressed.topk_reply),
    "signsgd": Case("signsgd", compressed.signsgd, {"server_lr": 0.03}, reply=compressed.sign_reply),
    "qsgd": Case("qsgd", compressed.qsgd, exact=False, bpp_up=3.9, reply=compressed.qsgd_reply),
    "eden": Case("eden", compressed.eden, exact=False, bpp_up=1.5, reply=compressed.eden_reply),
    "fedcode": Case(
        "fedcode", compressed.fedcode, {"centres": 8}, exact=False, bpp_up=4.0, reply=compressed.fedcode_reply
    ),
    "mpfl": Case(
        "mpfl",
        slimming.mpfl,
        {"search_rounds": 3, "keep_min": 4},
        bpp_up=32.0,
        reply=slimming.reply,
        visible=slimming.visible,
    ),
    "mpfl-never": Case(
        "mpfl",
        slimming.mpfl,
        {"search_rounds": 4, "keep_min": 4, "rewind": "never", "rule": "threshold", "consensus": 0.4},
        bpp_up=32.0,
        reply=slimming.reply,
        visible=slimming.visible,
    ),
    "pruning-fl": Case(
        "pruning-fl",
        slimming.pruning_fl,
        {"search_rounds": 3, "keep_min": 4},
        exact=False,
        bpp_up=32.0,
        visible=slimming.visible,
    ),
    "fedprox": Case("fedprox", oracles.fedavg, {"mu": 0.1}, exact=False, bpp_up=32.0),
    "fedweit": Case(
        "fedweit", weit.mean_of_columns, exact=False, bpp_up=60.0, reply=weit.reply, visible=weit.visible
    ),
    "fedweit-two-tasks": Case(
        "fedweit",
        weit.mean_of_columns,
        {"tasks": 2, "retroactive": "gradient", "client_sparsity": 0.0},
        exact=False,
        bpp_up=60.0,
        reply=weit.reply,
        visible=weit.visible,
    ),
    "confedmade": Case(
        "confedmade",
        weit.mean_of_columns,
        exact=False,
        bpp_up=40.0,
        reply=weit.reply,
        net="structured_net",
        visible=weit.visible,
    ),
    "lth": Case("lth", slimming.lth, {"cycle": 2, "cycles": 2, "prune_each": 0.3}, exact=False, bpp_up=32.0),
}
