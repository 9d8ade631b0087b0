"""A SuperNode whose client processes start warm.

Flower starts a fresh ``flwr-clientapp`` process for every message: on a small device importing torch and Flower
takes longer than the round. Here one process imports them once and forks for each message (`server`); a stand-in
named ``flwr-clientapp``, first on the SuperNode's PATH, asks it to (`shim`). The app itself is loaded from each
run's bundle as ever, and without the server the stand-in runs the real program. One thing of Flower is changed:
how long the SuperNode and the client sleep between looks for messages (`looks`).
"""

from __future__ import annotations

from .start import supernode as supernode

__all__ = ["supernode"]
