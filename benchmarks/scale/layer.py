"""What the strategy costs a client beside the arithmetic: messages, replies, the roster, the ledger.

    python benchmarks/scale/layer.py [--most 100000]

`MaskStrategy` over a Grid that answers at once, a network of 1000 weights (so decoding costs nothing), everyone in
every round; klms with ``downlink = relay``, which asks every node who it is and keeps what each holds. CPU
microseconds a client, of the second round, by what they go to. Points are kept in
benchmarks/results/scale-layer.json.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from flwr.app import ConfigRecord, Message, MetricRecord, RecordDict  # noqa: E402
from loopback import LoopbackGrid  # noqa: E402
from torch import nn  # noqa: E402

from fedmask_flwr.flower.records import frame_of, frame_record  # noqa: E402
from fedmask_flwr.flower.strategy import MaskStrategy  # noqa: E402
from fedmask_flwr.methods import Turn  # noqa: E402
from fedmask_flwr.wire import Counts, Frame, Payload, pack, pack_bits  # noqa: E402

RESULTS = ROOT / "benchmarks/results/scale-layer.json"
METHODS = {"fedpm": {}, "klms": {"downlink": "relay"}}
NUMEL = 1000


class Echo(LoopbackGrid):
    """Nodes that answer with made-up replies; ``spent`` is the time that this takes."""

    def __init__(self, clients: int, payload: Payload, method) -> None:
        self.nodes, self.payload, self.method = list(range(100, 100 + clients)), payload, method
        self.spent = 0.0

    def get_node_ids(self):
        return list(self.nodes)

    def send_and_receive(self, messages, *, timeout=None):
        began = time.process_time()
        replies, coded = [], None
        for message in messages:
            message.metadata.__dict__["_message_id"] = str(message.metadata.dst_node_id)
            client = message.metadata.dst_node_id - 100
            content = RecordDict(
                {"metrics": MetricRecord({"client": client, "num-examples": 60, "train_loss": 1.0})}
            )
            if message.metadata.message_type == "train":
                if coded is None:
                    told = Frame.parse(frame_of(message.content["arrays"]))
                    known = self.method.known(Payload(), Turn(7, told.round_, 2, client), {})
                    coded = pack(self.payload, digest=told.digest, round_=told.round_, known=known)
                content["arrays"] = frame_record(coded, self.method.numel)
            replies.append(Message(content, reply_to=message))
        self.spent += time.process_time() - began
        return replies


def measure(name: str, clients: int) -> dict:
    """CPU microseconds a client."""
    strategy = MaskStrategy(name, nn.Linear(NUMEL // 10, 10, bias=False), clients=clients, **METHODS[name])
    method = strategy.method
    if name == "klms":
        index = np.arange(4, dtype=np.uint32)
        payload = Payload(counts={"index": Counts(index, (1 << method.each) - 1)})
    else:
        payload = Payload(bits={"mask": pack_bits(np.arange(NUMEL) % 3 == 0)})
    grid, parts = Echo(clients, payload, method), {}
    for round_ in (1, 2):
        grid.spent, a = 0.0, time.process_time()
        messages = strategy.configure_train(round_, strategy.initial_arrays(), ConfigRecord(), grid)
        b = time.process_time() - grid.spent  # round 1 of klms: the nodes' answers to who they are
        replies = grid.send_and_receive(messages)
        c = time.process_time()
        _, metrics = strategy.aggregate_train(round_, replies)
        parts[round_] = (b - a, time.process_time() - c)
        assert metrics is not None and metrics["clients_ok"] == clients
    return {
        "method": name,
        "clients": clients,
        "tell_first_us": round(parts[1][0] / clients * 1e6, 1),
        "tell_us": round(parts[2][0] / clients * 1e6, 1),
        "hear_us": round(parts[2][1] / clients * 1e6, 1),
    }


def main() -> None:
    """Measure; print and keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--most", type=int, default=100_000)
    parser.add_argument("--only", default=",".join(METHODS))
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    logging.disable(logging.ERROR)
    rows = []
    for name in args.only.split(","):
        for clients in (n for n in (100, 1000, 10_000, 100_000) if n <= args.most):
            rows.append(measure(name, clients))
            print(json.dumps(rows[-1]), flush=True)
    args.out.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
