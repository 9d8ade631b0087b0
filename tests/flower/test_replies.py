"""Replies decoded in several threads: the same bits, in the same order, and no more in memory than that."""

from __future__ import annotations

import threading

import pytest
import tiny
from flwr.app import Array
from rounds import every_case, frame_of, run, without_clock

from fedmask_flwr import MaskStrategy
from fedmask_flwr.flower.records import STYPE
from fedmask_flwr.flower.replies import in_order

pytestmark = pytest.mark.flower


def one_is_cut(reply, message, context):
    """What the second client trained ends too early."""
    if message.metadata.message_type == "train" and context.node_config["partition-id"] == 1:
        reply.content.array_records["arrays"]["frame"] = Array("uint8", (1,), STYPE, frame_of(reply)[:-1])
    return reply


@every_case
def test_threads_change_nothing(tmp_path, case):
    settings = {"method": case.method, "model": f"tiny:{case.net}", "num_server_rounds": 2, **case.settings}
    one, _ = run(tmp_path / "one", 4, one_is_cut, **settings)
    four, _ = run(tmp_path / "four", 4, one_is_cut, server_threads=4, **settings)
    assert [without_clock(line) for line in one] == [without_clock(line) for line in four]
    assert one[0]["clients_failed"] == 1
    assert (tmp_path / "one/mask.fedmask").read_bytes() == (tmp_path / "four/mask.fedmask").read_bytes()


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_order_is_kept_and_few_wait(threads):
    begun, lock = [], threading.Lock()

    def square(n):
        with lock:
            begun.append(n)
        return n * n

    found = []
    for square_of in in_order(square, range(40), threads):
        found.append(square_of)
        assert len(begun) <= len(found) + threads
    assert found == [n * n for n in range(40)]


def test_work_happens_at_the_same_time():
    together = threading.Barrier(3, timeout=30)
    assert list(in_order(lambda n: together.wait() >= 0 and n, range(6), 3)) == list(range(6))


@pytest.mark.parametrize("threads", [1, 3])
def test_an_error_ends_it(threads):
    with pytest.raises(ZeroDivisionError):
        list(in_order(lambda n: 1 // (5 - n), range(40), threads))


def test_no_threads_are_refused():
    with pytest.raises(ValueError, match="server_threads must be 1 or more, got 0"):
        MaskStrategy("fedpm", tiny.net(), server_threads=0)
