"""A whole run of the bundled apps in this process: the same bits as in the simulation, without its start."""

from __future__ import annotations

import json

from flwr.app import Context, RecordDict
from loopback import LoopbackGrid

from client_app.main import app
from fedmask_flwr.flower.apps import serve
from fedmask_flwr.simulation.stage import defaults


def federate(out, clients, **settings):
    """Run into ``out``, the run config's own keys as ``fedmask run`` has them, and return its metrics lines."""
    config = {
        **defaults(),
        "out": str(out),
        "memory-dir": f"{out}-memory",
        "clients": clients,
        "min-nodes": clients,
        **settings,
    }
    serve(LoopbackGrid(app, clients, config), Context(1, 1, {}, RecordDict(), config))
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
