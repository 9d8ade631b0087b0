"""One client's rows of either split: it is tested on data like the data that it trains on."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from fedmask_flwr.data import DataError, Dataset, Split, keyed_rng
from fedmask_flwr.partition import Scheme, frozen, need_group, partition

__all__ = ["partition_like", "share"]


def share(
    train: Dataset,
    test: Dataset | None,
    split: Split,
    index: int,
    parts: int,
    scheme: Scheme,
    *,
    alpha: float = 0.5,
    classes_per_client: int = 2,
    seed: int,
) -> NDArray[np.int64]:
    """Give one client's rows of either split; cached, and equal for equal arguments.

    Parameters
    ----------
    train : Dataset
    test : Dataset or None
        Only read for ``split="test"``.
    split : "train" or "test"
        ``train``: the client's part of `partition`. ``test``: of `partition_like`; for the scheme ``group``, all
        test rows of the same group.
    index : int
        The client, in ``[0, parts)``.
    parts : int
    scheme, alpha, classes_per_client, seed
        As in `partition`.

    Returns
    -------
    int64 array, read-only, never empty

    Raises
    ------
    DataError
        The split is impossible, or the test split has nothing for this client; the message names the fix.
    """
    if not 0 <= index < parts:
        raise DataError(f"client {index} of {parts}: number the clients from 0 to {parts - 1}")
    own = partition(
        train.y,
        parts,
        scheme,
        alpha=alpha,
        classes_per_client=classes_per_client,
        group=train.group,
        seed=seed,
    )
    if split == "train":
        return own[index]
    if test is None:
        raise DataError("the test split was not given: load it too")
    if scheme == "group":
        return _same_group(train, test, own[index])
    raw = (train.y.tobytes(), test.y.tobytes())
    return _tests(*raw, parts, scheme, float(alpha), classes_per_client, seed=int(seed))[index]


def partition_like(
    train_labels: NDArray[np.int64],
    train_parts: Sequence[NDArray[np.int64]],
    test_labels: NDArray[np.int64],
    seed: int,
) -> list[NDArray[np.int64]]:
    """Share a test split so that each client is tested on the classes it trains on, as often as it meets them.

    Each class's shuffled test rows are dealt in proportion to the clients' training rows of that class, by largest
    remainder. A class that nobody trains on is dropped. A client that would get nothing gets one row of its most
    frequent class that the test split has, and shares it with whoever was dealt it; other rows go to one client.

    Parameters
    ----------
    train_labels : int64 array, shape (n,)
    train_parts : sequence of int64 arrays
        Training rows of each client, from `partition`.
    test_labels : int64 array, shape (m,)
    seed : int
        Names the shuffles.

    Returns
    -------
    list of int64 arrays
        Rows of the test split, one array a client, ascending, never empty, read-only.

    Raises
    ------
    DataError
        The test split has no row of any class that some client trains on.
    """
    classes = np.unique(train_labels)
    # counts[i, c]: training rows of classes[c] that client i holds.
    counts = np.stack(
        [np.bincount(np.searchsorted(classes, train_labels[p]), minlength=len(classes)) for p in train_parts]
    )
    pools = [np.flatnonzero(test_labels == c) for c in classes]
    dealt: list[list[NDArray[np.int64]]] = [[] for _ in train_parts]
    for c, pool in enumerate(pools):
        if not counts[:, c].any():
            continue
        rng = keyed_rng("like", seed, int(classes[c]))
        shares = _largest_remainder(len(pool), counts[:, c], rng)
        for i, rows in enumerate(np.split(rng.permutation(pool), np.cumsum(shares)[:-1])):
            dealt[i].append(rows)
    parts = []
    for i, some in enumerate(dealt):
        rows = np.sort(np.concatenate([*some, np.empty(0, np.int64)])).astype(np.int64)
        parts.append(frozen(rows if len(rows) else _spare(i, counts[i], classes, pools, seed)))
    return parts


def _same_group(train: Dataset, test: Dataset, own: NDArray[np.int64]) -> NDArray[np.int64]:
    whose = need_group(train.group, "training")[own[0]]
    rows = np.flatnonzero(need_group(test.group, "test") == whose)
    if not len(rows):
        raise DataError(f"group {whose} has training rows but no test rows; add some, or leave this group out")
    return frozen(rows)


@lru_cache(maxsize=8)
def _tests(
    train_raw: bytes, test_raw: bytes, parts: int, scheme: Scheme, alpha: float, classes: int, *, seed: int
) -> tuple[NDArray[np.int64], ...]:
    train = np.frombuffer(train_raw, np.int64)
    own = partition(train, parts, scheme, alpha=alpha, classes_per_client=classes, seed=seed)
    return tuple(partition_like(train, own, np.frombuffer(test_raw, np.int64), seed))


def _largest_remainder(n: int, weights: NDArray[np.int64], rng: np.random.Generator) -> NDArray[np.int64]:
    """Share n rows by weight, in whole rows; `rng` breaks ties, or the first clients would win in every class."""
    whole, rest = np.divmod(n * weights, weights.sum())
    order = rng.permutation(len(weights))
    order = order[np.argsort(-rest[order], kind="stable")]
    whole[order[: n - whole.sum()]] += 1
    return whole


def _spare(
    client: int, counts: NDArray[np.int64], classes: NDArray[np.int64], pools: list[NDArray[np.int64]], seed: int
) -> NDArray[np.int64]:
    held = [c for c in np.argsort(-counts, kind="stable") if counts[c]]
    pool = next((pools[c] for c in held if len(pools[c])), None)
    if pool is None:
        names = ", ".join(str(classes[c]) for c in sorted(held))
        raise DataError(
            f"client {client} trains on class {names}, of which the test split has no row; add test data"
        )
    return keyed_rng("like", seed, "spare", client).choice(pool, 1)
