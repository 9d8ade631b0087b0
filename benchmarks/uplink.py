"""A round behind a slow uplink: dense FedAvg against masks, the same network, on containers with shaped links.

    python benchmarks/uplink.py [--methods fedavg "deltamask downlink=relay"] [--up 1] [--down 4] [--rounds 4]
        [--out benchmarks/results/uplink.json]

Two nodes of docker/compose.yaml, each with a link of its own: ``tc tbf`` on both ends of its interface. Needs
root and a container engine. Conv-6 on images as large as CIFAR-10's, few of them and one epoch: the link is what is
measured. Bytes are those of the packets; a round's parts are the gRPC calls in them, seen at the SuperLink:

=======  ==========================================================================================
wait     the round began -> the node asks for messages and is given one
down     -> the node has confirmed that it has the whole message
client   -> the node announces its reply: start of the client process, training, coding
up       -> the whole reply is there
server   -> the round is complete: the other nodes' replies, the ServerApp looks, adds up, saves
=======  ==========================================================================================

The server evaluates the last round only: it shares this machine with the devices. "cpu" is what a node's container
computed meanwhile: a device's "client" is that and Flower's looks for work; on a busy machine it is longer.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import tempfile
from itertools import pairwise
from pathlib import Path
from statistics import mean, median

import numpy as np

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests/docker"))

import stack as stacks  # noqa: E402
from capture import Capture, calls  # noqa: E402

NODES = ("node0", "node1")  # two cores: a device has one of its own
PARTITIONS = 3  # of the compose file
PARTS = ("wait", "down", "client", "up", "server")
DENSE = "fedavg"


def fill(stack, folder, examples):
    """Images of noise with a class's brightness, on every volume that is for data."""
    draw = np.random.default_rng(3)
    for split, n in (("train", examples * PARTITIONS), ("test", 100)):
        y = np.arange(n) % 10
        x = draw.normal(size=(n, 3, 32, 32)) + y[:, None, None, None] / 5
        np.savez(folder / f"{split}.npz", x=x.astype(np.float32), y=y)
    for owner in ("server", *NODES):
        where = "-v", f"{folder}:/in:ro", "-v", f"{stack.name}_{owner}-data:/data"
        copy = "cp /in/*.npz /data/ && chmod a+r /data/*"
        stacks.docker("run", "--rm", "--user", "0", *where, stacks.IMAGE, "sh", "-c", copy)


def pid(container):
    return stacks.docker("inspect", "-f", "{{.State.Pid}}", container)


def shape(container, up, down):
    """Bound a container's link, Mbit/s: its own end for what goes up, the host's for what comes down."""
    inside = "nsenter", "-t", pid(container), "-n"
    route = json.loads(stacks.sh(*inside, "ip", "-j", "route", "show", "default").stdout)[0]["dev"]
    peer = json.loads(stacks.sh(*inside, "ip", "-j", "link", "show", route).stdout)[0]["link_index"]
    host = next(i["ifname"] for i in json.loads(stacks.sh("ip", "-j", "link").stdout) if i["ifindex"] == peer)
    for where, device, rate in ((inside, route, up), ((), host, down)):
        limit = "tbf", "rate", f"{rate}mbit", "burst", "15kb", "latency", "400ms"
        stacks.sh(*where, "tc", "qdisc", "add", "dev", device, "root", *limit)


def computed(process):
    """CPU seconds that the container of a process has used."""
    for line in Path(f"/proc/{process}/cgroup").read_text().splitlines():
        _, kinds, place = line.split(":", 2)
        old = Path(f"/sys/fs/cgroup/cpuacct{place}/cpuacct.usage")
        new = Path(f"/sys/fs/cgroup{place}/cpu.stat")
        if "cpuacct" in kinds.split(",") and old.exists():
            return int(old.read_text()) / 1e9
        if not kinds and new.exists():
            return int(new.read_text().split()[1]) / 1e6
    raise FileNotFoundError("no control group tells its CPU time")


def addresses(stack):
    """A node's address on the fleet network -> its name."""
    told = {name: json.loads(stacks.docker("inspect", stack.container(name))) for name in NODES}
    networks = {name: found[0]["NetworkSettings"]["Networks"] for name, found in told.items()}
    return {found[f"{stack.name}_fleet"]["IPAddress"]: name for name, found in networks.items()}


def run(stack, name, rounds, **config):
    """Train; when each round began and ended (clock time), its line of metrics with a node's CPU seconds."""
    nodes = [pid(stack.container(node)) for node in NODES]
    runner = stack.start(name, num_server_rounds=rounds, round_timeout=1800.0, **config)
    used = {}

    def note(number):
        if number not in used:
            assert stacks.docker("inspect", "-f", "{{.State.Running}}", runner) == "true", stack.logs()
            used[number] = mean(computed(node) for node in nodes)

    marks = stack.ends(name, rounds, note)
    lines, used = stack.finished(runner), [used[number] for number in range(1, rounds + 1)]
    assert all(line["clients_ok"] == len(NODES) for line in lines), lines
    # The first round waits for nodes, carries the app, and dense weights do not go down in it.
    for line, (before, after) in zip(lines[1:], pairwise(used), strict=True):
        line["cpu"] = after - before
    return [(*times, line) for times, line in zip(pairwise(marks), lines[1:], strict=True)]


def parts(rounds, spoken, links):
    """Of each round and node: seconds of its parts, bytes on the wire."""
    found = []
    for begin, end, _ in rounds:
        for client, said in spoken.items():
            now = [call for call in said if begin <= call.began < end]
            first = min(call.began for call in now if call.method == "PullObject")
            asked = max(call.began for call in now if call.method == "PullMessages" and call.began < first)
            had = next(call.began for call in now if call.method == "ConfirmMessageReceived")
            announced = next(call.began for call in now if call.method == "PushMessages")
            there = max(call.ended for call in now if call.method == "PushObject")
            at = (begin, asked, had, announced, there, end)
            taken = dict(zip(PARTS, (b - a for a, b in pairwise(at)), strict=True))
            up, down = (stream.sent(begin, end) for stream in links[client])
            found.append({**taken, "wire_up": up, "wire_down": down})
    return found


def row(method, rounds, found):
    """What a method cost: means over rounds and nodes, seconds a round as the median."""
    lines = [line for _, _, line in rounds]
    figures = {name: round(mean(part[name] for part in found), 2) for name in PARTS}
    return {
        "method": method,
        "rounds": len(rounds),
        "seconds_each": [line["seconds"] for line in lines],
        "seconds": round(median(line["seconds"] for line in lines), 1),
        "uplink_bytes": round(mean(line["uplink_bytes"] for line in lines) / len(NODES)),
        "downlink_bytes": round(mean(line["downlink_bytes"] for line in lines) / len(NODES)),
        "uplink_bpp": round(mean(line["uplink_bpp"] for line in lines), 3),
        "downlink_bpp": round(mean(line["downlink_bpp"] for line in lines), 3),
        "wire_up": round(mean(part["wire_up"] for part in found)),
        "wire_down": round(mean(part["wire_down"] for part in found)),
        "parts": figures,
        "cpu": round(mean(line["cpu"] for line in lines), 2),
        "transfer": round(figures["down"] + figures["up"], 2),
        "numel": round(lines[0]["uplink_bytes"] * 8 / lines[0]["uplink_bpp"] / len(NODES)),
    }


def table(rows):
    dense = next(row for row in rows if row["method"] == DENSE)
    lines = [
        "| method | frame up | frame down | wire up | wire down | s a round | faster | transfer s | faster "
        "| wait | down | client | up | server | cpu s |",
        "|---|" + "---:|" * 14,
    ]
    for r in rows:
        sizes = [f"{r[key] / 1000:,.0f} kB" for key in ("uplink_bytes", "downlink_bytes", "wire_up", "wire_down")]
        times = [f"{r['seconds']:.1f}", f"{dense['seconds'] / r['seconds']:.1f}x"]
        times += [f"{r['transfer']:.1f}", f"{dense['transfer'] / r['transfer']:.1f}x"]
        times += [*(f"{r['parts'][part]:.1f}" for part in PARTS), f"{r['cpu']:.1f}"]
        lines.append("| " + " | ".join([r["method"], *sizes, *times]) + " |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--methods", nargs="+", default=[DENSE, "deltamask", "deltamask downlink=relay", "fedpm"])
    parser.add_argument("--up", type=float, default=1.0, help="Mbit/s")
    parser.add_argument("--down", type=float, default=4.0, help="Mbit/s")
    parser.add_argument("--rounds", type=int, default=6, help="dense FedAvg: half of them, at least 3")
    parser.add_argument("--model", default="conv6")
    parser.add_argument("--examples", type=int, default=64, help="of each node")
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    assert DENSE in asked.methods, "there is nothing to compare with"
    stop = stacks.engine()
    stacks.build()
    rows, loads = [], []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        folder.chmod(0o755)
        stack = stacks.Stack(f"fedmask-uplink-{os.getpid()}", folder / "runs", FEDMASK_NODE_MEMORY="1g")
        try:
            stack.compose("create")
            fill(stack, folder, asked.examples)
            stack.up("superlink", "serverapp")
            capture = Capture(pid(stack.container("superlink")), 9092, folder / "packets.pcap")
            stack.up("superlink", "serverapp", *NODES)
            for name in NODES:
                shape(stack.container(name), asked.up, asked.down)
            node_of, taken = addresses(stack), {}
            for method in asked.methods:
                count = max(asked.rounds // 2, 3) if method == DENSE else asked.rounds
                name, *settings = method.split()
                told = {
                    "method": name,
                    "model": asked.model,
                    "data": "npz",
                    "data_dir": "/data",
                    "local_epochs": 1,
                    "evaluate_every": count,  # a server is another machine; here it would take the devices' cores
                    "clients": len(NODES),
                    "min_nodes": len(NODES),
                    **dict(setting.split("=") for setting in settings),
                }
                taken[method] = run(stack, re.sub("[ =]", "-", method), count, **told)
                loads.append(round(os.getloadavg()[1], 1))
            said = "import json, flwr, torch; print(json.dumps([flwr.__version__, torch.__version__]))"
            versions = json.loads(stacks.docker("exec", stack.container("node0"), "python", "-c", said))
            capture.stop()
            links = {client: pair for client, pair in capture.streams().items() if client[0] in node_of}
            assert len(links) == len(NODES), f"a node connected again: {sorted(links)}"
            spoken = {client: calls(*pair) for client, pair in links.items()}
            rows = [row(method, rounds, parts(rounds, spoken, links)) for method, rounds in taken.items()]
        finally:
            stack.down()
    if stop is not None:
        stop()
    result = {
        "settings": {
            "model": asked.model, "numel": rows[0]["numel"], "nodes": len(NODES), "examples_a_node": asked.examples,
            "local_epochs": 1, "up_mbit": asked.up, "down_mbit": asked.down, "node_memory": "1g", "node_cpus": 1.0,
        },
        "versions": {
            "flwr": versions[0], "torch": versions[1],
            "engine": stacks.docker("version", "-f", "{{.Server.Version}}"),
        },
        "machine": {"cores": os.cpu_count(), "load_5_min": loads},
        "rows": rows,
    }  # fmt: skip
    print(table(rows))
    if asked.out:
        asked.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
