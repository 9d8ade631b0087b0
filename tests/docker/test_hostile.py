"""A device that raises, dies, and answers with garbage, a stale round, another model's frame and 100 MB.

One run, a kind a round. What such a device sends must not reach the mask: it is compared, bit for bit, with that of
a run in which the same device only raises, in the same rounds. Accuracies alone would leave room for luck.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from reference import reference
from stack import Stack, docker

pytestmark = [pytest.mark.slow, pytest.mark.docker]
CLIENT = Path(__file__).parent / "hostile/client.py"
PACKAGED = "/opt/fedmask/lib/python3.11/site-packages/fedmask_flwr/_app/client_app/main.py"
SETTINGS = {"num_server_rounds": 13, "seed": 11, "local_epochs": 8}
POINT = 0.01
# What the run's log must say of the device in that round, besides its name.
SAID = {
    2: ("raise", r"code 2\).*hostile: I will not train"),
    3: ("unguarded", r"code 2\).*hostile: nobody catches this"),
    4: ("garbage", r"not a fedmask frame"),
    5: ("torn", r"frame is damaged"),
    6: ("empty", r"expected one array"),
    7: ("stale", r"frame is of round 1, expected round 7; a late or replayed message"),
    8: ("foreign", r"frame is for another model: digest"),
    9: ("huge", r"has 100000000 bytes, at most \d+ are possible"),
    10: ("dead", r"code \d+\).*stopped responding"),
}


@pytest.fixture(scope="module")
def fleet(image, tmp_path_factory):
    """A stack whose devices may use more memory: what a hostile one does with its own is not the subject."""
    base = tmp_path_factory.mktemp("hostile")
    found = Stack(f"fedmask-hostile-{base.parent.name}", base, FEDMASK_NODE_MEMORY="2g")
    try:
        found.up()
        yield found
    finally:
        found.down()


@pytest.fixture(scope="module")
def hostile(fleet):
    """The lines of the run through all kinds, and what the server's containers were like before."""
    began = {service: state(fleet, service) for service in ("superlink", "serverapp")}
    told = json.dumps({number: kind for number, (kind, _) in SAID.items()})
    docker("exec", fleet.container("node1"), "sh", "-c", f"echo '{told}' > /memory/hostile.json")
    return fleet.finished(fleet.start("kinds", mounts=[f"{CLIENT}:{PACKAGED}:ro"], **SETTINGS)), began


def state(stack, service):
    found = json.loads(docker("inspect", stack.container(service)))[0]
    return {key: found["State"][key] for key in ("Pid", "OOMKilled")} | {"restarts": found["RestartCount"]}


def test_each_round_says_who_and_why(fleet, hostile):
    lines, _ = hostile
    assert [line["round"] for line in lines] == list(range(1, SETTINGS["num_server_rounds"] + 1))
    assert [(line["clients_ok"], line["clients_failed"]) for line in lines] == [
        (2, 1) if line["round"] in SAID else (3, 0) for line in lines
    ]
    told = by_round(fleet.log("kinds"))
    for number, (kind, cause) in SAID.items():
        said = [line for line in told[number] if re.search(cause, line)]
        assert len(said) == 1, f"round {number}, {kind}: {told[number]}"
        assert re.search(r"client 1\b|node \d+\b", said[0]), said


def by_round(log):
    """Lines of a log by the round that they were said in: up to its own."""
    found, number = {}, 1
    for line in log.splitlines():
        found.setdefault(number, []).append(line)
        if match := re.search(r"\[round (\d+)\]", line):
            number = int(match[1]) + 1
    return found


def test_nothing_of_it_reaches_the_mask(fleet, hostile, tmp_path):
    expected, mask = reference(tmp_path, tuple(SAID), **SETTINGS)
    assert (fleet.folder / "kinds/mask.fedmask").read_bytes() == mask
    learned = ("accuracy_threshold", "loss", "train_loss", "uplink_bpp", "downlink_bpp")
    assert [[line[key] for key in learned] for line in hostile[0]] == [
        [line[key] for key in learned] for line in expected
    ]


def test_server_keeps_its_health(fleet, hostile):
    """Nobody was killed for memory or started again, and what 100 MB took was given back."""
    _, began = hostile
    for service, before in began.items():
        assert state(fleet, service) == before, service
        assert not before["OOMKilled"]
        health = docker("inspect", "-f", "{{.State.Health.Status}}", fleet.container(service))
        assert health == "healthy"
        limit, peak = memory(fleet, service)
        assert peak < limit, (service, peak)


def memory(stack, service):
    """Bytes that a container may use, and uses now without what the kernel could drop."""
    told = "cat /sys/fs/cgroup/memory/memory.limit_in_bytes /sys/fs/cgroup/memory/memory.stat 2>/dev/null"
    told += " || cat /sys/fs/cgroup/memory.max /sys/fs/cgroup/memory.stat"
    limit, *rest = docker("exec", stack.container(service), "sh", "-c", told).splitlines()
    stat = dict(line.split() for line in rest)
    return int(limit), int(stat.get("total_rss") or stat["anon"])


def test_learns_as_undisturbed(hostile, tmp_path):
    """Once the device is back, the run is where it would have been; a mean of 3 rounds: one swings by a point."""
    whole, _ = reference(tmp_path, **SETTINGS)
    ends = [sum(line["accuracy_threshold"] for line in lines[-3:]) / 3 for lines in (hostile[0], whole)]
    assert ends[0] >= ends[1] - POINT
