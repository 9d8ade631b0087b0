"""Longer runs of single methods, three seeds each, through `fedmask run`; comparisons are in benchmarks/compare.

    python benchmarks/curves.py digits
    python benchmarks/curves.py mnist --data-dir ../shared/data/mnist --methods deltamask

Each run is `fedmask run` with its defaults; bytes are whole frames, totals over ten clients. The metrics of every
round of every run are kept in benchmarks/results/<data>.json; delete that file to measure again.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
from pathlib import Path

import numpy as np

from fedmask_flwr.simulation.sandbox import scripts

RESULTS = Path(__file__).parent / "results"
ROUNDS = {"digits": 20, "mnist": 30}
KEPT = ("round", "accuracy_sampled", "accuracy_threshold", "accuracy_expected", "uplink_bytes", "downlink_bytes",
        "uplink_bpp", "downlink_bpp", "clients_failed")  # fmt: skip


def measure(name, methods, seeds, data_dir):
    """Run what is not kept yet; a run is kept as soon as it is complete."""
    kept = RESULTS / f"{name}.json"
    runs = json.loads(kept.read_text()) if kept.exists() else []
    for method in methods:
        for seed in seeds:
            if any((run["method"], run["seed"]) == (method, seed) for run in runs):
                continue
            with tempfile.TemporaryDirectory() as out:
                options = f"--method {method} --data {name} --clients 10 --rounds {ROUNDS[name]} --local-epochs 3"
                command = ["run", *options.split(), "--seed", str(seed), "--out", out]
                command += ["--data-dir", data_dir] if data_dir else []
                subprocess.run([str(scripts() / "fedmask"), *command], check=True)
                lines = [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]
            rounds = [{k: round(line[k], 5) for k in KEPT} for line in lines]
            runs.append({"method": method, "data": name, "seed": seed, "clients": 10, "rounds": rounds})
            RESULTS.mkdir(exist_ok=True)
            kept.write_text(json.dumps(runs).replace("}, {", "},\n{") + "\n")
    return runs


def series(runs, method, key):
    return np.array([[line[key] for line in run["rounds"]] for run in runs if run["method"] == method])


def table(runs):
    print(f"{'method':10} {'final accuracy (threshold)':28} {'uplink bpp':18} {'MB up':>7} {'MB down':>8}")
    for method in dict.fromkeys(run["method"] for run in runs):
        final = series(runs, method, "accuracy_threshold")[:, -1]
        bpp = series(runs, method, "uplink_bpp").mean(axis=1)
        up, down = (series(runs, method, f"{way}link_bytes").sum(axis=1).mean() / 1e6 for way in ("up", "down"))
        spread = f"{final.mean():.4f} ({final.min():.4f} to {final.max():.4f})"
        print(f"{method:10} {spread:28} {bpp.mean():.4f} (<= {bpp.max():.4f}) {up:7.2f} {down:8.2f}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", choices=ROUNDS)
    parser.add_argument("--data-dir", default="")
    parser.add_argument("--methods", default="fedavg,fedpm,deltamask")
    parser.add_argument("--seeds", default="1,2,3")
    args = parser.parse_args()
    runs = measure(args.data, args.methods.split(","), [int(s) for s in args.seeds.split(",")], args.data_dir)
    table(runs)


if __name__ == "__main__":
    main()
