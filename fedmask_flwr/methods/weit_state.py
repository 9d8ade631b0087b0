"""What the server of the FedWeIT family knows: settings, state, and the numbers of tasks and entries."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field

from fedmask_flwr.aggregate import KnowledgeBase
from fedmask_flwr.wire import Counts, WireError

from .base import MethodConfig
from .recollection import Floats, Ids

SKETCH = 512  # floats that stand for an A where entries are compared
FOUND = -1  # the task that a server names where devices find theirs themselves
LATEST = 2**20  # tasks are numbered below


class WeitConfig(MethodConfig):
    """Settings of the FedWeIT family; defaults are those of ``compat`` "fixed"."""

    tasks: int = Field(
        1, ge=0, lt=LATEST, description="tasks, each of as many rounds; 0: devices notice a new task by its losses"
    )
    lambda1: float = Field(1e-4, ge=0.0, description="weight of |A|")
    lambda2: float = Field(100.0, ge=0.0, description="weight of what earlier tasks lose; 0: they may")
    client_sparsity: float = Field(0.2, ge=0.0, lt=1.0, description="share of B's columns that a device keeps back")
    retroactive: Literal["exact", "gradient", "freeze"] = Field(
        "exact", description="how earlier A follow B: solved for each round, trained, or not at all"
    )
    retrieve: int = Field(-1, ge=-1, description="entries of knowledge for a task, the likest; -1: all, 0: none")
    probe_rounds: int = Field(2, ge=1, description="rounds of a task after which its A says what is alike")
    prune_below: float = Field(0.02, ge=0.0, description="values of A up to this stay on the device")
    kb_budget: float = Field(64.0, gt=0.0, description="MB of knowledge on the server")
    weighted: bool = Field(False, description="average B by numbers of examples")
    local_layers: int = Field(
        -1, ge=-1, description="last layers that are each task's own; -1: one, or none of a density model"
    )
    compat: Literal["fixed", "released"] = Field(
        "fixed", description='"released": three choices of the published code, see the card'
    )


@dataclass(frozen=True, slots=True, eq=False)
class WeitState:
    """What the server knows; n packed values, of clients that have answered.

    ``base`` (n,) is theta_G, or (0,) before the first round; ``sent`` (columns,) says which columns some client has
    sent. ``task`` is the one told (-1: devices find theirs), ``last`` 1 in its last round, ``clock`` the round.
    Rows of ``contacts`` are [client, task, probes], of ``holds`` and ``chosen`` [client, entry].
    """

    base: Floats
    sent: npt.NDArray[np.uint8]
    task: int
    last: int
    clock: int
    contacts: npt.NDArray[np.uint64]
    holds: npt.NDArray[np.uint64]
    chosen: npt.NDArray[np.uint64]
    knowledge: KnowledgeBase


def task_of(value: Any, name: str, floor: int) -> int:
    """Check a task number that came with a message."""
    if not isinstance(value, int) or not floor <= value < LATEST:
        raise WireError(f"{name} is {value!r}: expected a number from {floor} to {LATEST - 1}")
    return value


def counts_of(ids: Ids) -> Counts:
    """Make a field of ids."""
    return Counts(ids.astype(np.uint32), int(ids.max(initial=0)))


def entries_of(rows: npt.NDArray[np.uint64], client: int) -> Ids:
    """Second column of a client's rows."""
    mine: Ids = rows[rows[:, 0] == np.uint64(client), 1].astype(np.int64)
    return mine


def with_rows(rows: npt.NDArray[np.uint64], client: int, values: Any) -> npt.NDArray[np.uint64]:
    """Rows with those of a client replaced by ``values``, (k, width - 1)."""
    new = np.asarray(values, np.uint64).reshape(-1, rows.shape[1] - 1)
    mine = np.concatenate([np.full((len(new), 1), client, np.uint64), new], axis=1)
    return np.concatenate([rows[rows[:, 0] != np.uint64(client)], mine])
