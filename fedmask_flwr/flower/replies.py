"""Replies of a round: whose they are, what they hold, and which of them are refused."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.common.logger import log

from fedmask_flwr.methods import Method, Turn, Update
from fedmask_flwr.methods.reading import read_reply
from fedmask_flwr.wire import BitCodec, Payload, WireError

from .ledger import Ledger, brief
from .records import ARRAYS, CONFIG, MASKS, METRICS, frame_of, record

WARNING = 30
MOST, LONGEST = 256, 64  # metrics of a reply that are heard, characters of a name
T = TypeVar("T")
R = TypeVar("R")


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
            log(WARNING, "node %d failed (code %d): %s", node, reply.error.code, brief(reply.error.reason))
            if lose is not None:
                lose(f"{brief(reply.error.reason)} (code {reply.error.code})")
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
    spoke: dict[int, int],
    masks: str = "",
    lossy: str = "",
    threads: int = 1,
) -> Iterator[Update]:
    """Decode replies in the order of their client numbers, so that a run repeats exactly.

    A reply is let go once it is decoded. ``nodes`` is what ``destinations`` gave, ``state`` is the state that was
    broadcast, ``told(client)`` what that client was told of it, ``clients`` the numbers of the nodes that were
    asked for theirs, ``spoke`` the client that each node answered as, the latest last; it is kept up to date here.
    ``turn`` carries the round's seed; its client is replaced by each reply's. ``masks`` names the structural masks
    that every client must have, ``lossy`` the run's codec, if it may flip bits. An error reply, an unreadable
    frame, a second answer and metrics of a wrong type are logged and counted as failures, never raised. As many
    replies as there are ``threads`` are decoded at a time.
    """
    claims: dict[int, dict[int, Message]] = {}
    last = {client: node for node, client in spoke.items()}
    for node, reply in answers(replies, nodes, ledger.lose):
        ledger.receive(reply)
        try:
            same_masks(reply, masks)
            client = integer(reply, "client")
            if clients.get(node, client) != client:
                raise WireError(f"it answers as client {client}, but said it was client {clients[node]}")
            if spoke.get(node, client) != client:
                raise WireError(f"it answers as client {client}, but was client {spoke[node]} before")
            claims.setdefault(client, {})[node] = reply
        except WireError as error:
            log(WARNING, "reply of node %d dropped: %s", node, brief(error))
            ledger.lose(str(error))
    by_client = {}
    for client in sorted(claims):
        if (one := _rightful(client, claims.pop(client), last, ledger)) is not None:
            by_client[client] = one
        del one  # a reply is held once

    def decoded(asked: tuple[int, Payload]) -> tuple[int, int, _Read | WireError]:
        client, heard = asked
        node, reply = by_client.pop(client)
        try:
            mine = Turn(turn.seed, turn.round, turn.rounds, client)
            return client, node, _read(reply, mine, method, state, heard, digest, lossy)
        except WireError as error:
            return client, node, error

    for client, node, found in in_order(decoded, ((client, told(client)) for client in sorted(by_client)), threads):
        if isinstance(found, WireError):
            log(WARNING, "reply of client %d dropped: %s", client, brief(found))
            ledger.lose(str(found))
        else:
            spoke.pop(node, None)
            spoke[node] = client
            ledger.accept(found.nbytes, found.update.weight, found.metrics)
            yield found.update


def _rightful(
    client: int, claims: dict[int, Message], last: Mapping[int, int], ledger: Ledger
) -> tuple[int, Message] | None:
    """The node and the reply of a client, of nodes that say they are it: whoever came first must not decide.

    Of several, the node that spoke for the client before does so again; among strangers there is no telling.
    """
    told = f"{len(claims)} nodes say they are client {client}: give each its own client-id"
    for node in [node for node in claims if len(claims) > 1 and node != last.get(client)]:
        claims.pop(node)
        log(WARNING, "reply of node %d dropped: %s", node, told)
        ledger.lose(told)
    return claims.popitem() if claims else None


def in_order(function: Callable[[T], R], items: Iterable[T], threads: int) -> Iterator[R]:
    """Map in ``threads`` threads; no more results wait than that."""
    if threads == 1:
        yield from map(function, items)
        return
    pool = ThreadPoolExecutor(threads, "decode")
    try:
        waiting: deque[Future[R]] = deque()
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


@dataclass(frozen=True, slots=True)
class _Read:
    """A reply that can be used: the update, bytes of its frame, and its metrics."""

    update: Update
    nbytes: int
    metrics: dict[str, float]


def _read(
    reply: Message, turn: Turn, method: Method[Any], state: Any, told: Payload, digest: bytes, lossy: str
) -> _Read:
    frame = frame_of(record(reply.content, ARRAYS, ArrayRecord))
    examples = integer(reply, "num-examples")
    shared = method.recall(state, turn.client)
    received = read_reply(frame, method, told, turn, shared, digest=digest, lossy=lossy)
    payload = method.reconstruct(told, received.payload, turn)
    flips = (codec.flip_rate for codec in received.codecs.values() if isinstance(codec, BitCodec))
    rate = max(flips, default=0.0)
    update = Update(turn.client, payload, float(examples), rate, received.frame.fields)
    method.check(state, update)
    return _Read(update, len(frame), reported(reply))


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
        raise WireError(f"metrics hold {name} = {repr(value)[:80]}: expected a whole number from {low}")
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
