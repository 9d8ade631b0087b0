"""Shared by all tests."""

from __future__ import annotations

import os

import pytest
import tiny
from hypothesis import settings

# Shared machines stall for longer than any sensible per-example deadline.
settings.register_profile("fedmask", deadline=None, max_examples=60)
settings.load_profile("fedmask")


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    tiny.one_thread()


@pytest.hookimpl(trylast=True)  # once those of other marks are gone
def pytest_collection_modifyitems(items):
    """The longest tests lead the workers' shares, or one of them would begin when all else is done."""
    if any(item.get_closest_marker("long") for item in items):
        items.sort(key=lambda item: item.get_closest_marker("long") is None)
        workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
        items[:] = [item for first in range(workers) for item in items[first::workers]]
