"""Replies that FedWeIT's server refuses."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from weit_replies import METHOD, at, reply
from weit_turns import Device, begun, build, edited, folded

from fedmask_flwr.methods import Turn, Update
from fedmask_flwr.methods.reading import read_reply
from fedmask_flwr.methods.weit_state import FOUND, SKETCH
from fedmask_flwr.wire import Counts, Payload, SideInfo, WireError, pack

HUGE = 2**63
NAN = np.array([np.nan] * 3, np.float32)


def ids(*values):
    return Counts(np.array(values, np.uint32), max(values))


WRONG = {
    "a stale task": ({"meta": {"task": 0}}, "stale answer"),
    "another task": ({"meta": {"task": 2}}, "stale answer"),
    "a huge task": ({"meta": {"task": HUGE}}, "task is .*: expected a number"),
    "a negative task": ({"meta": {"task": -1}}, "task is -1: expected"),
    "a task in words": ({"meta": {"task": "1"}}, "task is '1'"),
    "half a task": ({"meta": {"task": 1.0}}, "task is 1.0"),
    "a future finish": ({"meta": {"finished": 2}}, "cannot be finished in task 1"),
    "a huge finish": ({"meta": {"finished": HUGE}}, "finished is"),
    "a negative finish": ({"meta": {"finished": -2}}, "finished is -2"),
    "a finish in words": ({"meta": {"finished": "all"}}, "finished is 'all'"),
    "nothing learned": ({"meta": {"finished": 0}}, "come together"),
    "too many values": ({"dense": {"base": np.zeros(METHOD.structure.numel + 1, np.float32)}}, "for columns of"),
    "no values": ({"dense": {"base": np.zeros(0, np.float32)}}, "for columns of"),
    "attention to nothing": ({"dense": {"alpha": np.zeros(3, np.float32)}}, "attention"),
    "no attention": ({"counts": {"ids": ids(0)}}, "attention"),
    "attention that is none": ({"counts": {"ids": ids(0)}, "dense": {"alpha": NAN}}, "attention"),
    "attention beyond all": ({"counts": {"ids": ids(0)}, "dense": {"alpha": NAN * 0 + np.inf}}, "attention"),
    "ids twice": (
        {"counts": {"ids": ids(0, 0)}, "dense": {"alpha": np.zeros(6, np.float32)}},
        "different entry ids",
    ),
    "another sketch": ({"dense": {"sketch": np.zeros(SKETCH - 1, np.float32)}}, "a sketch"),
    "a sketch that is none": ({"dense": {"sketch": np.full(SKETCH, np.nan, np.float32)}}, "a sketch"),
}


@pytest.mark.parametrize(("change", "match"), WRONG.values(), ids=WRONG)
def test_replies_that_cannot_be_are_refused(change, match):
    """On a server that knows the client at task 1, and others' entries."""
    state = folded(METHOD, at(METHOD, 0), {k: reply(client=k, finished=0) for k in (1, 2)})
    state = folded(METHOD, replace(state, task=1, clock=2), {0: reply(task=1)})
    good = reply(task=1)
    METHOD.check(state, Update(0, good, 1.0, 0.0))
    with pytest.raises(WireError, match=match):
        METHOD.check(state, Update(0, edited(good, **change), 1.0, 0.0))


def test_an_entry_that_does_not_fit_is_refused():
    state, good = at(METHOD, 0), reply(finished=0)
    METHOD.check(state, Update(0, good, 1.0, 0.0))
    n = METHOD.structure.numel
    behind = np.packbits(np.r_[np.ones(n, bool), np.ones(-n % 8, bool)], bitorder="little")
    cases_ = {
        "values for": edited(good, dense={"values": good.dense["values"][1:]}),
        "come together": edited(good, meta={"finished": -1}),
        "a value for each bit": edited(good, dense={"values": good.dense["values"] * np.float32(np.nan)}),
    }
    if n % 8:
        cases_["behind the last"] = edited(
            good, bits={"where": behind}, dense={"values": np.ones(8 * behind.size, np.float32)}
        )
    for match, bad in cases_.items():
        with pytest.raises(WireError, match=match):
            METHOD.check(state, Update(0, bad, 1.0, 0.0))


def test_who_finds_its_tasks_cannot_go_back():
    method = build(tasks=0)
    state = folded(method, begun(method, method.init()), {0: reply(method, task=3), 1: reply(method, 1, task=0)})
    assert state.task == FOUND
    for task in (3, 4):
        method.check(state, Update(0, reply(method, task=task), 1.0, 0.0))
    with pytest.raises(WireError, match="was at task 3 before"):
        method.check(state, Update(0, reply(method, task=2), 1.0, 0.0))
    method.check(state, Update(1, reply(method, 1, task=2), 1.0, 0.0))


def test_who_finds_its_tasks_and_lost_its_memory_goes_on():
    """It begins the task anew at which it was last heard: an earlier one would be refused for ever."""
    method = build(tasks=0)
    device, state = Device(method, 0), method.init()
    for _ in range(2):
        state = begun(method, state)
        if device.memory:
            device.memory["switch"] = np.ones(1, np.uint8)  # as if the losses had jumped
        state = folded(method, state, {0: device.turn(state, 0, 1)})
    assert method.tasks(device.memory) == (0, 1)
    device.memory.clear()
    for _ in range(2):
        state = begun(method, state)
        state = folded(method, state, {0: device.turn(state, 0, 1)})
        assert method.tasks(device.memory) == (1,)


@pytest.mark.parametrize(
    ("name", "wrong"),
    [("columns", 1), ("base", 10**6), ("alpha", 4), ("sketch", 511), ("where", 8), ("values", 10**6), ("use", 3)],
)
def test_foreign_shapes_are_refused_before_they_are_read(name, wrong):
    """A frame of the device's making: fields of other sizes, or that no reply has."""
    state = at(METHOD, 0)
    good = reply(finished=0)
    kind = "bits" if name in ("columns", "where") else "counts" if name == "use" else "dense"
    value = {
        "bits": np.zeros(-(-wrong // 8), np.uint8),
        "dense": np.zeros(wrong, np.float32),
        "counts": Counts(np.zeros(wrong, np.uint32), 0),
    }[kind]
    known = dict(METHOD.heard({}))
    if kind == "bits":
        known[name] = SideInfo((wrong,))
    frame = pack(edited(good, **{kind: {name: value}}), digest=b"together", round_=1, known=known)
    told_, turn = METHOD.broadcast(state, 0), Turn(1, 1, 9, 0)
    with pytest.raises(WireError, match=f"field '{name}'"):
        read_reply(frame, METHOD, told_, turn, {}, digest=b"together")
    fine = pack(good, digest=b"together", round_=1, known=METHOD.heard({}))
    assert read_reply(fine, METHOD, told_, turn, {}, digest=b"together").payload.meta["finished"] == 0


def test_an_entry_alone_is_no_reply():
    """The fields of a finished task come with all the others, or not at all."""
    good = reply(finished=0)
    half = Payload(bits=good.bits, counts=good.counts, dense={k: v for k, v in good.dense.items() if k != "values"})
    frame = pack(half, digest=b"together", round_=1, known=METHOD.heard({}))
    with pytest.raises(WireError, match="the reply holds"):
        read_reply(frame, METHOD, METHOD.broadcast(at(METHOD, 0), 0), Turn(1, 1, 9, 0), {}, digest=b"together")
