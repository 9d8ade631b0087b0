"""Runs of scenarios, and what their replies hold."""

from __future__ import annotations

import tiny
from rounds import frame_of, run, without_clock

from fedmask_flwr.wire import Frame

ROWS = ("0 1", "1 2", "2 3")
MADE = {"model": "made(hidden=16)", "weights": "glorot", "learning_rate": 0.03, "num_server_rounds": 6}
FILES = ("mask.fedmask", "checkpoint.safetensors")


def go(out, rows=ROWS, tamper=None, table=None, data="tiny:sources", **changes):
    """A run of a scenario with ``rows``; its lines and grid."""
    out.mkdir(exist_ok=True)
    keys = {"binary": data == "tiny:sources", **(table or {})}
    scenario = tiny.table(out.parent / "scenario.toml", *rows, data=data, **keys)
    kw = {**MADE, "local_epochs": 1, "method": "confedmade", "scenario": scenario, **changes}
    return run(out, len(rows), tamper, **kw)


def number(message):
    return message.content["config"]["server-round"]


def heard(kind, story):
    """A tamper that writes (round, client) -> reply into ``story`` and changes nothing."""

    def tamper(reply, message, context):
        if message.metadata.message_type == kind:
            story[number(message), context.node_config["partition-id"]] = reply
        return reply

    return tamper


def told(reply):
    """Metrics of a reply."""
    return dict(reply.content.metric_records["metrics"])


def meta(reply):
    return Frame.parse(frame_of(reply)).meta


def same(a, b):
    assert [without_clock(line) for line in a[0]] == [without_clock(line) for line in b[0]]
    for name in FILES:
        assert (a[1] / name).read_bytes() == (b[1] / name).read_bytes()
