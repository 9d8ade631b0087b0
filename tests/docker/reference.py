"""The run that a stack's is compared with: the same apps in this process, without Ray, SuperLink or sockets."""

from __future__ import annotations

import json

from flwr.app import Error, Message
from loopback import LoopbackGrid

from client_app.main import app
from fedmask_flwr.flower.apps import federate
from fedmask_flwr.simulation.stage import defaults


def reference(folder, raising=(), **config):
    """Lines and mask of a run of three devices, the second of which fails in the rounds ``raising``."""

    def tamper(reply, message, context):
        fails = context.node_config["partition-id"] == 1 and message.content["config"]["server-round"] in raising
        return Message(Error(2, "it raised"), reply_to=message) if fails else reply

    told = defaults() | {"data": "digits", "clients": 3, "memory-dir": str(folder / "memory")}
    told |= {key.replace("_", "-"): value for key, value in config.items()}
    federate(LoopbackGrid(app, 3, told, tamper), told, folder / "run")
    lines = [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()]
    return lines, (folder / "run/mask.fedmask").read_bytes()
