"""The package's public face: names, typing marker, and what importing it costs."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from importlib import import_module
from pathlib import Path

import pytest

import fedmask_flwr

ROOT = Path(__file__).parents[1]
PUBLIC = ["Backbone", "MaskAdam", "MaskSGD", "MaskSpec", "MaskStrategy", "MaskTurn"]


def test_public_names_are_locked():
    assert fedmask_flwr.__all__ == PUBLIC
    for name in PUBLIC:
        assert getattr(fedmask_flwr, name).__name__ == name


def test_an_unknown_name_lists_the_right_ones():
    with pytest.raises(AttributeError, match="MaskStrategy"):
        fedmask_flwr.MaskStrategi  # noqa: B018


@pytest.mark.parametrize("room", ["aggregate", "flower", "masks", "methods", "simulation", "wire"])
def test_rooms_export_what_they_list(room):
    module = import_module(f"fedmask_flwr.{room}")
    assert len(module.__all__) == len(set(module.__all__))
    assert all(hasattr(module, name) for name in module.__all__)


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("fedmask_flwr", {"torch", "flwr", "numpy", "torchvision"}),
        ("fedmask_flwr.wire", {"torch", "flwr", "torchvision", "PIL", "zstandard", "pyfusefilter"}),
        ("fedmask_flwr.aggregate", {"torch", "flwr"}),
        ("fedmask_flwr.cli", {"torch", "flwr", "numpy"}),
        ("fedmask_flwr.methods", {"flwr", "torchvision"}),
        ("client_app.main", {"torchvision", "ray", "sklearn", "datasets", "matplotlib"}),
        ("server_app.main", {"torch", "torchvision", "ray"}),
    ],
)
def test_importing_is_cheap(module, absent):
    code = f"import sys, {module}; print(*sorted(set(sys.modules) & {absent!r}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_version_is_the_project_s():
    assert f'version = "{fedmask_flwr.__version__}"' in (ROOT / "pyproject.toml").read_text()
    assert (ROOT / "fedmask_flwr/py.typed").exists()


def test_a_device_s_install_is_without_torchvision():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    holders = {name for name, lines in extras.items() if any(line.startswith("torchvision") for line in lines)}
    assert holders == {"sim", "vision"}
    assert not any(line.startswith("torchvision") for line in project["dependencies"])


def test_no_lock_file_and_no_host_name_is_kept():
    for file in ("constraints.txt", "constraints-flwr141.txt"):
        text = (ROOT / file).read_text()
        assert "//" not in text
        assert all("==" in line for line in text.splitlines())
    assert not (ROOT / "uv.lock").exists()


def test_kept_mnist_runs_keep_the_promise():
    """benchmarks/results/mnist.json: three seeds, 30 rounds, real frames."""
    runs = json.loads((ROOT / "benchmarks/results/mnist.json").read_text())
    assert [run["seed"] for run in runs if run["method"] == "deltamask"] == [1, 2, 3]
    for run in runs:
        assert len(run["rounds"]) == 30
        assert run["rounds"][-1]["accuracy_threshold"] >= 0.96
        assert sum(line["uplink_bpp"] for line in run["rounds"]) / 30 <= 0.2
        for line in run["rounds"]:
            assert line["uplink_bpp"] == pytest.approx(8 * line["uplink_bytes"] / 10 / 266_200, abs=1e-4)
