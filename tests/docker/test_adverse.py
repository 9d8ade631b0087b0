"""A full disk, wrong clocks, a slow link and a slow processor: what a fleet meets without anybody's ill will."""

from __future__ import annotations

import base64
import json
import re
import shutil
import subprocess
import sys
from functools import cache

import pytest
from reference import reference
from stack import IMAGE, ROOT, TESTBED, Stack, docker, sh, until

pytestmark = [pytest.mark.slow, pytest.mark.docker]
HERE = ROOT / "tests/docker/adverse"
SETTINGS = {"seed": 11, "local_epochs": 8}


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


@pytest.mark.parametrize("secure", [False, True], ids=["plain", "tls"])
def test_clocks_an_hour_off(started, clock, undisturbed, secure):
    """Such a node is refused, with a key or without. The doctor says by how much; set right, it takes part."""
    files = ["compose.tls.yaml"] * secure + [str(HERE / "clock.yaml")]
    stack = started(Stack, f"clock{secure:d}", *files)
    stack.up("superlink", "serverapp", "node0")
    stack.compose("up", "-d", "node1", "node2")
    for node, side in (("node1", "ahead of"), ("node2", "behind")):
        until(lambda node=node: "Finished server process" in stack.logs(node), f"{node} is refused")
        seen, status = clock_of(stack, node, secure)
        wanted = rf"3(59|60)\d s {side} the SuperLink's"
        if secure and side == "behind":  # the CA was not valid then: no SuperLink is reached that tells
            wanted = r" is \d+ s before (fedmask-flwr was installed|the server's certificate starts)"
        assert re.search(wanted, seen), seen
        assert status == "fail"
    assert clock_of(stack, "node0", secure)[1] == "ok"
    stack.env |= {"FEDMASK_NODE1_CLOCK": "0", "FEDMASK_NODE2_CLOCK": "0"}
    stack.up()
    assert whole(stack.finished(stack.start("clocks", num_server_rounds=2, **SETTINGS)), 2)
    assert (stack.folder / "clocks/mask.fedmask").read_bytes() == undisturbed(2)
    stack.down()


def clock_of(stack, node, secure):
    """What the doctor says of a node's clock, and how it judges it."""
    told = "--superlink=superlink:9092", *["--root-certificates=/keys/public/ca.crt"] * secure, "--json"
    done = stack.compose("run", "--rm", "--no-deps", "-T", node, "fedmask", "doctor", *told, check=False)
    found = {one["name"]: one for one in json.loads(done.stdout)["findings"]}["clock"]
    return found["seen"], found["status"]


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
        return None
    inside(stack, node, *qdisc, "tbf", "rate", "1mbit", "burst", "15kb", "latency", "400ms")
    delay = TESTBED / "nfdelay.py"
    assert delay.exists(), "this kernel has no netem: load sch_netem, or lay nfdelay.py into the test bed"
    queue = "-j", "NFQUEUE", "--queue-num", "1", "--queue-bypass"
    inside(stack, node, "iptables", "-A", "INPUT", "-i", link, *queue)
    pid = docker("inspect", "-f", "{{.State.Pid}}", stack.container(node))
    return subprocess.Popen(["nsenter", "-t", pid, "-n", sys.executable, str(delay), "1", "80", "5"])


LISTEN = """
import socket
link, _ = socket.create_server(("0.0.0.0", 9999)).accept()
while not link.recv(1 << 16).endswith(b"."):
    pass
link.sendall(b".")
"""
SEND = """
import socket, time
began = time.time()
link = socket.create_connection(("superlink", 9999))
met = time.time()
link.sendall(bytes(250_000) + b".")
link.recv(1)
print(met - began, time.time() - met)
"""


def link_of(stack, node):
    """Seconds to connect from a node to the SuperLink, and to send it 250 kB and hear that they are there."""
    docker("exec", "-d", stack.container("superlink"), "python", "-c", LISTEN)
    send = "docker", "exec", stack.container(node), "python", "-c", SEND
    told = until(lambda: sh(*send, check=False).stdout, "a listener", 60)  # refused until it listens
    return tuple(map(float, told.split()))


def test_slow_link_and_slow_processor(started, undisturbed):
    """1 Mbit/s and 80 ms for one, a quarter of a processor for another: nobody is lost, the mask is the same."""
    stack = started(Stack, "slow")
    stack.up()
    delay = shaped(stack, "node1")
    try:
        docker("update", "--cpus", "0.25", stack.container("node2"))
        connect, send = link_of(stack, "node1")
        assert connect >= 0.075, f"{connect:.3f} s to connect: the link is not slow"
        assert send >= 1.8, f"{send:.2f} s for 250 kB: the link is not slow"
        assert whole(stack.finished(stack.start("slow", num_server_rounds=3, **SETTINGS)), 3)
        assert (stack.folder / "slow/mask.fedmask").read_bytes() == undisturbed(3)
        throttled = "cat /sys/fs/cgroup/cpu/cpu.stat 2>/dev/null || cat /sys/fs/cgroup/cpu.stat"
        told = docker("exec", stack.container("node2"), "sh", "-c", throttled)
        assert int(re.search(r"nr_throttled (\d+)", told)[1]) > 0, told
    finally:
        if delay is not None:
            delay.terminate()
            delay.wait()
        stack.down()
