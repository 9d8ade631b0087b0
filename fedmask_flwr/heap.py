"""What the C library does with freed memory: kept for the next step of training, or given back at once.

torch asks it for the same tensors in every step. By itself glibc gives much of that back in between, and the system
clears the pages anew: up to a fifth of a step (`benchmarks/heap.py`). A server's arrays come once a round;
kept, they only make it larger. Another C library has no such options, and nothing is done.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator
from functools import cache

from . import cgroup

__all__ = ["give_back", "keep", "kept"]

AMPLE = 1 << 30
"""Bytes that must be free where they are to be kept: a small device needs what it can get."""
_TRIM, _TOP_PAD, _MMAP = -1, -2, -3  # of malloc.h
_KEPT = {_TRIM: 128 << 20, _TOP_PAD: 64 << 20, _MMAP: 64 << 20}
_BATCHES = {_TRIM: 32 << 20, _TOP_PAD: 8 << 20, _MMAP: 4 << 20}  # an array as large as the network comes once
_GIVEN = {_TRIM: 1 << 20, _TOP_PAD: 0, _MMAP: 1 << 20}


def keep() -> bool:
    """Keep freed memory, up to 128 MB at the heap's end and no array above 64 MB; whether it does so now.

    For the process that trains; not where less than 1 GB is free, by the machine or the control group.
    """
    return _ample() and _set(_KEPT)


def give_back() -> None:
    """Give back freed arrays of 1 MB and more at once; glibc comes to keep those of up to 32 MB."""
    _set(_GIVEN)


@contextlib.contextmanager
def kept() -> Iterator[None]:
    """Keep freed arrays below 4 MB, 32 MB in all, in a process that otherwise gives back; where `keep` would."""
    changed = _ample() and _set(_BATCHES)
    try:
        yield
    finally:
        if changed:
            give_back()


@cache
def _ample() -> bool:
    """Looked at once in a process: it takes milliseconds to read."""
    return min(cgroup.free_memory(), cgroup.limits().left) >= AMPLE


def _set(options: dict[int, int]) -> bool:
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    taken: int = sum(mallopt(option, value) for option, value in options.items())
    return taken == len(options)
