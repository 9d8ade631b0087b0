"""Continual federations as tables: which client meets which data as which of its tasks."""

from __future__ import annotations

import re
import tomllib
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from fedmask_flwr.config import ConfigError

from .sets import known, unknown

__all__ = ["SCENARIOS", "Cell", "Scenario", "scenario"]

_MAX_BYTES = 1 << 20
_CELL = re.compile(r"([^\[\]]+)(?:\[([^\[\]]*)\])?")


@dataclass(frozen=True, slots=True)
class Cell:
    """What one client learns as one task, written ``mnist[0,1]`` or ``debd/adult``.

    Attributes
    ----------
    data : str
        A name that `load` knows.
    classes : tuple of int
        Ascending; empty: all that the set has.
    """

    data: str
    classes: tuple[int, ...] = ()

    def __str__(self) -> str:
        return f"{self.data}[{','.join(map(str, self.classes))}]" if self.classes else self.data


@dataclass(frozen=True, slots=True)
class Scenario:
    """A continual federation.

    Attributes
    ----------
    name : str
    cells : tuple of tuples of Cell
        One row a client, one column a task.
    limit : int
        Most training examples of a cell; 0: no limit.
    lag : int
        Rounds by which each client moves on to its next task later than the client before it.
    binary : bool
        Inputs are thresholded at 0.5 (of pixels: above 127 of 255), as density models need.
    """

    name: str
    cells: tuple[tuple[Cell, ...], ...]
    limit: int = 0
    lag: int = 0
    binary: bool = False

    @property
    def clients(self) -> int:
        """Number of clients, C."""
        return len(self.cells)

    @property
    def tasks(self) -> int:
        """Number of tasks that each client meets, T."""
        return len(self.cells[0])

    def where(self, client: int, task: int) -> str:
        """Name a cell in errors, as its table's reader finds it: rows and columns from 1."""
        return f"scenario {self.name}, row {client + 1}, column {task + 1} ({self.cells[client][task]})"

    def task_at(self, client: int, round_: int, rounds: int) -> int:
        """Give the task that a client learns in a round.

        With R = rounds / T, client c is at task floor((round - 1 - lag*c) / R), kept within 0 and T - 1: whoever
        lags stays longer with its first task and has less time, or none, for its last.

        Parameters
        ----------
        client : int
            In ``[0, clients)``.
        round_ : int
            From 1.
        rounds : int
            Of the whole run, a multiple of `tasks`.

        Raises
        ------
        ConfigError
            `rounds` is no multiple of `tasks`.
        ValueError
            `client` or `round_` is out of range.
        """
        if rounds < 1 or rounds % self.tasks:
            raise ConfigError(
                f"num-server-rounds is {rounds}; scenario {self.name} has {self.tasks} tasks, use a multiple of it"
            )
        if not 0 <= client < self.clients or round_ < 1:
            raise ValueError(f"client {client} of {self.clients}, round {round_}")
        return max(0, min(self.tasks - 1, (round_ - 1 - self.lag * client) // (rounds // self.tasks)))


@lru_cache(maxsize=16)
def scenario(name_or_path: str) -> Scenario:
    """Give a built-in scenario (one of `SCENARIOS`), or read a table from a ``.toml`` file.

    Such a file holds ``clients``, a list with one row a client and one column a task, and may say ``binary``,
    ``limit`` and ``lag``, as in `Scenario`. It is read once a process.

    Raises
    ------
    ConfigError
        The name is unknown, or the file is missing or wrong; the message names the row and the column.
    """
    if name_or_path in _BUILTIN:
        pattern, rows, rest = _BUILTIN[name_or_path]
        by_task = [[pattern.format(word) for word in row.split()] for row in rows]
        return _checked(name_or_path, {"clients": [list(column) for column in zip(*by_task, strict=True)], **rest})
    path = Path(name_or_path)
    if path.suffix != ".toml":
        raise ConfigError(
            f"unknown scenario {name_or_path!r}; use one of {', '.join(SCENARIOS)}, or the path of a .toml table"
        )
    try:
        with path.open("rb") as f:
            raw = f.read(_MAX_BYTES + 1)
        table = tomllib.loads(raw.decode()) if len(raw) <= _MAX_BYTES else None
    except FileNotFoundError:
        raise ConfigError(f"scenario {path} does not exist on this machine") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"scenario {path} is not TOML: {error}") from error
    if table is None:
        raise ConfigError(f"scenario {path} is larger than {_MAX_BYTES} bytes, which is no table of cells")
    return _checked(path.stem, table)


def _checked(name: str, table: dict[str, Any]) -> Scenario:
    where = f"scenario {name}"
    defaults: dict[str, Any] = {"binary": False, "limit": 0, "lag": 0}
    wrong = sorted(set(table) - {*defaults, "clients"})
    if wrong:
        raise ConfigError(f"{where}: unknown key {', '.join(wrong)}; the keys are binary, clients, lag, limit")
    for key, default in defaults.items():
        value = table.get(key, default)
        # bool is an int: only the exact type will do.
        if type(value) is not type(default) or (key != "binary" and not 0 <= value < 1 << 31):
            want = "true or false" if key == "binary" else "a whole number, 0 or above"
            raise ConfigError(f"{where}: {key} is {value!r}; use {want}")
        defaults[key] = value
    rows = table.get("clients")
    if not isinstance(rows, list) or not rows or not all(isinstance(row, list) and row for row in rows):
        raise ConfigError(f'{where}: clients must be rows of cells, such as [["mnist[0,1]", "mnist[2,3]"]]')
    for c, row in enumerate(rows, 1):
        if len(row) != len(rows[0]):
            raise ConfigError(f"{where}, row {c} has {len(row)} columns, and row 1 has {len(rows[0])}")
    cells = tuple(
        tuple(_cell(text, f"{where}, row {c}, column {t}") for t, text in enumerate(row, 1))
        for c, row in enumerate(rows, 1)
    )
    return Scenario(name, cells, **defaults)


def _cell(text: object, where: str) -> Cell:
    match = _CELL.fullmatch(text) if isinstance(text, str) else None
    if match is None:
        raise ConfigError(f'{where}: {text!r} is no cell; write "mnist[0,1]", or "mnist" for all classes')
    data, inner = match[1].strip(), match[2]
    if not known(data):
        raise ConfigError(f"{where}: {unknown(data)}")
    if inner is None:
        return Cell(data)
    words = [word.strip() for word in inner.split(",")]
    if not all(re.fullmatch("[0-9]{1,9}", word) for word in words):
        raise ConfigError(f"{where}: classes {inner!r}; write their numbers between commas, at least one")
    classes = tuple(sorted({int(word) for word in words}))
    if len(classes) != len(words):
        raise ConfigError(f"{where}: a class is there twice in {inner!r}")
    return Cell(data, classes)


def _rotated(*groups: str) -> tuple[str, ...]:
    """Rows of a Latin square: in each task every client has another group, and meets all of them in the end."""
    return tuple(" ".join(groups[t:] + groups[:t]) for t in range(len(groups)))


_PAIRS = _rotated("0,1", "2,3", "4,5", "6,7", "8,9")
_BINARY_SETS = (
    "tretail rcv1 connect4 adult",
    "adult connect4 rcv1 tretail",
    "connect4 tretail adult rcv1",
    "rcv1 adult tretail connect4",
)
_DENSITY: dict[str, Any] = {"binary": True}
# How a cell is written, one row a task with one word a client, and the table's other keys. The first three are
# CONFEDMADE's (CoLLAs 2024, PMLR 274:70-85), as the generator of its released code has them.
_BUILTIN: dict[str, tuple[str, tuple[str, ...], dict[str, Any]]] = {
    "mnist-3x5": ("mnist[{}]", ("0 1 2", "3 4 5", "6 7 8", "9 0 1", "2 3 4"), _DENSITY),
    "mnist-overlap": ("mnist[{}]", ("1 6 5 3", "3 5 6 1"), _DENSITY),
    "debd-latin": ("debd/{}", _BINARY_SETS, {**_DENSITY, "limit": 2000}),
    "mnist-split": ("mnist[{}]", _PAIRS, {}),
    "cifar10-split": ("cifar10[{}]", _PAIRS, {}),
    "digits-split": ("digits[{}]", _rotated("0,1,2", "3,4,5", "6,7,8"), {}),
}
SCENARIOS = tuple(_BUILTIN)
