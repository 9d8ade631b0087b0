"""Votes counted in bit planes, in numpy and in machine code, against the plain sum."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ways import WAYS, machine_code

from fedmask_flwr.aggregate import VoteCounter, planes


@pytest.fixture(params=WAYS, scope="module")
def way(request):
    """Count with or without machine code, whatever the size."""
    with machine_code(request.param == "compiled"):
        yield request.param


@settings(max_examples=60)
@given(
    numel=st.one_of(st.integers(0, 200), st.sampled_from((511, 512, 513, 64 * 512 - 1, 64 * 512 + 9))),
    clients=st.integers(0, 40),
    density=st.sampled_from((0.0, 0.02, 0.5, 1.0)),
    asked=st.sets(st.integers(0, 40), max_size=3),
    seed=st.integers(0, 2**32 - 1),
)
def test_votes_equal_the_plain_sum_at_any_time(way, numel, clients, density, asked, seed):
    rows = np.random.default_rng(seed).random((clients, numel)) < density
    counter = VoteCounter(numel)
    for n, row in enumerate(rows, 1):
        counter.add(np.packbits(row, bitorder="little"))
        if n in asked:
            assert counter.votes().tolist() == rows[:n].sum(axis=0).tolist()
    found = counter.votes()
    assert (found.dtype, found.shape, counter.masks) == (np.uint32, (numel,), clients)
    found += 1  # the caller's own
    assert counter.votes().tolist() == rows.sum(axis=0).tolist()


def test_thousands_of_masks(way):
    numel = 77
    rows = np.random.default_rng(3).random((11, numel)) < 0.7
    rows[:, :9] = True
    counter, total = VoteCounter(numel), np.zeros(numel, int)
    packed = np.packbits(rows, axis=1, bitorder="little")
    for n in range(70_000):  # beyond 16 planes
        counter.add(packed[n % 11])
        total += rows[n % 11]
        if n in {255, 256, 65_535}:
            assert counter.votes().tolist() == total.tolist()
    assert counter.votes().tolist() == total.tolist()
    assert total.max() == 70_000


def test_more_words_than_a_block(way):
    numel = 64 * (planes._BLOCK + 3) + 17
    rows = np.random.default_rng(0).random((20, numel)) < 0.3
    counter = VoteCounter(numel)
    for row in rows:
        counter.add(np.packbits(row, bitorder="little"))
    assert np.array_equal(counter.votes(), rows.sum(axis=0))


def test_set_pad_bits_count_for_nothing(way):
    counter = VoteCounter(9)
    for _ in range(17):
        counter.add(np.array([1, 0xFF], np.uint8))
    assert counter.votes().tolist() == [17, *[0] * 7, 17]


def test_rows_are_aligned_and_share_no_cache_set():
    for numel in (1, 64, 1 << 15, 1 << 18, 100_000):
        rows = planes.rows_of(3, numel)
        assert rows.shape == (3, -(-numel // 64))
        assert not rows.any()
        assert all(row.ctypes.data % 64 == 0 for row in rows)
        assert (rows[1].ctypes.data - rows[0].ctypes.data) // 64 % 2 == 1


@pytest.mark.parametrize("numel", [64 * 40, 64 * 40 + 13])
def test_masks_of_any_kind(way, numel):
    """Read-only, strided and unaligned ones are counted as others are, and left as they were."""
    rows = np.random.default_rng(1).random((17, numel)) < 0.4
    counter = VoteCounter(numel)
    for n, row in enumerate(rows):
        mask = np.packbits(row, bitorder="little")
        if n % 4 == 1:
            mask.flags.writeable = False
        elif n % 4 == 2:
            mask = np.repeat(mask, 2)[::2]
        elif n % 4 == 3:
            mask = np.concatenate([[0], mask]).astype(np.uint8)[1:]
        counter.add(mask)
        assert np.array_equal(np.unpackbits(mask, count=numel, bitorder="little"), row)
    assert np.array_equal(counter.votes(), rows.sum(axis=0))


def test_memory_is_two_bytes_a_position_and_a_bit_a_digit(way):
    numel = 4_000_000
    mask = np.zeros(numel // 8, np.uint8)
    warm = VoteCounter(numel)
    warm.add(mask)
    warm.votes()
    tracemalloc.start()
    try:
        counter = VoteCounter(numel)
        for _ in range(300):
            counter.add(mask.copy())
        adding = tracemalloc.get_traced_memory()[1]
        tracemalloc.reset_peak()
        found = counter.votes()
        reading = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert found.size == numel
    assert adding < 5.5 * numel  # 2 for the masks, room for 8 and then for 16 planes
    assert reading < 6.6 * numel  # the votes, 4, instead of the masks
