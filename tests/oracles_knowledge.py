"""Slow, readable twin of the knowledge base: a dict of dense vectors, counted and compared in plain loops."""

from __future__ import annotations

import math

import numpy as np


def sketch(values, size, seed):
    """One position after another: the word's lowest bit is the sign, the rest the bucket."""
    out = [0.0] * size
    for word, value in zip(np.random.Philox(key=seed).random_raw(len(values)).tolist(), values, strict=True):
        out[(word >> 1) % size] += float(value) if word & 1 else -float(value)
    return np.array(out, np.float32)


def cosine(a, b):
    dot, norm = float(np.dot(a, b)), math.sqrt(float(np.dot(a, a)) * float(np.dot(b, b)))
    return dot / norm if norm else 0.0


class Slow:
    """Entries: id -> [vector, added, owners]. Reports: [client, task, entry, owner, its task, clock, alpha]."""

    def __init__(self, n, kinds, size):
        self.n, self.kinds, self.size = n, kinds, size
        self.entries, self.reports, self.received, self.next_id = {}, [], set(), 0

    def entry_bytes(self, id_):
        vector, _, owners = self.entries[id_]
        return (self.n + 7) // 8 + 4 * np.count_nonzero(vector) + 4 * self.size + 3 * 8 + 24 * len(owners)

    def nbytes(self):
        entries = sum(self.entry_bytes(i) for i in self.entries)
        return 8 + 16 * len(self.received) + entries + len(self.reports) * (48 + 4 * self.kinds)

    def _new(self, vector, added, owners):
        self.entries[self.next_id] = [vector, added, owners]
        self.next_id += 1

    def add(self, client, task, vector, clock):
        self.received.add((client, task))
        for i, (old, _, owners) in list(self.entries.items()):
            if owners == {(client, task)}:
                if (old == vector).all():
                    return
                del self.entries[i]
        self._new(vector, clock, {(client, task)})

    def candidates(self, client):
        return [i for i in sorted(self.entries) if client not in {c for c, _ in self.entries[i][2]}]

    def attend(self, client, task, ids, alpha, clock):
        for i, row in sorted(zip(ids, alpha, strict=True)):
            if i in self.candidates(client):
                self.reports = [r for r in self.reports if r[:3] != [client, task, i] or r[5] is None]
                self.reports += [[client, task, i, *o, None, row] for o in sorted(self.entries[i][2])]
        for r in self.reports:
            r[5] = clock if r[5] is None else r[5]

    def nearest(self, client, own, k):
        ids = self.candidates(client)
        rows = {i: sketch(self.entries[i][0], self.size, 0).astype(float) for i in ids}
        mean = sum(rows.values()) / len(rows) if len(rows) > 1 else 0.0

        def less(row):  # what is the mean, but for rounding, is like nothing
            tiny = np.linalg.norm(row - mean) <= 1e-6 * np.linalg.norm(row)
            return row * 0.0 if tiny else row - mean

        return sorted(ids, key=lambda i: (-round(cosine(less(rows[i]), less(own)), 6), i))[:k]

    def fit(self, budget, clock, window, negligible, similar):
        if self.nbytes() <= budget:
            return
        self._forget(budget // 8)
        used = {}
        for _, _, i, _, _, at, alpha in self.reports:
            if at > clock - window and i in self.entries:
                used[i] = max(used.get(i, 0.0), *(abs(float(a)) for a in alpha))
        for _, i in sorted((most, i) for i, most in used.items() if most < negligible):
            if self.nbytes() > budget:
                del self.entries[i]
        while self.nbytes() > budget and self._merge_once_each(budget, similar):
            pass
        while self.nbytes() > budget and self.entries:
            del self.entries[min(self.entries, key=lambda i: (self.entries[i][1], i))]
        if not self.entries:
            self._forget(max(budget - 8 - 16 * len(self.received), 0))

    def _forget(self, most):
        """Drop reports on what is gone, then the oldest, until they take no more than ``most`` bytes."""
        while len(self.reports) * (48 + 4 * self.kinds) > most:
            self.reports.remove(min(self.reports, key=lambda r: (r[2] in self.entries, r[5])))

    def _merge_once_each(self, budget, similar):
        """Every entry proposes its most similar one; best proposals first."""
        old = {i: sketch(self.entries[i][0], self.size, 0).astype(float) for i in sorted(self.entries)}
        mean = sum(old.values()) / len(old) if len(old) > 2 else 0.0
        pairs = set()
        for i, own in old.items():
            like = {j: cosine(own - mean, other - mean) for j, other in old.items() if j != i}
            if like and max(like.values()) > similar:
                j = max(like, key=like.get)
                pairs.add((-max(like.values()), min(i, j), max(i, j)))
        merged = False
        for _, i, j in sorted(pairs):
            if self.nbytes() <= budget or not {i, j} <= set(self.entries):
                continue
            (x, at, p), (y, bt, q) = self.entries[i], self.entries[j]
            if cosine(x.astype(float), y.astype(float)) > similar:
                del self.entries[i], self.entries[j]
                mean_ = (len(p) * x.astype(float) + len(q) * y.astype(float)) / (len(p) + len(q))
                self._new(mean_.astype(np.float32), max(at, bt), p | q)
                merged = True
        return merged
