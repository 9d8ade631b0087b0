"""What rides in a Flower message: one frame, and the plan that tells a client how to answer."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, TypeVar

from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict

from fedmask_flwr.methods import Memory, Method
from fedmask_flwr.methods.reading import read_fields
from fedmask_flwr.plan import Plan
from fedmask_flwr.wire import Frame, Payload, WireError

STYPE = "fedmask.frame/1"  # no numpy reader understands it, so nothing decodes a frame by mistake
FRAME, ARRAYS, CONFIG, METRICS, MASKS = "frame", "arrays", "config", "metrics", "masks"

R = TypeVar("R", ArrayRecord, MetricRecord, ConfigRecord)


def plan_config(plan: Plan, server_round: int, config: Mapping[str, Any]) -> dict[str, Any]:
    """The plan as text, and what else ``config`` says: the same in all messages of a round."""
    return {"server-round": server_round, "plan": json.dumps(asdict(plan), sort_keys=True), **config}


def content_of(frame: Array, told: dict[str, Any]) -> RecordDict:
    """A message's content: a frame and what `plan_config` made, in records of its own."""
    return RecordDict({ARRAYS: ArrayRecord({FRAME: frame}), CONFIG: ConfigRecord(told)})


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


def frame_array(frame: bytes, numel: int) -> Array:
    """One frame as one array: each further array would cost Flower 1-2 KB."""
    return Array(dtype="uint8", shape=(numel,), stype=STYPE, data=frame)


def frame_record(frame: bytes, numel: int) -> ArrayRecord:
    """A record of that one array."""
    return ArrayRecord({FRAME: frame_array(frame, numel)})


def record(content: RecordDict, name: str, kind: type[R]) -> R | None:
    """One record of a message, or None when there is none of that kind.

    Flower's views of a content, such as ``array_records``, are in cycles: frames would stay until these are found.
    """
    found = content.get(name)
    return found if isinstance(found, kind) else None


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
    parsed = Frame.parse(frame)
    if method.personal and not method.in_step(parsed.meta, memory):
        return Payload(meta=parsed.meta)
    return read_fields(parsed, method.down(memory), method.heard(memory), digest=digest, round_=round_).payload


def flower_bytes(content: RecordDict, frames: int) -> int:
    """Bytes of a message's records as Flower counts them, without the ``frames`` bytes of its frames.

    Envelopes, object ids, HTTP or gRPC headers, polls and TLS come on top: about 11 KB up and 3 KB down a
    client-round on a real link (measured on flwr 1.39: docs/wire.md).
    """
    return sum(map(_count, content.values())) - frames


def _count(record: ArrayRecord | MetricRecord | ConfigRecord) -> int:
    try:
        return record.count_bytes()
    except (ValueError, IndexError):  # Flower cannot count empty strings and lists
        return 0
