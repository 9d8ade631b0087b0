"""Seconds in which a server decodes the replies of a round, by `server-threads`.

    python benchmarks/scale/threads.py [--threads 1 2] [--numel 1000000] [--clients 40]

`in_order` over `decoded`, as the strategy does it, with made-up replies (`synthetic`). Real seconds: run it on a
machine that does nothing else. Each repetition decodes with every number of threads in turn, and a ratio is the
median over repetitions. Kept in benchmarks/results/scale-threads.json.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT)]

from benchmarks.scale.synthetic import DEVICES, METHODS, begun, built, decoded, frames  # noqa: E402
from fedmask_flwr.flower.replies import in_order  # noqa: E402

RESULTS = ROOT / "benchmarks/results/scale-threads.json"


def measure(name: str, numel: int, clients: int, threads: list[int], repetitions: int = 5) -> dict:
    """Median seconds with each number of threads, and how many times faster than with the first."""
    rng = np.random.Generator(np.random.Philox(key=1))
    method = built(name, numel)
    state = begun(method, rng)
    made = frames(method, state, rng)

    def read(client: int) -> int:
        _, payload = decoded(method, state, made[client % DEVICES], client % DEVICES)
        return int(payload.bits["mask"][0])

    took: dict[int, list[float]] = {n: [] for n in threads}
    wanted = list(map(read, range(clients)))  # compile
    for _ in range(repetitions):
        for n in threads:
            began = time.perf_counter()
            if list(in_order(read, range(clients), n)) != wanted:
                raise RuntimeError("another mask")
            took[n].append(time.perf_counter() - began)
    faster = {n: median(a / b for a, b in zip(took[threads[0]], took[n], strict=True)) for n in threads}
    return {
        "method": name, "parameters": method.numel, "clients": clients, "cores": os.cpu_count(),
        "seconds": {n: round(median(took[n]), 4) for n in threads},
        "times_faster": {n: round(faster[n], 3) for n in threads},
    }  # fmt: skip


def main() -> None:
    """Measure; print and keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--numel", type=int, default=1_000_000)
    parser.add_argument("--clients", type=int, default=40)
    parser.add_argument("--only", default=",".join(METHODS))
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    rows = []
    for row in map(
        partial(measure, numel=args.numel, clients=args.clients, threads=args.threads), args.only.split(",")
    ):
        rows.append(row)
        print(json.dumps(row), flush=True)
    args.out.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
