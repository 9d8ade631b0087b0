"""A SuperNode that shares what its processes import; ``main`` with FOLDER OPTIONS as arguments.

Flower's SuperNode, its SuperExec and every client process import much the same 90 MB. This process imports them,
forks the keeper, and is the SuperNode from then on.
"""

from __future__ import annotations

import os
import sys
from importlib import import_module
from importlib.metadata import distribution
from pathlib import Path

from .looks import look_sooner
from .server import Entry, imported, keep, listen

CLIENT, SUPEREXEC, SUPERNODE = "flwr-clientapp", "flower-superexec", "flower-supernode"


def entry_of(program: str) -> str:
    """Return what runs one of Flower's programs, "module:function", as its installation says."""
    found = distribution("flwr").entry_points.select(group="console_scripts", name=program)
    return next(iter(found)).value


def main() -> None:
    """Fork the keeper, then be ``flower-supernode``."""
    folder, argv = Path(sys.argv[1]), sys.argv[2:]
    entries = {name: entry_of(name) for name in (CLIENT, SUPEREXEC, SUPERNODE)}
    imported([entry.partition(":")[0] for entry in entries.values()])
    module, _, name = entries[SUPERNODE].partition(":")
    run = getattr(import_module(module), name)
    programs: dict[str, Entry] = {name: entries[name] for name in (CLIENT, SUPEREXEC)}
    places = {name: (listen(folder, name), entry) for name, entry in programs.items()}
    me = os.getpid()
    if os.fork() == 0:
        keep(folder, me, places)
    for listener, _ in places.values():
        listener.close()
    sys.argv = [SUPERNODE, *argv]
    look_sooner()
    run()
    # A signal ends the process before this; Flower itself says no more than "terminated gracefully".
    sys.exit(
        "fedmask: Flower ended this SuperNode. If nobody stopped it, the SuperLink refused it, for its key or its "
        "clock: fedmask doctor --superlink HOST:PORT says which"
    )
