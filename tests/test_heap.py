"""Freed memory is kept for training, or given back at once."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

from fedmask_flwr import cgroup, heap


@pytest.fixture(autouse=True)
def _looked_at_anew():
    heap._ample.cache_clear()
    yield
    heap._ample.cache_clear()


LOOP = """
import ctypes, resource
from fedmask_flwr import heap
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
libc.memset.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]

def faults(mb=3):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(50):
        block = libc.malloc(mb << 20)
        libc.memset(block, 1, mb << 20)
        libc.free(block)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

heap.give_back()
given = faults()
heap.AMPLE = 0
assert heap.keep()
faults()
kept = faults()
heap.give_back()
again = faults()
with heap.kept():
    faults()
    inside = faults()
    network = faults(8)
print(given, kept, again, inside, network, faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries have no mallopt")
def test_pages_are_cleared_anew_only_where_memory_is_given_back():
    done = subprocess.run([sys.executable, "-c", LOOP], capture_output=True, text=True, check=True)
    given, kept, again, inside, network, after = map(int, done.stdout.split())
    for many in (given, again, network, after):
        for few in (kept, inside):
            assert many > 10 * (few + 10), done.stdout


@pytest.mark.parametrize(("free", "left"), [(2e9, 0.5e9), (0.5e9, 2e9)])
def test_nothing_is_kept_where_memory_is_short(monkeypatch, free, left):
    monkeypatch.setattr(heap, "_set", lambda options: pytest.fail(f"set {options}"))
    monkeypatch.setattr(cgroup, "free_memory", lambda: free)
    monkeypatch.setattr(cgroup, "limits", lambda: cgroup.Limits(left=left))
    assert not heap.keep()
    with heap.kept():
        pass


def test_another_c_library_is_left_alone(monkeypatch):
    monkeypatch.setattr(heap, "AMPLE", 0)
    monkeypatch.setattr(heap.ctypes, "CDLL", lambda _name: object())
    assert not heap.keep()
    heap.give_back()
    with heap.kept():
        pass
