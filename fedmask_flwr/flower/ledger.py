"""What a round cost and who answered: frames, bytes and failures, counted on what really travelled."""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.common.logger import log

from fedmask_flwr.methods import Method, Turn, Update
from fedmask_flwr.methods.reading import read_reply
from fedmask_flwr.wire import BitCodec, Payload, WireError

from .records import ARRAYS, CONFIG, MASKS, METRICS, flower_bytes, frame_of, record

WARNING = 30
MOST, LONGEST = 256, 64  # metrics of a reply that are heard, characters of a name
REASON = 200  # characters that are kept of why a client failed


@dataclass(slots=True)
class Ledger:
    """Counts of one round. Bytes are totals over clients, of whole frames; Flower's own bytes stand apart."""

    sent: int = 0
    silent: int = 0  # sampled, but not told anything: they did not say who they are
    ok: int = 0
    asked: int = 0
    evaluated: int = 0
    uplink: int = 0
    downlink: int = 0
    evaluation: int = 0
    accepted: int = 0
    flower_uplink: int = 0
    flower_downlink: int = 0
    metrics: list[tuple[float, dict[str, float]]] = field(default_factory=list)
    lost: Counter[str] = field(default_factory=Counter)  # why training replies could not be used

    def __post_init__(self) -> None:
        if self.silent:
            self.lost["it did not tell its client number"] = self.silent

    def send(self, messages: Sequence[Message]) -> None:
        """Count a round's training messages."""
        self.sent = len(messages)
        self.downlink = self._spend(messages)

    def ask(self, messages: Sequence[Message]) -> None:
        """Count its evaluation messages; their frames stand apart, since training does not need them."""
        self.asked = len(messages)
        self.evaluation = self._spend(messages)

    def lose(self, reason: str) -> None:
        """Note why a training reply could not be used."""
        self.lost[" ".join(reason.split())[:REASON]] += 1

    def receive(self, reply: Message) -> None:
        """Count a reply's bytes, readable or not."""
        arrays = [found for found in reply.content.values() if isinstance(found, ArrayRecord)]
        frames = sum(len(array.data) for found in arrays for array in found.values())
        self.uplink += frames
        self.flower_uplink += flower_bytes(reply.content, frames)

    def _spend(self, messages: Sequence[Message]) -> int:
        frames = [len(frame_of(record(message.content, ARRAYS, ArrayRecord))) for message in messages]
        self.flower_downlink += sum(flower_bytes(m.content, n) for m, n in zip(messages, frames, strict=True))
        return sum(frames)

    def line(self, numel: int) -> dict[str, float]:
        """The round's figures; bits per parameter are means over training clients, of d = ``numel`` parameters."""
        return {
            "uplink_bytes": self.uplink,
            "downlink_bytes": self.downlink,
            "uplink_bpp": 8.0 * self.accepted / max(self.ok, 1) / numel,
            "downlink_bpp": 8.0 * self.downlink / max(self.sent, 1) / numel,
            "evaluate_bytes": self.evaluation,
            "flower_uplink_bytes": self.flower_uplink,
            "flower_downlink_bytes": self.flower_downlink,
            "clients_ok": self.ok,
            "clients_failed": self.sent + self.silent - self.ok,
            "evaluations_failed": self.asked - self.evaluated,
        }


def destinations(sent: Iterable[Message]) -> dict[str, int]:
    """Which node each message went to, by the message's id, once they were sent."""
    return {message.metadata.message_id: message.metadata.dst_node_id for message in sent}


def released(messages: Iterable[Message]) -> Iterator[Message]:
    """Hand messages over one by one and keep none of them."""
    rest = deque(messages)
    del messages
    while rest:
        yield rest.popleft()


def answers(
    replies: Iterable[Message], nodes: Mapping[str, int], lose: Callable[[str], None] | None = None
) -> Iterator[tuple[int, Message]]:
    """Yield (node, reply) of every reply without an error, each message's first one; log the others.

    A dead node's error comes from the SuperLink, so the culprit is found by the message it answers: ``nodes`` is
    what ``destinations`` gave. ``lose`` hears why nodes failed.
    """
    node_of = dict(nodes)
    for reply in replies:
        node = node_of.pop(reply.metadata.reply_to_message_id, None)
        if node is None:
            log(WARNING, "a second or unasked reply of node %d dropped", reply.metadata.src_node_id)
        elif reply.has_error():
            log(WARNING, "node %d failed (code %d): %s", node, reply.error.code, reply.error.reason)
            if lose is not None:
                lose(f"{reply.error.reason} (code {reply.error.code})")
        else:
            yield node, reply
    for node in node_of.values():  # Flower says nothing of these
        log(WARNING, "node %d did not answer in time", node)
        if lose is not None:
            lose("no answer in time")


def read_updates(
    replies: Iterable[Message],
    nodes: Mapping[str, int],
    *,
    method: Method[Any],
    state: Any,
    told: Callable[[int], Payload],
    clients: Mapping[int, int],
    digest: bytes,
    turn: Turn,
    ledger: Ledger,
    masks: str = "",
) -> Iterator[Update]:
    """Decode replies one at a time, in the order of their client numbers, so that a run repeats exactly.

    A reply is let go once it is decoded. ``nodes`` is what ``destinations`` gave, ``state`` is the state that was
    broadcast, ``told(client)`` what that client was told of it, ``clients`` the numbers of the nodes that were
    asked for theirs. ``turn`` carries the round's seed; its client is replaced by
    each reply's. ``masks`` names the structural masks that every client must have. An error reply, an unreadable
    frame, a second answer and metrics of a wrong type are logged and counted as failures, never raised.
    """
    by_client: dict[int, list[Message]] = {}
    for node, reply in answers(replies, nodes, ledger.lose):
        ledger.receive(reply)
        try:
            same_masks(reply, masks)
            client = integer(reply, "client")
            if clients.get(node, client) != client:
                raise WireError(f"it answers as client {client}, but said it was client {clients[node]}")
            by_client.setdefault(client, []).append(reply)
        except WireError as error:
            log(WARNING, "reply of node %d dropped: %s", node, error)
            ledger.lose(str(error))
    for client in sorted(by_client):
        found = by_client.pop(client)
        try:
            if len(found) > 1:  # whoever came first must not decide
                raise WireError(f"{len(found)} nodes say they are it: give each its own client-id")
            mine = Turn(turn.seed, turn.round, turn.rounds, client)
            update = _read(found.pop(), mine, method, state, told(client), digest, ledger)
        except WireError as error:
            log(WARNING, "reply of client %d dropped: %s", client, error)
            for _ in range(max(1, len(found))):
                ledger.lose(str(error))
        else:
            yield update


def _read(
    reply: Message, turn: Turn, method: Method[Any], state: Any, told: Payload, digest: bytes, ledger: Ledger
) -> Update:
    frame = frame_of(record(reply.content, ARRAYS, ArrayRecord))
    examples = integer(reply, "num-examples")
    shared = method.recall(state, turn.client)
    received = read_reply(frame, method, told, turn, shared, digest=digest)
    payload = method.reconstruct(told, received.payload, turn)
    flips = (codec.flip_rate for codec in received.codecs.values() if isinstance(codec, BitCodec))
    rate = max(flips, default=0.0)
    update = Update(turn.client, payload, float(examples), rate, received.frame.fields)
    method.check(state, update)
    ledger.ok += 1
    ledger.accepted += len(frame)
    ledger.metrics.append((float(examples), reported(reply)))
    return update


def same_masks(reply: Message, masks: str) -> None:
    """Refuse a reply of a client whose network has other structural masks than ``masks`` ("": any).

    Raises
    ------
    WireError
        With both names.
    """
    config = record(reply.content, CONFIG, ConfigRecord)
    its = "" if config is None else str(config.get(MASKS, ""))
    if masks and its != masks:
        raise WireError(
            f"the client trained with structural masks {its[:64] or '(none)'}, the server has {masks}: build the "
            "model with the same arguments and mask seed on both ends"
        )


def integer(reply: Message, name: str) -> int:
    """A reply's "client" or "num-examples".

    Raises
    ------
    WireError
        When it is missing or out of range.
    """
    metrics = record(reply.content, METRICS, MetricRecord)
    value = None if metrics is None else metrics.get(name)
    low, high = (1, 2**40) if name == "num-examples" else (0, 2**64)
    if not isinstance(value, int) or not low <= value < high:
        raise WireError(f"metrics hold {name} = {value!r}: expected a whole number from {low}")
    return value


def finite(reply: Message) -> dict[str, float]:
    """The float metrics of a reply that are numbers; a client cannot make a run's files grow with more."""
    metrics = record(reply.content, METRICS, MetricRecord)
    if metrics is None:
        return {}
    named = sorted(name for name in metrics if len(name) <= LONGEST)[:MOST]
    return {name: v for name in named if isinstance(v := metrics[name], float) and math.isfinite(v)}


def measured(reply: Message) -> dict[str, float]:
    """The metrics of an evaluation.

    Raises
    ------
    WireError
        When it calls something an accuracy that is none.
    """
    metrics = finite(reply)
    if not 0.0 <= metrics.get("accuracy", 0.0) <= 1.0:
        raise WireError(f"an accuracy of {metrics['accuracy']:g}: expected 0 to 1")
    return metrics


def reported(reply: Message) -> dict[str, float]:
    """The metrics of a training, without names that a round's evaluation has."""
    return {k: v for k, v in finite(reply).items() if not k.startswith(("accuracy_", "client_"))}


def weighted_means(metrics: Sequence[tuple[float, dict[str, float]]]) -> dict[str, float]:
    """Mean of each metric over the clients that gave it, weighted by examples; one that overflows is left out."""
    means = {}
    for name in sorted({name for _, values in metrics for name in values}):
        pairs = [(n, values[name]) for n, values in metrics if name in values]
        mean = sum(n * v for n, v in pairs) / sum(n for n, _ in pairs)
        if math.isfinite(mean):
            means[name] = mean
    return means


def spread(metrics: Sequence[tuple[float, dict[str, float]]], name: str) -> dict[str, float]:
    """How one metric lies over clients, each counted once: mean, standard deviation, worst decile and worst.

    The worst decile is the mean of the ceil(n / 10) lowest.
    """
    values = sorted(values[name] for _, values in metrics if name in values)
    if not values:
        return {}
    mean = sum(values) / len(values)
    worst = values[: -(-len(values) // 10)]
    return {
        f"{name}_mean": mean,
        f"{name}_std": (sum((v - mean) * (v - mean) for v in values) / len(values)) ** 0.5,
        f"{name}_worst_decile": sum(worst) / len(worst),
        f"{name}_worst": values[0],
    }
