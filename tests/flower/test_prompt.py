"""Replies are looked for soon, and not for ever."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from flwr.superlink.grid import HttpGrid
from loopback import LoopbackGrid

from fedmask_flwr.flower import prompt
from fedmask_flwr.flower.prompt import PromptGrid


class Late(HttpGrid):
    """Answers message i in its i-th look; notes how long it was left alone."""

    def __init__(self):
        self.looks = 0

    def push_messages(self, messages):
        return [str(i) for i, _ in enumerate(messages)]

    def pull_messages(self, message_ids):
        self.looks += 1
        due = [i for i in message_ids if int(i) < self.looks]
        return [SimpleNamespace(metadata=SimpleNamespace(reply_to_message_id=i)) for i in due]


@pytest.fixture
def slept(monkeypatch):
    naps, clock = [], [0.0]

    def sleep(seconds):
        naps.append(seconds)
        clock[0] += seconds

    monkeypatch.setattr(prompt.time, "sleep", sleep)
    monkeypatch.setattr(prompt.time, "monotonic", lambda: clock[0])
    return naps


def test_all_replies_come_and_the_first_looks_are_close(slept):
    replies = prompt.prompt(Late()).send_and_receive([object()] * 40)
    assert sorted(int(r.metadata.reply_to_message_id) for r in replies) == list(range(40))
    assert len(slept) == 39
    assert slept[0] == prompt.SOON
    assert max(slept) <= prompt.LATEST
    assert all(nap <= max(prompt.SOON, prompt.SHARE * sum(slept[:i])) + 1e-9 for i, nap in enumerate(slept))


def test_a_timeout_ends_it_with_what_has_come(slept):
    grid = Late()
    replies = prompt.prompt(grid).send_and_receive([object()] * 1000, timeout=2.0)
    assert len(replies) == grid.looks
    assert 2.0 <= sum(slept) < 2.5


def test_only_a_grid_over_the_network_is_wrapped():
    loop = LoopbackGrid(None, 1, {})
    assert prompt.prompt(loop) is loop
    wrapped = prompt.prompt(Late())
    assert isinstance(wrapped, PromptGrid)
    assert list(wrapped.push_messages([1, 2])) == ["0", "1"]
