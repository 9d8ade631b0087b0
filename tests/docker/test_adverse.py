"""A full disk, wrong clocks, a slow link and a slow processor: what a fleet meets without anybody's ill will."""

from __future__ import annotations

import base64
import json
import re
import shutil
import subprocess
import sys
import time
from functools import cache

import pytest
from reference import reference
from stack import IMAGE, ROOT, TESTBED, Stack, docker, sh, until

pytestmark = [pytest.mark.slow, pytest.mark.docker]
HERE = ROOT / "tests/docker/adverse"
SETTINGS = {"seed": 11, "local_epochs": 8}
HOUR = 3600


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The mask of a run of that many rounds that nobody disturbed."""

    @cache
    def mask(rounds):
        return reference(tmp_path_factory.mktemp("reference"), num_server_rounds=rounds, **SETTINGS)[1]

    return mask


@pytest.fixture(scope="module")
def started(image, tmp_path_factory):
    """Start stacks of compose files; one at a time, the tests take them down."""
    stacks = []

    def start(kind, name, *overrides, **env):
        base = tmp_path_factory.mktemp(name)
        stacks.append(kind(f"fedmask-{name}-{base.parent.name}", base, "compose.yaml", *overrides, **env))
        return stacks[-1]

    yield start
    for stack in stacks:
        stack.down()


def whole(lines, rounds):
    return [(line["round"], line["clients_ok"], line["clients_failed"]) for line in lines] == [
        (number, 3, 0) for number in range(1, rounds + 1)
    ]


# a disk that is full


class Small(Stack):
    """A stack that writes its runs to a small disk, where the test cannot look from outside."""

    def __init__(self, *args, **env):
        super().__init__(*args, **env)
        self.env["FEDMASK_RUNS"] = ""  # the volume

    def read(self, name, file):
        told = sh("docker", "exec", self.container("serverapp"), "base64", f"/runs/{name}/{file}", check=False)
        return base64.b64decode(told.stdout) if told.returncode == 0 else b""

    def fill(self):
        """Take what is left of the disk."""
        took = self.server("dd if=/dev/zero of=/runs/full bs=1k")
        assert "No space left" in took.stderr, took.stderr

    def free(self):
        assert self.server("rm /runs/full").returncode == 0

    def server(self, command):
        return sh("docker", "exec", self.container("serverapp"), "sh", "-c", command, check=False)


@pytest.fixture
def small(started):
    stack = started(Small, "disk", str(HERE / "full.yaml"))
    stack.up()
    yield stack
    stack.down()


def said(runner, words):
    """What a runner's container has said so far, with these words in it."""
    done = sh("docker", "logs", runner)
    return [line for line in (done.stdout + done.stderr).splitlines() if words in line]


def test_full_disk(small, undisturbed):
    """Freed while the run goes on, it has cost nothing; freed after the last round, it costs rounds again."""
    runner = small.start("middle", num_server_rounds=4, **SETTINGS)
    small.await_round("middle", 1)
    small.fill()
    kept = [line["round"] for line in small.lines("middle")]
    until(lambda: len(said(runner, "was not saved")) >= 2, "two rounds that cannot be saved")
    assert [line["round"] for line in small.lines("middle")][: len(kept)] == kept, "what was recorded is gone"
    small.free()
    assert whole(small.finished(runner), 4)
    assert small.read("middle", "mask.fedmask") == undisturbed(4)
    lost = re.findall(r"round (\d) was not saved \(.*No space left.*\): free the disk", small.log("middle"))
    assert len(lost) >= 2, "the log of the time without a disk is gone"
    assert "[round 4]" in small.log("middle")

    runner = small.start("end", num_server_rounds=3, **SETTINGS)
    small.await_round("end", 1)
    small.fill()
    until(lambda: said(runner, "mask.fedmask was not saved: is the disk"), "a run without its result")
    assert docker("inspect", "-f", "{{.State.Running}}", runner) == "true", "it passed for complete"
    small.free()
    assert whole(small.finished(runner), 3)
    assert small.read("end", "mask.fedmask") == undisturbed(3)
    assert "resuming after round" in small.log("end")


# clocks that are wrong


@pytest.fixture(scope="module")
def clock(image):
    """The image with a clock that can be wrong."""
    base = "--build-arg", f"FEDMASK_IMAGE={IMAGE}"
    docker("build", "-q", *base, "-t", f"{IMAGE}-clock", "-f", HERE / "clock.Dockerfile", HERE)


def off(stack, node):
    """Seconds by which a node's clock is ahead."""
    told = docker("exec", stack.container(node), "python", "-c", "import time; print(time.time())")
    return float(told) - time.time()


def test_clocks_an_hour_off(started, clock, undisturbed):
    """Without node keys nobody compares clocks: an hour ahead and an hour behind change nothing."""
    stack = started(Stack, "clocks", str(HERE / "clock.yaml"))
    stack.up()
    assert abs(off(stack, "node1") - HOUR) < 60
    assert abs(off(stack, "node2") + HOUR) < 60
    assert whole(stack.finished(stack.start("clocks", num_server_rounds=2, **SETTINGS)), 2)
    assert (stack.folder / "clocks/mask.fedmask").read_bytes() == undisturbed(2)
    stack.down()


def test_clock_an_hour_off_with_node_keys(started, clock, undisturbed):
    """Signed calls carry their time: the node is refused, the doctor says why, and set right it takes part."""
    files = "compose.tls.yaml", str(HERE / "clock.yaml")
    stack = started(Stack, "signed", *files, FEDMASK_NODE2_CLOCK="0")
    stack.up("superlink", "serverapp", "node0", "node2")
    stack.compose("up", "-d", "node1")
    until(lambda: "Invalid timestamp" in stack.logs("node1"), "node1 is refused")
    told = "--superlink", "superlink:9092", "--root-certificates", "/keys/public/ca.crt", "--json"
    ahead, right = r" 3(59|60)\d s ahead of the SuperLink's", r" [0-4] s (ahead of|behind) the SuperLink's"
    for node, status, words in (("node1", "fail", ahead), ("node0", "ok", right)):
        done = stack.compose("run", "--rm", "--no-deps", "-T", node, "fedmask", "doctor", *told, check=False)
        findings = {one["name"]: one for one in json.loads(done.stdout)["findings"]}
        assert findings["clock"]["status"] == status, findings["clock"]
        assert re.search(words, findings["clock"]["seen"]), findings["clock"]
        assert status == "ok" or done.returncode == 1
    stack.env["FEDMASK_NODE1_CLOCK"] = "0"
    stack.up()
    assert whole(stack.finished(stack.start("signed", num_server_rounds=2, **SETTINGS)), 2)
    assert (stack.folder / "signed/mask.fedmask").read_bytes() == undisturbed(2)
    stack.down()


# a slow link, a slow processor


def inside(stack, node, *command, check=True):
    """Run a program of this machine in a container's network."""
    pid = docker("inspect", "-f", "{{.State.Pid}}", stack.container(node))
    return sh("nsenter", "-t", pid, "-n", *command, check=check)


def shaped(stack, node):
    """Give a node an uplink of 1 Mbit/s and 80 ms to everywhere; what must be ended afterwards."""
    needs = [name for name in ("nsenter", "tc", "iptables") if shutil.which(name) is None]
    assert not needs, (
        f"this test shapes a link with {', '.join(needs)}: install it (iproute2, iptables, util-linux)"
    )
    may = inside(stack, node, "true", check=False)
    assert may.returncode == 0, f"this test shapes a link as root, on the engine's machine: {may.stderr}"
    link = re.search(r"dev (\S+)", inside(stack, node, "ip", "-o", "route", "show", "default").stdout)[1]
    qdisc = "tc", "qdisc", "add", "dev", link, "root"
    if inside(stack, node, *qdisc, "netem", "delay", "80ms", "rate", "1mbit", check=False).returncode == 0:
        return link, None
    inside(stack, node, *qdisc, "tbf", "rate", "1mbit", "burst", "15kb", "latency", "400ms")
    delay = TESTBED / "nfdelay.py"
    assert delay.exists(), "this kernel has no netem: load sch_netem, or lay nfdelay.py into the test bed"
    queue = "-j", "NFQUEUE", "--queue-num", "1", "--queue-bypass"
    inside(stack, node, "iptables", "-A", "INPUT", "-i", link, *queue)
    pid = docker("inspect", "-f", "{{.State.Pid}}", stack.container(node))
    return link, subprocess.Popen(["nsenter", "-t", pid, "-n", sys.executable, str(delay), "1", "80", "5"])


CONNECT = (
    "import socket, time; t = time.time(); socket.create_connection(('superlink', 9092)); print(time.time() - t)"
)


def test_slow_link_and_slow_processor(started, undisturbed):
    """1 Mbit/s and 80 ms for one, a quarter of a processor for another: nobody is lost, the mask is the same."""
    stack = started(Stack, "slow")
    stack.up()
    link, delay = shaped(stack, "node1")
    try:
        docker("update", "--cpus", "0.25", stack.container("node2"))
        took = float(docker("exec", stack.container("node1"), "python", "-c", CONNECT))
        assert took >= 0.075, f"{took:.3f} s to connect: the link is not slow"
        assert whole(stack.finished(stack.start("slow", num_server_rounds=3, **SETTINGS)), 3)
        assert (stack.folder / "slow/mask.fedmask").read_bytes() == undisturbed(3)
        stats = inside(stack, "node1", "tc", "-s", "qdisc", "show", "dev", link).stdout
        assert int(re.search(r"Sent (\d+) bytes", stats)[1]) > 10_000, stats
        assert int(re.search(r"overlimits (\d+)", stats)[1]) > 0 or "netem" in stats, stats
        throttled = "cat /sys/fs/cgroup/cpu/cpu.stat 2>/dev/null || cat /sys/fs/cgroup/cpu.stat"
        told = docker("exec", stack.container("node2"), "sh", "-c", throttled)
        assert int(re.search(r"nr_throttled (\d+)", told)[1]) > 0, told
    finally:
        if delay is not None:
            delay.terminate()
            delay.wait()
        stack.down()
