"""Accuracy against total bytes, both directions, ours beside the field: one process, real frames, no Ray.

    python benchmarks/peers/run.py mnist --data-dir ../shared/data/mnist
    python benchmarks/peers/run.py mnist --data-dir ../shared/data/mnist --only klms,fedpm --seeds 1 --rounds 6
    python benchmarks/peers/run.py hapt --data-dir DIR/hapt      # DIR: what benchmarks/compare/prepare.py wrote
    python benchmarks/peers/run.py digits --quick

Ten clients with IID parts (HAPT: its thirty users), three local epochs; every method with its own defaults, but for
what its row says. The
metrics of every round are kept in benchmarks/results/peers-<data>.json, a run as soon as it is complete; what is
kept is not run again. The tables are in benchmarks/peers/README.md; `--table` prints them from what is kept, and
`--plot FILE` draws them.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from flwr.app import Context, RecordDict  # noqa: E402
from loopback import LoopbackGrid  # noqa: E402

from benchmarks import ratios  # noqa: E402
from benchmarks.peers import report  # noqa: E402
from client_app.main import app  # noqa: E402
from fedmask_flwr.flower.apps import serve  # noqa: E402

RESULTS = ROOT / "benchmarks/results"
EXACT = {"kappa": 1.0, "kappa-min": 1.0, "adam-eps": 1e-4}
BLOCKS = {"code": "blocks", "index-bits": 8, "margin": 2.0}
ROWS = {
    "drawstep at 0.05": {"method": "drawstep", "step": 1.25, "target-bpp": 0.05, "downlink": "relay"},
    "drawstep at 0.03": {"method": "drawstep", "step": 1.25, "target-bpp": 0.03, "downlink": "relay"},
    "drawstep": {"method": "drawstep", "downlink": "relay"},
    "drawstep in blocks at 0.03": {
        "method": "drawstep",
        **BLOCKS,
        "step": 1.25,
        "target-bpp": 0.03,
        "downlink": "relay",
    },
    "drawstep in blocks": {"method": "drawstep", **BLOCKS, "downlink": "relay"},
    "drawstep in blocks at step 2": {"method": "drawstep", **BLOCKS, "step": 2.0, "downlink": "relay"},
    "klms at 0.03": {"method": "klms", "downlink": "relay", "target-bpp": 0.03},
    "klms": {"method": "klms", "downlink": "relay"},
    "deltastep": {"method": "deltastep", "downlink": "relay"},
    "deltastep to 1": {"method": "deltastep", "step-min": 1.0, "downlink": "relay"},
    "deltastep to 1.5": {"method": "deltastep", "step-min": 1.5, "downlink": "relay"},
    "deltamask exact": {"method": "deltamask", **EXACT, "downlink": "relay"},
    "deltamask exact by votes": {"method": "deltamask", **EXACT, "downlink": "votes"},
    "deltamask faithful": {"method": "deltamask", "codec": "fuse8+png"},
    "fedpm": {"method": "fedpm"},
    "fedavg": {"method": "fedavg"},
    "fedavg zstd": {"method": "fedavg", "weights-codec": "float32+zstd"},
    "fedavg float16": {"method": "fedavg", "weights-codec": "float16"},
    "signsgd": {"method": "signsgd"},
    "qsgd": {"method": "qsgd"},
    "eden": {"method": "eden"},
    "topk": {"method": "topk"},
}
DATA = {
    "mnist": {"data": "mnist", "model": "mlp", "clients": 10},
    "held-out": {"data": "benchmarks.settings:unit", "model": "mlp", "clients": 10},
    "digits": {"data": "digits", "model": "mlp", "clients": 10},
    "cifar10": {"data": "benchmarks.peers.cut:cifar10", "model": "lenet5", "clients": 10},
    "hapt": {"data": "npz", "model": "har", "partition": "group", "clients": 30},
}
TARGETS = {
    "mnist": (0.9, 0.95, 0.96),
    "held-out": (0.9, 0.95, 0.96),
    "digits": (0.7, 0.8),
    "cifar10": (0.25, 0.4),
    "hapt": (0.7, 0.8, 0.85),
}
QUICK = {"seeds": "1", "rounds": 2, "only": "drawstep,deltastep,fedpm"}
KEPT = ("round", "accuracy_threshold", "accuracy_sampled", "uplink_bytes", "downlink_bytes", "uplink_bpp",
        "flower_uplink_bytes", "flower_downlink_bytes", "clients_failed", "seconds")  # fmt: skip


def run(settings: dict, rounds: int, seed: int) -> list[dict]:
    """One federation in this process; its rounds."""
    with tempfile.TemporaryDirectory() as out:
        config = {
            "out": out, "memory-dir": f"{out}/memory", "num-server-rounds": rounds, "seed": seed,
            "min-nodes": settings["clients"], "local-epochs": 3, **settings,
        }  # fmt: skip
        serve(LoopbackGrid(app, settings["clients"], config), Context(1, 1, {}, RecordDict(), config))
        lines = [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]
    return [{key: line[key] for key in KEPT if key in line} for line in lines]


def main() -> None:
    """Run what is not kept, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", choices=DATA)
    parser.add_argument("--data-dir", default="")
    parser.add_argument("--only", default=",".join(ROWS), help="rows, by name")
    parser.add_argument("--seeds", default="1,2,3")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--set", action="append", default=[], help="key=value for all rows; part of their names")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--targets", help="accuracies, such as 0.9,0.95; the second one is that of the ratios")
    parser.add_argument("--table", action="store_true", help="print what is kept")
    parser.add_argument("--plot", type=Path, help="a PNG of what is kept of these rows")
    parser.add_argument("--ratios", type=Path, help="JSON of the ratios, for benchmarks/bench.py")
    parser.add_argument("--quick", action="store_true", help="two rounds of three rows; nothing is kept")
    args = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("flwr").setLevel(logging.ERROR)
    if args.quick:
        for key, value in QUICK.items():
            setattr(args, key, value)
    kept = args.out or RESULTS / f"peers-{args.data}.json"
    runs = json.loads(kept.read_text()) if kept.exists() and not args.quick else []
    more = dict(pair.split("=", 1) for pair in args.set)
    more = {key: json.loads(value) if value[0] in "0123456789tf" else value for key, value in more.items()}
    for seed in [] if args.table else [int(s) for s in args.seeds.split(",")]:
        for name in args.only.split(","):
            label = ", ".join([name, *args.set])
            if any((run["name"], run["seed"]) == (label, seed) for run in runs):
                continue
            began = time.monotonic()
            settings = {"data-dir": args.data_dir, **DATA[args.data], **ROWS[name], **more}
            lines = run(settings, args.rounds, seed)
            clients = settings["clients"]
            numel = round(8 * lines[0]["uplink_bytes"] / clients / lines[0]["uplink_bpp"])
            runs.append({"name": label, "seed": seed, "clients": clients, "numel": numel,
                         "settings": settings | {"data-dir": ""}, "rounds": lines})  # fmt: skip
            if not args.quick:
                kept.write_text(json.dumps(runs).replace("}, {", "},\n{") + "\n")
            print(label, seed, f"{time.monotonic() - began:.0f} s", lines[-1]["accuracy_threshold"], flush=True)
    targets = [float(t) for t in args.targets.split(",")] if args.targets else TARGETS[args.data]
    figures = report.ratios(runs, targets[1], args.data)
    order = {name: place for place, name in enumerate(ROWS)}
    runs.sort(key=lambda run: (order.get(run["name"].split(",")[0], len(order)), run["name"], run["seed"]))
    print(report.table(runs, targets), ratios.table(figures), sep="\n\n")
    if args.plot:
        shown = [run for run in runs if run["name"] in args.only.split(",")]
        report.plot(shown, args.plot, f"{args.data}: {runs[0]['clients']} clients, 3 local epochs")
    if args.ratios:
        ratios.save(args.ratios, figures)


if __name__ == "__main__":
    main()
