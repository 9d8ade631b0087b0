"""Seconds and memory of a simulated round: 1000 clients, 100 of them a round, ours beside Flower's own FedAvg.

    python benchmarks/scale/simulate.py --data-dir ../shared/data/mnist [--clients 1000] [--share 0.1] [--rounds 5]

MNIST in equal parts (60 images a client), the 784-300-100-10 network, one local epoch; Flower's Simulation Runtime
for all, each run in a fresh one, two actors on two cores. ``flower`` is ``flwr.serverapp.strategy.FedAvg`` with a
ClientApp that knows nothing of us (benchmarks/scale/plain). A line a round is kept in
benchmarks/results/scale-simulation.json: seconds, the most memory of the whole tree of processes (resident: shared
pages count once a process; proportional: once), CPU seconds by kind of process.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path
from statistics import median

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

from processes import Watch  # noqa: E402

from fedmask_flwr.simulation import run  # noqa: E402

RESULTS = ROOT / "benchmarks/results/scale-simulation.json"
PLAIN = "flower"
ROWS = {
    PLAIN: {},
    "fedavg": {"method": "fedavg"},
    "deltamask": {"method": "deltamask", "kappa": 1.0, "kappa-min": 1.0, "adam-eps": 1e-4},
    "klms": {"method": "klms", "downlink": "relay"},
    "drawstep": {"method": "drawstep", "downlink": "relay"},
}
KEPT = ("round", "seconds", "accuracy_threshold", "uplink_bytes", "downlink_bytes", "clients_failed")


def plain_app(folder: Path) -> Path:
    """The app to compare with, as `simulation.run` wants it."""
    shutil.copytree(Path(__file__).parent / "plain", folder, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copyfile(ROOT / "LICENSE", folder / "LICENSE")
    return folder


def measure(name: str, args: argparse.Namespace) -> dict:
    """One simulation; what each round took."""
    rounds: list[dict] = []
    with tempfile.TemporaryDirectory() as place, Watch() as watch:
        config = {"num-server-rounds": args.rounds, "fraction-train": args.share, "local-epochs": 1}
        config |= {"data-dir": str(Path(args.data_dir).absolute())}
        root = None
        if name == PLAIN:
            root = plain_app(Path(place) / "root")
        else:
            config |= {"data": "mnist", "model": "mlp", "eval-samples": 1, "clients": args.clients, **ROWS[name]}
            config |= {"memory-dir": f"{place}/memory"}

        def on_round(line: dict) -> None:
            rounds.append({key: line[key] for key in KEPT if key in line} | {"end": watch.now})
            print(name, line["round"], line["seconds"], flush=True)

        run(config, num_clients=args.clients, out=Path(place) / "out", on_round=on_round, root=root)
        whole = watch.now
    for line in rounds:
        end = line.pop("end")
        start = end - line["seconds"]
        seen = watch.between(start - 1, end + 1)
        line["peak_rss_mb"] = round(max(s.rss for s in seen) / 1e6)
        line["cpu_s"] = watch.cpu_between(start - 1, end + 1)
    top = max(watch.samples, key=lambda s: s.rss)
    later = [line["seconds"] for line in rounds[1:]]
    return {
        "name": name,
        "clients": args.clients,
        "share": args.share,
        "load": round(os.getloadavg()[1], 1),  # of the last five minutes: how many processes wanted the cores
        "whole_s": round(whole, 1),
        "start_s": round(whole - sum(line["seconds"] for line in rounds), 1),
        "first_round_s": rounds[0]["seconds"],
        "round_s": round(median(later), 2) if later else None,
        "peak_rss_mb": round(top.rss / 1e6),
        "peak_pss_mb": round(max(s.pss for s in watch.samples) / 1e6),
        "round_cpu_s": round(median(sum(line["cpu_s"].values()) for line in rounds[1:]), 2) if later else None,
        "at_peak_mb": {kind: round(rss / 1e6) for kind, rss in sorted(top.parts.items())},
        "rounds": rounds,
    }


def table(rows: list[dict]) -> str:
    """A line a run, in Markdown."""
    head = (
        "| | load | start | round 1 | a later round | of CPU | memory | shared once | up a client | down a client |"
    )
    lines = [head, "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|"]
    for row in rows:
        last, told = row["rounds"][-1], row["clients"] * row["share"]
        lines.append(
            f"| {row['name']} | {row['load']} | {row['start_s']:.0f} s | {row['first_round_s']:.1f} s "
            f"| {row['round_s']:.1f} s | {row['round_cpu_s']:.1f} s "
            f"| {row['peak_rss_mb']} MB | {row['peak_pss_mb']} MB "
            f"| {last['uplink_bytes'] / told / 1e3:.1f} kB | {last['downlink_bytes'] / told / 1e3:.1f} kB |"
        )
    return "\n".join(lines)


def main() -> None:
    """Measure what was asked for; rows of an earlier run are replaced, one by one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", default="", help="folder of MNIST's idx files")
    parser.add_argument("--clients", type=int, default=1000)
    parser.add_argument("--share", type=float, default=0.1, help="of the clients that train in a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", default=",".join(ROWS))
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--table", action="store_true", help="print what is kept")
    args = parser.parse_args()
    rows = json.loads(args.out.read_text()) if args.out.exists() else []
    for name in [] if args.table else args.only.split(","):
        row = measure(name, args)
        rows = [old for old in rows if (old["name"], old["clients"]) != (name, args.clients)] + [row]
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(rows, indent=1) + "\n")
    print(table(rows))


if __name__ == "__main__":
    main()
