"""A Grid that looks for replies soon: Flower's own looks every three seconds, which a short round waits for."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import final

from flwr.app import Message
from flwr.proto.node_pb2 import NodeInfo
from flwr.serverapp import Grid
from flwr.supercore.run import Run

SOON, SHARE, LATEST = 0.1, 0.04, 3.0  # seconds; share of the time waited so far; seconds


def prompt(grid: Grid) -> Grid:
    """Wrap a grid that talks to a SuperLink; others, such as a simulation's, know at once."""
    from flwr.superlink.grid import HttpGrid  # the server's alone: a device must not import it

    return PromptGrid(grid) if isinstance(grid, HttpGrid) else grid


def meanwhile(grid: Grid, work: Callable[[], None]) -> None:
    """Do some work: at once, or, where devices are elsewhere, as soon as the next messages are on their way."""
    if isinstance(grid, PromptGrid):
        grid.meanwhile(work)
    else:
        work()


@final
class PromptGrid(Grid):
    """Another grid, but for how long it sleeps between looks: a 25th of the time waited, 0.1 to 3 s.

    What it was given with `meanwhile` is done between sending and the first look.
    """

    def __init__(self, grid: Grid) -> None:
        self._grid = grid
        self._work: list[Callable[[], None]] = []

    def meanwhile(self, work: Callable[[], None]) -> None:
        """Do ``work`` once the next messages are sent; an error of it ends the `send_and_receive` it is done in."""
        self._work.append(work)

    def set_run(self, run: Run) -> None:
        """As the other grid."""
        self._grid.set_run(run)

    @property
    def run(self) -> Run:
        """As the other grid."""
        return self._grid.run

    def create_message(
        self, content: object, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        """As the other grid."""
        return self._grid.create_message(content, message_type, dst_node_id, group_id, ttl)  # type: ignore[arg-type]

    def get_node_ids(self) -> Iterable[int]:
        """As the other grid."""
        return self._grid.get_node_ids()

    def get_nodes(self) -> Iterable[NodeInfo]:
        """As the other grid."""
        return self._grid.get_nodes()

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """As the other grid."""
        return self._grid.push_messages(messages)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """As the other grid."""
        return self._grid.pull_messages(message_ids)

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        """Push, then pull until all have answered or ``timeout`` seconds are over."""
        open_ = set(self._grid.push_messages(messages))
        del messages  # the caller may have handed them over: their frames are not needed any more
        began, replies = time.monotonic(), list[Message]()
        while self._work:
            self._work.pop(0)()
        while open_:
            found = list(self._grid.pull_messages(open_))
            replies += found
            open_ -= {message.metadata.reply_to_message_id for message in found}
            waited = time.monotonic() - began
            if timeout is not None and waited >= timeout:
                break
            if open_:
                time.sleep(min(max(SOON, SHARE * waited), LATEST))
        return replies
