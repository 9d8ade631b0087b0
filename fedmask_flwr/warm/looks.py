"""Look for messages sooner: Flower's SuperNode sleeps 3 s between looks, which a short round waits for twice.

flwr has no option for that. Its main loop calls ``time.sleep`` by that name, in a module of its own; in this
process that module gets a ``time`` whose sleeps are short at first and Flower's own once nothing has come for long.
"""

from __future__ import annotations

import time
from importlib import import_module
from types import ModuleType
from typing import Any, final

LOOP = "flwr.supernode.start_client_internal"
SOON, SHARE = 0.25, 0.2  # seconds; share of the time since the last message that a sleep may take
REPLY = 0.1  # seconds between looks whether the reply is there, on this machine
IDLE = 3.0  # what Flower sleeps when there was no message
PULL = "flwr.supercore.inflatable.inflatable_utils", "pull_and_inflate_object_from_tree"
BACKOFF = {"initial_backoff": 0.1, "backoff_cap": 1.0}  # seconds; Flower's own are 1 and 10


@final
class Looks:
    """Stands in for the module ``time``; everything but `sleep` is its own."""

    def __init__(self) -> None:
        self._last = time.monotonic()  # when there was a message, or its reply was waited for

    def __getattr__(self, name: str) -> Any:
        return getattr(time, name)

    def sleep(self, seconds: float) -> None:
        """Sleep no longer than asked."""
        if seconds < IDLE:
            self._last = time.monotonic()
            time.sleep(min(seconds, REPLY))
        else:
            time.sleep(min(seconds, max(SOON, SHARE * (time.monotonic() - self._last))))


def look_sooner() -> bool:
    """Have this process's SuperNode look sooner; False where Flower's loop is another than the known one."""
    try:
        loop = import_module(LOOP)
    except ImportError:
        return False
    if not isinstance(getattr(loop, "time", None), ModuleType):
        return False
    loop.time = Looks()  # type: ignore[attr-defined]
    return True


def pull_sooner() -> bool:
    """Have a client process ask its own node sooner for a message that is still under way; False where it cannot.

    The node starts the client while it downloads, and the client waits 1, 2, 4 ... 10 s between its questions.
    """
    module, name = PULL
    try:
        defaults = getattr(import_module(module), name).__kwdefaults__
    except (ImportError, AttributeError):
        return False
    if not defaults or not set(BACKOFF) <= set(defaults):
        return False
    defaults.update(BACKOFF)
    return True
