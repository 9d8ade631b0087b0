"""What a round cost and who answered: frames, bytes and failures, counted on what really travelled."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from flwr.app import Message
from flwr.common.logger import log

from fedmask_flwr.methods import Method, Turn, Update
from fedmask_flwr.wire import BitCodec, Payload, SideInfo, WireError

from .records import ARRAYS, METRICS, flower_bytes, frame_of, read_frame

WARNING = 30


@dataclass(slots=True)
class Ledger:
    """Counts of one round. Bytes are totals over clients, of whole frames; Flower's own bytes stand apart."""

    sent: int = 0
    ok: int = 0
    uplink: int = 0
    downlink: int = 0
    flower_uplink: int = 0
    flower_downlink: int = 0
    accepted: int = 0
    metrics: list[tuple[float, dict[str, float]]] = field(default_factory=list)

    def spend(self, messages: Sequence[Message]) -> None:
        """Count downlink bytes."""
        for message in messages:
            size = len(frame_of(message.content.array_records[ARRAYS]))
            self.downlink += size
            self.flower_downlink += flower_bytes(message.content, size)

    def line(self, numel: int) -> dict[str, float]:
        """The round's figures; bits per parameter are a client's mean over d = ``numel`` parameters."""
        return {
            "uplink_bytes": self.uplink,
            "downlink_bytes": self.downlink,
            "uplink_bpp": 8.0 * self.accepted / max(self.ok, 1) / numel,
            "downlink_bpp": 8.0 * self.downlink / max(self.sent, 1) / numel,
            "flower_uplink_bytes": self.flower_uplink,
            "flower_downlink_bytes": self.flower_downlink,
            "clients_ok": self.ok,
            "clients_failed": self.sent - self.ok,
        }


def read_updates(
    replies: Sequence[Message],
    sent: Sequence[Message],
    *,
    method: Method[Any],
    told: Callable[[int], Payload],
    clients: Mapping[int, int],
    digest: bytes,
    turn: Turn,
    ledger: Ledger,
) -> Iterator[Update]:
    """Decode replies one at a time, in the order of their client numbers, so that a run repeats exactly.

    ``told(client)`` is what that client was broadcast, ``clients`` the numbers of the nodes that were asked for
    theirs. ``turn`` carries the round's seed; its client is replaced by each reply's. An error reply, an
    unreadable frame, a second answer and metrics of a wrong type are logged and counted as failures, never raised.
    """
    node_of = {message.metadata.message_id: message.metadata.dst_node_id for message in sent}
    by_client: dict[int, Message] = {}
    for reply in replies:
        # A dead node's error comes from the SuperLink, so the culprit is found by the message it answers.
        node = node_of.get(reply.metadata.reply_to_message_id, reply.metadata.src_node_id)
        if reply.has_error():
            log(WARNING, "node %d failed (code %d): %s", node, reply.error.code, reply.error.reason)
            continue
        try:
            client = _integer(reply, "client")
            if clients.get(node, client) != client:
                raise WireError(f"it answers as client {client}, but said it was client {clients[node]}")
            if client in by_client:
                raise WireError(f"client {client} answered twice: give each node its own client-id")
            by_client[client] = reply
        except WireError as error:
            log(WARNING, "reply of node %d dropped: %s", node, error)
    for client in sorted(by_client):
        reply = by_client[client]
        try:
            mine = Turn(turn.seed, turn.round, turn.rounds, client)
            yield _read(reply, mine, method, method.known(told(client), mine), digest, ledger)
        except WireError as error:
            log(WARNING, "reply of client %d dropped: %s", client, error)
    if len(replies) < len(sent):  # Flower says nothing of these
        log(WARNING, "%d of %d nodes did not answer in time", len(sent) - len(replies), len(sent))


def _read(
    reply: Message, turn: Turn, method: Method[Any], known: SideInfo | None, digest: bytes, ledger: Ledger
) -> Update:
    frame = frame_of(reply.content.array_records.get(ARRAYS))
    ledger.uplink += len(frame)
    ledger.flower_uplink += flower_bytes(reply.content, len(frame))
    examples = _integer(reply, "num-examples")
    received = read_frame(frame, method, "up", digest=digest, round_=turn.round, known=known)
    metrics = reply.content.metric_records[METRICS]
    ledger.ok += 1
    ledger.accepted += len(frame)
    ledger.metrics.append(
        (examples, {k: float(v) for k, v in metrics.items() if isinstance(v, float) and math.isfinite(v)})
    )
    flips = (codec.flip_rate for codec in received.codecs.values() if isinstance(codec, BitCodec))
    return Update(turn.client, received.payload, float(examples), max(flips, default=0.0))


def _integer(reply: Message, name: str) -> int:
    record = reply.content.metric_records.get(METRICS)
    value = None if record is None else record.get(name)
    if not isinstance(value, int) or not 0 <= value < 2**64 or (name == "num-examples" and not 1 <= value < 2**40):
        raise WireError(f"metrics hold {name} = {value!r}: expected a number from 0, or 1 for num-examples")
    return value


def weighted_means(metrics: Sequence[tuple[float, dict[str, float]]]) -> dict[str, float]:
    """Mean of each metric over the clients that gave it, weighted by examples."""
    names = sorted({name for _, values in metrics for name in values})
    means = {}
    for name in names:
        pairs = [(n, values[name]) for n, values in metrics if name in values]
        means[name] = sum(n * v for n, v in pairs) / sum(n for n, _ in pairs)
    return means
