"""Figures of a continual run: losses at each task's end, what was forgotten, and who helped whom.

alpha of (client, task) for (owner client, owner task) is what the first gives the second's task-adaptive
parameters, mean over weight tensors.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = [
    "ACCURACIES",
    "LOSSES",
    "Attention",
    "Entry",
    "Line",
    "attention",
    "forgetting",
    "is_count",
    "latest",
    "number",
    "task_ends",
    "tasks_of",
]

LOSSES = (
    ("new", "client_loss_new"),
    ("base", "client_loss_base"),
    ("average", "client_loss"),
    ("mixture", "client_loss_mixture"),
    ("latest", "client_loss_latest"),
)
ACCURACIES = (
    ("new", "client_accuracy_new"),
    ("base", "client_accuracy_base"),
    ("average", "client_accuracy"),
)
Line = Mapping[str, Any]
Entry = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Attention:
    """Who helped whom: ``alpha`` (learners, owners), signed; NaN where a learner reported none.

    A learner or an owner is a (client, task), both from 0, in ascending order.
    """

    learners: tuple[Entry, ...]
    owners: tuple[Entry, ...]
    alpha: npt.NDArray[np.float64]


def attention(rows: Iterable[Sequence[Any]]) -> Attention:
    """Make a matrix of rows (client, task, owner client, owner task, alpha); of two for one place the later counts.

    Raises
    ------
    ValueError
        A row is none.
    """
    found: dict[tuple[Entry, Entry], float] = {}
    for row in rows:
        if not isinstance(row, list | tuple) or len(row) != 5 or not all(map(is_count, row[:4])):
            raise ValueError(f"{row!r} is no row (client, task, owner client, owner task, alpha)")
        if (alpha := number(row[4])) is None:
            raise ValueError(f"alpha of {row!r} is no finite number")
        found[(row[0], row[1]), (row[2], row[3])] = alpha
    learners = tuple(sorted({learner for learner, _ in found}))
    owners = tuple(sorted({owner for _, owner in found}))
    matrix = np.full((len(learners), len(owners)), np.nan)
    for (learner, owner), alpha in found.items():
        matrix[learners.index(learner), owners.index(owner)] = alpha
    return Attention(learners, owners, matrix)


def latest(lines: Iterable[Line]) -> list[Sequence[Any]]:
    """Rows of each (client, task)'s last report; an owner that it no longer names is gone.

    Raises
    ------
    ValueError
        A line's attention is no list of rows.
    """
    reports: dict[Entry, list[Sequence[Any]]] = {}
    for line in lines:
        rows = line.get("attention") or []
        if not isinstance(rows, list):
            raise ValueError(f"attention of round {line.get('round')} is no list")
        attention(rows)
        fresh: dict[Entry, list[Sequence[Any]]] = {}
        for row in rows:
            fresh.setdefault((row[0], row[1]), []).append(row)
        reports |= fresh
    return [row for rows in reports.values() for row in rows]


def forgetting(lines: Sequence[Line], tasks: int | None = None) -> dict[str, float]:
    """How much worse the earlier tasks are at the last evaluation than at their best before; what is known of it.

    "loss": mean over j < tasks - 1 of (last L_j - least earlier L_j), nats. "accuracy": of (greatest earlier a_j -
    last a_j). Below 0: they became better. ``tasks`` have been met; None: as many as the lines have figures of. A
    task that was never evaluated before is left out of the mean.
    """
    tasks = tasks_of(lines) if tasks is None else tasks
    found = {}
    for kind, sign in (("loss", 1), ("accuracy", -1)):
        names = [f"client_{kind}_task_{j}" for j in range(tasks - 1)]
        # The last line that evaluates any of them, so that one task's lack does not bring up an older figure.
        at = max((i for i, line in enumerate(lines) for n in names if number(line.get(n)) is not None), default=0)
        worse = []
        for name in names:
            before = [sign * v for line in lines[:at] if (v := number(line.get(name))) is not None]
            last = number(lines[at].get(name)) if lines else None
            if before and last is not None:
                worse.append(sign * last - min(before))
        if worse:
            found[kind] = sum(worse) / len(worse)
    return found


def task_ends(lines: Sequence[Line], tasks: int, rounds: int) -> list[tuple[int, int]]:
    """(task, index of a line): the last evaluation in each task's rounds; a task without one is left out.

    ``rounds`` is the whole run's; each task has an equal share of them.
    """
    ends: dict[int, int] = {}
    for i, line in enumerate(lines):
        if any(number(line.get(key)) is not None for _, key in (*LOSSES, *ACCURACIES)) or tasks_of([line]):
            ends[min(tasks - 1, (int(line["round"]) - 1) * tasks // rounds)] = i
    return sorted(ends.items())


def is_count(value: Any) -> bool:
    """Whether it is a whole number, 0 or more."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def number(value: Any) -> float | None:
    """Give it as a float; None where it is no finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def tasks_of(lines: Iterable[Line]) -> int:
    """1 + the greatest task that a line has a figure of; 0: none."""
    heads = ("client_loss_task_", "client_accuracy_task_")
    tails = [key.removeprefix(head) for line in lines for key in line for head in heads if key.startswith(head)]
    return 1 + max((int(tail) for tail in tails if tail.isascii() and tail.isdigit()), default=-1)
