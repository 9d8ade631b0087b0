"""A bounded knowledge base: sparse task deltas of many clients, retrieved by likeness, evicted by use.

It is a value: every change returns a new one. All fields are arrays or numbers, as a checkpoint wants them.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from operator import index
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .eviction import Entry, evict
from .sketches import Floats, Packed, centred, densify, sketch

Ids = NDArray[np.int64]
Rows = NDArray[np.uint64]
CLIENTS, TASKS, CLOCKS = 2**64, 2**20, 2**31
LARGEST = 1e30  # of what replies hold: the sketch of 3e8 such values is finite


class Attention(NamedTuple):
    """What ``client`` made of an entry, in its ``task``: alpha, averaged over the kinds."""

    client: int
    task: int
    owner_client: int
    owner_task: int
    alpha: float
    entry: int
    clock: int


@dataclass(frozen=True, slots=True, eq=False)
class KnowledgeBase:
    """N entries, each a vector (numel,) of which only the non-zeros are kept; begin with ``empty``.

    Ids ascend and are never used again. What is replaced or merged gets a new id, so an id is also a version, and
    its values and owners never change. Clients are < 2^64, tasks < 2^20, clocks (rounds) < 2^31. While it changes,
    the old and the new value are held at once.
    """

    numel: int
    kinds: int
    seed: int  # of the sketches
    next_id: int
    ids: Ids  # (N,) ascending
    where: Packed  # (N, ceil(numel/8))
    starts: Ids  # (N+1,) into values
    values: Floats  # (V,)
    sketches: Floats  # (N, S)
    added: Ids  # (N,) clock when it came
    owners: Rows  # (M, 3) rows [entry, client, task] by entry
    received: Rows  # (R, 2) every (client, task) that ever came, also when evicted since
    seen: Rows  # (Q, 6) rows [client, task, entry, owner client, owner task, clock], the latest last
    alpha: Floats  # (Q, kinds) beside ``seen``

    def __post_init__(self) -> None:
        for array in self._arrays():
            array.flags.writeable = False

    @classmethod
    def empty(cls, numel: int, kinds: int, sketch: int = 512, seed: int = 0) -> KnowledgeBase:
        """No entries; of vectors (numel,), with ``kinds`` attentions an entry and sketches (sketch,)."""
        if min(numel, kinds, sketch) < 1 or not 0 <= seed < 2**64:
            raise ValueError(
                f"no knowledge base of {numel=}, {kinds=}, {sketch=}, {seed=}: all but seed are positive"
            )
        rows = [np.zeros((0, width), np.uint64) for width in (3, 2, 6)]
        none = np.zeros(0, np.int64)
        return cls(
            numel=numel,
            kinds=kinds,
            seed=seed,
            next_id=0,
            ids=none,
            where=np.zeros((0, -(-numel // 8)), np.uint8),
            starts=np.zeros(1, np.int64),
            values=np.zeros(0, np.float32),
            sketches=np.zeros((0, sketch), np.float32),
            added=none.copy(),
            owners=rows[0],
            received=rows[1],
            seen=rows[2],
            alpha=np.zeros((0, kinds), np.float32),
        )

    def __len__(self) -> int:
        """Entries."""
        return self.ids.size

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays: what RAM, disk and a checkpoint hold."""
        return sum(array.nbytes for array in self._arrays())

    @property
    def fixed(self) -> int:
        """Bytes that ``fit`` cannot free: who was received (16 a client and task), and 8."""
        return self.received.nbytes + 8

    def add(self, client: int, task: int, where: Packed, values: NDArray[Any], clock: int) -> KnowledgeBase:
        """With the entry of (client, task): bits (ceil(numel/8),) little-endian, and a value for each that is set.

        Its older entry goes, unless it has been merged: that one stays, with its owners. The same entry again
        changes nothing.

        Raises
        ------
        ValueError
            When a number is out of range, or shapes, bits and values do not fit, or a value is not finite.
        """
        return self.extend([(client, task, where, values)], clock)

    def extend(self, items: Iterable[tuple[int, int, Packed, NDArray[Any]]], clock: int) -> KnowledgeBase:
        """``add`` of each (client, task, where, values) in turn, but what is held is copied once, not each time.

        One bad item is a ValueError for all: ``densify`` tells beforehand what is wrong with bits and values.
        """
        clock = _within("clock", clock, CLOCKS)
        entries, next_id = self._entries(), self.next_id
        received = dict.fromkeys(map(tuple, self.received.tolist()))
        for client, task, where, values in items:
            owner = (_within("client", client, CLIENTS), _within("task", task, TASKS))
            kept = _finite("a value for each bit", values, (values.size,))
            dense = densify(where, kept, self.numel)
            received[owner] = None
            at = next((k for k, e in enumerate(entries) if e.owners == (owner,)), None)
            if at is not None:
                if np.array_equal(entries[at].where, where) and np.array_equal(entries[at].values, kept):
                    continue
                del entries[at]
            drawn = sketch(dense, self._size, self.seed)
            entries.append(Entry(next_id, where.copy(), kept, drawn, clock, (owner,)))
            next_id += 1
        if next_id == self.next_id:
            return self
        return replace(self._with(entries, next_id), received=np.array(list(received), np.uint64))

    def attend(self, client: int, task: int, ids: Ids, alpha: NDArray[Any], clock: int) -> KnowledgeBase:
        """With what (client, task) made of entries: ids (K,), alpha (K, kinds). Replaces its older report of each.

        Ids evicted meanwhile and entries of its own are ignored. A merged entry is reported to each of its owners.

        Raises
        ------
        ValueError
            When a number is out of range, shapes do not fit, an id comes twice, or alpha is not finite.
        """
        client, task = _within("client", client, CLIENTS), _within("task", task, TASKS)
        clock = _within("clock", clock, CLOCKS)
        if ids.ndim != 1 or ids.dtype.kind not in "iu" or np.unique(ids).size != ids.size:
            raise ValueError(f"need a vector of different entry ids, got {ids.dtype} {ids.shape}")
        alpha = _finite("attention", alpha, (ids.size, self.kinds))
        rank = {int(entry): k for k, entry in enumerate(ids)}
        known = set(self.candidates(client).tolist())
        heard = [(rank[row[0]], row) for row in self.owners.tolist() if row[0] in rank and row[0] in known]
        if not heard:
            return self
        new = np.array([(client, task, *row, clock) for _, row in heard], np.uint64)
        same = (self.seen[:, 0] == client) & (self.seen[:, 1] == task) & np.isin(self.seen[:, 2], new[:, 2])
        took = np.concatenate([self.alpha[~same], alpha[[k for k, _ in heard]]])
        return replace(self, seen=np.concatenate([self.seen[~same], new]), alpha=took)

    def fit(
        self, budget: int, clock: int, *, window: int = 100, negligible: float = 0.02, similar: float = 0.9
    ) -> KnowledgeBase:
        """With ``nbytes`` <= max(budget, fixed): evicts only while it must, in this order.

        0. Attention beyond an eighth of the budget: reports on evicted entries, then the oldest.
        1. Entries whose largest |alpha| in the reports of the last ``window`` clocks is below ``negligible``, the
           least used first. What nobody reported on stays.
        2. Pairs whose centred sketches have a cosine above ``similar``, as have their vectors: one entry, the mean
           by numbers of owners, under a new id.
        3. The oldest. If nothing stays because the budget is too small for a single entry, the log says so.
        """
        clock = _within("clock", clock, CLOCKS)
        if self.nbytes <= budget:
            return self
        kept = self._recall(budget // 8)
        recent = kept.seen[:, 5].astype(np.int64) > clock - window
        used: dict[int, float] = {}
        for entry, most in zip(kept.seen[recent, 2].tolist(), np.abs(kept.alpha[recent]).max(axis=1), strict=True):
            used[entry] = max(used.get(entry, 0.0), float(most))
        entries, next_id = evict(
            kept._entries(),
            kept.nbytes - budget,
            used,
            negligible=negligible,
            similar=similar,
            next_id=self.next_id,
            n=self.numel,
            seed=self.seed,
        )
        out = kept._with(entries, next_id)
        if not len(out):
            out = out._recall(max(budget - out.fixed, 0))
            logging.getLogger(__name__).warning(
                "a budget of %d bytes holds no entry of %d positions: nothing is kept, raise it", budget, self.numel
            )
        return out

    def candidates(self, client: int) -> Ids:
        """Ids, ascending, of entries that ``client`` owns no part of."""
        own = self.owners[self.owners[:, 1] == np.uint64(client), 0].astype(np.int64)
        return self.ids[~np.isin(self.ids, own)]

    def nearest(self, client: int, sketch: NDArray[Any], k: int) -> Ids:
        """The k candidates most like the client's own ``sketch`` (S,), the most alike first, ties by id.

        By cosine, all less the mean of the candidates, as what all entries share says nothing (one candidate: as
        they are). All of them if there are no more than k.

        Raises
        ------
        ValueError
            When ``sketch`` has another shape or is not finite.
        """
        own = _finite("a sketch", sketch, (self._size,))[None]
        ids = self.candidates(client)
        rows = self.sketches[np.isin(self.ids, ids)].astype(np.float64)
        mean = rows.mean(axis=0) if len(rows) > 1 else None
        likeness = (centred(rows, mean) * centred(own, mean)).sum(axis=1)
        return ids[np.lexsort([ids, -likeness.round(6)])[: max(k, 0)]]  # rounded: machines add in different ways

    def entry(self, id: int) -> tuple[Packed, Floats]:  # noqa: A002
        """Bits (ceil(numel/8),) and values of an entry: read-only views. KeyError when there is none."""
        at = int(np.searchsorted(self.ids, id))
        if at == self.ids.size or self.ids[at] != id:
            raise KeyError(f"no entry {id}: it was evicted, replaced or merged; ask for `candidates` again")
        return self.where[at], self.values[self.starts[at] : self.starts[at + 1]]

    def tasks(self, client: int) -> tuple[int, ...]:
        """Tasks of ``client`` that ever came, ascending."""
        return tuple(sorted(self.received[self.received[:, 0] == np.uint64(client), 1].tolist()))

    def attention(self) -> list[Attention]:
        """The reports, the latest last; those on evicted entries too, until ``fit`` needs their place."""
        rows = zip(self.seen.tolist(), self.alpha.mean(axis=1, dtype=np.float64).tolist(), strict=True)
        return [Attention(c, t, oc, ot, mean, entry, clock) for (c, t, entry, oc, ot, clock), mean in rows]

    @property
    def _size(self) -> int:
        return int(self.sketches.shape[1])

    def _arrays(self) -> Iterable[NDArray[Any]]:
        return (v for f in fields(self) if isinstance(v := getattr(self, f.name), np.ndarray))

    def _entries(self) -> list[Entry]:
        """Views of all rows."""
        owners: dict[int, list[tuple[int, int]]] = {}
        for entry, client, task in self.owners.tolist():
            owners.setdefault(entry, []).append((client, task))
        starts = self.starts.tolist()
        return [
            Entry(i, self.where[k], self.values[starts[k] : starts[k + 1]], self.sketches[k], at, tuple(owners[i]))
            for k, (i, at) in enumerate(zip(self.ids.tolist(), self.added.tolist(), strict=True))
        ]

    def _with(self, entries: Sequence[Entry], next_id: int) -> KnowledgeBase:
        """The same with other entries, ascending by id."""
        n = len(entries)
        owners = [(e.id, *owner) for e in entries for owner in e.owners]
        return replace(
            self,
            next_id=next_id,
            ids=np.array([e.id for e in entries], np.int64),
            where=np.array([e.where for e in entries], np.uint8).reshape(n, self.where.shape[1]),
            starts=np.cumsum([0, *(e.values.size for e in entries)], dtype=np.int64),
            values=np.concatenate([np.zeros(0, np.float32), *(e.values for e in entries)]),
            sketches=np.array([e.sketch for e in entries], np.float32).reshape(n, self._size),
            added=np.array([e.added for e in entries], np.int64),
            owners=np.array(owners, np.uint64).reshape(-1, 3),
        )

    def _recall(self, most: int) -> KnowledgeBase:
        """With at most ``most`` bytes of attention: reports on evicted entries go first, then the oldest."""
        rows = max(most, 0) // (8 * 6 + 4 * self.kinds)
        if len(self.seen) <= rows:
            return self
        live = np.isin(self.seen[:, 2], self.ids.astype(np.uint64))
        keep = np.sort(np.lexsort([np.arange(live.size), self.seen[:, 5], live])[live.size - rows :])
        return replace(self, seen=self.seen[keep], alpha=self.alpha[keep])


def _within(name: str, value: int, limit: int) -> int:
    if not 0 <= index(value) < limit:
        raise ValueError(f"{name} {value} is not in [0, {limit})")
    return index(value)


def _finite(name: str, array: NDArray[Any], shape: tuple[int, ...]) -> Floats:
    """A copy as float32."""
    if array.shape != shape or array.dtype.kind != "f" or not (np.abs(array) <= LARGEST).all():
        raise ValueError(f"{name}: need finite floats {shape} up to {LARGEST:g}, got {array.dtype} {array.shape}")
    return array.astype(np.float32)
