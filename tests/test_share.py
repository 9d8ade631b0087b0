"""A client is tested on data like its own."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedmask_flwr.data import DataError, Dataset, keyed_rng
from fedmask_flwr.partition import partition
from fedmask_flwr.share import _tests, partition_like, share


def dataset(y, group=None):
    return Dataset(np.zeros((len(y), 2), np.float32), np.asarray(y, np.int64), 10, group)


def labels(name, n, classes=10):
    return keyed_rng("share", name).integers(0, classes, n)


TRAIN, TEST = dataset(labels("train", 600)), dataset(labels("test", 200))


@st.composite
def federations(draw):
    """Training labels with an owner each, at least one row a client, and test labels."""
    clients = draw(st.integers(1, 6))
    owners = [*range(clients), *draw(st.lists(st.integers(0, clients - 1), max_size=40))]
    y = draw(st.lists(st.integers(0, 4), min_size=len(owners), max_size=len(owners)))
    test = draw(st.lists(st.integers(0, 5), max_size=60))
    parts = [np.flatnonzero(np.array(owners) == i) for i in range(clients)]
    return np.array(y), parts, np.array(test, np.int64), draw(st.integers(0, 2**63 - 1))


@given(federations())
def test_each_class_is_dealt_by_largest_remainder(case):
    y, parts, test, seed = case
    lost = [i for i, p in enumerate(parts) if not set(y[p]) & set(test)]
    if lost:
        with pytest.raises(DataError, match=f"client {lost[0]} trains on class"):
            partition_like(y, parts, test, seed)
        return
    got = partition_like(y, parts, test, seed)
    assert len(got) == len(parts)
    assert all((g == h).all() for g, h in zip(got, partition_like(y, parts, test, seed), strict=True))
    spare = set()
    for i, rows in enumerate(got):
        assert len(rows)
        assert len(set(rows)) == len(rows)
        assert rows.dtype == np.int64
        assert (np.diff(rows) > 0).all()
        assert not rows.flags.writeable
        assert set(test[rows]) <= set(y[parts[i]])
        if len(rows) == 1 and any(rows[0] in other for j, other in enumerate(got) if j != i):
            spare.add(i)
    for c in set(y):
        dealt = [0 if i in spare else int((test[g] == c).sum()) for i, g in enumerate(got)]
        weights = [int((y[p] == c).sum()) for p in parts]
        n, total = int((test == c).sum()), sum(weights)
        # One row held by several: all but one hold it as a spare, and which of them was dealt it cannot be seen.
        missing = n - sum(dealt)
        shared = {got[i][0] for i in spare if test[got[i][0]] == c}
        assert 0 <= missing <= len(shared)
        for i, (k, w) in enumerate(zip(dealt, weights, strict=True)):
            if i not in spare:
                assert n * w // total <= k <= -(-n * w // total)
        kept = [i for i in range(len(parts)) if i not in spare]
        up = [n * weights[i] % total for i in kept if dealt[i] > n * weights[i] // total]
        down = [n * weights[i] % total for i in kept if dealt[i] == n * weights[i] // total]
        assert not up or not down or min(up) >= max(down)


def test_shares_by_hand():
    # Class 0 is held 3:1 and has 4 test rows; class 1 only by client 1; nobody trains on class 2.
    y = np.array([0, 0, 0, 0, 1, 1])
    test = np.array([0, 1, 0, 2, 0, 1, 0])
    got = partition_like(y, [np.array([0, 1, 2]), np.array([3, 4, 5])], test, 0)
    assert [len(g) for g in got] == [3, 3]
    assert sorted(np.concatenate(got).tolist()) == [0, 1, 2, 4, 5, 6]
    assert {1, 5} < set(got[1].tolist())
    other = [partition_like(y, [np.array([0, 1, 2]), np.array([3, 4, 5])], test, s)[0].tolist() for s in range(9)]
    assert len({tuple(o) for o in other}) > 1


def test_ties_do_not_favour_the_first_clients():
    y = np.repeat(np.arange(20), 10)
    parts = [np.arange(i, 200, 10) for i in range(10)]
    got = partition_like(y, parts, np.repeat(np.arange(20), 3), 0)
    assert sum(map(len, got)) == 60
    assert min(map(len, got)) >= 2


def test_who_would_get_nothing_gets_one_row_of_its_main_class():
    y = np.array([0] * 9 + [0] + [1, 1, 1, 0])
    parts = [np.arange(9), np.array([9]), np.array([10, 11, 12, 13])]
    got = partition_like(y, parts, np.array([0, 0, 0]), 5)
    assert got[0].tolist() == [0, 1, 2]
    assert [len(g) for g in got[1:]] == [1, 1]


@pytest.mark.flower
@pytest.mark.parametrize("scheme", ["iid", "dirichlet", "classes"])
def test_share_gives_either_split(scheme):
    how = {"alpha": 0.3, "classes_per_client": 3, "seed": 3}
    parts = partition(TRAIN.y, 12, scheme, **how)
    tests = [share(TRAIN, TEST, "test", i, 12, scheme, **how) for i in range(12)]
    for i in range(12):
        mine = share(TRAIN, None, "train", i, 12, scheme, **how)
        np.testing.assert_array_equal(mine, parts[i])
        assert set(TEST.y[tests[i]]) <= set(TRAIN.y[mine])
    assert sorted(np.concatenate(tests).tolist()) == list(range(len(TEST)))
    _tests.cache_clear()
    again = share(TRAIN, TEST, "test", 4, 12, scheme, **how)
    np.testing.assert_array_equal(again, tests[4])
    assert share(TRAIN, TEST, "test", 4, 12, scheme, **how) is again
    other = share(TRAIN, TEST, "test", 4, 12, scheme, **(how | {"seed": 4}))
    assert other.tolist() != again.tolist()


def test_share_by_group():
    train = dataset([0, 1, 2, 0], np.array([8, 2, 8, 5]))
    test = dataset([1, 1, 0, 2], np.array([9, 8, 2, 8]))
    assert share(train, None, "train", 2, 3, "group", seed=0).tolist() == [0, 2]
    assert share(train, test, "test", 0, 3, "group", seed=0).tolist() == [2]
    assert share(train, test, "test", 2, 3, "group", seed=0).tolist() == [1, 3]
    with pytest.raises(DataError, match="group 5 has training rows but no test rows"):
        share(train, test, "test", 1, 3, "group", seed=0)
    with pytest.raises(DataError, match="test split does not say"):
        share(train, dataset([1, 1]), "test", 1, 3, "group", seed=0)
    with pytest.raises(DataError, match="training split does not say"):
        share(dataset([1, 1]), test, "train", 0, 2, "group", seed=0)


def test_share_refuses():
    with pytest.raises(DataError, match="client 3 of 3: number the clients from 0 to 2"):
        share(TRAIN, TEST, "train", 3, 3, "iid", seed=0)
    with pytest.raises(DataError, match="test split was not given"):
        share(TRAIN, None, "test", 0, 3, "iid", seed=0)
    with pytest.raises(DataError, match="client 0 trains on class 0, 1, of which the test split has no row"):
        share(dataset([0, 1]), dataset([2]), "test", 0, 1, "iid", seed=0)
