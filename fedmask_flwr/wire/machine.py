"""When machine code is used in ``wire``: the bytes are the same with and without."""

from __future__ import annotations

import sys

from fedmask_flwr import jit

COMPILED_FROM = 1 << 20
"""Positions from which it pays: numba takes a third of a second to load, and 120 MB."""
LOADED_FROM = 1 << 16
"""The same where something else has loaded it: a server decodes hundreds of replies."""


def compiled_pays(numel: int) -> bool:
    """Whether to use compiled kernels on this many positions; imports numba only where they are enough."""
    least = LOADED_FROM if "numba" in sys.modules else COMPILED_FROM
    return numel >= least and jit.available()
