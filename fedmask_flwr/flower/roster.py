"""Which nodes are there, who they are, and which of them train this round."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence, Set

from flwr.app import Message, RecordDict
from flwr.common.logger import log
from flwr.serverapp import Grid

from fedmask_flwr.masks import derive, permutation

from .records import METRICS

INFO, WARNING = 20, 30
POLL = 1.0  # seconds between looks at the grid
TRIES, AGAIN = 3, 10  # an app without a query handler must not cost a message in every round; one that was away may


class Roster:
    """Nodes and the stable client numbers behind them.

    Flower's node ids are drawn anew at each start of a simulation, so a sample keyed by them would not repeat.
    Nodes are asked for their numbers; one whose app has no ``query`` handler is sampled under its node id.
    ``told`` holds what nodes said, ``spoke`` what they answered as. ``expect`` nodes are waited for before the
    first round, ``min_nodes`` later.
    """

    def __init__(self, *, min_nodes: int, expect: int, node_timeout: float, seed: int) -> None:
        self.min_nodes, self.node_timeout, self.seed = min_nodes, node_timeout, seed
        self.told: dict[int, int] = {}
        self.spoke: dict[int, int] = {}
        self._need = max(min_nodes, expect)
        self._asked: Counter[int] = Counter()

    def wait(self, grid: Grid) -> list[int]:
        """Wait for enough nodes and return all node ids.

        Raises
        ------
        TimeoutError
            When fewer are there after ``node_timeout`` seconds.
        """
        deadline = time.monotonic() + self.node_timeout
        while True:
            nodes = list(grid.get_node_ids())
            if len(nodes) >= self._need:
                self._need = self.min_nodes
                return nodes
            if time.monotonic() > deadline:
                raise TimeoutError(
                    f"{len(nodes)} of {self._need} nodes came within {self.node_timeout:g} s: start more "
                    "SuperNodes, lower min-nodes and clients, or raise node-timeout"
                )
            log(INFO, "waiting for nodes: %d of %d", len(nodes), self._need)
            time.sleep(POLL)

    def sample(self, grid: Grid, fraction: float, purpose: str, server_round: int) -> list[int]:
        """Node ids of max(min_nodes, round(fraction * nodes)) nodes, keyed by (seed, purpose, round)."""
        nodes = self.wait(grid)
        size = min(len(nodes), max(self.min_nodes, round(fraction * len(nodes))))
        if size == len(nodes):
            return nodes
        self.identify(grid, nodes)
        nodes.sort(key=lambda node: self.told.get(node, node))
        order = permutation(derive(self.seed, purpose, server_round), len(nodes))
        return [nodes[i] for i in order[:size]]

    def audience(
        self, grid: Grid, fraction: float, purpose: str, server_round: int, *, personal: str = ""
    ) -> tuple[dict[int, int], int]:
        """Number of each sampled node that is told something, and how many are told nothing.

        Where each is told its own, by the method named ``personal``, that is who did not tell its number.

        Raises
        ------
        TimeoutError
            As `wait`.
        RuntimeError
            No node ever told its number, although these were asked ``TRIES`` times.
        """
        nodes = self.sample(grid, fraction, purpose, server_round)
        if not personal:
            return {node: self.told.get(node, node) for node in nodes}, 0
        self.identify(grid, nodes)
        known = {node: self.told[node] for node in nodes if node in self.told}
        if not known and not self.told and all(self._asked[node] >= TRIES for node in nodes):
            raise RuntimeError(
                f"method {personal} tells each client its own, but no node told its number: register "
                "fedmask_flwr.flower.identify as the ClientApp's query handler"
            )
        return known, len(nodes) - len(known)

    def identify(self, grid: Grid, nodes: Sequence[int]) -> None:
        """Ask those of ``nodes`` that have not told their client number: ``TRIES`` times, then now and again."""
        strangers = [node for node in nodes if node not in self.told]
        unknown = [node for node in strangers if self._asked[node] < TRIES or self._asked[node] % AGAIN == 0]
        self._asked.update(strangers)
        if not unknown:
            return
        asked = [Message(RecordDict(), node, "query") for node in unknown]
        said: dict[int, int] = {}
        for reply in grid.send_and_receive(asked, timeout=self.node_timeout):
            record = None if reply.has_error() else reply.content.metric_records.get(METRICS)
            client = None if record is None else record.get("client")
            if isinstance(client, int) and 0 <= client < 2**64:
                said[reply.metadata.src_node_id] = client
        self._believe(said, set(grid.get_node_ids()))
        if silent := [node for node in unknown if node not in self.told]:
            log(WARNING, "%d nodes did not tell their client number, such as %d", len(silent), silent[0])

    def _believe(self, said: Mapping[int, int], present: Set[int]) -> None:
        """Take over the numbers that strangers told, but those that another node has or tells too.

        What a client is told may be its own, so no node hears it by saying a number. Who had one before keeps it
        while it is there.
        """
        for node in [node for node in self.told if node not in present]:
            del self.told[node]
        count = Counter([*said.values(), *self.told.values()])
        for node, client in said.items():
            if count[client] == 1:
                self.told[node] = client
            else:
                self._asked[node] = 0  # a device that was started again: the node that it was will be gone
                log(
                    WARNING,
                    "node %d says it is client %d, and so does another: give each its own client-id",
                    node,
                    client,
                )
