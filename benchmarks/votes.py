"""Time and memory of counting N masks, streamed as a server does it, against ``np.unpackbits`` and an int64 sum.

Run: python benchmarks/votes.py [--numel 10000000] [--clients 10 100 1000] [--quick]

Every mask is written anew before it is added, as a decoder does; that is not timed. Seconds are of this thread's
processor time, as the machine may run other things. ``peak_mb`` is what numpy allocated at most, masks and all.
Compiled kernels are called once before the clock starts.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import numpy as np

sys.path[:0] = [str(Path(__file__).parents[1])]

from benchmarks import ratios  # noqa: E402
from fedmask_flwr import jit  # noqa: E402
from fedmask_flwr.aggregate import VoteCounter  # noqa: E402

RESULTS = Path(__file__).parent / "results/votes.json"
SOURCES = 8  # different masks, in turn


def masks(numel: int) -> np.ndarray:
    """A few random masks, (SOURCES, ceil(numel / 8))."""
    rows = np.random.default_rng(0).integers(0, 256, (SOURCES, -(-numel // 8)), dtype=np.uint8)
    rows[:, -1] &= 0xFF >> (-numel % 8)
    return rows


def naive(rows: np.ndarray, numel: int, repeats: int) -> float:
    """Seconds a mask of the plain way, the median."""
    total, seconds = np.zeros(numel, np.int64), []
    for k in range(repeats):
        mask = rows[k % SOURCES].copy()
        start = time.thread_time()
        total += np.unpackbits(mask, count=numel, bitorder="little")
        seconds.append(time.thread_time() - start)
    return float(np.median(seconds))


def measure(numel: int, clients: int) -> dict[str, float | int | bool]:
    """One row of the table; the plain way is timed before and after ours."""
    rows = masks(numel)
    warm = VoteCounter(numel)
    warm.add(rows[0].copy())
    warm.votes()
    plain = naive(rows, numel, 4)
    counter, adding = VoteCounter(numel), 0.0
    for k in range(clients):
        mask = rows[k % SOURCES].copy()
        start = time.thread_time()
        counter.add(mask)
        adding += time.thread_time() - start
    start = time.thread_time()
    votes = counter.votes()
    reading = time.thread_time() - start
    plain = (plain + naive(rows, numel, 4)) / 2
    times = np.bincount(np.arange(clients) % SOURCES, minlength=SOURCES)
    part = slice(0, min(numel, 1 << 16))
    found = times @ np.unpackbits(rows, axis=1, count=numel, bitorder="little")[:, part]
    if not np.array_equal(votes[part], found):
        raise RuntimeError("the votes are wrong")
    del votes, counter
    tracemalloc.start()
    counter = VoteCounter(numel)
    for _ in range(min(clients, 300)):
        counter.add(rows[0].copy())
    counter.votes()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    size = clients * rows.shape[1]
    return {
        "compiled": jit.available(),
        "numel": numel,
        "clients": clients,
        "add_s": adding,
        "votes_s": reading,
        "gb_per_s": size / adding / 1e9,
        "gb_per_s_with_votes": size / (adding + reading) / 1e9,
        "naive_gb_per_s": rows.shape[1] / plain / 1e9,
        "ratio": plain * clients / adding,
        "ratio_with_votes": plain * clients / (adding + reading),
        "peak_mb": peak / 1e6,
    }


def main() -> None:
    """Print a table, with and without machine code, and write the same as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--numel", type=int, default=10_000_000)
    parser.add_argument("--clients", type=int, nargs="+", default=[10, 100, 1000])
    parser.add_argument(
        "--quick", action="store_true", help="a tenth of the positions, 10 and 100 clients, no file"
    )
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--ratios", type=Path, help="JSON of the figures, for benchmarks/bench.py")
    parser.add_argument("--one", action="store_true", help="this process only; JSON alone")
    args = parser.parse_args()
    if args.quick:
        args.numel, args.clients = min(args.numel, 2_000_000), [n for n in args.clients if n <= 100]
    if args.one:
        print(json.dumps([measure(args.numel, n) for n in args.clients]))
        return
    command = [sys.executable, __file__, "--one", "--numel", str(args.numel), "--clients", *map(str, args.clients)]
    rows = []
    for switch in ("1", "0"):
        done = subprocess.run(
            command, env={**os.environ, "FEDMASK_JIT": switch}, stdout=subprocess.PIPE, text=True, check=True
        )
        rows += json.loads(done.stdout)
    print(f"d = {args.numel}  clients  GB/s  (with votes())  plain GB/s  ratio  (with votes())  peak MB")
    for r in rows:
        print(
            f"{'machine code' if r['compiled'] else 'numpy':>12} {r['clients']:8} {r['gb_per_s']:6.2f} "
            f"{r['gb_per_s_with_votes']:10.2f} {r['naive_gb_per_s']:14.3f} {r['ratio']:9.1f} "
            f"{r['ratio_with_votes']:10.1f} {r['peak_mb']:14.1f}"
        )
    if args.ratios:
        best = max((r for r in rows if r["compiled"]), key=lambda r: r["clients"], default=rows[-1])
        of = f"votes of {best['clients']} masks of {best['numel']:.0e}"
        ratios.save(
            args.ratios,
            [
                ratios.Ratio(f"{of}: GB/s of packed masks", best["gb_per_s"], 1.5),
                ratios.Ratio(f"{of}: np.unpackbits and an int64 sum / ours", best["ratio"], 40.0),
                ratios.Ratio(f"{of}: seconds", best["add_s"] + best["votes_s"], 1.0, "at most"),
                ratios.Ratio(f"{of}: peak MB", best["peak_mb"], 200.0, "at most"),
            ],
        )
    if not args.quick:
        args.out.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
