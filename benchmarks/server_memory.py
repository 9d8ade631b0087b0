"""What memory a ServerApp takes: 100 clients, a network of 10 million parameters.

    python benchmarks/server_memory.py [--clients 100] [--rounds 3] [--methods fedpm,deltamask]

The bundled ServerApp (evaluation, checkpoint and curve included) runs in a process of its own, over Flower's own
Grid and HTTP client. This process stands for the SuperLink and the devices: it speaks the Runtime API and answers
each training message with a real frame. FedPM's are a bit a parameter, drawn anew; DeltaMask's are flips of 1 to
10 % of the bits, coded as devices do, against the mask that the server draws for each client by itself.

Peak: VmHWM of the server's process. (``ru_maxrss`` of a child counts what its parent held when it forked.)
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks/results/server_memory.json"
MODEL = "mlp(hidden=3000,2550)"
SIZES = (784 * 3000, 3000 * 2550, 2550 * 10)
NUMEL = sum(SIZES)
DENSITIES = [percent / 100 for percent in range(1, 11)]


def images(split, data_dir):
    """Noise in the shape of MNIST: what is learned does not matter here."""
    import numpy as np

    rng = np.random.Generator(np.random.Philox(key=len(split)))
    return rng.random((1000, 1, 28, 28), np.float32), np.arange(1000) % 10


class Fleet:
    """The SuperLink and its nodes, as far as a Grid can see them."""

    def __init__(self, method, clients, workers=2):
        import numpy as np

        from fedmask_flwr.wire import Payload, SideInfo, pack, pack_bits

        self.clients = clients
        self.rng = np.random.Generator(np.random.Philox(key=7))
        self.objects, self.waiting = {}, {}
        self.lock = threading.Lock()
        self.sent = self.received = 0
        known = SideInfo(SIZES)  # flips alone: what a client's own reference makes of them is the server's to draw
        self.coded = []
        for density in DENSITIES if method == "deltamask" else []:
            flips = pack_bits(self.rng.random(NUMEL, np.float32) < density)
            self.coded.append(pack(Payload(bits={"mask": flips}), digest=bytes(8), round_=0, known=known))

    def frame(self, digest, round_, client):
        """A client's reply."""
        from fedmask_flwr.wire import Frame, Payload, SideInfo, pack

        if self.coded:
            coded = Frame.parse(self.coded[client % len(self.coded)])
            return Frame(digest, round_, coded.fields, coded.meta).to_bytes()
        bits = self.rng.integers(0, 256, (NUMEL + 7) // 8, "uint8")
        bits[-1] &= (1 << (NUMEL - 1) % 8 + 1) - 1
        payload, plain = Payload(bits={"mask": bits}), {"bits": "bits"}
        return pack(payload, digest=digest, round_=round_, known=SideInfo(SIZES), codecs=plain)

    def answer(self, message_id):
        """Train: the reply's objects are kept until the next round."""
        from flwr.app import Message, MetricRecord, RecordDict
        from flwr.app.message import remove_content_from_message
        from flwr.common.serde import message_to_proto
        from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree
        from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents

        from fedmask_flwr.flower.records import frame_of, frame_record
        from fedmask_flwr.wire import Frame

        asked = inflate_object_from_contents(message_id, self.objects, keep_object_contents=True)
        asked.metadata.__dict__["_message_id"] = message_id
        told = Frame.parse(frame_of(asked.content.array_records["arrays"]))
        client = asked.metadata.dst_node_id - 1
        record = frame_record(self.frame(told.digest, told.round_, client), NUMEL)
        metrics = MetricRecord({"client": client, "num-examples": 100, "train_loss": 1.0})
        reply = Message(RecordDict({"arrays": record, "metrics": metrics}), reply_to=asked)
        reply.metadata.__dict__["_message_id"] = reply.object_id
        tree = get_object_tree(reply)
        self.objects |= {key: value.deflate() for key, value in get_all_nested_objects(reply).items()}
        return message_to_proto(remove_content_from_message(reply)), tree

    def call(self, name, raw):
        """One request of the Runtime API."""
        from flwr.proto import message_pb2, runtime_pb2
        from flwr.proto.node_pb2 import NodeInfo
        from flwr.supercore.inflatable.inflatable_object import iterate_object_tree

        if name == "get-nodes":
            return runtime_pb2.GetNodesResponse(nodes=[NodeInfo(node_id=1 + i) for i in range(self.clients)])
        if name == "push-messages":
            pushed = runtime_pb2.PushAppMessagesRequest.FromString(raw)
            ids = [message.metadata.message_id for message in pushed.messages_list]
            self.objects.clear()
            self.waiting = dict.fromkeys(ids)
            wanted = {tree.object_id for root in pushed.message_object_trees for tree in iterate_object_tree(root)}
            return runtime_pb2.PushAppMessagesResponse(message_ids=ids, objects_to_push=wanted, session_id="1")
        if name == "push-object":
            pushed = message_pb2.PushObjectRequest.FromString(raw)
            self.objects[pushed.object_id] = pushed.object_content
            self.sent += len(pushed.object_content)
            return message_pb2.PushObjectResponse(stored=True)
        if name == "pull-messages":
            began, found = time.monotonic(), []
            while self.waiting and time.monotonic() - began < 15:  # the Grid's client gives up after 30 s
                found.append(self.answer(self.waiting.popitem()[0]))
            return runtime_pb2.PullAppMessagesResponse(
                messages_list=[message for message, _ in found], message_object_trees=[tree for _, tree in found]
            )
        if name == "pull-object":
            wanted = message_pb2.PullObjectRequest.FromString(raw)
            content = self.objects[wanted.object_id]
            self.received += len(content)
            return message_pb2.PullObjectResponse(object_found=True, object_available=True, object_content=content)
        if name == "confirm-message-received":
            return message_pb2.ConfirmMessageReceivedResponse()
        raise KeyError(name)


def listen(fleet):
    """Serve the Runtime API at a free port."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self):
            raw = self.rfile.read(int(self.headers["content-length"]))
            with fleet.lock:
                body = fleet.call(self.path.rpartition("/")[2], raw).SerializeToString()
            self.send_response(200)
            self.send_header("content-type", "application/protobuf")
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_): ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


def memory(field):
    """A line of /proc/self/status in MB of 10^6 bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024 / 1e6
    raise KeyError(field)


def serve(address, out, changes):
    """The server's process: the bundled ServerApp over Flower's own Grid."""
    from flwr.app import Context, RecordDict
    from flwr.supercore.run import Run
    from flwr.supercore.task_identity import TaskIdentity
    from flwr.superlink.grid import HttpGrid

    import fedmask_flwr.flower.apps as apps
    from fedmask_flwr.simulation.stage import defaults

    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1
    imported = memory("VmRSS")
    grid = HttpGrid(address, insecure=True, token="none")
    grid.set_run(Run.create_empty(1))
    config = defaults() | changes | {"out": str(out), "data": "benchmarks.server_memory:images", "model": MODEL}
    apps.serve(grid, Context(1, 1, {}, RecordDict(), config))
    print(json.dumps({"imports_mb": imported, "peak_mb": memory("VmHWM")}))


def measure(method, clients, rounds, env=None, **changes):
    """Run a federation and return what the server took."""
    fleet = Fleet(method, clients)
    server = listen(fleet)
    config = {"method": method, "clients": clients, "num-server-rounds": rounds, "node-timeout": 60.0, **changes}
    with tempfile.TemporaryDirectory() as out:
        began = time.monotonic()
        done = subprocess.run(
            [sys.executable, __file__, "--server", f"127.0.0.1:{server.server_port}", out, json.dumps(config)],
            stdout=subprocess.PIPE,
            text=True,
            check=True,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT), **(env or {})},
        )
        seconds = time.monotonic() - began
        lines = [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]
    server.shutdown()
    server.server_close()
    assert [line["clients_ok"] for line in lines] == [clients] * rounds
    found = json.loads(done.stdout.splitlines()[-1])
    return {
        "method": method,
        "clients": clients,
        "parameters": NUMEL,
        "rounds": rounds,
        **{name: round(value, 1) for name, value in found.items()},
        "own_mb": round(found["peak_mb"] - found["imports_mb"], 1),
        "uplink_mb_a_round": round(lines[-1]["uplink_bytes"] / 1e6, 2),
        "broadcast_mb": round(lines[-1]["downlink_bytes"] / clients / 1e6, 2),
        "pushed_mb": round(fleet.sent / 1e6, 2),
        "pulled_mb": round(fleet.received / 1e6, 2),
        "seconds": round(seconds, 1),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--methods", default="fedpm,deltamask")
    parser.add_argument("--server", nargs=3, metavar=("ADDRESS", "FOLDER", "CONFIG"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.server:
        serve(args.server[0], args.server[1], json.loads(args.server[2]))
        return
    import torch

    for method in args.methods.split(","):
        row = {**measure(method, args.clients, args.rounds), "torch": torch.__version__}
        print(json.dumps(row), flush=True)
        rows = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
        rows = [*(old for old in rows if old["method"] != method), row]
        RESULTS.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
