"""An engine and an image for the session, a stack for the module."""

from __future__ import annotations

import os

import pytest
import stack as stacks


@pytest.fixture(scope="session")
def image():
    """The image, built from this checkout."""
    stop = stacks.engine()
    stacks.build()
    yield stacks.IMAGE
    if stop is not None:
        stop()


@pytest.fixture(scope="session")
def shared(image, tmp_path_factory):
    """A stack that the tests share; each has its own run in it."""
    found = stacks.Stack(f"fedmask-{os.getpid()}", tmp_path_factory.mktemp("runs"))
    try:
        yield found
    finally:
        found.down()


@pytest.fixture
def stack(shared):
    """The shared stack, whole."""
    shared.up()
    return shared
