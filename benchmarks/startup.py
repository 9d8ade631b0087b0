"""What a device pays for a message that is not training: seconds a round of an almost empty task, cold and warm.

    python benchmarks/startup.py [--nodes 2] [--rounds 6] [--out benchmarks/results/startup.json]
    python benchmarks/startup.py --containers [--cpus 0.5] [--rounds 4] [--out benchmarks/results/startup.json]

A SuperLink and SuperNodes on this machine's loopback, over Flower's own transport. "cold" is ``flower-supernode``,
which starts a Python process for each message; "warm" is ``fedmask supernode``, which forks one that has imported
torch. The same run, the same result bit for bit. Also seconds of importing the client app, and what it imports.

With ``--containers``, one node in a container of its own with that much of a processor, as in docker/compose.yaml
(the image of tests/docker is built first), and one batch a round: what is left is start-up and waiting.
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
from collections import Counter
from pathlib import Path
from statistics import median

ROOT = Path(__file__).parents[1]
# One batch of the 467 examples that a device has.
ONE = {"clients": 1, "min_nodes": 1, "local_epochs": 1, "batch_size": 2000}
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


def contained(folder, cpus, rounds):
    """Seconds a round and largest memory of one node's container, cold and warm, and the final masks."""
    sys.path.insert(0, str(ROOT / "tests/docker"))
    import stack as stacks

    stop = stacks.engine()
    found, masks = {}, set()
    override = folder / "cold.yaml"
    cold = ["flower-supernode", "--insecure", "--superlink=superlink:9092"]
    cold.append('--node-config=partition-id=0 num-partitions=3 memory-dir="/memory"')
    override.write_text(json.dumps({"services": {"node0": {"command": cold}}}))
    try:
        stacks.build()
        for name, files in {"cold": ("compose.yaml", override), "warm": ("compose.yaml",)}.items():
            stack = stacks.Stack(
                f"fedmask-startup-{os.getpid()}", folder / name, *files, FEDMASK_NODE_CPUS=str(cpus)
            )
            try:
                stack.up("superlink", "serverapp", "node0")
                runner = stack.start("run", **{**ONE, "num_server_rounds": rounds})
                lines = stack.finished(runner)
                where = "cat /sys/fs/cgroup/memory.peak 2>/dev/null || "
                where += "cat /sys/fs/cgroup/memory/memory.max_usage_in_bytes"
                peak = int(stacks.docker("exec", stack.container("node0"), "sh", "-c", where))
                masks.add(stack.read("run", "mask.fedmask"))
            finally:
                stack.down()
            found[name] = {
                "seconds_a_round": round(median(line["seconds"] for line in lines[1:]), 2),
                "peak_megabytes": round(peak / 2**20),
            }
    finally:
        if stop is not None:
            stop()
    assert len(masks) == 1, "warm and cold must learn the same"
    ratio = found["cold"]["seconds_a_round"] / found["warm"]["seconds_a_round"]
    return {**found, "cold_over_warm": round(ratio, 2), "cpus": cpus, "rounds": rounds}


def imports():
    """Seconds of importing the client app in a fresh process, its heaviest packages, and the number of modules."""
    code = "import client_app.main, fedmask_flwr.flower.apps, sys; print(len(sys.modules))"
    took, modules, own = [], 0, Counter()
    for _ in range(3):
        began = time.monotonic()
        done = subprocess.run(
            [sys.executable, "-X", "importtime", "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
        )
        took.append(time.monotonic() - began)
        if took[-1] > min(took):
            continue
        modules, own = int(done.stdout), Counter()
        for microseconds, name in re.findall(r"import time:\s+(\d+) \|\s+\d+ \|\s+(\S+)", done.stderr):
            own[name.partition(".")[0]] += int(microseconds)
    heaviest = {name: round(value / 1e6, 3) for name, value in own.most_common(8)}
    ours = round(own["fedmask_flwr"] / 1e6, 3)
    return {"seconds": round(min(took), 2), "modules": modules, "ours": ours, "packages": heaviest}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--nodes", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--containers", action="store_true")
    parser.add_argument("--cpus", type=float, default=0.5)
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    if asked.containers:
        with tempfile.TemporaryDirectory() as folder:
            result = {"containers": contained(Path(folder), asked.cpus, asked.rounds), "load": os.getloadavg()[1]}
    else:
        result = local(asked)
    text = json.dumps(result, indent=1)
    print(text)
    if asked.out:
        kept = json.loads(asked.out.read_text()) if asked.out.exists() else {}
        asked.out.write_text(json.dumps({**kept, **result}, indent=1) + "\n")


def local(asked):
    """Nodes on this machine's loopback."""
    ways = {"cold": ["flower-supernode"], "warm": ["fedmask", "supernode"]}
    found, masks = {}, set()
    with tempfile.TemporaryDirectory() as folder:
        for name, program in ways.items():
            lines, mask = rounds(Path(folder) / name, asked.nodes, asked.rounds, program)
            masks.add(mask)
            # The first round waits for nodes, and for the warm server to have imported.
            found[name] = round(median(line["seconds"] for line in lines[1:]), 3)
    assert len(masks) == 1, "warm and cold must learn the same"
    return {
        "seconds_a_round": found,
        "cold_over_warm": round(found["cold"] / found["warm"], 2),
        "import": imports(),
        "nodes": asked.nodes,
        "rounds": asked.rounds,
    }


if __name__ == "__main__":
    main()
