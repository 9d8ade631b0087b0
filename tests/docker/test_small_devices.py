"""Devices of 512 MB train a network of 2.3 million parameters, on data from their own volumes."""

from __future__ import annotations

import json
import os

import numpy as np
import pytest
from stack import IMAGE, Stack, docker

pytestmark = [pytest.mark.slow, pytest.mark.docker]
NODES = ("node0", "node1", "node2")
MB = 1 << 20


@pytest.fixture
def stack(image, tmp_path):
    """A stack of small devices, with images as large as CIFAR-10's on every volume that is for data."""
    found = Stack(f"fedmask-small-{os.getpid()}", tmp_path / "runs", FEDMASK_NODE_MEMORY="512m")
    try:
        found.compose("create")
        fill(found, tmp_path)
        found.up()
        yield found
    finally:
        found.down()


def fill(stack, tmp_path):
    draw = np.random.default_rng(3)
    for split, n in (("train", 600), ("test", 100)):
        y = np.arange(n) % 10
        x = draw.normal(size=(n, 3, 32, 32)).astype(np.float32) + y[:, None, None, None] / 5
        np.savez(tmp_path / f"{split}.npz", x=x.astype(np.float32), y=y)
    for owner in ("server", *NODES):
        where = "-v", f"{tmp_path}:/in:ro", "-v", f"{stack.name}_{owner}-data:/data"
        docker("run", "--rm", "--user", "0", *where, IMAGE, "sh", "-c", "cp /in/*.npz /data/ && chmod a+r /data/*")


def test_half_a_gigabyte(stack):
    runner = stack.start("large", data="npz", data_dir="/data", model="conv6", num_server_rounds=2, local_epochs=1)
    lines = stack.finished(runner)
    assert [(line["clients_ok"], line["clients_failed"]) for line in lines] == [(3, 0), (3, 0)]
    bits = json.loads((stack.folder / "large/metrics.jsonl").read_text().splitlines()[0])
    assert bits["uplink_bytes"] * 8 / bits["uplink_bpp"] / 3 > 2.2e6, "a smaller network than it should be"
    for node in NODES:
        found = json.loads(docker("inspect", stack.container(node)))[0]
        assert found["HostConfig"]["Memory"] == found["HostConfig"]["MemorySwap"] == 512 * MB
        assert (found["State"]["OOMKilled"], found["RestartCount"]) == (False, 0)
        assert killed(stack.container(node)) == 0


def killed(container):
    """How many processes the kernel has killed there for memory."""
    where = "cat /sys/fs/cgroup/memory.events 2>/dev/null || cat /sys/fs/cgroup/memory/memory.oom_control"
    told = dict(line.split() for line in docker("exec", container, "sh", "-c", where).splitlines())
    return int(told["oom_kill"])
