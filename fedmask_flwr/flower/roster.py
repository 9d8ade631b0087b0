"""Which nodes are there, who they are, and which of them train this round."""

from __future__ import annotations

import time
from collections.abc import Sequence

from flwr.app import Message, RecordDict
from flwr.common.logger import log
from flwr.serverapp import Grid

from fedmask_flwr.masks import derive, permutation

from .records import METRICS

INFO, WARNING = 20, 30
POLL = 1.0  # seconds between looks at the grid


class Roster:
    """Nodes and the stable client numbers behind them.

    Flower's node ids are drawn anew at each start of a simulation, so a sample keyed by them would not repeat.
    Each new node is asked once for its number; one whose app has no ``query`` handler counts under its node id.
    """

    def __init__(self, *, min_nodes: int, node_timeout: float, seed: int) -> None:
        self.min_nodes, self.node_timeout, self.seed = min_nodes, node_timeout, seed
        self.clients: dict[int, int] = {}

    def wait(self, grid: Grid) -> list[int]:
        """Wait for ``min_nodes`` nodes and return all node ids.

        Raises
        ------
        TimeoutError
            When fewer are there after ``node_timeout`` seconds.
        """
        deadline = time.monotonic() + self.node_timeout
        while True:
            nodes = list(grid.get_node_ids())
            if len(nodes) >= self.min_nodes:
                return nodes
            if time.monotonic() > deadline:
                raise TimeoutError(
                    f"{len(nodes)} of {self.min_nodes} nodes came within {self.node_timeout:g} s: start more "
                    "SuperNodes, or lower min-nodes or raise node-timeout"
                )
            log(INFO, "waiting for nodes: %d of %d", len(nodes), self.min_nodes)
            time.sleep(POLL)

    def sample(self, grid: Grid, fraction: float, purpose: str, server_round: int) -> list[int]:
        """Node ids of max(min_nodes, round(fraction * nodes)) nodes, keyed by (seed, purpose, round)."""
        nodes = self.wait(grid)
        size = min(len(nodes), max(self.min_nodes, round(fraction * len(nodes))))
        if size == len(nodes):
            return nodes
        self.identify(grid, nodes)
        nodes.sort(key=lambda node: self.clients[node])
        order = permutation(derive(self.seed, purpose, server_round), len(nodes))
        return [nodes[i] for i in order[:size]]

    def identify(self, grid: Grid, nodes: Sequence[int]) -> None:
        """Learn the client numbers of ``nodes`` into ``clients``; each node is asked once."""
        asked = [Message(RecordDict(), node, "query") for node in nodes if node not in self.clients]
        if not asked:
            return
        for reply in grid.send_and_receive(asked, timeout=self.node_timeout):
            record = None if reply.has_error() else reply.content.metric_records.get(METRICS)
            if record is not None and isinstance(record.get("client"), int):
                self.clients[reply.metadata.src_node_id] = int(str(record["client"]))
        for node in nodes:
            if node not in self.clients:
                log(WARNING, "node %d did not tell its client number: it counts under its node id", node)
                self.clients[node] = node
