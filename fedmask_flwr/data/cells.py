"""The examples of a scenario's cells: dealt once, the same on every machine, no row in two cells."""

from __future__ import annotations

from functools import lru_cache
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from .dataset import DataError, Dataset, Split, keyed_rng
from .scenario import Scenario
from .sets import load

__all__ = ["CellSplit", "cell_data", "shape_of"]

CellSplit = Literal["train", "valid", "test"]
_SPLITS = ("train", "valid", "test")
_VALID_PART = 6
"""One row in this many of a cell's share of the training split validates."""


def cell_data(
    s: Scenario,
    client: int,
    task: int,
    split: CellSplit,
    data_dir: str = "",
    seed: int = 0,
    *,
    cumulative: bool = False,
) -> Dataset:
    """Give what one client has of one of its tasks; cached, so do not write to the arrays.

    Of each set and class, the rows are shuffled by a key and dealt evenly among the cells that have the class.
    "train" and "valid" are 5/6 and 1/6 of the cell's share of the set's training split, "test" its share of the
    test split.

    Parameters
    ----------
    s : Scenario
    client : int
        In ``[0, s.clients)``.
    task : int
        In ``[0, s.tasks)``.
    split : "train", "valid" or "test"
        ``s.limit`` caps the first.
    data_dir : str
        As in `load`.
    seed : int
        Names the deal.
    cumulative : bool
        Give all of the client's cells from its first task to this one (the upper bound of continual learning).

    Returns
    -------
    Dataset
        x as `shape_of` says: a flat set of fewer inputs than another has zeros after its own, and `valid` is how
        many are its own. Cells of different `valid`, accumulated, have None: their padding counts as inputs that
        are always 0, which a model learns at once and which then cost it almost nothing. y is numbered as in the
        set.
        `labels` are the classes of the cell, None where it has all.

    Raises
    ------
    DataError
        A set is missing or damaged, sets of different shapes do not fit one network, or a class has too few rows
        for the cells that name it.
    ValueError
        `client`, `task` or `split` is out of range.
    """
    if not 0 <= client < s.clients or not 0 <= task < s.tasks or split not in _SPLITS:
        raise ValueError(f"client {client} of {s.clients}, task {task} of {s.tasks}, split {split!r}")
    if cumulative and task:
        return _until(s, client, task, split, str(data_dir), int(seed))
    return _cell(s, client, task, split, str(data_dir), int(seed))


@lru_cache(maxsize=16)
def shape_of(s: Scenario, data_dir: str = "") -> tuple[tuple[int, ...], int]:
    """Give the shape of an example and the number of classes that every device builds its network for.

    Returns
    -------
    in_shape : tuple of int
        Of flat sets, the largest number of inputs.
    num_classes : int
        The most of any set.

    Raises
    ------
    DataError
        A set is missing or damaged, or images of different shapes do not fit one network.
    """
    sets = {name: load(name, "train", data_dir) for name in sorted({cell.data for row in s.cells for cell in row})}
    shapes = {d.in_shape for d in sets.values()}
    if len(shapes) > 1 and any(len(shape) > 1 for shape in shapes):
        each = ", ".join(f"{name} {d.in_shape}" for name, d in sets.items())
        raise DataError(f"scenario {s.name} mixes shapes that do not fit one network: {each}")
    return max(shapes), max(d.num_classes for d in sets.values())


# A cell is a copy: the cells of a whole scenario take as much memory as its sets.
@lru_cache(maxsize=128)
def _cell(s: Scenario, client: int, task: int, split: CellSplit, data_dir: str, seed: int) -> Dataset:
    in_shape, num_classes = shape_of(s, data_dir)
    cell = s.cells[client][task]
    whole = load(cell.data, "test" if split == "test" else "train", data_dir)
    rows = _rows(s, client, task, split, whole.y, seed)
    x, valid = whole.x[rows], whole.valid
    if x.shape[1:] != in_shape and x.ndim == 2:
        valid = x.shape[1] if valid is None else valid
        if valid > in_shape[0]:
            raise DataError(f"{s.where(client, task)}: its {split} split has more inputs than the training splits")
        x = np.pad(x, ((0, 0), (0, in_shape[0] - x.shape[1])))
    if x.shape[1:] != in_shape:
        raise DataError(f"{s.where(client, task)}: examples of shape {x.shape[1:]}, in training {in_shape}")
    y = whole.y[rows]
    if y.max() >= num_classes:
        raise DataError(f"{s.where(client, task)}: class {y.max()} is in the test split and not in training")
    if s.binary:
        x = (x > 0.5).astype(np.float32)
    return Dataset(x, y, num_classes, None, valid, cell.classes or None)


@lru_cache(maxsize=8)
def _until(s: Scenario, client: int, task: int, split: CellSplit, data_dir: str, seed: int) -> Dataset:
    parts = [_cell(s, client, t, split, data_dir, seed) for t in range(task + 1)]
    x, y = np.concatenate([d.x for d in parts]), np.concatenate([d.y for d in parts])
    valid = {d.valid for d in parts}
    labels = [d.labels for d in parts if d.labels is not None]
    return Dataset(
        x,
        y,
        parts[0].num_classes,
        None,
        valid.pop() if len(valid) == 1 else None,
        tuple(sorted({c for some in labels for c in some})) if len(labels) == len(parts) else None,
    )


def _rows(
    s: Scenario, client: int, task: int, split: CellSplit, y: NDArray[np.int64], seed: int
) -> NDArray[np.int64]:
    """Rows of the set's training or test split that are this cell's, ascending."""
    cell = s.cells[client][task]
    source: Split = "test" if split == "test" else "train"
    classes = cell.classes or tuple(np.unique(y).tolist())
    rows = np.concatenate([_dealt(s, client, task, c, np.flatnonzero(y == c), source, seed) for c in classes])
    if split == "test":
        return np.sort(rows)
    if len(rows) < 2:
        raise DataError(f"{s.where(client, task)} gets one training row; it needs two, one to validate")
    rows = rows[keyed_rng("cell", seed, cell.data, client, task).permutation(len(rows))]
    valid = max(1, len(rows) // _VALID_PART)
    if split == "valid":
        return np.sort(rows[:valid])
    return np.sort(rows[valid:][: s.limit or None])


def _dealt(
    s: Scenario, client: int, task: int, label: int, pool: NDArray[np.int64], source: Split, seed: int
) -> NDArray[np.int64]:
    """Share of a class's rows that this cell is dealt."""
    data = s.cells[client][task].data
    holders = [
        (c, t)
        for c, row in enumerate(s.cells)
        for t, cell in enumerate(row)
        if cell.data == data and (not cell.classes or label in cell.classes)
    ]
    if len(pool) < len(holders):
        raise DataError(
            f"{s.where(client, task)}: class {label} has {len(pool)} rows in the {source} split of {data} for "
            f"{len(holders)} cells; name another class, or name it in fewer cells"
        )
    order = keyed_rng("deal", seed, data, label, source).permutation(pool)
    return np.array_split(order, len(holders))[holders.index((client, task))]
