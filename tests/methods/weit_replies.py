"""The server half of FedWeIT with replies made up."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import weit_cases as cases
from weit_turns import build, edited

from fedmask_flwr.wire import Counts

METHOD = build(tasks=2)


def at(method, task, clock=1, **changes):
    """A state in which a round of that task goes on."""
    return replace(method.init(), task=task, clock=clock, **changes)


def reply(method=METHOD, client=0, seed=0, task=0, finished=-1, holds=(), sketch=None, entry=None):
    """A reply of random columns, and with what a finished task learned (``entry``: its values)."""
    rng = np.random.default_rng([client, seed])
    found = edited(cases.reply(method, None, client, rng), meta={"task": task, "finished": finished})
    if holds:
        found = edited(found, counts={"holds": Counts(np.array(holds, np.uint32), max(holds))})
    if finished >= 0:
        found = edited(cases.entry(found, method, rng), meta={"task": task, "finished": finished})
    if entry is not None:
        where = np.packbits(np.abs(entry) > 0, bitorder="little")
        found = edited(found, bits={"where": where}, dense={"values": entry[np.abs(entry) > 0].astype(np.float32)})
    return found if sketch is None else cases.probed(found, sketch)


def told(method, state, client):
    """Ids to use, ids that travel, own tasks that came, and whether a sketch is asked for."""
    got = method.broadcast(state, client)
    ids = [tuple(got.counts[n].values.tolist()) if n in got.counts else () for n in ("use", "new", "came")]
    assert sum(name.startswith("where.") for name in got.bits) == len(ids[1])
    for slot, i in enumerate(ids[1]):
        where, values = state.knowledge.entry(i)
        assert np.array_equal(got.bits[f"where.{slot}"], where)
        assert np.array_equal(got.dense[f"values.{slot}"], values)
    return *ids, bool(got.meta["probe"])
