"""A client process lives for one message: what it imports is what a small device pays for each round."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
HEAVY = ("torchvision", "torch._dynamo", "sklearn", "datasets", "matplotlib", "ray", "sympy", "onnx", "scipy")
TURN = f"""
import sys
sys.path[:0] = {[str(TESTS.parent), str(TESTS), str(TESTS / "flower")]!r}
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


@pytest.mark.flower
@pytest.mark.parametrize("method", ["deltamask", "fedavg", "fedweit"])
def test_a_turn_imports_nothing_heavy(method, tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", TURN, method, str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == ""
