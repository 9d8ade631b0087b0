"""Split one data set among simulated clients, with Flower Datasets' partitioners, offline."""

from __future__ import annotations

import os
import warnings
from functools import lru_cache
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from fedmask_flwr.data import DataError, keyed_rng

__all__ = ["SCHEMES", "Scheme", "frozen", "need_group", "partition"]

Scheme = Literal["iid", "dirichlet", "classes", "group"]
SCHEMES: tuple[Scheme, ...] = ("iid", "dirichlet", "classes", "group")

# Each of these is ten draws inside DirichletPartitioner.
_DIRICHLET_SEEDS = 5


def partition(
    labels: NDArray[np.int64],
    num_partitions: int,
    scheme: Scheme,
    *,
    alpha: float = 0.5,
    classes_per_client: int = 2,
    group: NDArray[np.int64] | None = None,
    seed: int,
) -> list[NDArray[np.int64]]:
    """Split rows among clients; the result depends on the arguments alone and is cached.

    Parameters
    ----------
    labels : int64 array, shape (n,)
    num_partitions : int
    scheme : "iid" | "dirichlet" | "classes" | "group"
        ``iid`` deals shuffled rows out evenly. ``dirichlet`` draws each class's shares from
        Dirichlet(`alpha`); no client is empty. ``classes`` gives each client exactly `classes_per_client`
        classes, and drops the rows of a class that no client was given (few clients, few classes each).
        ``group`` gives each client all rows of one group, groups in ascending order; groups beyond the first
        `num_partitions` are not used.
    alpha : float
        Concentration; small is uneven.
    classes_per_client : int
    group : int64 array, shape (n,), or None
        Whose row it is; what ``group`` needs and the others do not look at.
    seed : int

    Returns
    -------
    list of int64 arrays
        One array of row numbers a client: disjoint, never empty, read-only.

    Raises
    ------
    DataError
        The split is impossible; the message says which argument to change.
    """
    labels = np.ascontiguousarray(labels, np.int64)
    if num_partitions < 1:
        raise DataError(f"{num_partitions} partitions asked for; use 1 or more")
    if num_partitions > len(labels):
        raise DataError(f"{num_partitions} partitions of {len(labels)} rows; use fewer clients or more data")
    if scheme not in SCHEMES:
        raise DataError(f"unknown partition scheme {scheme!r}; use one of {', '.join(SCHEMES)}")
    if scheme == "group":
        return _by_group(group, num_partitions)
    if scheme == "dirichlet" and not (np.isfinite(alpha) and alpha > 0):
        raise DataError(f"alpha is {alpha}; use a number above 0")
    if scheme == "classes" and not 1 <= classes_per_client <= (most := len(np.unique(labels))):
        raise DataError(f"classes-per-client is {classes_per_client}; use 1 to {most}, the classes of this data")
    # Arguments that a scheme does not use must not split the cache.
    a = float(alpha) if scheme == "dirichlet" else 0.0
    c = int(classes_per_client) if scheme == "classes" else 0
    return list(_partition(labels.tobytes(), int(num_partitions), scheme, a, c, seed=int(seed)))


@lru_cache(maxsize=8)
def _partition(
    raw: bytes, num_partitions: int, scheme: Scheme, alpha: float, classes: int, *, seed: int
) -> tuple[NDArray[np.int64], ...]:
    labels = np.frombuffer(raw, np.int64)
    # IidPartitioner cuts contiguous shards and the other two deal a class's rows in file order.
    order = keyed_rng("partition", seed).permutation(len(labels)).astype(np.int64)
    tries = _DIRICHLET_SEEDS if scheme == "dirichlet" else 1
    reason: Exception | None = None
    for k in range(tries):
        try:
            parts = _flower(labels[order], num_partitions, scheme, alpha, classes, seed=_sub_seed(seed, k))
        except ValueError as error:
            reason = error
            continue
        if all(len(p) for p in parts):
            return tuple(frozen(order[p]) for p in parts)
    fix = "raise alpha or use fewer clients" if scheme == "dirichlet" else "use fewer clients or fewer classes each"
    raise DataError(
        f"cannot split {len(labels)} rows by {scheme!r} among {num_partitions} clients, none empty; {fix}"
    ) from reason


def _by_group(group: NDArray[np.int64] | None, num_partitions: int) -> list[NDArray[np.int64]]:
    rows = _groups(np.ascontiguousarray(need_group(group, "training"), np.int64).tobytes())
    if num_partitions > len(rows):
        raise DataError(f"{num_partitions} clients and {len(rows)} groups; use {len(rows)} clients or fewer")
    return list(rows[:num_partitions])


@lru_cache(maxsize=2)
def _groups(raw: bytes) -> tuple[NDArray[np.int64], ...]:
    """Rows of each group, the groups in ascending order."""
    group = np.frombuffer(raw, np.int64)
    order = np.argsort(group, kind="stable")
    starts = np.unique(group[order], return_index=True)[1]
    return tuple(frozen(rows) for rows in np.split(order, starts[1:]))


def need_group(group: NDArray[np.int64] | None, split: str) -> NDArray[np.int64]:
    """Give the groups of a split, or raise `DataError` where there are none."""
    if group is None:
        raise DataError(
            f"partition 'group' needs to know whose each row is, and the {split} split does not say: add an "
            "integer array 'group' of shape (n,) to the .npz file, or return a Dataset with group"
        )
    return group


def frozen(rows: NDArray[np.int64]) -> NDArray[np.int64]:
    """Make cached rows read-only."""
    rows.flags.writeable = False
    return rows


def _sub_seed(seed: int, k: int) -> int:
    return int(keyed_rng("partitioner", seed, k).integers(1 << 32))


def _flower(
    labels: NDArray[np.int64], num_partitions: int, scheme: Scheme, alpha: float, classes: int, *, seed: int
) -> list[NDArray[np.int64]]:
    if scheme == "iid":
        # What IidPartitioner gives (a test compares them), without ten seconds of imports in every client.
        return np.array_split(np.arange(len(labels)), num_partitions)
    datasets, partitioners = _imports()
    with warnings.catch_warnings():
        # Redraws and unused classes are warned about; both are checked by the caller.
        warnings.simplefilter("ignore")
        if scheme == "dirichlet":
            p = partitioners.DirichletPartitioner(
                num_partitions, "label", alpha, min_partition_size=1, self_balancing=True, seed=seed
            )
        else:
            # The mode of Li et al. (arXiv:2102.02079): with enough clients every class has an owner.
            p = partitioners.PathologicalPartitioner(
                num_partitions, "label", classes, class_assignment_mode="first-deterministic", seed=seed
            )
        p.dataset = datasets.Dataset.from_dict({"label": labels, "row": np.arange(len(labels))})
        parts = [p.load_partition(i).with_format("numpy") for i in range(num_partitions)]
        return [np.asarray(part["row"][:], np.int64) if len(part) else np.empty(0, np.int64) for part in parts]


def _imports() -> tuple[Any, Any]:
    # Read when huggingface_hub is imported: an in-memory table needs no hub.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import datasets
            from flwr_datasets import partitioner
    except ImportError as error:
        raise DataError("splitting one data set among clients needs: pip install 'fedmask-flwr[sim]'") from error
    datasets.disable_progress_bars()
    return datasets, partitioner
