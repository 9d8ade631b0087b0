"""Data sets as arrays, and a small deterministic loader.

A data set is named in the run config: ``digits``, ``mnist``, ``fashion-mnist``, ``cifar10``, ``npz`` (a
device's own folder), ``debd/NAME`` (binary sets) or ``package.module:function`` (your own). Anything heavier
than numpy is imported only by the loader that needs it. A `Scenario` says which client meets which data as which
of its tasks.
"""

from __future__ import annotations

from .binary import binary_splits as binary_splits
from .cells import CellSplit as CellSplit
from .cells import cell_data as cell_data
from .cells import shape_of as shape_of
from .dataset import DataError as DataError
from .dataset import Dataset as Dataset
from .dataset import Split as Split
from .dataset import epoch_batches as epoch_batches
from .dataset import keyed_rng as keyed_rng
from .scenario import SCENARIOS as SCENARIOS
from .scenario import Cell as Cell
from .scenario import Scenario as Scenario
from .scenario import scenario as scenario
from .sets import NAMES as NAMES
from .sets import form as form
from .sets import load as load

__all__ = [
    "NAMES",
    "SCENARIOS",
    "Cell",
    "CellSplit",
    "DataError",
    "Dataset",
    "Scenario",
    "Split",
    "binary_splits",
    "cell_data",
    "epoch_batches",
    "form",
    "keyed_rng",
    "load",
    "scenario",
    "shape_of",
]
