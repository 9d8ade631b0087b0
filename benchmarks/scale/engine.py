"""What Flower's simulation engine itself costs, without Ray or clients: one look for messages over all nodes.

    python benchmarks/scale/engine.py

flwr 1.39's engine (``vce_api.add_messages_to_queue``) asks its state for each node's message, ten times a second at
most, and the state walks through every message there is (``InMemoryLinkState.get_message_ins``): nodes x messages.
CPU seconds of a look that delivers nothing any more, while clients work. It shares a process, and Python's lock,
with the ServerApp and with what feeds the clients. Printed, nothing is kept.
"""

from __future__ import annotations

import time
from dataclasses import replace

from flwr.app import Message, RecordDict
from flwr.proto.task_pb2 import Task
from flwr.server.superlink.fleet.vce.vce_api import _register_nodes
from flwr.server.superlink.linkstate import LinkStateFactory
from flwr.server.superlink.linkstate.in_memory_linkstate import RunRecord
from flwr.supercore.constant import FLWR_IN_MEMORY_DB_NAME, NOOP_FEDERATION_ID
from flwr.supercore.object_store import ObjectStoreFactory
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity
from flwr.superlink.federation import NoOpFederationManager
from flwr.superlink.grid import InMemoryGrid


def look(nodes: int, messages: int) -> float:
    """CPU seconds of one pass."""
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1
    factory = LinkStateFactory(FLWR_IN_MEMORY_DB_NAME, NoOpFederationManager(), ObjectStoreFactory())
    state = factory.state()
    run = replace(Run.create_empty(1), primary_task_id=1, federation_id=NOOP_FEDERATION_ID)
    state.run_ids[1] = RunRecord(run=run)
    state.task_store[1] = Task(task_id=1, run_id=1)
    grid = InMemoryGrid(state_factory=factory)
    grid.set_run(run)
    known = list(_register_nodes(num_nodes=nodes, state_factory=factory))
    grid.push_messages([Message(RecordDict(), node, "query") for node in known[:messages]])
    for node in known[:messages]:
        assert state.get_message_ins(node_id=node, limit=1)
    began = time.process_time()
    for node in known:
        state.get_message_ins(node_id=node, limit=1)
    return time.process_time() - began


def main() -> None:
    """Print a line a size."""
    for nodes, messages in ((100, 10), (100, 100), (1000, 10), (1000, 100), (1000, 1000), (2000, 200)):
        seconds = look(nodes, messages)
        each = seconds / nodes / messages * 1e6
        print(f"{nodes} nodes, {messages} messages: {seconds:.3f} s a look, {each:.2f} us a pair")


if __name__ == "__main__":
    main()
