"""Masks on the last blocks of a pretrained network, beside linear probing and full fine-tuning.

    python benchmarks/pretrained/prepare.py --data ../shared/data --out DIR
    python benchmarks/pretrained/run.py resnet20 --dir DIR
    python benchmarks/pretrained/run.py resnet20 --table

Ten clients with IID parts, one process, whole frames. First two rounds of linear probing, whose head the other
methods begin with and keep frozen; linear probing itself goes on for as many rounds as they have. Every round of
every run is kept in benchmarks/results/pretrained-<net>.json, a run as soon as it is complete; what is kept is not
run again.
`--held` measures on held-out training images and keeps nothing: for choosing settings, `--set` changes them.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from flwr.app import Context, RecordDict  # noqa: E402
from loopback import LoopbackGrid  # noqa: E402

from client_app.main import app  # noqa: E402
from fedmask_flwr.export import read_run  # noqa: E402
from fedmask_flwr.flower.apps import serve  # noqa: E402
from fedmask_flwr.masks import MaskSpec  # noqa: E402
from fedmask_flwr.methods.beta import BetaMethod  # noqa: E402

RESULTS = ROOT / "benchmarks/results"
NETS = {
    "mobilenetv2": {
        "model": "benchmarks.pretrained.nets:mobilenetv2(first=17)",
        "include": "features.*",
        "exclude": "classifier.*",
        "batch-size": 25,
        "local-epochs": 1,
    },
    "resnet20": {
        "model": "benchmarks.pretrained.nets:resnet20(first=3)",
        "include": "layer3.*",
        "exclude": "linear.*",
        "batch-size": 25,
        "local-epochs": 2,
    },
}
PROBE = {"mobilenetv2": {"learning-rate": 3e-3}, "resnet20": {"learning-rate": 0.1}}
MASKED = {"theta0": 0.95, "learning-rate": 0.3, "adam-eps": 1e-5}
TUNED = {"mobilenetv2": {"learning-rate": 3e-4}, "resnet20": {"learning-rate": 1e-3}}
EXACT = {"kappa": 1.0, "kappa-min": 1.0, "downlink": "relay"}
ROWS = {
    "linear probing": {"method": "linear-probe"},
    "fine-tuning, same blocks": {"method": "finetune"},
    "deltamask faithful": {"method": "deltamask", "codec": "fuse8+png"},
    "deltamask exact": {"method": "deltamask", **EXACT},
    "deltastep": {"method": "deltastep", "downlink": "relay"},
    "drawstep": {"method": "drawstep", "downlink": "relay"},
    "drawstep in blocks": {
        "method": "drawstep",
        "code": "blocks",
        "index-bits": 8,
        "margin": 2.0,
        "downlink": "relay",
    },
    "klms": {"method": "klms", "downlink": "relay"},
    "fedpm": {"method": "fedpm"},
}
KEPT = (
    "round",
    "accuracy_threshold",
    "loss",
    "uplink_bytes",
    "downlink_bytes",
    "uplink_bpp",
    "clients_failed",
    "seconds",
)
CLIENTS, HEAD_ROUNDS = 10, 2


def federation(settings: dict, rounds: int, seed: int, folder: Path) -> list[dict]:
    """One federation in this process; its rounds."""
    config = {
        "out": str(folder), "memory-dir": f"{folder}/memory", "num-server-rounds": rounds, "seed": seed,
        "data": "npz", "clients": CLIENTS, "min-nodes": CLIENTS, **settings,
    }  # fmt: skip
    serve(LoopbackGrid(app, CLIENTS, config), Context(1, 1, {}, RecordDict(), config))
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: line[key] for key in KEPT if key in line} for line in lines]


def named(path: Path) -> str:
    """A checkpoint as the run config names it."""
    return f"file:{path}#sha256={hashlib.sha256(path.read_bytes()).hexdigest()}"


def probed(net: str, folder: Path, data: Path, seed: int) -> tuple[str, list[dict]]:
    """The network whose head was trained for two rounds of linear probing, by name, and those rounds."""
    path = folder / "heads" / f"{data.name}-{seed}.safetensors"
    if not path.exists():
        settings = {
            "method": "linear-probe",
            "data-dir": str(data),
            "weights": named(folder / f"{net}.safetensors"),
        }
        with tempfile.TemporaryDirectory() as out:
            lines = federation({**settings, **NETS[net], **PROBE[net]}, HEAD_ROUNDS, seed, Path(out))
            state = read_run(Path(out)).model.state_dict()
        path.parent.mkdir(exist_ok=True)
        path.with_suffix(".json").write_text(json.dumps(lines))
        save_file(state, path)
    return named(path), json.loads(path.with_suffix(".json").read_text())


def run(net: str, name: str, folder: Path, data: Path, rounds: int, seed: int, more: dict) -> dict:
    """One row: what is kept of it."""
    row = {**NETS[net], **ROWS[name]}
    method = row["method"]
    own = {"linear-probe": PROBE[net], "finetune": TUNED[net]}.get(method, MASKED)
    if method == "linear-probe":
        weights, head, rounds = named(folder / f"{net}.safetensors"), [], rounds + HEAD_ROUNDS
    else:
        weights, head = probed(net, folder, data, seed)
    settings = {**row, **own, **more}
    with tempfile.TemporaryDirectory() as out:
        lines = federation({**settings, "data-dir": str(data), "weights": weights}, rounds, seed, Path(out))
        model = read_run(Path(out)).model
    masked = MaskSpec.of(model, NETS[net]["include"].split(","), NETS[net]["exclude"].split(",")).numel
    return {"name": name, "seed": seed, "clients": CLIENTS, "masked": masked, "settings": settings,
            "head": head, "rounds": lines}  # fmt: skip


def per_weight(lines: list[dict], key: str, masked: int) -> float:
    """Bits a masked weight, client and round."""
    return 8 * sum(line[key] for line in lines) / len(lines) / CLIENTS / masked


def table(runs: list[dict]) -> None:
    """Markdown: accuracy, bits a masked weight and round, megabytes in all."""
    print(
        "| method | seeds | accuracy | bits up, mean | bits up, last | bits up and down, mean | MB up | MB both |"
    )
    print("|---" * 8 + "|")
    for name in dict.fromkeys(run["name"] for run in runs):
        mine = [run for run in runs if run["name"] == name]
        final = [run["rounds"][-1]["accuracy_threshold"] for run in mine]
        up = [per_weight(run["rounds"], "uplink_bytes", run["masked"]) for run in mine]
        down = [per_weight(run["rounds"], "downlink_bytes", run["masked"]) for run in mine]
        last = [per_weight(run["rounds"][-1:], "uplink_bytes", run["masked"]) for run in mine]
        sent = [sum(line["uplink_bytes"] for line in run["head"] + run["rounds"]) / 1e6 for run in mine]
        told = [sum(line["downlink_bytes"] for line in run["head"] + run["rounds"]) / 1e6 for run in mine]
        n = len(mine)
        spread = f"{sum(final) / n:.4f}" + (f" ({min(final):.4f} to {max(final):.4f})" if n > 1 else "")
        print(
            f"| {name} | {n} | {spread} | {sum(up) / n:.3g} | {sum(last) / n:.3g} | {sum(up + down) / n:.3g} "
            f"| {sum(sent) / n:.3g} | {sum(sent + told) / n:.3g} |"
        )
    heads = {run["seed"]: run["head"][-1]["accuracy_threshold"] for run in runs if run["head"]}
    print("\nafter the two rounds of linear probing:", ", ".join(f"{v:.4f}" for v in heads.values()))


def option(text: str) -> tuple[str, object]:
    key, _, value = text.partition("=")
    return key, json.loads(value) if value[0] in "0123456789tf" else value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("net", choices=NETS)
    parser.add_argument("--dir", type=Path, help="what prepare.py wrote")
    parser.add_argument("--only", default="", help="rows, by name, separated by semicolons")
    parser.add_argument("--seeds", default="1,2,3")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--set", action="append", default=[], help="key=value for all rows")
    parser.add_argument("--held", action="store_true", help="measure on held-out training images, keep nothing")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--table", action="store_true", help="print what is kept")
    args = parser.parse_args()
    torch.set_num_threads(1)
    BetaMethod.modes = ("threshold",)  # what the table says; three networks a round would take longer than training
    logging.getLogger("flwr").setLevel(logging.ERROR)
    kept = args.out or RESULTS / f"pretrained-{args.net}.json"
    runs = json.loads(kept.read_text()) if kept.exists() and not args.held else []
    if not args.table and args.dir is None:
        parser.error("--dir is missing: the folder that prepare.py wrote")
    for seed in [] if args.table else [int(s) for s in args.seeds.split(",")]:
        for name in args.only.split(";") if args.only else ROWS:
            if any((run["name"], run["seed"]) == (name, seed) for run in runs):
                continue
            began = time.monotonic()
            data = args.dir.absolute() / (args.net + "-held" * args.held)
            found = run(args.net, name, args.dir.absolute(), data, args.rounds, seed, dict(map(option, args.set)))
            runs.append(found)
            if not args.held:
                kept.write_text(json.dumps(runs).replace("}, {", "},\n{") + "\n")
            seen = [
                f"{line['accuracy_threshold']:.3f}/{line.get('accuracy_expected', 0):.3f}"
                for line in found["rounds"]
            ]
            print(name, seed, *args.set, f"{time.monotonic() - began:.0f} s,", " ".join(seen), flush=True)
    table(runs)


if __name__ == "__main__":
    main()
