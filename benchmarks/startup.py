"""What a device pays for a message that is not training: seconds a round of an almost empty task, cold and warm.

    python benchmarks/startup.py [--nodes 2] [--rounds 6] [--out benchmarks/results/startup.json]

A SuperLink and SuperNodes on this machine's loopback, over Flower's own transport. "cold" is ``flower-supernode``,
which starts a Python process for each message; "warm" is ``fedmask supernode``, which forks one that has imported
torch. The same run, the same result bit for bit. Also seconds of importing the client app, and what it imports.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

ROOT = Path(__file__).parents[1]
SCRIPTS = Path(sys.executable).parent
QUIET = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
}


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait(port, seconds=120):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            return
        time.sleep(0.2)
    raise SystemExit(f"nothing listens at port {port}")


@contextlib.contextmanager
def deployment(folder, nodes, program):
    """A SuperLink and its SuperNodes; yields the environment in which ``flwr`` finds it as "here"."""
    control, fleet = free_port(), free_port()
    env = {
        **os.environ,
        **QUIET,
        "FLWR_HOME": str(folder / "flwr"),
        "PATH": f"{SCRIPTS}{os.pathsep}{os.environ['PATH']}",
    }
    (folder / "flwr").mkdir()
    (folder / "flwr/config.toml").write_text(
        f'[superlink]\ndefault = "here"\n\n[superlink.here]\naddress = "127.0.0.1:{control}"\ninsecure = true\n'
    )
    log = (folder / "log").open("w")
    started = []

    def start(*command):
        started.append(
            subprocess.Popen(command, env=env, cwd=folder, stdout=log, stderr=log, start_new_session=True)
        )

    try:
        start(
            "flower-superlink", "--insecure", "--host", "127.0.0.1", "--port", str(control),
            "--fleet-api-type", "grpc-rere", "--fleet-api-address", f"127.0.0.1:{fleet}",
        )  # fmt: skip
        wait(fleet)
        wait(control)
        for i in range(nodes):
            start(
                *program, "--insecure", "--superlink", f"127.0.0.1:{fleet}", "--port", str(free_port()),
                "--node-config", f"partition-id={i} num-partitions={nodes}",
            )  # fmt: skip
        yield env
    finally:
        for process in reversed(started):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
        for process in started:
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
        log.close()


def rounds(folder, nodes, rounds, program):
    """Run the task; its lines of metrics and the final mask's bytes."""
    folder.mkdir()
    out = folder / "run"
    told = {
        "out": f"'{out}'", "memory-dir": f"'{folder / 'memory'}'", "clients": nodes, "num-server-rounds": rounds,
        "local-epochs": 1, "node-timeout": 300.0,
    }  # fmt: skip
    config = " ".join(f"{key}={value}" for key, value in told.items())
    with deployment(folder, nodes, program) as env:
        done = subprocess.run(
            ["flwr", "run", str(ROOT), "here", "--stream", "--run-config", config],
            env=env, cwd=folder, capture_output=True, text=True, check=False, timeout=1800,
        )  # fmt: skip
        deadline = time.monotonic() + 60
        while not (out / "mask.fedmask").exists() and time.monotonic() < deadline:
            time.sleep(0.5)
    if not (out / "mask.fedmask").exists():
        raise SystemExit(done.stdout + done.stderr + (folder / "log").read_text()[-3000:])
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return lines, (out / "mask.fedmask").read_bytes()


def imports():
    """Seconds of importing the client app in a fresh process, torch's share, and how many modules that is."""
    code = "import client_app.main, fedmask_flwr.flower.apps, sys; print(len(sys.modules))"
    took, modules, torch = [], 0, 0.0
    for _ in range(3):
        began = time.monotonic()
        done = subprocess.run(
            [sys.executable, "-X", "importtime", "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
        )
        took.append(time.monotonic() - began)
        modules = int(done.stdout)
        torch = max(float(m) for m in re.findall(r"\|\s*(\d+) \|\s+torch\n", done.stderr)) / 1e6
    return {"seconds": round(min(took), 2), "torch_seconds": round(torch, 2), "modules": modules}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--nodes", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    ways = {"cold": ["flower-supernode"], "warm": ["fedmask", "supernode"]}
    found, masks = {}, set()
    with tempfile.TemporaryDirectory() as folder:
        for name, program in ways.items():
            lines, mask = rounds(Path(folder) / name, asked.nodes, asked.rounds, program)
            masks.add(mask)
            # The first round waits for nodes, and for the warm server to have imported.
            found[name] = round(median(line["seconds"] for line in lines[1:]), 3)
    assert len(masks) == 1, "warm and cold must learn the same"
    result = {
        "seconds_a_round": found,
        "cold_over_warm": round(found["cold"] / found["warm"], 2),
        "import": imports(),
        "nodes": asked.nodes,
        "rounds": asked.rounds,
    }
    text = json.dumps(result, indent=1)
    print(text)
    if asked.out:
        asked.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
