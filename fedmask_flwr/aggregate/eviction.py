"""What a knowledge base gives up when it is over its budget: the unused, then near-copies, then the oldest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from .sketches import Floats, Packed, centred, cosine, densify, sketch, sparsify

POOL = 2048  # so many of the oldest are compared pair by pair: 32 MiB, under a second


class Entry(NamedTuple):
    """One row of a knowledge base: n positions' bits, their values, the sketch, (client, task) of its owners."""

    id: int
    where: Packed
    values: Floats
    sketch: Floats
    added: int
    owners: tuple[tuple[int, int], ...]

    @property
    def nbytes(self) -> int:
        """Bytes that it takes in a knowledge base: the arrays, id, start and clock, and its owners' rows."""
        return self.where.nbytes + self.values.nbytes + self.sketch.nbytes + 24 + 24 * len(self.owners)


def evict(
    entries: Sequence[Entry],
    excess: int,
    used: Mapping[int, float],
    *,
    negligible: float,
    similar: float,
    next_id: int,
    n: int,
    seed: int,
) -> tuple[list[Entry], int]:
    """Entries, ascending by id, that are ``excess`` bytes fewer, and the next id; a rule goes on while it must.

    1. Where ``used`` (entry id -> largest attention) knows an entry: those below ``negligible``, the least first.
    2. The most similar pair becomes one entry (``_merge``).
    3. The oldest.
    """
    left, gone = list(entries), set()
    for entry in sorted(left, key=lambda e: (used.get(e.id, np.inf), e.id)):
        if excess <= 0 or not used.get(entry.id, np.inf) < negligible:
            break
        excess -= entry.nbytes
        gone.add(entry.id)
    left = [e for e in left if e.id not in gone]
    while excess > 0:
        merged, freed = _pass(left, excess, similar, next_id, n, seed)
        if not freed:
            break
        left, excess, next_id = merged, excess - freed, merged[-1].id + 1
    gone = set()
    for entry in sorted(left, key=lambda e: (e.added, e.id)):
        if excess <= 0:
            break
        excess -= entry.nbytes
        gone.add(entry.id)
    return [e for e in left if e.id not in gone], next_id


def _pass(
    entries: Sequence[Entry], excess: int, similar: float, next_id: int, n: int, seed: int
) -> tuple[list[Entry], int]:
    """Merge pairs, the most similar first, until ``excess`` bytes are free: what is left, and the bytes freed.

    In one pass an entry merges once: a pass costs one product of sketches, however many pairs there are.
    """
    pool = sorted(entries, key=lambda e: (e.added, e.id))[:POOL]
    gone: set[int] = set()
    fresh: list[Entry] = []
    freed = 0
    for a, b in _pairs(pool, similar):
        if freed >= excess:
            break
        if a.id in gone or b.id in gone:
            continue
        x, y = densify(a.where, a.values, n), densify(b.where, b.values, n)
        if cosine(x, y) <= similar:  # the sketches collide; that can be made on purpose, as their seed is public
            continue
        fresh.append(_merge(a, b, x, y, next_id + len(fresh), seed))
        gone |= {a.id, b.id}
        freed += a.nbytes + b.nbytes - fresh[-1].nbytes
    return [e for e in entries if e.id not in gone] + fresh, freed


def _pairs(pool: Sequence[Entry], similar: float) -> list[tuple[Entry, Entry]]:
    """Each entry with the one it is most like, if above ``similar``: the most similar pair first, then by id.

    Sketches are centred, as what all entries share says nothing; of two, the mean would make opposites.
    """
    if len(pool) < 2:
        return []
    rows = np.stack([e.sketch for e in pool]).astype(np.float64)
    rows = centred(rows, rows.mean(axis=0) if len(pool) > 2 else None)
    likeness = rows @ rows.T
    np.fill_diagonal(likeness, -2.0)
    best = enumerate(likeness.argmax(axis=1).tolist())
    found = [(-float(likeness[i, j]), i, j) for i, j in {(min(pair), max(pair)) for pair in best}]
    found.sort(key=lambda f: (f[0], *sorted((pool[f[1]].id, pool[f[2]].id))))
    return [(pool[i], pool[j]) for less, i, j in found if -less > similar]


def _merge(a: Entry, b: Entry, x: Floats, y: Floats, new_id: int, seed: int) -> Entry:
    """The mean of both by their numbers of owners, as old as the younger, owned by all."""
    p, q = len(a.owners), len(b.owners)
    mean = ((p * x.astype(np.float64) + q * y.astype(np.float64)) / (p + q)).astype(np.float32)
    owners = tuple(sorted({*a.owners, *b.owners}))
    return Entry(new_id, *sparsify(mean), sketch(mean, a.sketch.size, seed), max(a.added, b.added), owners)
