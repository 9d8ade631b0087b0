"""What the warm server runs in test_warm.py in place of Flower's program."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

WARM = "colorsys" in sys.modules  # imported by the warm server alone, before this module was


def proc(name):
    path = Path("/proc/self") / name
    return path.read_text() if path.exists() else ""


def main():
    if "--fail" in sys.argv:
        how = sys.argv[sys.argv.index("--fail") + 1]
        if how == "raise":
            raise RuntimeError("as asked")
        if how == "exit":
            sys.exit(3)
        os.kill(os.getpid(), signal.SIGKILL)
    import numpy as np

    print("started", flush=True)
    child = subprocess.run(["true"], check=False).returncode
    drawn = float(np.random.rand())  # noqa: NPY002 - the global generator is meant
    said = {
        "argv": sys.argv, "mine": os.environ.get("MINE"), "pid": os.getpid(), "parent": os.getppid(), "warm": WARM,
        "random": random.random(), "numpy": drawn, "child": child,
        "title": proc("cmdline").strip("\0"), "oom": int(proc("oom_score_adj") or 0),
    }  # fmt: skip
    out = Path(sys.argv[sys.argv.index("--out") + 1])
    out.with_suffix(".part").write_text(json.dumps(said))
    out.with_suffix(".part").rename(out)
