"""What rides in a Flower message: one frame, and the plan that tells a client how to answer."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict

from fedmask_flwr.methods import Fields, Known, Memory, Method, Turn
from fedmask_flwr.plan import Plan
from fedmask_flwr.wire import Frame, Payload, Received, WireError, unpack

STYPE = "fedmask.frame/1"  # no numpy reader understands it, so nothing decodes a frame by mistake
FRAME, ARRAYS, CONFIG, METRICS, MASKS = "frame", "arrays", "config", "metrics", "masks"


def plan_record(plan: Plan, server_round: int, frame: bytes, numel: int) -> RecordDict:
    """Put frame and plan into a message's content."""
    config = ConfigRecord({"server-round": server_round, "plan": json.dumps(asdict(plan), sort_keys=True)})
    return RecordDict({ARRAYS: frame_record(frame, numel), CONFIG: config})


def read_plan(content: RecordDict) -> tuple[Plan, int]:
    """Return the plan and the round of a message.

    Raises
    ------
    WireError
        When the message was not written by a ``MaskStrategy``.
    """
    try:
        config = content.config_records[CONFIG]
        fields = json.loads(str(config["plan"]))
        fields |= {name: tuple(fields[name]) for name in ("include", "exclude")}
        return Plan(**fields), int(str(config["server-round"]))
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise WireError(
            f"message without a fedmask plan ({error}): does the ServerApp use MaskStrategy?"
        ) from error


def frame_record(frame: bytes, numel: int) -> ArrayRecord:
    """One frame as one array: each further array would cost Flower 1-2 KB."""
    return ArrayRecord({FRAME: Array(dtype="uint8", shape=(numel,), stype=STYPE, data=frame)})


def frame_of(arrays: ArrayRecord | None) -> bytes:
    """Return the frame's bytes.

    Raises
    ------
    WireError
        When there is not exactly one frame.
    """
    if arrays is None or list(arrays) != [FRAME] or arrays[FRAME].stype != STYPE:
        raise WireError(f"expected one array {FRAME!r} of type {STYPE}: is the other end a fedmask app?")
    return arrays[FRAME].data


def read_broadcast(
    frame: bytes, method: Method[Any], memory: Memory, *, digest: bytes, round_: int | None
) -> Payload:
    """Decode what a client was told; fields that its memory does not fit are left out (see ``Method.in_step``).

    Raises
    ------
    WireError
        When the frame is damaged, of another model or round, or holds other fields.
    """
    if method.personal and not method.in_step(meta := Frame.parse(frame).meta, memory):
        return Payload(meta=meta)
    allowed = method.down(memory)
    return _read(frame, allowed, method.heard(memory), digest, round_).payload


def read_reply(
    frame: bytes, method: Method[Any], got: Payload, turn: Turn, shared: Memory, *, digest: bytes
) -> Received:
    """Decode a client's reply to ``got``; ``shared`` is what the server holds of its memory.

    Raises
    ------
    WireError
        When the frame is damaged, of another model or round, or is not one of the replies that the method allows.
    """
    forms = method.up(got, shared)
    allowed = {name: field for form in forms for name, field in form.items()}
    require = {name: kind for name, (kind, _) in allowed.items()} if len(forms) == 1 else {}
    received = _read(frame, allowed, method.known(got, turn, shared), digest, turn.round, require)
    if not any(set(received.codecs) == set(form) for form in forms):
        wanted = " or ".join(", ".join(form) or "nothing" for form in forms)
        raise WireError(f"the reply holds {', '.join(received.codecs) or 'nothing'}, expected {wanted}")
    return received


def _read(
    frame: bytes,
    allowed: Fields,
    known: Known,
    digest: bytes,
    round_: int | None,
    require: Mapping[str, str] | None = None,
) -> Received:
    expect = {name: numel for name, (_, numel) in allowed.items()}
    received = unpack(frame, digest=digest, round_=round_, known=known, expect=expect, require=require)
    for name, codec in received.codecs.items():
        if codec.kind != allowed[name][0]:
            raise WireError(f"field {name!r} came as {codec.kind}, expected {allowed[name][0]}")
    return received


def flower_bytes(content: RecordDict, frames: int) -> int:
    """Bytes of a message's records as Flower counts them, without the ``frames`` bytes of its frames.

    Envelopes, object ids, HTTP or gRPC headers, polls and TLS come on top: about 17 KB up and 7 KB down a
    client-round on a real link (measured on flwr 1.41).
    """
    return sum(map(_count, content.values())) - frames


def _count(record: ArrayRecord | MetricRecord | ConfigRecord) -> int:
    try:
        return record.count_bytes()
    except (ValueError, IndexError):  # Flower cannot count empty strings and lists
        return 0
