"""Whole runs through Flower's own runtime, as a user starts them. Every shell command of the README is here."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import time
import uuid
from pathlib import Path

import numpy as np
import pytest
from inprocess import federate
from test_docs import commands

from fedmask_flwr.simulation.sandbox import scripts

ROOT = Path(__file__).parents[2]
pytestmark = [pytest.mark.slow, pytest.mark.flower]


def shell(command, timeout=600, **env):
    """Run a command of the README in the checkout, with the test's own environment's programs first."""
    path = f"{scripts()}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(
        shlex.split(command), cwd=ROOT, env={**os.environ, "PATH": path, **env}, capture_output=True, text=True,
        timeout=timeout, check=False,
    )  # fmt: skip


def mean_bpp(lines):
    return float(np.mean([line["uplink_bpp"] for line in lines]))


def test_demo():
    began = time.monotonic()
    done = shell("make demo", timeout=400)
    assert done.returncode == 0, done.stdout + done.stderr
    assert time.monotonic() - began < 240
    lines = [json.loads(line) for line in (ROOT / "runs/demo/metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 20
    assert lines[-1]["accuracy_threshold"] >= 0.93
    assert mean_bpp(lines) <= 0.25
    assert all(line["clients_ok"] == 10 and line["clients_failed"] == 0 for line in lines)


@pytest.mark.long
def test_readme_commands():
    """A run, a look at its mask, its network, a comparison: the very lines of the README."""
    for name in ("fedpm", "fedpm-network", "compare"):
        shutil.rmtree(ROOT / "runs" / name, ignore_errors=True)
    lines = [line for line in commands() if line.startswith("fedmask") and "continual" not in line]
    done = {line.split()[1]: shell(line) for line in lines}
    assert set(done) == {"run", "inspect", "export", "compare"}
    for line, result in done.items():
        assert result.returncode == 0, line + result.stdout + result.stderr
    lines = [json.loads(line) for line in (ROOT / "runs/fedpm/metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["accuracy_threshold"] >= 0.93
    assert mean_bpp(lines) <= 1.01
    assert "density" in done["inspect"].stdout
    assert (ROOT / "runs/fedpm-network/model.pt2").stat().st_size > 0
    assert "[6/6]" in done["compare"].stdout
    kept = json.loads((ROOT / "runs/compare/compare.json").read_text())
    assert [(m["label"], len(m["seeds"]), m["failures"]) for m in kept["methods"]] == [
        ("deltamask", 2, 0), ("fedmask", 2, 0), ("standalone", 2, 0)
    ]  # fmt: skip
    for method in kept["methods"]:
        assert method["figures"]["client_accuracy_mean"]["mean"] > 0.5
    for name in ("table.md", "compare.png", "deltamask-s7/mask.fedmask", "fedmask-s8/metrics.jsonl"):
        assert (ROOT / "runs/compare" / name).stat().st_size > 0
    assert "standalone" in shell("fedmask report runs/compare").stdout


def test_readme_commands_of_continual_learning():
    shutil.rmtree(ROOT / "runs/continual", ignore_errors=True)
    lines = [line for line in commands() if line.startswith("fedmask") and "continual" in line]
    done = [shell(line) for line in lines]
    assert len(done) == 2
    for line, result in zip(lines, done, strict=True):
        assert result.returncode == 0, line + result.stdout + result.stderr
    last = json.loads((ROOT / "runs/continual/metrics.jsonl").read_text().splitlines()[-1])
    assert last["client_accuracy"] > 0.8
    assert last["kb_entries"] == 9
    assert "orgetting" in done[1].stdout
    assert (ROOT / "runs/continual/attention.png").stat().st_size > 0


def processes(mark, program):
    """Pids of a run's processes by command name, found by an environment variable they inherit."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            ours = entry.name.isdigit() and mark.encode() in (entry / "environ").read_bytes()
            if ours and program in (entry / "cmdline").read_bytes().decode():
                found.append(int(entry.name))
        except OSError:
            continue
    return found


@pytest.mark.long
def test_a_killed_server_resumes_bit_for_bit(tmp_path):
    """Kill the server in round 4, start again, kill ``fedmask run`` itself in round 6, start again."""
    options = "--method deltamask --data digits --clients 3 --rounds 8 --local-epochs 1"
    changes = {"method": "deltamask", "data": "digits", "num-server-rounds": 8, "local-epochs": 1}
    whole = federate(tmp_path / "whole", 3, **changes)
    mark, out = uuid.uuid4().hex, tmp_path / "cut"
    command = [str(scripts() / "fedmask"), "run", *options.split(), "--out", str(out)]
    metrics = out / "metrics.jsonl"
    for rounds, victim, code in ((3, "flwr-simulation", 1), (5, "", -signal.SIGKILL)):
        run = subprocess.Popen(command, env={**os.environ, "E2E_MARK": mark}, stdout=subprocess.DEVNULL)
        while not (metrics.exists() and metrics.read_text().count("\n") >= rounds):
            assert run.poll() is None
            time.sleep(0.05)
        for pid in processes(mark, victim) if victim else [run.pid]:
            os.kill(pid, signal.SIGKILL)
        assert run.wait(120) == code
        deadline = time.monotonic() + 60
        while left := processes(mark, ""):
            assert time.monotonic() < deadline, left
            time.sleep(0.2)
        assert metrics.read_text().count("\n") < 8
    again = subprocess.run(command, capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stdout + again.stderr
    assert "resuming the unfinished run after round" in again.stdout
    for name in ("mask.fedmask", "checkpoint.safetensors"):
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    same = [{k: v for k, v in line.items() if k != "seconds"} for line in lines]
    assert same == [{k: v for k, v in line.items() if k != "seconds"} for line in whole]


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


@pytest.mark.long
def test_flwr_run_does_the_same_thing(tmp_path):
    """``flwr run .`` in the checkout, with a FLWR_HOME and ports of its own, ends with the mask of this process."""
    changes = {"num-server-rounds": 3, "local-epochs": 1}
    ours = federate(tmp_path / "ours", 10, **changes)
    mark, exports = uuid.uuid4().hex, [line for line in commands() if line.startswith("export")]
    env = {
        "E2E_MARK": mark, "FLWR_HOME": str(tmp_path / "home"), "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1", **dict(line.split()[1].split("=") for line in exports),
        "FLWR_LOCAL_SUPERLINK_HTTP_API_PORT": free_port(),
        "FLWR_LOCAL_CONTROL_API_PORT": free_port(), "SPT_NOENV": "1",
    }  # fmt: skip
    config = " ".join(f"{k}={v}" for k, v in changes.items()) + f" out='{tmp_path / 'theirs'}'"
    (readme,) = [line for line in commands() if line.startswith("flwr run")]
    try:
        path = f"{scripts()}{os.pathsep}{os.environ['PATH']}"
        done = subprocess.run(
            [*shlex.split(readme), "--run-config", config],
            cwd=ROOT, env={**os.environ, **env, "PATH": path},
            capture_output=True, text=True, check=False, timeout=300,
        )  # fmt: skip
        mask = tmp_path / "theirs/mask.fedmask"
        assert mask.exists(), done.stdout + done.stderr
        assert mask.read_bytes() == (tmp_path / "ours/mask.fedmask").read_bytes()
        assert len(ours) == 3
    finally:
        while left := processes(mark, ""):
            for pid in left:
                os.kill(pid, signal.SIGKILL)
            time.sleep(0.1)
