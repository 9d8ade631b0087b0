"""A SuperNode looks for messages soon after one, and as seldom as Flower's once nothing comes."""

from __future__ import annotations

import importlib
import time
from types import SimpleNamespace

import pytest

from fedmask_flwr.warm import looks


@pytest.fixture
def slept(monkeypatch):
    naps, clock = [], [0.0]

    def sleep(seconds):
        naps.append(seconds)
        clock[0] += seconds

    monkeypatch.setattr(looks, "time", SimpleNamespace(sleep=sleep, monotonic=lambda: clock[0], other=7))
    return naps


def test_sleeps_grow_from_short_to_flowers_own(slept):
    clock = looks.Looks()
    for _ in range(40):
        clock.sleep(3)
    assert slept[0] == looks.SOON
    assert slept == sorted(slept)
    assert slept[-1] == 3
    assert sum(nap < 3 for nap in slept) <= 20, "a device that waits must not chatter"


def test_a_message_makes_them_short_again(slept):
    clock = looks.Looks()
    for _ in range(40):
        clock.sleep(3)
    clock.sleep(0.5)  # Flower waits for the reply
    clock.sleep(3)
    assert slept[-2:] == [looks.REPLY, looks.SOON]
    assert clock.other == 7


@pytest.mark.flower
def test_flowers_loop_takes_it(monkeypatch):
    """If this fails after an update of flwr, look how its SuperNode waits now."""
    try:
        loop = importlib.import_module(looks.LOOP)
    except ImportError:
        assert not looks.look_sooner()
        return
    assert loop.time is time, "its loop does not sleep by that name"
    monkeypatch.setattr(loop, "time", time)  # and puts it back
    assert looks.look_sooner()
    assert isinstance(loop.time, looks.Looks)
    assert loop.time.monotonic() <= time.monotonic()


@pytest.mark.flower
def test_a_client_asks_its_node_sooner(monkeypatch):
    """If this fails after an update of flwr, look how its client process waits for its message now."""
    module, name = looks.PULL
    pull = getattr(importlib.import_module(module), name)
    before = dict(pull.__kwdefaults__)
    try:
        assert looks.pull_sooner()
        assert pull.__kwdefaults__ == {**before, **looks.BACKOFF}
    finally:
        pull.__kwdefaults__.update(before)
    monkeypatch.setattr(looks, "PULL", ("flwr", name))
    assert not looks.pull_sooner()
