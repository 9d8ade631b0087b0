"""Data sets as arrays, and a small deterministic loader.

A data set is named in the run config: ``digits``, ``mnist``, ``fashion-mnist``, ``cifar10``, ``npz`` (a
device's own folder) or ``package.module:function`` (your own). Anything heavier than numpy is imported only
by the loader that needs it.
"""

from __future__ import annotations

from .dataset import DataError as DataError
from .dataset import Dataset as Dataset
from .dataset import Split as Split
from .dataset import epoch_batches as epoch_batches
from .dataset import keyed_rng as keyed_rng
from .sets import NAMES as NAMES
from .sets import load as load

__all__ = ["NAMES", "DataError", "Dataset", "Split", "epoch_batches", "keyed_rng", "load"]
