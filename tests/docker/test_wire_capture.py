"""What a device really sends: packets between SuperNode and SuperLink against what the run says it cost.

A device's bytes of a round are those of its messages (frames and Flower's records, both in ``metrics.jsonl``) and
Flower's own, which docs/wire.md states: so many a message, so many while it waits. The figures here are those.
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass

import pytest
from capture import PREFACE, Capture, calls, frames, records
from stack import Stack, docker

pytestmark = [pytest.mark.slow, pytest.mark.docker]
NODES = ("node0", "node1", "node2")
PORT = 9092
SMALL, LARGE = "mlp", "mlp(hidden=1400,1400)"  # 50 thousand parameters, 2 million
# Flower's constant, bytes up and down: a train message and its reply, another try to pull what is not yet there, a
# look for messages (every 0.25 to 3 s unless the device trains, every 3 s where there is no run), a heartbeat
# (every 21 to 27 s).
MESSAGE, AGAIN, POLL, HEARTBEAT = (11250, 2860), (675, 110), (602, 98), (623, 100)
PULLS = 6  # a message has so many objects
LOOK, BEAT = 3.0, 24.0
MOST = 20  # looks more of a device that waits after a round, until it looks every 3 s
WITHIN = 0.1


@dataclass
class Round:
    """One round: clock times, what the run said of it."""

    begin: float
    end: float
    line: dict

    def reported(self, way):
        return self.line[f"{way}link_bytes"] + self.line[f"flower_{way}link_bytes"]


class Watched:
    """A stack whose SuperLink is listened to since before the first device came."""

    def __init__(self, stack, folder):
        self.stack = stack
        stack.up("superlink", "serverapp")
        pid = docker("inspect", "-f", "{{.State.Pid}}", stack.container("superlink"))
        self.capture = Capture(pid, PORT, folder / "packets.pcap")
        stack.up()
        self.nodes = [self._address(node) for node in NODES]

    def _address(self, node):
        networks = json.loads(docker("inspect", self.stack.container(node)))[0]["NetworkSettings"]["Networks"]
        return networks[f"{self.stack.name}_fleet"]["IPAddress"]

    def run(self, name, model, rounds):
        runner, begin = self.stack.start(name, model=model, num_server_rounds=rounds, local_epochs=1), time.time()
        ends = self.stack.ends(name, rounds)
        lines = self.stack.finished(runner)
        found = [Round(*times, line) for *times, line in zip([begin, *ends], ends, lines, strict=False)]
        assert [r.line["clients_ok"] for r in found] == [3] * rounds
        return found

    def links(self):
        """The (up, down) streams of each device: one connection each."""
        found = self.capture.streams()
        links = {client[0]: pair for client, pair in found.items() if client[0] in self.nodes}
        assert sorted(client[0] for client in found if client[0] in self.nodes) == sorted(self.nodes)
        assert all(stream.whole for pair in links.values() for stream in pair)
        return list(links.values())

    def digest(self, name):
        """Magic, version and model digest: the first bytes of every frame of a run."""
        return (self.stack.folder / name / "mask.fedmask").read_bytes()[:12]


@pytest.fixture(scope="module")
def plain(image, tmp_path_factory):
    yield from watched(tmp_path_factory, "plain", {"small": (SMALL, 3), "large": (LARGE, 3)})


@pytest.fixture(scope="module")
def secure(image, tmp_path_factory):
    yield from watched(tmp_path_factory, "secure", {"large": (LARGE, 3)}, "compose.yaml", "compose.tls.yaml")


def watched(tmp_path_factory, name, runs, *files):
    """The stack, idle seconds (begin, end) and the rounds of its runs; all packets are in."""
    folder = tmp_path_factory.mktemp(name)
    stack = Stack(f"fedmask-wire-{name}-{os.getpid()}", folder / "runs", *files)
    try:
        found = Watched(stack, folder)
        time.sleep(5)  # the nodes have come
        begin = time.time()
        time.sleep(60)
        found.idle = (begin, time.time())
        found.rounds = {run: found.run(run, model, rounds) for run, (model, rounds) in runs.items()}
        found.capture.stop()
        yield found
    finally:
        stack.down()


def test_speaks_grpc_over_http2(plain):
    for up, down in plain.links():
        assert up.data.startswith(PREFACE)
        assert sum(end - begin for begin, end, *_ in frames(up, False)) > 0.99 * len(up.data)
        said = [call for call in calls(up, down) if call.method]
        assert {call.asked[b":path"].rpartition(b"/")[0] for call in said} == {b"/flwr.proto.Fleet"}
        assert {call.asked[b":method"] for call in said} == {b"POST"}
        assert {call.asked[b"content-type"] for call in said} == {b"application/grpc"}
        assert {call.answered[b"content-type"] for call in said if call.answered} == {b"application/grpc"}
        assert {"PullMessages", "PullObject", "PushMessages", "PushObject"} <= {call.method for call in said}
        for run in plain.rounds:  # what TLS must hide
            assert plain.digest(run) in up.data
            assert plain.digest(run) in down.data


def test_tls_hides_it(secure):
    for up, down in secure.links():
        for stream in (up, down):
            kinds = [kind for kind, _, _ in records(stream.data)]
            assert kinds[0] == 22, "it does not begin with a handshake"
            assert set(kinds) <= {20, 21, 22, 23}
            assert secure.digest("large") not in stream.data
            assert b"PRI * HTTP/2.0" not in stream.data
            assert b"flwr" not in stream.data
        _, version, hello = next(records(up.data))
        assert (version >> 8, hello[0]) == (3, 1), "no ClientHello"
        assert b"\x02h2" in hello  # it asks for HTTP/2


@pytest.mark.parametrize("run", ["small", "large"])
@pytest.mark.parametrize("way", ["up", "down"])
def test_wire_is_what_we_report(plain, run, way):
    """Every round, three devices together; the app, fetched once a run, is counted apart."""
    side = ("up", "down").index(way)
    for number, now in enumerate(plain.rounds[run]):
        wire = constant = 0
        for up, down in plain.links():
            wire += (up, down)[side].sent(now.begin, now.end)
            said = [call for call in calls(up, down)[:-1] if now.begin <= call.began < now.end]
            app = [call for call in said if call.method in ("GetRun", "GetFab")]
            assert [call.method for call in app] == (["GetRun", "GetFab"] if number == 0 else [])
            wire -= sum(call.sizes[side] for call in app)
            again = [call.method for call in said].count("PullObject") - PULLS
            constant += MESSAGE[side] + again * AGAIN[side] + waiting(said, now.end - now.begin, side)
        assert wire == pytest.approx(now.reported(way) + constant, rel=WITHIN), f"round {number + 1}"


def waiting(said, seconds, side):
    """Bytes of what a device asks of itself: it looks for messages unless it trains, and beats always."""
    looks = [call.method for call in said].count("PullMessages") - 1  # one was given the message
    return POLL[side] * looks + HEARTBEAT[side] * seconds / BEAT


@pytest.mark.parametrize("way", ["up", "down"])
def test_wire_is_what_we_report_with_tls(secure, way):
    """In a stream that nobody can read a device's waiting is not seen: all of the round at most."""
    side = ("up", "down").index(way)
    for now in secure.rounds["large"][1:]:
        wire = sum(pair[side].sent(now.begin, now.end) for pair in secure.links())
        least = now.reported(way) + 3 * MESSAGE[side]
        seconds = now.end - now.begin
        idle = 3 * (MOST * POLL[side] + seconds * (POLL[side] / LOOK + HEARTBEAT[side] / BEAT))
        assert least * (1 - WITHIN) <= wire <= (least + idle) * (1 + WITHIN)


@pytest.mark.parametrize("way", ["up", "down"])
def test_idle_devices(plain, way):
    """A device that waits: bytes a second."""
    side, (begin, end) = ("up", "down").index(way), plain.idle
    told = POLL[side] / LOOK + HEARTBEAT[side] / BEAT
    for pair in plain.links():
        assert pair[side].sent(begin, end) / (end - begin) == pytest.approx(told, rel=0.2)
