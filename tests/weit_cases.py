"""The FedWeIT family in the contract suite: replies it allows, and a slow twin of its aggregation."""

from __future__ import annotations

import numpy as np

from fedmask_flwr.methods.weit_state import SKETCH
from fedmask_flwr.wire import Counts, Payload

NONE = Counts(np.zeros(0, np.uint32), 0)


def reply(method, state, client, rng):
    """Some columns of some B."""
    flags = rng.random(method.structure.columns) < 0.7
    column = method.structure.column.numpy()
    dense = {
        "base": rng.normal(size=int(flags[column].sum())).astype(np.float32),
        "alpha": np.zeros(0, np.float32),
        "sketch": np.zeros(0, np.float32),
    }
    bits = {"columns": np.packbits(flags, bitorder="little")}
    return Payload(bits=bits, counts={"holds": NONE, "ids": NONE}, dense=dense, meta={"task": 0, "finished": -1})


def entry(payload, method, rng, task=0):
    """The same reply with what a finished task learned."""
    where = rng.random(method.structure.numel) < 0.5
    bits = {**payload.bits, "where": np.packbits(where, bitorder="little")}
    dense = {**payload.dense, "values": rng.normal(size=int(where.sum())).astype(np.float32)}
    return Payload(bits=bits, counts=payload.counts, dense=dense, meta={"task": task, "finished": task})


def probed(payload, values):
    """The same reply with a sketch."""
    assert values.size == SKETCH
    return Payload(
        bits=payload.bits, counts=payload.counts, dense={**payload.dense, "sketch": values}, meta=payload.meta
    )


def visible(method, state):
    """theta_G, or the named weights before anybody answered."""
    return state.base if state.base.size else method.start * 0


def mean_of_columns(method, rounds):
    """Column by column, value by value: the mean over those that sent it; what nobody sends stays."""
    column = method.structure.column.numpy()
    base = np.zeros(method.structure.numel)
    for updates in rounds:
        heard = [[] for _ in base]
        for update in updates:
            flags = np.unpackbits(update.payload.bits["columns"], bitorder="little")
            values = iter(update.payload.dense["base"].tolist())
            for i, o in enumerate(column):
                if flags[o]:
                    heard[i].append(next(values))
        base = np.array([np.mean(h) if h else b for h, b in zip(heard, base, strict=True)], np.float32)
    return base
