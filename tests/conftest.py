"""Shared by all tests."""

from __future__ import annotations

import pytest
import tiny
from hypothesis import settings

# Shared machines stall for longer than any sensible per-example deadline.
settings.register_profile("fedmask", deadline=None, max_examples=60)
settings.load_profile("fedmask")


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    tiny.one_thread()
