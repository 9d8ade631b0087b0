"""What it is worth that a client's C library keeps freed memory (`fedmask_flwr.heap`): time and peak of training.

    python benchmarks/heap.py [--quick] [--model conv4 ...]

DeltaMask's optimiser on the models of benchmarks/training.py, one thread, each setting in fresh processes in turn:
"kept" as the bundled client has it, "default" as glibc is, "given back" as a server has it (and what
``MALLOC_TRIM_THRESHOLD_=1048576 MALLOC_MMAP_THRESHOLD_=1048576`` does). Processor time of a step, pages that the
system cleared for it, and the peak above what the process held before the optimiser. Kept in
benchmarks/results/heap.json.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT)]

from benchmarks.ratios import Ratio, save  # noqa: E402

RESULTS = ROOT / "benchmarks/results/heap.json"
SETTINGS = ("kept", "default", "given back")
MODELS = ("mlp", "leaf", "conv4", "mobilenet_v2")


def one(name: str, setting: str, steps: int) -> dict[str, float]:
    """Steps of one model under one setting, in this process."""
    import torch

    from benchmarks.training import CASES, network, status, stepper
    from fedmask_flwr import heap

    torch.set_num_threads(1)
    if setting == "given back":
        heap.give_back()
    elif setting == "kept" and not heap.keep():
        raise SystemExit("less than 1 GB is free: nothing would be kept")
    case = CASES[name]
    model, (x, y) = network(name, case), case.inputs()
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    step = stepper(model, "compiled", "adam", x, y)
    for _ in range(3):
        step()
    began, faults = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(steps):
        step()
    took = time.process_time() - began
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults
    peak = (status("VmHWM") - before) / 1024
    return {"ms": 1000 * took / steps, "faults": faults / steps, "peak_mb": peak}


def measure(name: str, steps: int, repetitions: int) -> dict[str, object]:
    """A model's row; a ratio is the median over repetitions."""
    found: dict[str, list[dict[str, float]]] = {setting: [] for setting in SETTINGS}
    for _ in range(repetitions):
        for setting in SETTINGS:
            command = [sys.executable, __file__, "--one", name, setting, str(steps)]
            done = subprocess.run(
                command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, text=True, check=True
            )
            found[setting].append(json.loads(done.stdout))
    row: dict[str, object] = {"model": name}
    for setting, runs in found.items():
        row[setting] = {key: round(median(run[key] for run in runs), 2) for key in runs[0]}
        pairs = zip(runs, found["kept"], strict=True)
        row[f"{setting} / kept"] = round(median(run["ms"] / kept["ms"] for run, kept in pairs), 3)
    return row


def main() -> None:
    """Measure; print and keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the LEAF CNN once, few steps; nothing is kept")
    parser.add_argument("--model", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--ratios", type=Path, help="JSON of the figures, for benchmarks/bench.py")
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(one(args.one[0], args.one[1], int(args.one[2]))))
        return
    rows = []
    for name in ["leaf"] if args.quick else args.model:
        rows.append(measure(name, *((5, 1) if args.quick else (200 if name == "mlp" else 12, 3))))
        print(json.dumps(rows[-1]), flush=True)
    if args.ratios:
        save(
            args.ratios,
            [
                Ratio(f"freed memory, {row['model']}: a step with glibc as it is / kept", row["default / kept"])
                for row in rows
            ],
        )
    if not args.quick:
        args.out.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
