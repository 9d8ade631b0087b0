"""What a bounded knowledge base costs as clients and tasks come: bytes held, time, a client's downloads.

    python benchmarks/continual/knowledge.py [--out benchmarks/results/knowledge.json]

100 clients have 10 tasks each, all of n = 100,000 packed positions, half of them zero. Each task belongs to one of
20 groups: its vector is a part that all tasks share, one that its group shares, and its own. A group's zeros are the
same but for one position in ten. The own part has the group's variance, in one group of four only a hundredth: those
can be merged. After each task every client gives its vector and gets the k most alike; those that it holds are not
sent again. k = "all" is the papers' broadcast, from the same budget. It then reports attention: .2 to an entry of its
own group, else .001. "unbounded" is what the server would hold, and each client get, if nothing were evicted.

Download bytes are an estimate: the bits at their entropy, H(q) n / 8, and 4 bytes a value. Precision is the share of
the retrieved that are of the client's own group; "relevant" counts candidates of that group, before the choice.
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


def run(k, budget):
    """One row after each task."""
    groups, vector = vectors(7)
    kb, rows = KnowledgeBase.empty(N, KINDS, SIZE), []
    held = [set() for _ in range(CLIENTS)]
    got = np.zeros(CLIENTS)
    unbounded = 0
    for task in range(TASKS):
        seconds = {"add": 0.0, "fit": 0.0, "nearest": 0.0}
        own, items = [], []
        for client in range(CLIENTS):
            dense = vector(client, task)
            items.append((client, task, *sparsify(dense)))
            own.append(sketch(dense, SIZE, 0))
            unbounded += items[-1][2].nbytes + items[-1][3].nbytes + 4 * SIZE + 48
        start = time.perf_counter()
        kb = kb.extend(items, task)
        seconds["add"] += time.perf_counter() - start
        start = time.perf_counter()
        kb = kb.fit(budget, task, window=3)
        seconds["fit"] += time.perf_counter() - start
        owners = {}
        for entry, client, of in kb.owners.tolist():
            owners.setdefault(entry, []).append(int(groups[client, of]))
        hits = chosen = relevant = 0
        reports = []
        for client in range(CLIENTS):
            group = int(groups[client, task])
            start = time.perf_counter()
            ids = kb.nearest(client, own[client], len(kb) if k is None else k)
            seconds["nearest"] += time.perf_counter() - start
            alike = np.array([group in owners[i] for i in ids.tolist()])
            hits, chosen = hits + int(alike.sum()), chosen + ids.size
            relevant += sum(group in owners[i] for i in kb.candidates(client).tolist())
            got[client] += sum(download(kb.entry(i)[1].size, N) for i in ids.tolist() if i not in held[client])
            held[client].update(ids.tolist())
            reports.append((client, ids, np.repeat(np.where(alike, 0.2, 0.001)[:, None], KINDS, 1)))
        for client, ids, alpha in reports:
            kb = kb.attend(client, task, ids, alpha, task)
        kb = kb.fit(budget, task, window=3)
        assert kb.nbytes <= budget, "the budget is a promise"
        rows.append(
            {
                "task": task + 1,
                "entries": len(kb),
                "merged": int((np.unique(kb.owners[:, 0], return_counts=True)[1] > 1).sum()),
                "server_bytes": kb.nbytes,
                "unbounded_server_bytes": unbounded,
                "seconds": {name: round(s, 3) for name, s in seconds.items()},
                "download_bytes_a_client": round(float(got.mean())),
                "unbounded_download_bytes_a_client": round((task + 1) * (CLIENTS - 1) * download(N // 2, N)),
                "precision": round(hits / chosen, 4) if chosen else None,
                "relevant_a_client": relevant / CLIENTS,
            }
        )
        print(k or "all", json.dumps(rows[-1]), flush=True)
    return {"k": k or "all", "budget": budget, "after_task": rows}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "results/knowledge.json")
    args = parser.parse_args()
    setting = {"clients": CLIENTS, "tasks": TASKS, "n": N, "kinds": KINDS, "sketch": SIZE, "groups": GROUPS}
    found = {"setting": setting, "runs": [run(k, BUDGET) for k in CHOICES]}
    args.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
