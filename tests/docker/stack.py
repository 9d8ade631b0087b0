"""The compose stack under test: start it, start runs in it, break it, read what the runs wrote."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TESTBED = ROOT.parent / "shared/testbed"
IMAGE, BASE = os.environ.get("FEDMASK_TEST_IMAGE", "fedmask-test"), "ci/python-torch:3.11"
PATIENCE = float(
    os.environ.get("FEDMASK_PATIENCE", "900")
)  # seconds for what takes one minute when nothing else runs
POLL = 0.5


def sh(*command, check=True, timeout=PATIENCE, **env):
    """Run a program; its output as text, or AssertionError with all it said."""
    done = subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, check=False, timeout=timeout,
        stdin=subprocess.DEVNULL, env={**os.environ, **env},
    )  # fmt: skip
    assert not check or done.returncode == 0, (
        f"{command}: {done.returncode}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    )
    return done


def docker(*command, **options):
    return sh("docker", *command, **options).stdout.strip()


def until(true, what, patience=PATIENCE):
    """Wait until ``true()`` is, and give it."""
    deadline = time.monotonic() + patience
    while not (found := true()):
        assert time.monotonic() < deadline, f"not within {patience:g} s: {what}"
        time.sleep(POLL)
    return found


class Stack:
    """One project of compose files, its runs in ``folder``."""

    def __init__(self, name, folder, *files, **env):
        self.name, self.folder = name, folder
        self.files = files or ("compose.yaml",)
        self.env = {"FEDMASK_IMAGE": IMAGE, "FEDMASK_RUNS": str(folder), "FEDMASK_PORT": "0", **env}
        folder.mkdir(parents=True, exist_ok=True)
        folder.chmod(0o777)  # the containers' user is another

    def compose(self, *command, **options):
        files = [part for name in self.files for part in ("-f", str(ROOT / "docker" / name))]
        return sh("docker", "compose", "-p", self.name, *files, *command, **{**self.env, **options})

    def container(self, service):
        return f"{self.name}-{service}-1"

    def up(self, *services):
        self.compose("up", "-d", "--wait", *(services or ("superlink", "serverapp", "node0", "node1", "node2")))

    def down(self):
        self.compose("down", "-v", "--timeout", "5", "--remove-orphans")

    def start(self, name, *, mounts=(), **config):
        """Start a run in a container of its own, as the service ``run`` does; give the container's name."""
        told = {"out": f"/runs/{name}", "clients": 3, "data": "digits", "round-timeout": 300.0}
        told |= {key.replace("_", "-"): value for key, value in config.items()}
        file = self.folder / f"{name}.toml"
        file.write_text("".join(f"{key} = {json.dumps(value)}\n" for key, value in told.items()))
        runner = f"{self.name}-{name}"
        volumes = [part for mount in mounts for part in ("-v", mount)]
        self.compose("run", "-d", "--no-deps", "--name", runner, *volumes, "run", FEDMASK_RUN=str(file))
        return runner

    def read(self, name, file):
        """A file of a run's folder; nothing when there is none."""
        path = self.folder / name / file
        return path.read_bytes() if path.exists() else b""

    def lines(self, name):
        """The run's own record, a line a round."""
        lines = self.read(name, "metrics.jsonl").decode().splitlines(keepends=True)
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def await_round(self, name, number):
        until(lambda: len(self.lines(name)) >= number, f"round {number} of {name}")

    def checkpointed(self, name):
        """Number of the last round whose replies were added up, and when that was: its line comes later."""
        path = self.folder / name / "checkpoint.safetensors"
        try:
            with path.open("rb") as file:
                when = os.fstat(file.fileno()).st_mtime
                header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        except FileNotFoundError:
            return 0, 0.0
        return json.loads(header["__metadata__"]["fedmask"])["meta"]["round"], when

    def ends(self, name, rounds, running=None):
        """When each round ended, clock time; ``running`` is asked now and again."""
        found, deadline = {}, time.monotonic() + PATIENCE * rounds
        while rounds not in found:
            number, when = self.checkpointed(name)
            found.setdefault(number, when)
            assert time.monotonic() < deadline, f"{name} does not come to round {rounds}"
            if running is not None:
                running(number)
            time.sleep(0.1)
        return [found[number] for number in range(1, rounds + 1)]

    def log(self, name):
        """What the run's ServerApp said."""
        return self.read(name, "flower.log").decode()

    def training(self, service):
        """Whether a client process works in that node's container, warm or cold: both have Flower's name."""
        told = docker("top", self.container(service), "-o", "pid,args", check=False)
        return "flwr-clientapp" in told

    def finish(self, runner):
        """Wait for a run's end and give its exit status."""
        return int(docker("wait", runner, timeout=4 * PATIENCE))

    def finished(self, runner):
        """Wait for a run that completes."""
        status = self.finish(runner)
        assert status == 0, docker("logs", "--tail", "60", runner) + self.logs()
        return self.lines(runner.removeprefix(f"{self.name}-"))

    def logs(self, *services):
        return self.compose("logs", "--no-color", "--tail", "40", *services).stdout


def engine():
    """Make a container engine answer; give what stops it when this started it. No engine is a failure."""
    script = TESTBED / "engine.sh"
    if sh("docker", "info", check=False).returncode == 0 if _has_docker() else False:
        return None
    if not script.exists():
        pytest.fail("no container engine answers: start Docker, or set DOCKER_HOST")
    os.environ["DOCKER_HOST"] = sh("bash", script, "host").stdout.strip()
    if _has_docker() and sh("docker", "info", check=False).returncode == 0:
        return None
    with tempfile.TemporaryFile() as said:  # no pipe: the engine that stays would keep it open
        command = ["bash", str(script), "up"]
        subprocess.run(command, check=True, timeout=PATIENCE, stdin=subprocess.DEVNULL, stdout=said, stderr=said)
    return lambda: sh("bash", script, "down")


def _has_docker():
    return any((Path(folder) / "docker").exists() for folder in os.environ["PATH"].split(os.pathsep))


def build():
    """Build the image, on the stand-in base image where the test bed is."""
    env = {"FEDMASK_IMAGE": IMAGE}
    if "BASE_IMAGE" not in os.environ and (TESTBED / "engine.sh").exists():
        if sh("docker", "image", "inspect", BASE, check=False).returncode:
            sh("bash", TESTBED / "engine.sh", "base")
        env |= {"BASE_IMAGE": BASE, "PIP_EXTRA_INDEX_URL": ""}
    sh("docker", "compose", "-f", ROOT / "docker/compose.yaml", "build", "superlink", timeout=4 * PATIENCE, **env)
