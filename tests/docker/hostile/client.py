"""The ClientApp with a device in it that misbehaves; mounted over the packaged one.

A device does so when its memory folder holds ``hostile.json``, {"round": "kind"}; without one it is honest.
"""

from __future__ import annotations

import json
import os
import pickle
from dataclasses import replace
from pathlib import Path

from flwr.app import ArrayRecord, Context, Message
from flwr.clientapp import ClientApp

from fedmask_flwr.flower import identify, safely
from fedmask_flwr.flower.client import memory_folder
from fedmask_flwr.flower.records import ARRAYS, frame_of, frame_record, read_plan
from fedmask_flwr.wire.frame import Frame

HUGE = 100 * 10**6
app = ClientApp()


@app.train()
def train(msg: Message, context: Context) -> Message:
    folder, (_, number) = memory_folder(context), read_plan(msg.content)
    told = folder / "hostile.json"
    kind = json.loads(told.read_text()).get(str(number), "") if told.exists() else ""
    if kind == "unguarded":
        raise RuntimeError("hostile: nobody catches this")
    if kind == "dead":
        os._exit(3)
    return safely(lambda msg, context: answer(kind, msg, context, folder / "hostile.reply"))(msg, context)


def answer(kind: str, msg: Message, context: Context, kept: Path) -> Message:
    from fedmask_flwr.flower.apps import train_turn

    if kind == "raise":
        raise RuntimeError("hostile: I will not train")
    if kind == "stale":
        arrays, metrics = pickle.loads(kept.read_bytes())  # its own
        return rewritten(train_turn(msg, context), arrays, metrics)
    reply = train_turn(msg, context)
    if not kind:
        frame, metrics = frame_of(reply.content.array_records[ARRAYS]), dict(reply.content["metrics"])
        kept.write_bytes(pickle.dumps((frame, metrics)))
        return reply
    return rewritten(reply, BREAK[kind](frame_of(reply.content.array_records[ARRAYS])))


def rewritten(reply: Message, frame: bytes | None, metrics: dict[str, float] | None = None) -> Message:
    numel = next(iter(reply.content.array_records[ARRAYS].values())).shape[0]
    reply.content[ARRAYS] = ArrayRecord() if frame is None else frame_record(frame, numel)
    reply.content["metrics"].update(metrics or {})
    return reply


def foreign(frame: bytes) -> bytes:
    """The same bits, said to be of another model; all else is valid, the checksum too."""
    own = Frame.parse(frame)
    return replace(own, digest=bytes(byte ^ 0xFF for byte in own.digest)).to_bytes()


def huge(frame: bytes) -> bytes:
    """A frame of this model and round, its first body 100 MB long; all lengths and the checksum are right."""
    own = Frame.parse(frame)
    first = replace(own.fields[0], body=os.urandom(HUGE))
    return replace(own, fields=(first, *own.fields[1:])).to_bytes()


BREAK = {
    "garbage": lambda frame: os.urandom(len(frame)),
    "torn": lambda frame: frame[: len(frame) // 2],
    "empty": lambda frame: None,
    "foreign": foreign,
    "huge": huge,
}


@app.evaluate()
@safely
def evaluate(msg: Message, context: Context) -> Message:
    from fedmask_flwr.flower.apps import evaluate_turn

    return evaluate_turn(msg, context)


@app.query()
@safely
def query(msg: Message, context: Context) -> Message:
    return identify(msg, context)
