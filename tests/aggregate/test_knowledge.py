"""The knowledge base against a dict of dense vectors, what it never does, and what hostile replies meet."""

from __future__ import annotations

import dataclasses

import numpy as np
import oracles_knowledge as oracles
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fedmask_flwr.aggregate import KnowledgeBase, densify, sketch, sparsify
from fedmask_flwr.checkpoint import load_state, save_state

N, KINDS, SIZE = 43, 2, 16
LAST = 2**64 - 1  # the largest client number
FLOATS = hnp.arrays(np.float32, st.integers(1, 60), elements=st.floats(-100, 100, width=32))


def vector(theme, *noise, n=N):
    """About half of n positions; vectors of one theme are alike, and only the same noise makes the same."""
    rng = np.random.default_rng([theme, *noise])
    base = np.random.default_rng(theme)
    kept = base.random(n) < 0.5
    return (kept * (base.normal(size=n) + 0.15 * rng.normal(size=n))).astype(np.float32)


def filled(*vectors):
    """Client i gives vector i as its task 0, at clock i."""
    kb = KnowledgeBase.empty(vectors[0].size, KINDS, SIZE)
    for i, v in enumerate(vectors):
        kb = kb.add(i, 0, *sparsify(v), i)
    return kb


def dense(kb, id_):
    return densify(*kb.entry(id_), kb.numel)


def copies(kb):
    return {f.name: np.array(getattr(kb, f.name)) for f in dataclasses.fields(kb)}


def assert_same(a, b):
    for name, value in copies(a).items():
        other = np.array(getattr(b, name))
        assert value.dtype == other.dtype, name
        np.testing.assert_array_equal(value, other, name)


# Against the oracle

clients, tasks = st.sampled_from([0, 1, 2, 3, LAST]), st.integers(0, 2)
ops = st.one_of(
    st.tuples(st.just("add"), clients, tasks, st.integers(0, 3), st.integers(0, 50)),
    st.tuples(st.just("add"), clients, tasks, st.integers(0, 3), st.integers(0, 50)),
    st.tuples(st.just("attend"), clients, tasks, st.integers(0, 2**20), st.integers(0, 2**20)),
    st.tuples(st.just("fit"), st.floats(0, 1.1), st.sampled_from([0.5, 0.9])),
)


def step(kb, slow, op, clock):
    if op[0] == "add":
        v = vector(op[3], *op[1:3], op[4])
        slow.add(*op[1:3], v, clock)
        return kb.add(*op[1:3], *sparsify(v), clock)
    if op[0] == "attend":
        rng = np.random.default_rng(op[4])
        ids = np.flatnonzero(np.unpackbits(np.array([op[3]], "<u4").view(np.uint8)))[: kb.next_id + 2]
        alpha = rng.choice([0, 0.001, -0.01, 0.05, -0.5], (ids.size, KINDS)).astype(np.float32)
        slow.attend(*op[1:3], ids.tolist(), alpha.tolist(), clock)
        return kb.attend(*op[1:3], ids, alpha, clock)
    budget, rules = int(op[1] * kb.nbytes), {"window": 6, "negligible": 0.02, "similar": op[2]}
    slow.fit(budget, clock, **rules)
    out = kb.fit(budget, clock, **rules)
    assert out.nbytes <= max(budget, out.fixed)
    return out


@given(st.lists(ops, max_size=20))
def test_it_is_a_dict_of_dense_vectors(sequence):
    kb, slow = KnowledgeBase.empty(N, KINDS, SIZE), oracles.Slow(N, KINDS, SIZE)
    for clock, op in enumerate(sequence):
        before, was = kb, copies(kb)
        kb = step(kb, slow, op, clock)
        for name, value in was.items():
            np.testing.assert_array_equal(value, getattr(before, name), "the old value changed")
        new = set(kb.ids.tolist()) - set(before.ids.tolist())
        assert kb.next_id >= before.next_id
        assert all(before.next_id <= i < kb.next_id for i in new), "an id came again"
        assert kb.ids.tolist() == sorted(slow.entries)
        assert kb.nbytes == slow.nbytes()
        for at, (i, (v, added, owners)) in enumerate(sorted(slow.entries.items())):
            np.testing.assert_array_equal(dense(kb, i), v)
            np.testing.assert_array_equal(kb.sketches[at], oracles.sketch(v, SIZE, 0))
            assert kb.added[at] == added
            assert kb.owners[kb.owners[:, 0] == i, 1:].tolist() == [list(o) for o in sorted(owners)]
        for client in (0, 1, 2, 3, LAST):
            own = sketch(vector(9, clock), SIZE, 0)
            assert kb.candidates(client).tolist() == slow.candidates(client)
            assert kb.nearest(client, own, 3).tolist() == slow.nearest(client, own.astype(float), 3)
            assert list(kb.tasks(client)) == sorted(t for c, t in slow.received if c == client)
        assert [(*r[:4], r.entry, r.clock) for r in kb.attention()] == [
            (c, t, oc, ot, i, at) for c, t, i, oc, ot, at, _ in slow.reports
        ]
        np.testing.assert_allclose([r.alpha for r in kb.attention()], [np.mean(r[6]) for r in slow.reports], 1e-6)


# Entries


def test_the_same_entry_again_changes_nothing_and_another_gets_a_new_id():
    kb = filled(vector(0, 0), vector(1, 0))
    assert kb.add(0, 0, *sparsify(vector(0, 0)), 9) is kb
    other = kb.add(0, 0, *sparsify(vector(0, 1)), 9)
    assert other.ids.tolist() == [1, 2]
    assert other.tasks(0) == kb.tasks(0) == (0,)
    assert other.received.tolist() == kb.received.tolist()
    with pytest.raises(KeyError, match="no entry 0: it was evicted, replaced or merged"):
        other.entry(0)


def test_many_at_once_are_one_by_one():
    items = [(c, t, *sparsify(vector(c % 2, c, t))) for c in range(3) for t in range(2)]
    items += [items[0], (1, 0, *sparsify(vector(1, 99)))]
    kb = filled(vector(5, 5))
    one = kb
    for item in items:
        one = one.add(*item, 7)
    assert_same(kb.extend(iter(items), 7), one)
    assert one.ids.tolist() == [1, 2, 4, 5, 6, 7]
    assert one.extend([], 8) is one.extend(items[1:2], 8) is one
    with pytest.raises(ValueError, match="client -1"):
        kb.extend([*items, (-1, 0, *items[0][2:])], 7)


def test_arrays_cannot_be_written():
    kb = filled(vector(0, 0))
    where, values = kb.entry(0)
    for array in (where, values, kb.ids, kb.owners, kb.values):
        with pytest.raises(ValueError, match="read-only"):
            array[...] = 0
    mine = vector(0, 3)
    bits, kept = sparsify(mine)
    more = kb.add(5, 0, bits, kept, 1)
    bits[:], kept[:] = 0, 7
    np.testing.assert_array_equal(dense(more, 1), mine)


def test_the_largest_numbers_are_kept_exactly():
    kb = KnowledgeBase.empty(N, KINDS, SIZE).add(LAST, 2**20 - 1, *sparsify(vector(0, 0)), 2**31 - 1)
    kb = kb.attend(LAST - 1, 2**20 - 1, kb.ids, np.full((1, KINDS), 0.5), 2**31 - 1)
    assert kb.tasks(LAST) == (2**20 - 1,)
    assert kb.tasks(LAST - 1) == ()
    assert kb.candidates(LAST).size == 0
    assert kb.candidates(LAST - 1).tolist() == [0]
    assert kb.attention() == [(LAST - 1, 2**20 - 1, LAST, 2**20 - 1, 0.5, 0, 2**31 - 1)]


def test_what_replies_say_is_checked():
    kb = filled(vector(0, 0))
    bits, kept = sparsify(vector(0, 1))
    bad = kept.copy()
    bad[0] = np.nan
    tail = np.concatenate([bits[:-1], np.array([0x80], np.uint8)])
    for args, why in [
        ((-1, 0, bits, kept, 0), "client -1 is not in"),
        ((2**64, 0, bits, kept, 0), "client"),
        ((0, 2**20, bits, kept, 0), "task"),
        ((0, 0, bits, kept, 2**31), "clock"),
        ((0, 0, bits[:-1], kept, 0), "need 6 bytes"),
        ((0, 0, bits.astype(np.int64), kept, 0), "need 6 bytes"),
        ((0, 0, bits, kept[:-1], 0), "bits are set"),
        ((0, 0, bits, kept[None], 0), "a value for each bit: need finite floats"),
        ((0, 0, bits, kept.astype(np.int64), 0), "a value for each bit: need finite floats"),
        ((0, 0, bits, bad, 0), "a value for each bit: need finite floats"),
        ((0, 0, bits, kept * np.float64(1e300), 0), "a value for each bit: need finite floats"),
        ((0, 0, tail, kept, 0), "behind the last"),
    ]:
        with pytest.raises(ValueError, match=why):
            kb.add(*args)
    ids, alpha = kb.ids, np.zeros((1, KINDS))
    for args, why in [
        ((1, -1, ids, alpha, 0), "task"),
        ((1, 0, ids.astype(float), alpha, 0), "different entry ids"),
        ((1, 0, np.zeros(2, np.int64), np.zeros((2, KINDS)), 0), "different entry ids"),
        ((1, 0, ids, np.zeros((1, KINDS + 1)), 0), "attention: need finite floats"),
        ((1, 0, ids, np.zeros((2, KINDS)), 0), "attention: need finite floats"),
        ((1, 0, ids, alpha + np.inf, 0), "attention: need finite floats"),
        ((1, 0, ids, alpha.astype(bool), 0), "attention: need finite floats"),
    ]:
        with pytest.raises(ValueError, match=why):
            kb.attend(*args)
    for own in (np.zeros(SIZE + 1), np.zeros(SIZE, np.int64), np.full(SIZE, np.nan), np.full(SIZE, 1e300)):
        with pytest.raises(ValueError, match="a sketch: need finite floats"):
            kb.nearest(1, own, 1)
    with pytest.raises(ValueError, match="all but seed are positive"):
        KnowledgeBase.empty(0, 1)


# Retrieval


def test_own_entries_are_no_candidates_also_when_merged():
    kb = filled(vector(0, 0), vector(0, 1), vector(1, 0), vector(2, 0)).fit(0, 9)
    assert len(kb) == 0
    kb = filled(vector(0, 0), vector(0, 1), vector(1, 0), vector(2, 0))
    kb = kb.fit(kb.nbytes - 1, 9, similar=0.5)
    assert kb.ids.tolist() == [2, 3, 4]
    np.testing.assert_allclose(dense(kb, 4), (vector(0, 0) + vector(0, 1)) / 2, rtol=1e-6)
    assert [kb.candidates(c).tolist() for c in range(5)] == [[2, 3], [2, 3], [3, 4], [2, 4], [2, 3, 4]]
    # A newer version beside the merged one, which keeps what the client gave: still its own.
    kb = kb.add(0, 0, *sparsify(vector(0, 7)), 10)
    assert kb.ids.tolist() == [2, 3, 4, 5]
    assert kb.candidates(0).tolist() == [2, 3]
    # Three owners of which one counts once: (v0 + v1 + v0') / 3.
    kb = kb.fit(kb.nbytes - 1, 11, similar=0.5)
    assert kb.ids.tolist() == [2, 3, 6]
    assert kb.owners[kb.owners[:, 0] == 6, 1].tolist() == [0, 1]
    np.testing.assert_allclose(dense(kb, 6), (vector(0, 0) + vector(0, 1) + vector(0, 7)) / 3, rtol=1e-5)


def test_nearest_takes_the_lower_id_of_equals_and_survives_zeros():
    zero, own = np.zeros(N, np.float32), sketch(vector(0, 5), SIZE, 0)
    kb = filled(vector(1, 0), vector(0, 0), vector(0, 0), zero, vector(0, 0))
    assert kb.nearest(9, own, 3).tolist() == [1, 2, 4]
    assert kb.nearest(2, own, 99).size == 4
    assert kb.nearest(9, np.zeros(SIZE), 0).size == 0
    assert KnowledgeBase.empty(N, KINDS, SIZE).nearest(0, own, 3).size == 0
    assert filled(zero).nearest(9, own, 3).tolist() == [0]
    assert filled(zero, zero, zero).nearest(9, np.zeros(SIZE), 2).tolist() == [0, 1]
    assert filled(*[vector(0, 0)] * 4).nearest(9, own, 2).tolist() == [0, 1]


# Eviction


def test_a_budget_below_one_entry_keeps_none_and_says_so(caplog):
    kb = filled(vector(0, 0), vector(1, 0))
    kb = kb.attend(1, 0, kb.ids, np.ones((2, KINDS)), 3)
    out = kb.fit(kb.fixed + 99, 4)
    assert len(out) == 0
    assert out.nbytes <= kb.fixed + 99
    assert "holds no entry of 43 positions" in caplog.text
    assert out.tasks(0) == (0,), "a device is not asked again"
    assert out.next_id == kb.next_id
    assert kb.fit(0, 4).nbytes == kb.fixed
    assert out.add(0, 0, *sparsify(vector(0, 0)), 5).ids.tolist() == [2]


def test_enough_room_changes_nothing():
    kb = filled(vector(0, 0), vector(0, 1), vector(0, 2))
    assert kb.fit(kb.nbytes, 9) is kb


def test_the_unused_go_before_the_old_and_what_nobody_tried_stays():
    kb = filled(*(vector(i, 0, n=2000) for i in range(4)))
    told = kb.attend(9, 0, np.array([1, 2, 3]), np.array([[0.5, 0.0], [0.001, -0.01], [0.0, 0.005]]), 50)
    assert told.fit(told.nbytes - 1, 60).ids.tolist() == [0, 1, 2]
    assert told.fit(told.nbytes * 6 // 10, 60).ids.tolist() == [0, 1], "the least used first"
    assert told.fit(told.nbytes - 1, 60, negligible=0.0).ids.tolist() == [1, 2, 3], "none is negligible: the oldest"
    assert told.fit(told.nbytes - 1, 150).ids.tolist() == [1, 2, 3], "the report is too old"
    again = told.attend(9, 0, np.array([3]), np.full((1, KINDS), 0.9), 55)
    assert again.fit(again.nbytes - 1, 60).ids.tolist() == [0, 1, 3], "the latest report counts"
    more = told.attend(8, 0, np.array([3]), np.full((1, KINDS), 0.9), 55)
    assert more.fit(more.nbytes - 1, 60).ids.tolist() == [0, 1, 3], "one client that uses it is enough"


def test_a_client_does_not_vote_for_its_own_and_gone_ids_are_ignored():
    kb = filled(vector(0, 0), vector(1, 0))
    assert kb.attend(0, 0, np.array([0, 77]), np.ones((2, KINDS)), 3) is kb
    assert kb.attend(0, 0, np.array([LAST], np.uint64), np.ones((1, KINDS)), 3) is kb
    both = kb.attend(0, 0, np.array([1, 0]), np.array([[1.0, 0.5], [9.0, 9.0]]), 3)
    assert both.attention() == [(0, 0, 1, 0, 0.75, 1, 3)]


def test_reports_outlive_their_entry_but_take_an_eighth_at_most():
    kb = filled(*(vector(i, 0) for i in range(6)))
    for task in range(40):
        kb = kb.attend(9, task, np.array([0, 5]), np.full((2, KINDS), 0.3), task + 1)
    gone = kb.add(0, 0, *sparsify(vector(7, 7)), 50)
    assert len(gone.attention()) == 80
    budget = gone.nbytes - 1
    out = gone.fit(budget, 51)
    row = 48 + 4 * KINDS
    assert len(out) == 6, "reports go first"
    assert len(out.attention()) == budget // 8 // row
    assert {r.entry for r in out.attention()} == {5}, "those on evicted entries before others"
    assert out.attention()[-1].clock == 40
    assert out.attention()[0].clock > 1, "then the oldest"


def test_sketches_that_collide_do_not_merge():
    words = np.random.Philox(key=0).random_raw(N)
    alike = {}
    for position, word in enumerate(words.tolist()):
        alike.setdefault(((word >> 1) % SIZE, word & 1), []).append(position)
    first, second = next(p for p in alike.values() if len(p) > 1)[:2]
    a, b = np.zeros((2, N), np.float32)
    a[first] = b[second] = 1
    kb = filled(a, b, vector(0, 0))
    np.testing.assert_array_equal(kb.sketches[0], kb.sketches[1])
    assert kb.fit(kb.nbytes - 1, 9, similar=0.3).ids.tolist() == [1, 2], "the oldest goes"
    both = filled(a, a, vector(0, 0))
    assert both.fit(both.nbytes - 1, 9, similar=0.3).ids.tolist() == [2, 3], "true copies become one"


# Sketches


@given(FLOATS, st.integers(1, 40), st.integers(0, LAST))
def test_the_sketch_is_its_slow_twin(values, size, seed):
    found = sketch(values, size, seed)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, oracles.sketch(values, size, seed))


def test_the_sketch_is_the_same_on_every_machine():
    assert sketch(np.arange(1, 13), 5, 42).tolist() == [-12.0, -18.0, 4.0, 11.0, 15.0]


@given(st.integers(0, 999))
def test_the_sketch_is_linear_and_keeps_cosines(seed):
    rng = np.random.default_rng(seed)
    x, y = rng.normal(size=(2, 4000))
    y += rng.normal() * x
    a, b = sketch(x, 512, seed), sketch(y, 512, seed)
    np.testing.assert_allclose(sketch(2 * x - y, 512, seed), 2 * a - b, atol=1e-3)
    assert abs(oracles.cosine(a, b) - oracles.cosine(x, y)) < 5 / 512**0.5


@given(FLOATS, st.floats(0, 5))
def test_what_is_made_sparse_comes_back(values, tau):
    where, kept = sparsify(values, tau)
    np.testing.assert_array_equal(densify(where, kept, values.size), np.where(np.abs(values) > tau, values, 0))


def test_only_finite_vectors_are_made_sparse():
    for bad in (np.array([np.nan]), np.array([np.inf]), np.zeros((2, 2))):
        with pytest.raises(ValueError, match="need a finite vector"):
            sparsify(bad)


# Checkpoints


def test_a_checkpoint_brings_everything_back(tmp_path):
    kb = filled(*(vector(0, i) for i in range(4)), vector(1, 0))
    kb = kb.attend(7, 0, kb.ids, np.full((5, KINDS), 0.25), 9)
    kb = kb.fit(kb.nbytes - 1, 10, similar=0.5).add(LAST, 1, *sparsify(vector(3, 0)), 11)
    for n, value in enumerate((KnowledgeBase.empty(N, KINDS, SIZE), kb)):
        save_state(tmp_path / f"{n}", value, {"round": 3})
        found, meta = load_state(tmp_path / f"{n}", KnowledgeBase)
        assert meta == {"round": 3}
        assert_same(found, value)
        assert_same(found.fit(found.nbytes // 2, 12), value.fit(value.nbytes // 2, 12))
