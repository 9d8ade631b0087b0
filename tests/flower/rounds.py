"""A whole run of the bundled apps in this process: what the tests of rounds share."""

from __future__ import annotations

import contextlib
import json

import pytest
import tiny
from cases import CASES
from flwr.app import Context, RecordDict
from loopback import LoopbackGrid

from client_app.main import app
from fedmask_flwr.flower.apps import serve

# Flower sees one method like another: on its other releases these stand for all.
TYPICAL = ("deltamask", "fedavg", "fedmask")
every_case = pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, id=name, marks=[] if name in TYPICAL else [pytest.mark.each_method])
        for name, case in CASES.items()
    ],
)


def run(out, clients=3, tamper=None, first_node=100, stop_after=None, deaf=False, **changes):
    """Serve a run into ``out`` and return its metrics lines and the grid.

    The server is killed after ``stop_after`` rounds: before it asks again, or, if ``deaf``, once all devices have
    trained the next round.
    """
    config = tiny.run_config(**{"out": str(out), "memory_dir": str(out / "memory"), **changes})
    grid = LoopbackGrid(app, clients, config, tamper, first_node)
    if stop_after is not None:
        grid.send_and_receive = dying(grid.send_and_receive, stop_after, deaf)
    with contextlib.suppress(Killed):
        serve(grid, Context(1, 1, {}, RecordDict(), config))
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()], grid


def served(out, grid, clients, **changes):
    """Serve a run to the nodes of ``grid``, which get its run config, and return its metrics lines."""
    config = tiny.run_config(**{"out": str(out), "memory_dir": str(out / "memory"), "clients": clients, **changes})
    for context in grid.contexts.values():
        context.run_config = dict(config)
    serve(grid, Context(1, 1, {}, RecordDict(), config))
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


class Killed(BaseException):
    """Stands for SIGKILL: nothing in the package may catch it."""


def dying(send, rounds, deaf):
    left = [rounds]

    def send_and_receive(messages, *, timeout=None):
        if any(m.metadata.message_type == "train" for m in messages):
            if left[0] == 0:
                if deaf:
                    send(messages, timeout=timeout)
                raise Killed
            left[0] -= 1
        return send(messages, timeout=timeout)

    return send_and_receive


def without_clock(line):
    return {k: v for k, v in line.items() if k != "seconds"}


def frame_of(message):
    return message.content.array_records["arrays"]["frame"].data
