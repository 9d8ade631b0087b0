"""One training split, shared among simulated clients."""

from __future__ import annotations

import numpy as np
import pytest

from fedmask_flwr.data import DataError, keyed_rng
from fedmask_flwr.partition import _imports, _partition, partition

LABELS = keyed_rng("labels").integers(0, 10, 600)


@pytest.mark.flower
@pytest.mark.parametrize("scheme", ["iid", "dirichlet", "classes"])
@pytest.mark.parametrize("k", [1, 10, 50])
def test_partition_covers_and_repeats(scheme, k):
    classes = 10 if k == 1 else 2
    got = partition(LABELS, k, scheme, classes_per_client=classes, seed=3)
    assert len(got) == k
    assert all(len(p) for p in got)
    assert sorted(np.concatenate(got).tolist()) == list(range(len(LABELS)))
    _partition.cache_clear()
    again = partition(LABELS, k, scheme, classes_per_client=classes, seed=3)
    assert all((a == b).all() for a, b in zip(got, again, strict=True))
    other = partition(LABELS, k, scheme, classes_per_client=classes, seed=4)
    assert any(a.tolist() != b.tolist() for a, b in zip(got, other, strict=True))


@pytest.mark.flower
def test_iid_is_shuffled_and_even():
    labels = np.sort(LABELS)
    got = partition(labels, 7, "iid", seed=0)
    assert {len(p) for p in got} <= {85, 86}
    assert all(len(np.unique(labels[p])) == 10 for p in got)


@pytest.mark.flower
def test_classes_holds_exactly_that_many():
    got = partition(LABELS, 20, "classes", classes_per_client=3, seed=0)
    assert {len(np.unique(LABELS[p])) for p in got} == {3}


@pytest.mark.flower
def test_dirichlet_alpha_sets_how_uneven():
    def classes_held(alpha):
        return np.mean([len(np.unique(LABELS[p])) for p in partition(LABELS, 10, "dirichlet", alpha=alpha, seed=0)])

    assert classes_held(0.05) < 4 < 9 < classes_held(100.0)


@pytest.mark.flower
def test_partition_refuses():
    with pytest.raises(DataError, match="601 partitions of 600 rows"):
        partition(LABELS, 601, "iid", seed=0)
    with pytest.raises(DataError, match="1 or more"):
        partition(LABELS, 0, "iid", seed=0)
    with pytest.raises(DataError, match="iid, dirichlet, classes, group"):
        partition(LABELS, 2, "idd", seed=0)
    with pytest.raises(DataError, match="alpha"):
        partition(LABELS, 2, "dirichlet", alpha=0.0, seed=0)
    with pytest.raises(DataError, match="classes-per-client"):
        partition(LABELS, 2, "classes", classes_per_client=11, seed=0)
    with pytest.raises(DataError, match="fewer classes each"):
        partition(LABELS, 590, "classes", classes_per_client=5, seed=0)
    with pytest.raises(DataError, match="raise alpha"):
        partition(LABELS, 600, "dirichlet", alpha=0.5, seed=0)


@pytest.mark.parametrize(("rows", "parts"), [(1400, 10), (1403, 10), (7, 7), (97, 3)])
def test_iid_is_flower_datasets_iid(rows, parts):
    datasets, partitioners = _imports()
    theirs = partitioners.IidPartitioner(num_partitions=parts)
    order = keyed_rng("partition", 5).permutation(rows)
    theirs.dataset = datasets.Dataset.from_dict({"row": order})
    ours = partition(np.zeros(rows, np.int64), parts, "iid", seed=5)
    for k in range(parts):
        assert ours[k].tolist() == list(theirs.load_partition(k)["row"])


def test_group_gives_each_client_one_owner():
    group = np.array([7, 3, 7, 90, 3, 3])
    labels = np.zeros(6, np.int64)
    got = partition(labels, 3, "group", group=group, seed=1)
    assert [p.tolist() for p in got] == [[1, 4, 5], [0, 2], [3]]
    assert not got[0].flags.writeable
    assert partition(labels, 3, "group", group=group, seed=1)[0] is got[0]  # once, not for every client
    first = partition(labels, 2, "group", group=group, seed=2)
    assert [p.tolist() for p in first] == [[1, 4, 5], [0, 2]]


def test_group_refuses():
    labels = np.zeros(6, np.int64)
    with pytest.raises(DataError, match="4 clients and 3 groups; use 3 clients or fewer"):
        partition(labels, 4, "group", group=np.array([7, 3, 7, 90, 3, 3]), seed=1)
    with pytest.raises(DataError, match=r"training split does not say: add an integer array 'group'"):
        partition(labels, 2, "group", seed=1)
