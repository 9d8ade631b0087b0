"""A client process lives for one message: what it imports is what a small device pays for each round."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
# torch's compiler and its algebra, packages of networks and data sets, plots, a simulator: none trains a mask.
HEAVY = (
    "torchvision", "torch._dynamo", "torch._inductor", "sympy", "sklearn", "scipy", "pandas", "datasets",
    "matplotlib", "ray", "onnx", "numpy.f2py", "PIL", "IPython", "numba",
)  # fmt: skip
OURS = ("fedmask_flwr.simulation", "fedmask_flwr.compare", "fedmask_flwr.checks", "fedmask_flwr.keys")
PATHS = [str(TESTS.parent), str(TESTS), str(TESTS / "flower")]
TURN = f"""
import sys
sys.path[:0] = {PATHS!r}
from pathlib import Path
import tiny
from client_app.main import app
from flwr.app import Context, Message, RecordDict
from loopback import LoopbackGrid
from fedmask_flwr.flower.strategy import MaskStrategy
from fedmask_flwr.masks import initialise
model = tiny.net()
initialise(model, "seed:7")
config = tiny.run_config(method=sys.argv[1], memory_dir=sys.argv[2], fraction_evaluate=1.0)
grid = LoopbackGrid(app, 2, config)
strategy = MaskStrategy(sys.argv[1], model, weights="as-built", fraction_evaluate=1.0)
result = strategy.start(grid, num_rounds=1)
assert len(result.evaluate_metrics_clientapp) == 1
print(*[name for name in {HEAVY!r} if name in sys.modules])
"""
APP = f"""
import sys
sys.path[:0] = {PATHS!r}
import flwr.supernode.runtime.run_clientapp
before = set(sys.modules)
import torch
import client_app.main, fedmask_flwr.flower.apps
from fedmask_flwr import data
data.load("digits", "train")
print(*[name for name in {HEAVY + OURS!r} if name in sys.modules])
print(len([name for name in sys.modules if name.partition(".")[0] == "fedmask_flwr"]))
"""


def ran(code, *argv):
    """Without the extra `fast`: whoever has it imports numba, and what that likes."""
    env = {**os.environ, "FEDMASK_JIT": "0"}
    done = subprocess.run([sys.executable, "-c", code, *argv], capture_output=True, text=True, check=False, env=env)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.flower
@pytest.mark.parametrize("method", ["deltamask", "fedavg", "fedweit"])
def test_a_turn_imports_nothing_heavy(method, tmp_path):
    assert ran(TURN, method, str(tmp_path))[-1] == ""


@pytest.mark.flower
def test_the_client_app_keeps_its_budget_of_modules():
    """With Flower, torch and the digits, whose file is scikit-learn's; a device pays for every module of ours."""
    heavy, ours = ran(APP)[-2:]
    assert heavy == ""
    assert int(ours) <= 91


@pytest.mark.flower
def test_the_client_app_is_a_small_part_of_its_imports(tmp_path):
    """Time of our own modules against torch's, which the same process imports under the same load."""
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-c", "import torch, client_app.main, fedmask_flwr.flower.apps"],
        capture_output=True, text=True, check=True, cwd=TESTS.parent, env={**os.environ, "PYTHONPATH": PATHS[0]},
    )  # fmt: skip
    own = {"torch": 0, "fedmask_flwr": 0}
    for line in done.stderr.splitlines():
        if line.startswith("import time:") and "self" not in line:
            took, _, name = (part.strip() for part in line.removeprefix("import time:").split("|"))
            if (package := name.partition(".")[0]) in own:
                own[package] += int(took)
    assert 0 < own["fedmask_flwr"] < own["torch"] / 2
