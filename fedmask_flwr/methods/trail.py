"""Devices that follow the state: told what changed since the one they hold, instead of all of it.

A device that trained in a round keeps the counts that the round began with. Next time it can be told

- ``votes``: how many of the last round's masks had each bit, coded by the counts that it holds; or
- ``relay``: the replies themselves, as they came, of all rounds since then. Every end knows theta and the keys, so
  it decodes and adds them up as the server did. K replies of few bits are far less than d counts.

Either is followed by a checksum of the counts that must come out. A device that lost its memory says so in its
reply's error, and is told everything in the round after.

Relayed rounds, one after another: varint length; varint round, u8 1 if the votes before no longer count, varint
number of replies; each: varint client, u8 number of fields; each: u8 place of its name in alphabetical order, u8
codec, varint elements, varint length, body.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

from fedmask_flwr.wire import Field, WireError, get_varint, put_varint
from fedmask_flwr.wire.counts import occurrences
from fedmask_flwr.wire.grouped import joined

__all__ = [
    "REPLAYS",
    "Relayed",
    "Trail",
    "counts_bytes",
    "given_bytes",
    "levels",
    "read_rounds",
    "shortened",
    "write_round",
]

_MOST = 1 << 40  # above any length or number that a relay may name
_LEVELS = 64
_BLOCK = 1 << 20  # positions that are there as 64-bit numbers at a time
REPLAYS = 100
"""Replies that a device may have to decode to follow: some 30 ns a parameter each on a fast core, while the counts
instead are a third of a byte a parameter. A hundred take as long as those on a link of 1 Mbit/s."""


@dataclass(frozen=True, slots=True)
class Trail:
    """How the present state came about, as far as a device may still have to be told.

    Attributes
    ----------
    now
        The round that is on, or was last.
    rounds
        How many there are in all: a replay must know it, as a step may depend on it.
    last
        The last round that brought votes; 0: none.
    before, before_total
        Counts (d,) that it began with, of so many masks; empty if nobody follows.
    oldest
        The first round whose replies are kept; all rounds from there on are.
    relay
        Those replies, uint8.
    whole, votes
        Bytes that the whole state, and that the last round's votes, are expected to take.
    held
        (n, 2) uint64, ascending: a client, and the round that it trained in last.
    """

    now: int = 0
    rounds: int = 0
    last: int = 0
    before: npt.NDArray[np.uint32] = field(default_factory=lambda: np.zeros(0, np.uint32))
    before_total: int = 0
    oldest: int = 1
    relay: npt.NDArray[np.uint8] = field(default_factory=lambda: np.zeros(0, np.uint8))
    whole: float = 0.0
    votes: float = 0.0
    held: npt.NDArray[np.uint64] = field(default_factory=lambda: np.zeros((0, 2), np.uint64))

    def base(self, client: int) -> int | None:
        """The round whose start that client holds, or None."""
        at = int(np.searchsorted(self.held[:, 0], np.uint64(client)))
        return int(self.held[at, 1]) if at < len(self.held) and self.held[at, 0] == client else None

    def without(self, clients: Sequence[int]) -> npt.NDArray[np.uint64]:
        """``held`` without some clients."""
        return self.held[~np.isin(self.held[:, 0], np.array(clients, np.uint64))]

    def with_trained(self, clients: Sequence[int]) -> npt.NDArray[np.uint64]:
        """``held`` once these clients trained in round ``now``."""
        rows = np.array([(client, self.now) for client in clients], np.uint64).reshape(-1, 2)
        found: npt.NDArray[np.uint64] = np.concatenate([self.without(clients), rows])
        return found[np.argsort(found[:, 0], kind="stable")]

    def entered(self, round_: int, rounds: int) -> Trail:
        """The trail at a round's beginning. Of a run that goes on for longer than it said, nothing is replayed."""
        if self.rounds in (0, rounds):
            return replace(self, now=round_, rounds=rounds)
        return replace(self, now=round_, rounds=rounds, relay=np.zeros(0, np.uint8), oldest=round_)

    def since(self, base: int) -> bytes | None:
        """Relayed rounds from ``base`` on; None when they are no longer all kept."""
        if base < self.oldest:
            return None
        at, raw = 0, self.relay.tobytes()
        while at < len(raw):
            length, start = get_varint(raw, at, len(raw))
            if get_varint(raw, start, _MOST)[0] >= base:
                return raw[at:]
            at = start + length
        return b""


@dataclass(frozen=True, slots=True)
class Relayed:
    """One round as it is relayed: whether it begins anew, and each client's coded fields, by name."""

    round: int
    anew: bool
    replies: tuple[tuple[int, tuple[Field, ...]], ...]


def write_round(found: Relayed, names: Sequence[str]) -> bytes:
    """Serialise one round; ``names`` are those that a field may have, sorted."""
    parts: list[bytes | memoryview] = [put_varint(found.round), bytes([found.anew]), put_varint(len(found.replies))]
    for client, fields in found.replies:
        parts += [put_varint(client), bytes([len(fields)])]
        for f in fields:
            parts += [bytes([names.index(f.name), f.codec]), put_varint(f.numel), put_varint(len(f.body)), f.body]
    body = b"".join(parts)
    return put_varint(len(body)) + body


def read_rounds(raw: bytes, names: Sequence[str]) -> Iterator[Relayed]:
    """Undo `write_round`, round after round.

    Raises
    ------
    WireError
        Anything that does not add up, and more than `REPLAYS` replies: no server asks for so much work.
    """
    at, left = 0, REPLAYS
    while at < len(raw):
        length, at = get_varint(raw, at, len(raw) - at)
        if length > len(raw) - at:
            raise WireError("a relayed round is truncated")
        found = _read_round(memoryview(raw)[at : at + length], names, left)
        left -= len(found.replies)
        yield found
        at += length


def _read_round(raw: memoryview, names: Sequence[str], most: int) -> Relayed:
    round_, at = get_varint(raw, 0, 2**32 - 1)
    anew, at = get_varint(raw, at, 1)
    count, at = get_varint(raw, at, len(raw))
    if not 1 <= count <= most:
        raise WireError(f"a relayed round of {count} replies: expected 1 to {most} ({REPLAYS} in all)")
    replies = []
    for _ in range(count):
        client, at = get_varint(raw, at, 2**64 - 1)
        n, at = get_varint(raw, at, len(names))
        fields = []
        for _ in range(n):
            if at + 2 > len(raw) or raw[at] >= len(names):
                raise WireError("a relayed reply is truncated, or has a field without a name")
            name, codec = names[raw[at]], raw[at + 1]
            numel, at = get_varint(raw, at + 2, _MOST)
            size, at = get_varint(raw, at, len(raw))
            if size > len(raw) - at:
                raise WireError("a relayed reply is truncated")
            fields.append(Field(name, codec, numel, raw[at : at + size]))
            at += size
        replies.append((client, tuple(fields)))
    if at != len(raw):
        raise WireError("a relayed round is longer than its replies")
    return Relayed(round_, bool(anew), tuple(replies))


def shortened(raw: bytes, most: float, replies: int = REPLAYS) -> tuple[bytes, int]:
    """Drop the oldest rounds until at most ``most`` bytes and ``replies`` replies are left.

    Returns what is left, and the first round not dropped.
    """
    rounds, at = [], 0
    while at < len(raw):
        length, start = get_varint(raw, at, len(raw))
        number, inner = get_varint(raw, start, _MOST)
        at = start + length
        rounds.append((number, get_varint(raw, inner + 1, _MOST)[0], at))
    oldest, begin, held = 1, 0, sum(count for _, count, _ in rounds)
    for number, count, end in rounds:
        if len(raw) - begin <= most and held <= replies:
            break
        oldest, begin, held = number + 1, end, held - count
    return raw[begin:], oldest


def levels(ones: npt.NDArray[np.uint32], total: int) -> npt.NDArray[np.uint8]:
    """Class of each count by its share of the votes, (d,) uint8, below 64: what the next votes depend on."""
    found = np.empty(ones.size, np.uint8)
    for a in range(0, ones.size, _BLOCK):
        found[a : a + _BLOCK] = ones[a : a + _BLOCK].astype(np.uint64) * (_LEVELS - 1) // max(total, 1)
    return found


def counts_bytes(ones: npt.NDArray[np.uint32]) -> float:
    """Bytes that counts are expected to take."""
    return _entropy(occurrences(ones, 0, int(ones.max(initial=0)) + 1)) / 8 + 64


def given_bytes(votes: npt.NDArray[np.uint32], before: npt.NDArray[np.uint8]) -> float:
    """Bytes that votes are expected to take, given the class of each, as ``counts-by-class`` codes them."""
    top, group = int(votes.max(initial=0)) + 1, joined(occurrences(before, 0, _LEVELS))
    table = np.zeros((int(group.max()) + 1) * top, np.int64)
    for a in range(0, votes.size, _BLOCK):
        table += np.bincount(group[before[a : a + _BLOCK]] * top + votes[a : a + _BLOCK], minlength=table.size)
    return sum(_entropy(row) for row in table.reshape(-1, top)) / 8 + 1.5 * np.count_nonzero(table) + 64


def _entropy(histogram: npt.NDArray[np.int64]) -> float:
    live = histogram[histogram > 0]
    return float((live * np.log2(live.sum() / live)).sum())
