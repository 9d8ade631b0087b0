"""A table's entries by their numbers."""

from __future__ import annotations

from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from fedmask_flwr import jit
from fedmask_flwr.jit import compiled

T = TypeVar("T", bound=np.generic)


@compiled()
def _taken(table: NDArray[Any], numbers: NDArray[np.uint32], out: NDArray[Any]) -> None:
    last = np.uint32(table.size - 1)
    for i in range(numbers.size):
        out[i] = table[min(numbers[i], last)]


def taken(table: NDArray[T], numbers: NDArray[np.uint32]) -> NDArray[T]:
    """``table[numbers]``, the last entry for a number beyond it: (n,) of a table that has entries.

    numpy makes 64-bit numbers of them first: three times the time.
    """
    if table.size == 1 or not jit.pays(numbers.size):
        return table.take(numbers, mode="clip")
    out = np.empty(numbers.size, table.dtype)
    _taken(table, numbers, out)
    return out
