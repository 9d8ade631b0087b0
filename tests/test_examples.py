"""The drop-in: a plain Flower project, the same project with masks, and the README's diff between them."""

from __future__ import annotations

import difflib
import importlib
import sys
import tomllib
from pathlib import Path

import pytest
from flwr.app import Context, RecordDict
from loopback import LoopbackGrid

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
pytestmark = pytest.mark.flower


@pytest.fixture
def example(monkeypatch):
    """Import an example's two apps as Flower would: its folder on the path, nothing of the other one."""

    def load(name):
        for module in [m for m in sys.modules if m.split(".")[0] == "digits"]:
            monkeypatch.delitem(sys.modules, module)
        monkeypatch.syspath_prepend(str(EXAMPLES / name))
        importlib.invalidate_caches()
        server, client = (importlib.import_module(f"digits.{side}_app") for side in ("server", "client"))
        assert Path(server.__file__).is_relative_to(EXAMPLES / name)
        config = tomllib.loads((EXAMPLES / name / "pyproject.toml").read_text())["tool"]["flwr"]["app"]["config"]
        return server, client, config

    yield load
    for module in [m for m in sys.modules if m.split(".")[0] == "digits"]:
        del sys.modules[module]


@pytest.mark.parametrize(("name", "bits"), [("plain", 32.0), ("masked", 0.5)])
def test_example_learns(name, bits, example, monkeypatch):
    server, client, config = example(name)
    found, uplink = [], []

    def tamper(reply, message, context):
        uplink.append(sum(len(a.data) for a in reply.content.array_records["arrays"].values()))
        return reply

    measure = server.test
    monkeypatch.setattr(server, "test", lambda *a: found.append(measure(*a)) or found[-1])
    server.app(LoopbackGrid(client.app, 5, config, tamper), Context(1, 1, {}, RecordDict(), config))
    assert found[-1] > 0.9
    assert 8 * sum(uplink) / len(uplink) / 50_200 < bits * 1.05


def test_the_readme_shows_the_real_diff():
    lines = []
    for side in ("client_app.py", "server_app.py"):
        plain, masked = (
            (EXAMPLES / kind / "digits" / side).read_text().splitlines() for kind in ("plain", "masked")
        )
        lines += [line for line in difflib.unified_diff(plain, masked, n=0) if line.startswith(("+", "-"))]
    shown = set((ROOT / "README.md").read_text().splitlines())
    changed = [line for line in lines if "import" not in line and not line.startswith(("+++", "---"))]
    assert len(changed) == 16
    assert [line for line in changed if line not in shown] == []


def test_only_the_apps_differ():
    for file in ("digits/task.py", "digits/__init__.py"):
        assert (EXAMPLES / "plain" / file).read_bytes() == (EXAMPLES / "masked" / file).read_bytes()


def test_the_drop_in_trains_with_a_fraction_of_the_nodes(example, monkeypatch):
    """Its ClientApp has no query handler: nodes are sampled under their ids, and their answers count."""
    server, client, config = example("masked")
    seen = []

    class Watched(server.MaskStrategy):
        def aggregate_train(self, *args):
            result = super().aggregate_train(*args)
            seen.append((self.ledger.ok, self.ledger.sent))
            return result

    monkeypatch.setattr(server, "MaskStrategy", lambda *a: Watched(*a, fraction_train=0.5))
    config["num-server-rounds"] = 2
    server.app(LoopbackGrid(client.app, 6, config), Context(1, 1, {}, RecordDict(), config))
    assert seen == [(3, 3), (3, 3)]
