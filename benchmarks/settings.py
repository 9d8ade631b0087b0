"""Compare defaults on held-out *training* images of MNIST: input scale and Adam's epsilon.

    python benchmarks/settings.py --data-dir ../shared/data/mnist --rounds 8

Trains on the first 50,000 training images and measures on the other 10,000; the test set is never read. Writes
benchmarks/results/settings.json: accuracy and cumulative uplink bits a parameter, per round and variant.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
from pathlib import Path

from fedmask_flwr import data
from fedmask_flwr.simulation.sandbox import scripts

RESULTS = Path(__file__).parent / "results"
VARIANTS = [("centred", 1e-8), ("unit", 1e-8), ("unit", 1e-5), ("unit", 1e-4)]


def _held_out(split, data_dir):
    whole = data.load("mnist", "train", data_dir)
    rows = slice(0, 50_000) if split == "train" else slice(50_000, None)
    low = whole.x.min()
    return (whole.x[rows] - low) / (whole.x.max() - low), whole.y[rows]


def unit(split, data_dir):
    """Pixels in [0, 1]: black is no signal."""
    return _held_out(split, data_dir)


def centred(split, data_dir):
    """Pixels in [-1, 1]."""
    x, y = _held_out(split, data_dir)
    return 2 * x - 1, y


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", required=True)
    parser.add_argument("--rounds", type=int, default=8)
    args = parser.parse_args()
    found = []
    for scale, eps in VARIANTS:
        with tempfile.TemporaryDirectory() as out:
            command = (
                f"run --data benchmarks.settings:{scale} --clients 10 --rounds {args.rounds} -c adam-eps={eps}"
            )
            subprocess.run(
                [str(scripts() / "fedmask"), *command.split(), "--data-dir", args.data_dir, "--out", out],
                check=True,
            )
            lines = [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]
        sent = 0.0
        for line in lines:
            sent += line["uplink_bpp"]
            row = {"scale": scale, "adam_eps": eps, "round": line["round"], "uplink_bpp_so_far": round(sent, 4)}
            found.append(row | {"accuracy_threshold": line["accuracy_threshold"]})
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "settings.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
