"""When machine code is used in ``wire``: the bytes are the same with and without."""

from __future__ import annotations

from fedmask_flwr import jit

COMPILED_FROM = 1 << 20
"""Positions from which it pays: numba takes a third of a second to load, and 120 MB."""


def compiled_pays(numel: int) -> bool:
    """Whether to use compiled kernels on this many positions; imports numba only where they are enough."""
    return numel >= COMPILED_FROM and jit.available()
