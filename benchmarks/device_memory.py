"""Memory that a device's turn takes, bytes a parameter: training, and until the reply is written.

    python benchmarks/device_memory.py [--parameters 3000000] [--methods fedpm deltamask ...] [--quick]

One masked layer without activations to speak of, one step of Adam that moves every position, the reply as it
travels; each method in a fresh process, after a turn on a tiny network, which loads what has to be loaded. The peak
is VmHWM, less what the process held before. The doctor's estimate (`fedmask_flwr/checks/machine.py`) is above all.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from torch import nn

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT)]

from benchmarks.ratios import Ratio, save  # noqa: E402
from benchmarks.training import status  # noqa: E402
from fedmask_flwr.checks.machine import PER_PARAMETER  # noqa: E402
from fedmask_flwr.masks import initialise  # noqa: E402
from fedmask_flwr.methods import Training, Turn, resolve  # noqa: E402
from fedmask_flwr.wire import pack  # noqa: E402

RESULTS = ROOT / "benchmarks/results/device_memory.json"
METHODS = ("fedpm", "deltamask", "deltastep", "klms", "drawstep", "fedavg")


def turn(name: str, width: int) -> int:
    """Kilobytes at most until the training step is done; the reply is written after."""
    network, images = nn.Sequential(nn.Linear(width, 1000, bias=False)), torch.randn(4, width)
    initialise(network, "seed:0")
    method = resolve(name)(resolve(name).layout(network), network, resolve(name).Config())
    when, memory = Turn(7, 1, 5, 3), {}
    got = method.broadcast(method.init())
    optimizer = method.begin(got, network, Training(), when, memory)
    optimizer.zero_grad()
    network(images).pow(2).mean().backward()
    optimizer.step()
    trained = status("VmHWM")
    reply = method.finish(got, network, optimizer, when, memory)
    known = method.known(got, when, memory)
    pack(reply, digest=bytes(8), round_=1, known=known, codecs={**method.codecs, "bits": "auto"})
    return trained


def one(name: str, parameters: int) -> dict[str, object]:
    """One row, in this process."""
    torch.set_num_threads(1)
    turn(name, 10)
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    trained = turn(name, parameters // 1000)
    each = 1024 / parameters
    return {
        "method": name, "parameters": parameters,
        "training": round(each * (trained - before), 1), "turn": round(each * (status("VmHWM") - before), 1),
    }  # fmt: skip


def main() -> None:
    """Print and keep a row a method."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parameters", type=int, default=3_000_000)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument(
        "--quick", action="store_true", help="two methods, a third of the parameters; nothing is kept"
    )
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--ratios", type=Path, help="JSON of the figures, for benchmarks/bench.py")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(one(args.one, args.parameters)))
        return
    if args.quick:
        args.methods, args.parameters = ["deltamask", "drawstep"], 1_000_000
    rows = []
    for name in args.methods:
        command = [sys.executable, __file__, "--one", name, "--parameters", str(args.parameters)]
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True, check=True)
        rows.append(json.loads(done.stdout))
        print(done.stdout.strip(), flush=True)
    most = max(rows, key=lambda row: row["turn"])
    figure = Ratio(f"a device's turn, {most['method']}: bytes a parameter", most["turn"], PER_PARAMETER, "at most")
    if args.ratios:
        save(args.ratios, [figure])
    if not args.quick:
        args.out.write_text(json.dumps({"rows": rows, "torch": torch.__version__}, indent=1) + "\n")


if __name__ == "__main__":
    main()
