"""What rides in a Flower message: one frame, and the plan that tells a client how to answer."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict

from fedmask_flwr.masks import MaskSpec
from fedmask_flwr.methods import Direction, Method, resolve
from fedmask_flwr.wire import Received, SideInfo, WireError, unpack

STYPE = "fedmask.frame/1"  # no numpy reader understands it, so nothing decodes a frame by mistake
FRAME, ARRAYS, CONFIG, METRICS = "frame", "arrays", "config", "metrics"
AS_BUILT = "as-built"


@dataclass(frozen=True, slots=True)
class Plan:
    """How every client of a run answers; sent with each message so that only the server is configured.

    ``weights`` names the frozen weights ("seed:7", a checkpoint and its hash, or "as-built": the model arrives
    with them).
    """

    method: str
    settings: dict[str, Any]
    weights: str
    include: tuple[str, ...]
    exclude: tuple[str, ...]
    seed: int
    rounds: int
    codec: str

    def record(self, server_round: int, frame: bytes, numel: int) -> RecordDict:
        """Put frame and plan into a message's content."""
        config = ConfigRecord({"server-round": server_round, "plan": json.dumps(asdict(self), sort_keys=True)})
        return RecordDict({ARRAYS: frame_record(frame, numel), CONFIG: config})

    @classmethod
    def read(cls, content: RecordDict) -> tuple[Plan, int]:
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
            return cls(**fields), int(str(config["server-round"]))
        except (KeyError, TypeError, ValueError, RecursionError) as error:
            raise WireError(
                f"message without a fedmask plan ({error}): does the ServerApp use MaskStrategy?"
            ) from error

    def build(self, spec: MaskSpec, floats: int, fraction: float = 1.0) -> Method[Any]:
        """Make the method on this end."""
        method = resolve(self.method)
        return method(spec, floats, method.Config(**self.settings), fraction=fraction)

    def codecs(self, method: Method[Any]) -> dict[str, str]:
        """Codec names by kind, with the run's choice for mask bits."""
        return {**method.codecs, "bits": self.codec}


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


def read_frame(
    frame: bytes,
    method: Method[Any],
    direction: Direction,
    *,
    digest: bytes,
    round_: int | None,
    known: SideInfo | None = None,
) -> Received:
    """Decode a frame that must hold the fields of ``method`` in ``direction``.

    Raises
    ------
    WireError
        When the frame is damaged, of another model or round, or holds other fields.
    """
    fields = method.fields(direction)
    received = unpack(
        frame,
        digest=digest,
        round_=round_,
        known=SideInfo(method.spec.sizes) if known is None else known,
        expect={name: numel for name, (_, numel) in fields.items()},
        require={name: kind for name, (kind, _) in fields.items()} if direction == "up" else None,
    )
    for name, codec in received.codecs.items():
        if codec.kind != fields[name][0]:
            raise WireError(f"field {name!r} came as {codec.kind}, expected {fields[name][0]}")
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
