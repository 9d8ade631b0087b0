"""What a bounded knowledge base costs as clients and tasks come: bytes held, time, a client's downloads.

    python benchmarks/continual/knowledge.py [--out benchmarks/results/knowledge.json]

100 clients have 10 tasks each, all of n = 100,000 packed positions, half of them zero. Each task belongs to one of
20 groups: its vector is a part that all tasks share, one that its group shares, and its own. A group's zeros are
the same but for one position in ten. The own part has the group's variance. In one group of four it has only a
hundredth, and one zero in a hundred differs: those can be merged.

After each task every client gives its vector and gets the k most alike; those that it holds are not sent again. It
then reports attention: .2 to an entry of its own group, else .001. k = "all" is the papers' broadcast, from the
same budget. "unbounded" is what the server would hold, and each client get, if nothing were evicted.

Download bytes are an estimate: the bits at their entropy, H(q) n / 8, and 4 bytes a value. "precision" is the share
of the retrieved that are of the client's own group. Where a group has merged, a client that gave to it is not
offered it, so "of_possible" divides by what was there to be had: min(k, candidates of its group).
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np

from fedmask_flwr.aggregate import KnowledgeBase, sketch, sparsify

N, KINDS, SIZE, GROUPS = 100_000, 3, 512, 20
CLIENTS, TASKS, BUDGET = 100, 10, 64 << 20
CHOICES = (1, 3, 10, None)


def vectors(seed):
    """A function of (client, task) -> vector (N,), and the group of each."""
    shared = np.random.default_rng(seed)
    parts = shared.standard_normal((GROUPS + 1, N), np.float32)
    kept = shared.random((GROUPS, N), np.float32) < 0.5
    groups = shared.integers(GROUPS, size=(CLIENTS, TASKS))

    def vector(client, task):
        rng = np.random.default_rng([seed, 2, client, task])
        group = groups[client, task]
        own = np.float32(0.1 if group % 4 == 0 else 1.0) * rng.standard_normal(N, np.float32)
        changed = rng.random(N, np.float32) < (0.01 if group % 4 == 0 else 0.1)
        return (parts[0] + parts[1 + group] + own) * (kept[group] ^ changed)

    return groups, vector


def download(values, n):
    """Bytes of an entry: bits at their entropy, floats as they are."""
    q = values / n
    entropy = 0.0 if q in (0, 1) else -q * np.log2(q) - (1 - q) * np.log2(1 - q)
    return entropy * n / 8 + 4 * values


class Run:
    """A server with one k, and what its clients hold."""

    def __init__(self, k, groups):
        self.k, self.groups, self.rows = k, groups, []
        self.kb = KnowledgeBase.empty(N, KINDS, SIZE)
        self.held = [set() for _ in range(CLIENTS)]
        self.got = np.zeros(CLIENTS)

    def step(self, task, items, sketches):
        """All clients give, then retrieve and report; the row of what it cost."""
        kb, groups, seconds = self.kb, self.groups, {}
        start = time.perf_counter()
        kb = kb.extend(items, task)
        seconds["add"] = time.perf_counter() - start
        start = time.perf_counter()
        kb = kb.fit(BUDGET, task, window=3)
        seconds["fit"] = time.perf_counter() - start
        start = time.perf_counter()
        found = [kb.nearest(c, own, len(kb) if self.k is None else self.k) for c, own in enumerate(sketches)]
        seconds["nearest"] = time.perf_counter() - start
        alike = {}
        for entry, client, of in kb.owners.tolist():
            alike.setdefault(entry, set()).add(groups[client, of])
        hits = possible = 0
        told = kb
        for client, ids in enumerate(found):
            group, new = groups[client, task], set(ids.tolist()) - self.held[client]
            good = np.array([group in alike[i] for i in ids.tolist()])
            hits += int(good.sum())
            possible += min(ids.size, sum(group in alike[i] for i in kb.candidates(client).tolist()))
            self.got[client] += sum(download(kb.entry(i)[1].size, N) for i in new)
            self.held[client] |= new
            told = told.attend(client, task, ids, np.repeat(np.where(good, 0.2, 0.001)[:, None], KINDS, 1), task)
        self.kb = kb = told.fit(BUDGET, task, window=3)
        assert kb.nbytes <= BUDGET, "the budget is a promise"
        chosen = sum(ids.size for ids in found)
        self.rows.append(
            {
                "task": task + 1,
                "entries": len(kb),
                "merged": int((np.unique(kb.owners[:, 0], return_counts=True)[1] > 1).sum()),
                "server_bytes": kb.nbytes,
                "seconds": {name: round(s, 3) for name, s in seconds.items()},
                "download_bytes_a_client": round(float(self.got.mean())),
                "precision": round(hits / chosen, 4),
                "of_possible": round(hits / possible, 4),
            }
        )
        print(self.k or "all", json.dumps(self.rows[-1]), flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "results/knowledge.json")
    args = parser.parse_args()
    groups, vector = vectors(7)
    runs, unbounded, whole = [Run(k, groups) for k in CHOICES], [], KnowledgeBase.empty(N, KINDS, SIZE).nbytes
    for task in range(TASKS):
        dense = [vector(client, task) for client in range(CLIENTS)]
        items = [(client, task, *sparsify(v)) for client, v in enumerate(dense)]
        sketches = [sketch(v, SIZE, 0) for v in dense]
        whole += sum(where.nbytes + values.nbytes + 4 * SIZE + 64 for _, _, where, values in items)
        each = sum(download(values.size, N) for _, _, _, values in items) * (CLIENTS - 1) / CLIENTS
        unbounded.append({"task": task + 1, "server_bytes": whole, "download_bytes_a_client": round(each)})
        if task:
            unbounded[-1]["download_bytes_a_client"] += unbounded[-2]["download_bytes_a_client"]
        for run in runs:
            run.step(task, items, sketches)
    setting = {"clients": CLIENTS, "tasks": TASKS, "n": N, "kinds": KINDS, "sketch": SIZE, "groups": GROUPS}
    found = [{"k": run.k or "all", "after_task": run.rows} for run in runs]
    result = {"setting": {**setting, "budget": BUDGET}, "unbounded": unbounded, "runs": found}
    args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
