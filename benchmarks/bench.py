"""Every ratio that the project promises, measured or read from kept runs, printed in one table and written as JSON.

    make bench                                   # minutes; what takes hours is read from benchmarks/results
    python benchmarks/bench.py --quick           # small, seconds each: CI runs it, and no figure means much
    python benchmarks/bench.py --only votes,training

Parts run one after another, a process each. A part that fails is named, and the exit status is 1; a target that is
missed is printed as such and does not fail: seconds depend on what else a machine does.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT)]

from benchmarks import ratios  # noqa: E402

RESULTS = ROOT / "benchmarks/results"


@dataclass(frozen=True, slots=True)
class Part:
    """A script with ``--quick`` and ``--out``, and further arguments of the full and of the small version."""

    script: str
    full: tuple[str, ...] = ()
    quick: tuple[str, ...] = ("--quick",)


PARTS = {
    "training": Part("training.py"),
    "heap": Part("heap.py"),
    "device memory": Part("device_memory.py"),
    "votes": Part("votes.py"),
    "codecs": Part(
        "codecs.py",
        ("--numel", "86000000", "--density", "0.01", "--codec", "auto", "rice", "entropy", "context"),
        ("--numel", "200000", "--density", "0.01", "0.2"),
    ),
    "filters": Part("fuse_query.py"),
    "candidates": Part("candidates.py"),
    "peers": Part("peers/run.py", ("mnist", "--table"), ("digits", "--quick")),
}


def run(name: str, *, quick: bool, out: Path) -> list[ratios.Ratio] | None:
    """Run a part; its figures, None if it failed."""
    part = PARTS[name]
    command = [sys.executable, str(ROOT / "benchmarks" / part.script), *(part.quick if quick else part.full)]
    began = time.monotonic()
    status = subprocess.run([*command, "--ratios", str(out)], check=False, cwd=ROOT).returncode
    print(f"-- {name}: {time.monotonic() - began:.0f} s, exit status {status}\n", flush=True)
    return None if status or not out.exists() else ratios.load(out)


def main() -> None:
    """Run the parts, print one table, write one file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--only", default=",".join(PARTS), help="parts, by name")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/bench.json, none with --quick")
    args = parser.parse_args()
    names = args.only.split(",")
    if unknown := set(names) - set(PARTS):
        parser.error(f"no part {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    with tempfile.TemporaryDirectory() as folder:
        found = {name: run(name, quick=args.quick, out=Path(folder) / f"{name}.json") for name in names}
    figures = [figure for part in found.values() for figure in part or []]
    print(ratios.table(figures))
    out = args.out or (None if args.quick else RESULTS / "bench.json")
    if out:
        ratios.save(out, figures)
    if failed := [name for name, part in found.items() if part is None]:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
