"""What training a mask costs over dense training of the same model: time and memory, one thread.

    python benchmarks/training.py [--quick] [--model mlp ...] [--out benchmarks/results/training.json]

Time is processor time of whole steps (zero the gradients, forward, backward, update). Each repetition takes one
step of every variant in turn, and a ratio is the median over repetitions of variant over dense of the same
repetition, so that what else the machine does falls out; of the MLP's, which hang on where its memory lies, the
median of five processes. Freed memory is kept for the next step, as devices keep it (`heap.keep`), for all
variants. "compiled" is this package with numba, "numpy" with FEDMASK_JIT=0, "naive" the straight-through estimator
as it is usually written.

Memory is the peak of the loop over what the process held before it built the model, each in a fresh process that
has warmed up on a tiny model with weights of the same kind: numba's own memory, which does not grow with the model,
is told apart. What imports left free in the heap is given back first, or a small model would hide in it, and what
is freed is given back at once: else the peak has glibc's fragments of the heap in it, and is another in each run.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
from torch import nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy

sys.path[:0] = [str(Path(__file__).parents[1])]

from benchmarks.ratios import Ratio, save  # noqa: E402
from fedmask_flwr import heap, jit  # noqa: E402
from fedmask_flwr.masks import MaskAdam, MaskSGD, MaskSpec, frozen_weights, initialise, write_mask  # noqa: E402
from fedmask_flwr.models import conv4, leaf, mlp  # noqa: E402

RESULTS = Path(__file__).parent / "results/training.json"


@dataclass(frozen=True, slots=True)
class Case:
    """A model, its input, how much of dense training's time a mask may take, and the processes that are timed."""

    shape: tuple[int, ...]
    classes: int
    batch: int
    reps: int
    target: float
    runs: int = 1

    def inputs(self):
        rng = torch.Generator().manual_seed(0)
        x = torch.randn(self.batch, *self.shape, generator=rng)
        return x, torch.randint(self.classes, (self.batch,), generator=rng)


CASES = {
    "mlp": Case((784,), 10, 64, 200, 1.15, runs=5),
    "leaf": Case((1, 28, 28), 62, 32, 16, 1.12),
    "conv4": Case((3, 32, 32), 10, 16, 16, 1.06),
    "mobilenet_v2": Case((3, 64, 64), 10, 16, 6, 1.03),
}
MEMORY_TARGET = 1.35
DENSE_LR = 1e-5  # it must not diverge: a pool or ReLU of NaN predicts its branches, and is faster
GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}  # bytes
VARIANTS = ("dense", "compiled", "numpy", "naive")
OPTIMISERS = {"sgd": (MaskSGD, torch.optim.SGD), "adam": (MaskAdam, torch.optim.Adam)}


def network(name, case):
    torch.manual_seed(0)
    if name == "mobilenet_v2":
        from torchvision.models import mobilenet_v2

        return settled(mobilenet_v2(weights=None, num_classes=case.classes), case.inputs()[0])
    model = {"mlp": mlp, "leaf": leaf, "conv4": conv4}[name](case.shape, case.classes)
    initialise(model, "seed:0")
    return model


@torch.no_grad()
def settled(model, x):
    """The model with the statistics of its own layers where it normalises, as a pretrained one has them.

    A mask keeps them as they are; with those of an untrained network (0 and 1) all signals vanish in its 50 layers,
    and denormal numbers take a processor ten times as long.
    """
    spec = MaskSpec.of(model)
    frozen = frozen_weights(model, spec).clone()
    write_mask(model, spec, frozen, torch.rand(spec.numel, generator=torch.Generator().manual_seed(1)) < 0.5)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # the mean of all batches
    model.train()(x)
    write_mask(model, spec, frozen, torch.ones(spec.numel, dtype=torch.bool))
    return model


def naive(model, optimiser):
    """Scores as parameters; sigmoid, Bernoulli and the detach trick in autograd."""
    spec = MaskSpec.of(model)
    for p in model.parameters():
        p.requires_grad_(False)
    weights = {name: model.get_parameter(name) for name in spec.names}
    scores = {name: nn.Parameter(torch.zeros_like(w)) for name, w in weights.items()}

    def forward(x):
        masked = {}
        for name, s in scores.items():
            theta = torch.sigmoid(s)
            masked[name] = weights[name] * (theta + (torch.bernoulli(theta) - theta).detach())
        return functional_call(model, masked, (x,))

    return forward, optimiser(scores.values(), lr=0.01)


def stepper(model, variant, optimiser, x, y):
    """A function that takes one training step of `model`."""
    ours, theirs = OPTIMISERS[optimiser]
    forward = model
    if variant == "naive":
        forward, update = naive(model, theirs)
    elif variant == "dense":
        update = theirs(model.parameters(), lr=DENSE_LR)
    else:
        update = ours(model, lr=0.01)

    def step():
        os.environ["FEDMASK_JIT"] = "0" if variant == "numpy" else "1"
        update.zero_grad()
        loss = cross_entropy(forward(x), y)
        loss.backward()
        update.step()
        return loss

    return step


def times(name, optimiser, variants, reps):
    """Median milliseconds of each variant, and its ratio to dense; for a process of its own."""
    torch.set_num_threads(1)
    heap.keep()  # as a device does
    case = CASES[name]
    steps = {v: stepper(network(name, case), v, optimiser, *case.inputs()) for v in variants}
    for step in steps.values():  # compile, allocate
        step()
        step()
    took = {v: [] for v in variants}
    for rep in range(reps):
        order = [variants[(rep + i) % len(variants)] for i in range(len(variants))]
        for v in order:
            start = time.process_time()
            loss = steps[v]()
            took[v].append(time.process_time() - start)
            if not loss.isfinite():
                raise SystemExit(f"{name}, {v}, {optimiser}: a loss of {loss}; such numbers take another time")
    ratio = {v: median(a / b for a, b in zip(took[v], took["dense"], strict=True)) for v in variants}
    return {v: {"ms": round(1e3 * median(took[v]), 3), "ratio": round(ratio[v], 3)} for v in variants}


def own(*arguments, **environment):
    """What a process of its own prints."""
    done = subprocess.run(
        [sys.executable, __file__, *arguments],
        capture_output=True, text=True, check=False, env={**os.environ, **environment},
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout)


def timed(name, optimiser, variants, reps, runs):
    """Each variant's run of `times` with the median ratio, and all runs' ratios."""
    found = [own("--time", name, optimiser, ",".join(variants), str(reps)) for _ in range(runs)]
    out = {}
    for v in variants:
        ordered = sorted((run[v] for run in found), key=lambda run: run["ratio"])
        out[v] = ordered[runs // 2] | {"runs": [run["ratio"] for run in ordered]}
    return out


def status(field):
    """Kilobytes of a line of /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field + ":"))


def peak(name, variant, optimiser):
    """Bytes that ten steps took at most, and what warming up took; for a process of its own."""
    torch.set_num_threads(1)
    case = CASES[name]
    if name == "mobilenet_v2":
        import torchvision.models  # noqa: F401
    before = status("VmRSS")
    tiny = nn.Linear(4, 3)
    if name != "mobilenet_v2":
        initialise(tiny, "seed:0")
    step = stepper(tiny, variant, optimiser, torch.ones(2, 4), torch.zeros(2, dtype=torch.int64))
    step()
    x, y = case.inputs()
    del tiny, step
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    start = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    step = stepper(network(name, case), variant, optimiser, x, y)
    for _ in range(10):
        step()
    return {"extra_mb": round((status("VmHWM") - start) / 1024, 1), "warm_mb": round((start - before) / 1024, 1)}


def memory(name, optimiser, variants):
    """Peak of each variant, each in a process of its own, and its ratio to dense."""
    found = {v: own("--peak", name, v, optimiser, OMP_NUM_THREADS="1", **GIVE_BACK) for v in variants}
    return {v: {**r, "ratio": round(r["extra_mb"] / found["dense"]["extra_mb"], 2)} for v, r in found.items()}


def figures(rows):
    """Time and memory of the fastest variant that is ours, over dense training."""
    out = []
    for r in rows:
        ours, of = next(v for v in ("compiled", "numpy") if v in r["time"]), f"{r['model']}, {r['optimiser']}"
        out.append(Ratio(f"training {of}: time over dense", r["time"][ours]["ratio"], r["target"], "at most"))
        if "memory" in r:
            peak = r["memory"][ours]["ratio"]
            out.append(Ratio(f"training {of}: peak memory over dense", peak, MEMORY_TARGET, "at most"))
    return out


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the MLP's time only, few repetitions, no file")
    parser.add_argument("--model", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--ratios", type=Path, help="JSON of the figures, for benchmarks/bench.py")
    parser.add_argument("--peak", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--time", nargs=4, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.peak:
        print(json.dumps(peak(*asked.peak)))
        return
    if asked.time:
        name, optimiser, variants, reps = asked.time
        print(json.dumps(times(name, optimiser, variants.split(","), int(reps))))
        return
    variants = [v for v in VARIANTS if v != "compiled" or jit.available()]
    rows = []
    print(f"{'':13}{'':5} {'dense ms':>9} " + " ".join(f"{v:>9}" for v in variants[1:]) + "   target   memory")
    for name in ["mlp"] if asked.quick else asked.model:
        case = CASES[name]
        for optimiser in OPTIMISERS:
            reps, runs = (15, 1) if asked.quick else (case.reps, case.runs)
            took = timed(name, optimiser, variants, reps, runs)
            row = {"model": name, "optimiser": optimiser, "batch": case.batch, "target": case.target, "time": took}
            row["parameters"] = MaskSpec.of(network(name, case)).numel
            told = ""
            if not asked.quick:
                row["memory"] = memory(name, optimiser, variants)
                best = row["memory"][variants[1]]
                told = f"{best['ratio']:.2f}x ({best['extra_mb']} MB, target {MEMORY_TARGET})"
            print(
                f"{name:13}{optimiser:5} {took['dense']['ms']:9.2f} "
                + " ".join(f"{took[v]['ratio']:8.3f}x" for v in variants[1:])
                + f"  <= {case.target:.2f}   {told}",
                flush=True,
            )
            rows.append(row)
    if asked.ratios:
        save(asked.ratios, figures(rows))
    result = {
        "rows": rows,
        "memory_target": MEMORY_TARGET,
        "torch": torch.__version__,
        "load": round(os.getloadavg()[0], 1),
    }
    if not asked.quick:
        if asked.out.exists() and set(asked.model) != set(CASES):
            kept = json.loads(asked.out.read_text())["rows"]
            result["rows"] = [r for r in kept if r["model"] not in asked.model] + rows
        asked.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
