"""What a mask that both ends can draw costs: numbers of separate blocks (KLMS) beside a path through a trellis.

    python benchmarks/candidates.py                                              # digits
    python benchmarks/candidates.py --data mnist --data-dir ../shared/data/mnist
    python benchmarks/candidates.py --quick

Theta of one of DrawStep's devices is recorded in some rounds of a real federation of ten, as it is about to be
sampled; then each code samples it, under several keys. "bits" are those sent for a bit of divergence, "carried" is
the share of the change that the masks have in the mean, measured by log weight: 1 is a sample. Since bits go with
the square of the change, carried^2 / bits is how near a code comes to the divergence itself. Seconds are processor
time of a mask. "dealt evenly" deals positions by their divergence, which a server does not know: what adaptive
blocks could gain.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

import numpy as np
import torch

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from inprocess import federate  # noqa: E402

from benchmarks.ratios import Ratio, save  # noqa: E402
from fedmask_flwr import jit  # noqa: E402
from fedmask_flwr.masks import (  # noqa: E402
    Change,
    Draws,
    derive,
    divergence,
    path_candidates,
    pick,
    replay,
    thresholds,
    trace_path,
)
from fedmask_flwr.methods import klms  # noqa: E402

RESULTS = ROOT / "benchmarks/results/candidates.json"


@dataclass(frozen=True, slots=True)
class Code:
    """b, the margin, and whether blocks are dealt evenly."""

    path: bool
    bits: int
    margin: float
    even: bool = False

    @property
    def name(self) -> str:
        return f"{'path' if self.path else 'blocks'}, b = {self.bits}" + (", dealt evenly" if self.even else "")


COLUMNS = ("code", "bits", "carried", "of the divergence", "seconds", "seconds in numpy")
CODES = (
    Code(False, 8, 2), Code(False, 12, 2), Code(False, 8, 2, even=True),
    Code(True, 6, 1), Code(True, 8, 1), Code(True, 10, 1), Code(True, 12, 1), Code(True, 8, 1, even=True),
)  # fmt: skip


class Dealt(Draws):
    """Draws whose blocks are dealt in the order of what each position costs, a turn of lots after the other."""

    __slots__ = ("order",)

    def block_of(self, places: np.ndarray) -> np.ndarray:
        d = self.order.size
        rng, out = np.random.Generator(np.random.Philox(key=5)), np.empty(d, np.int32)
        turns = [rng.permutation(self.blocks) for _ in range(-(-d // self.blocks))]
        out[self.order] = np.concatenate(turns)[:d]
        return out[places]


def recorded(data: str, data_dir: str, rounds: tuple[int, ...]) -> list[tuple[np.ndarray, np.ndarray]]:
    """(theta_g, what one device would sample) of each of ``rounds``."""
    found, sampled = [], klms.Sampling.finish

    def finish(self, got, model, optimizer, turn, memory):
        if turn.client == 0 and turn.round in rounds:
            theta_g = self.theta(got)
            found.append((theta_g, self.sampled(theta_g, klms.trained_theta(optimizer), turn)))
        return sampled(self, got, model, optimizer, turn, memory)

    klms.Sampling.finish = finish
    settings = {"method": "drawstep", "data": data, "data-dir": data_dir, "model": "mlp", "local-epochs": 3}
    try:
        with tempfile.TemporaryDirectory() as out:
            federate(Path(out) / "run", 10, **settings, **{"num-server-rounds": max(rounds)})
    finally:
        klms.Sampling.finish = sampled
    return found


def mask_of(code: Code, theta_g: np.ndarray, theta_k: np.ndarray, key: int) -> tuple[np.ndarray, int, float]:
    """The mask, the bits it takes, and the seconds to find it."""
    began = time.process_time()
    change = Change.between(theta_g, theta_k, klms.REST)
    bits = change.bits * code.bits / (code.bits - code.margin)
    draws = (Dealt if code.even else Draws)(
        derive("candidates", key), math.ceil(bits if code.path else bits / code.bits), 1 << code.bits
    )
    if code.even:
        object.__setattr__(draws, "order", np.argsort(-divergence(theta_k, theta_g), kind="stable"))
    if code.path:
        sent = trace_path(draws, change)
        chosen, size = path_candidates(sent, draws.size), draws.blocks
    else:
        chosen = pick(draws, change, derive("chance", key))
        size = draws.blocks * code.bits
    seconds = time.process_time() - began
    if not code.even:
        return replay(draws, thresholds(theta_g), chosen), size, seconds
    os.environ["FEDMASK_JIT"] = "0"  # machine code deals by lot
    try:
        return replay(draws, thresholds(theta_g), chosen), size, seconds
    finally:
        os.environ.pop("FEDMASK_JIT")


def carried(theta_g: np.ndarray, theta_k: np.ndarray, mask: np.ndarray) -> float:
    """Share of the change that a mask has."""
    k, g = np.clip(theta_k, 1e-12, 1 - 1e-12), np.clip(theta_g, 1e-12, 1 - 1e-12)
    gain = np.log(k / g) - np.log((1 - k) / (1 - g))
    return float((gain * (mask - theta_g)).sum() / (gain * (theta_k - theta_g)).sum())


def measure(code: Code, thetas: list[tuple[np.ndarray, np.ndarray]], keys: int) -> dict[str, float | str]:
    """One row: means over rounds and keys."""
    shares, bits, seconds = [], [], []
    mask_of(code, *thetas[0], 0)  # compiled
    for theta_g, theta_k in thetas:
        asked = float(divergence(theta_k, theta_g).sum())
        for key in range(keys):
            mask, size, took = mask_of(code, theta_g, theta_k, key)
            shares.append(carried(theta_g, theta_k, mask))
            bits.append(size / asked)
            seconds.append(took)
    return {
        "code": code.name, "bits": round(mean(bits), 4), "carried": round(mean(shares), 4),
        "of the divergence": round(mean(shares) ** 2 / mean(bits), 4), "seconds": round(mean(seconds), 4),
    }  # fmt: skip


def main() -> None:
    """Print a table, with machine code and without, and keep it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="digits")
    parser.add_argument("--data-dir", default="")
    parser.add_argument("--quick", action="store_true", help="one round, one key, three codes; nothing is kept")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--ratios", type=Path, help="JSON of the figures, for benchmarks/bench.py")
    args = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("flwr").setLevel(logging.ERROR)
    codes = [c for c in CODES if not args.quick or (c.bits, c.even) in {(8, False), (10, False)}]
    thetas = recorded(args.data, args.data_dir, (2,) if args.quick else (2, 5, 8))
    rows = [measure(code, thetas, 1 if args.quick else 4) for code in codes]
    os.environ["FEDMASK_JIT"] = "0"
    plain = [] if args.quick or not jit._importable() else [c for c in CODES if not c.even and c.bits < 12]
    for row, code in zip(rows, codes, strict=True):
        if code in plain:
            row["seconds in numpy"] = measure(code, thetas, 1)["seconds"]
    os.environ.pop("FEDMASK_JIT")
    print("| code | bits for a bit of divergence | carried | of the divergence | seconds | in numpy |")
    print("|---|---:|---:|---:|---:|---:|")
    for row in rows:
        print("| " + " | ".join(str(row.get(key, "")) for key in COLUMNS) + " |")
    near = {row["code"]: float(row["of the divergence"]) for row in rows}
    if args.ratios:
        gain = near["path, b = 10"] / near["blocks, b = 8"]
        save(args.ratios, [Ratio("bits for the same change: numbers of blocks / a path", gain, 1.15)])
    if not args.quick:
        kept = json.loads(args.out.read_text()) if args.out.exists() else {}
        kept[args.data] = {"parameters": int(thetas[0][0].size), "rows": rows}
        args.out.write_text(json.dumps(kept, indent=1) + "\n")


if __name__ == "__main__":
    main()
