"""A mask by a path through a trellis: fewer bits than numbers of separate blocks, for as many candidates.

Trellis source coding, here of samples, as in "Rate-Constrained Simulation and Source Coding IID Sources", arXiv
1008.2008. Its use for minimal random coding is ours.

The message is one bit a block. It runs through a shift register; the register's last b bits are the number of the
candidate of the block. A bit so takes part in the choice for b blocks, and the whole message is chosen at once: the
path of largest log weight, by Viterbi's algorithm, over the same 2^b candidates of each block that `sampled.pick`
would choose from block by block. Numbers of separate blocks waste what a block's best candidate lacks or has to
spare; a path balances it. At b = 8 it carries a change in 5/6 of their bits.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fedmask_flwr import jit
from fedmask_flwr.jit import compiled

from .change import Change
from .sampled import Draws, tallies, weigh

_TALLIES = 1 << 20  # tallies that are in memory at a time
_STATES = 16  # of one block, that count for a position where machine code may pay
_NEVER = -(1 << 62)

__all__ = ["path_candidates", "trace_path"]


def path_candidates(path: NDArray[np.uint32], size: int) -> NDArray[np.uint32]:
    """Candidate of each block, (blocks,) below ``size``, a power of 2, that a path (blocks,) of bits stands for."""
    found = np.zeros(path.size, np.uint32)
    for age in range(min(size.bit_length() - 1, path.size)):
        found[age:] |= path[: path.size - age] << np.uint32(age)
    return found


def trace_path(draws: Draws, change: Change) -> NDArray[np.uint32]:
    """Find the path of largest log weight: a bit a block, (blocks,) uint32.

    ``draws.size`` is a power of 2, 2^b. The size of the change is that of theta_k where blocks are b / (b - 1)
    times the divergence in bits or a little more; many more exaggerate it. Log weights are added as whole numbers,
    so numpy and machine code find the same path.
    """
    if draws.size & (draws.size - 1):
        raise ValueError(f"a register has 2^b candidates, got {draws.size}")
    weighed, states, stage = weigh(draws, change), max(1, draws.size >> 1), max(1, _TALLIES // draws.size)
    value = np.full(states, _NEVER, np.int64)
    value[0] = 0  # the register begins with zeros
    kept = np.empty((draws.blocks, states + 7 >> 3), np.uint8)
    fast = jit.pays(draws.blocks * states // _STATES)
    for first in range(0, draws.blocks, stage):
        rows = tallies(draws, weighed, first, min(first + stage, draws.blocks))
        oldest = np.empty((len(rows), states), np.bool_)
        (_extend if fast else _extend_plainly)(rows, value, oldest)
        kept[first : first + len(rows)] = np.packbits(oldest, axis=1, bitorder="little")
    path = np.empty(draws.blocks, np.uint32)
    (_back if fast else _back_plainly)(kept, states, int(np.argmax(value)), path)
    return path


@compiled()
def _extend(rows: NDArray[np.int32], value: NDArray[np.int64], oldest: NDArray[np.bool_]) -> None:
    states = value.size
    before = np.empty_like(value)
    for t in range(rows.shape[0]):
        before[:] = value
        for s in range(states):  # the register without its oldest bit, which was 0 or 1
            zero = before[s >> 1] + rows[t, s]
            one = before[(s + states) >> 1] + rows[t, s + states]
            oldest[t, s] = one > zero
            value[s] = one if one > zero else zero


def _extend_plainly(rows: NDArray[np.int32], value: NDArray[np.int64], oldest: NDArray[np.bool_]) -> None:
    """Follow all states through the blocks of ``rows`` (blocks, 2^b): the best way to each, and its oldest bit."""
    states = value.size
    for row, old in zip(rows, oldest, strict=True):
        both = np.repeat(value, 2) + row
        np.greater(both[states:], both[:states], out=old)
        np.maximum(both[:states], both[states:], out=value)


@compiled()
def _back(kept: NDArray[np.uint8], states: int, state: int, path: NDArray[np.uint32]) -> None:
    for t in range(path.size - 1, -1, -1):
        register = state + states * ((kept[t, state >> 3] >> (state & 7)) & 1)
        path[t] = register & 1
        state = register >> 1


def _back_plainly(kept: NDArray[np.uint8], states: int, state: int, path: NDArray[np.uint32]) -> None:
    """From the last block's best state back to the first: the bits that led there."""
    for t in range(path.size - 1, -1, -1):
        register = state + states * int(kept[t, state >> 3] >> (state & 7) & 1)
        path[t] = register & 1
        state = register >> 1
