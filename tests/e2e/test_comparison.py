"""One comparison through Flower's own runtime, as a user starts it."""

from __future__ import annotations

import json
import subprocess

import pytest

from fedmask_flwr.simulation.sandbox import scripts

pytestmark = [pytest.mark.slow, pytest.mark.flower]


def fedmask(*words):
    command = [str(scripts() / "fedmask"), *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)


def test_two_methods_in_one_simulation(tmp_path):
    out = tmp_path / "out"
    options = "--methods fedpm,deltamask --data digits --clients 3 --rounds 2 --local-epochs 1 --seeds 1"
    done = fedmask("compare", *options.split(), "--out", out)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "[2/2] deltamask seed 7: threshold 0." in done.stdout
    kept = json.loads((out / "compare.json").read_text())
    assert [(method["label"], method["seeds"], method["failures"]) for method in kept["methods"]] == [
        ("fedpm", [7], 0), ("deltamask", [7], 0)
    ]  # fmt: skip
    for method in kept["methods"]:
        assert method["figures"]["client_accuracy_mean"]["mean"] > 0.3
    pm, delta = (run["rounds"] for run in kept["runs"])
    assert len(pm) == len(delta) == 2
    assert delta[1]["uplink_bytes"] < pm[1]["uplink_bytes"] / 2
    for name in ("table.md", "compare.png", "flower.log", "fedpm-s7/mask.fedmask", "deltamask-s7/curve.png"):
        assert (out / name).stat().st_size > 0
    again = fedmask("report", out)
    assert again.returncode == 0
    assert "fedpm" in again.stdout
