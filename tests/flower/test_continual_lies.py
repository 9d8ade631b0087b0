"""Replies of continual runs that must not count, and networks with other structural masks."""

from __future__ import annotations

import math
import struct
from dataclasses import replace

import numpy as np
import pytest
from continual_runs import FILES, ROWS, go, heard, number
from flwr.app import ConfigRecord
from loopback import LoopbackGrid
from rounds import frame_of
from safetensors.numpy import load_file

from fedmask_flwr.flower.records import frame_record
from fedmask_flwr.made import made
from fedmask_flwr.wire import Frame

pytestmark = pytest.mark.flower


def rewritten(reply, change):
    """The reply with its frame edited: ``change(frame)`` returns another."""
    frame = frame_of(reply)
    edited = change(Frame.parse(frame)).to_bytes()
    reply.content["arrays"] = frame_record(edited, reply.content["arrays"]["frame"].shape[0])
    return reply


def as_task(task):
    return lambda frame: replace(frame, meta={**frame.meta, "task": task})


def with_body(name, body, numel):
    def change(frame):
        fields = [
            replace(f, body=body(bytes(f.body)), numel=numel(f.numel)) if f.name == name else f
            for f in frame.fields
        ]
        return replace(frame, fields=tuple(fields))

    return change


LIES = [
    as_task(1),
    as_task("0"),
    as_task(2**62),
    lambda frame: replace(frame, meta={**frame.meta, "finished": 2**62}),
    with_body("base", lambda body: body[:-4], lambda n: n - 1),
    with_body("alpha", lambda body: struct.pack("<fff", 1.0, math.nan, 1.0), lambda n: 3),
    with_body("sketch", lambda body: bytes(4 * 100), lambda n: 100),
    lambda frame: replace(frame, fields=tuple(f for f in frame.fields if f.name != "holds")),
]


def test_a_lie_is_counted_and_has_no_effect(tmp_path, caplog):
    """Every round client 1 lies in another way; the run is that of a client that does not answer."""

    def lying(reply, message, context):
        if message.metadata.message_type == "train" and context.node_config["partition-id"] == 1:
            return rewritten(reply, LIES[number(message) - 1])
        return reply

    def silent(reply, message, context):
        mine = message.metadata.message_type == "train" and context.node_config["partition-id"] == 1
        return None if mine else reply

    for name, tamper in {"a": lying, "b": silent}.items():
        lines, _ = go(tmp_path / name, ROWS, tamper, {"limit": 40}, num_server_rounds=len(LIES))
        assert [(line["clients_ok"], line["clients_failed"]) for line in lines] == [(2, 1)] * len(LIES)
    mask, checkpoint = FILES
    assert (tmp_path / "a" / mask).read_bytes() == (tmp_path / "b" / mask).read_bytes()
    ours, theirs = (
        load_file(tmp_path / run / checkpoint) for run in "ab"
    )  # bytes of dropped replies are told apart
    assert ours.keys() == theirs.keys()
    assert all(np.array_equal(ours[name], theirs[name]) for name in ours)
    said = [r.getMessage() for r in caplog.records if "reply of client 1 dropped" in r.getMessage()]
    assert len(said) == len(LIES)
    why = (
        "this round is of task 0",
        "task is '0'",
        "task is 4",
        "finished is 4",
        "146 values for columns of 147",
        "NaN",
        "'sketch'",
        "holds",
    )
    assert all(text in line for text, line in zip(why, said, strict=True)), said


# Structural masks


class OtherMasks(LoopbackGrid):
    """The second device builds its network with another seed of masks."""

    def __init__(self, *args):
        super().__init__(*args)
        list(self.contexts.values())[1].run_config["model"] = "made(hidden=16 seed=5)"


def masks_of(reply):
    record = reply.content.config_records.get("config")
    return None if record is None else record.get("masks")


def test_every_reply_says_which_masks(whole):
    name = made((8,), 1, hidden=16).mask_id
    assert {masks_of(reply) for story in whole[2:] for reply in story.values()} == {name}


@pytest.mark.parametrize("method", ["confedmade", "fedavg"])
def test_a_device_with_other_masks_refuses(method, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("rounds.LoopbackGrid", OtherMasks)
    lines, _ = go(tmp_path / "run", method=method, num_server_rounds=2)
    assert [(line["clients_failed"], line["evaluations_failed"]) for line in lines] == [(1, 1)] * 2
    ours, its = made((8,), 1, hidden=16).mask_id, made((8,), 1, hidden=16, seed=5).mask_id
    said = [r.getMessage() for r in caplog.records if "failed (code" in r.getMessage()]
    assert said and all(f"structural masks {its}, the server's {ours}: build the model" in line for line in said)


def test_the_server_refuses_a_reply_with_other_masks(tmp_path, caplog):
    def tamper(reply, message, context):
        client, kind = context.node_config["partition-id"], message.metadata.message_type
        if kind != "query" and client == 1:
            reply.content["config"] = ConfigRecord({"masks": "0" * 32})
        if kind != "query" and client == 2 and number(message) == 2:
            del reply.content["config"]
        return reply

    lines, _ = go(tmp_path / "run", tamper=tamper, num_server_rounds=2)
    assert [(line["clients_failed"], line["evaluations_failed"]) for line in lines] == [(1, 1), (2, 2)]
    assert f"trained with structural masks {'0' * 32}, the server has" in caplog.text
    assert "trained with structural masks (none)" in caplog.text


@pytest.mark.parametrize("method", ["fedavg", "fedweit"])
def test_other_masks_are_welcome_where_the_run_says_so(method, tmp_path, monkeypatch):
    """Each device then has masks of its own; values are averaged position by position, whoever uses them."""
    replies = {}
    lines, _ = go(
        tmp_path / "run", tamper=heard("train", replies), method=method, same_masks=False, num_server_rounds=2
    )
    assert [line["clients_failed"] + line["evaluations_failed"] for line in lines] == [0, 0]
    assert len({masks_of(reply) for reply in replies.values()}) == 3
    assert masks_of(replies[1, 0]) == masks_of(replies[2, 0])
