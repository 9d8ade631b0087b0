"""Appending to a file on a full disk: whole or not at all, and nothing of what was there is lost."""

from __future__ import annotations

import json
import resource
import signal

import pytest

from fedmask_flwr.disk import append
from fedmask_flwr.track import RunDir


@pytest.fixture
def room():
    """Set how large files may grow: the write that crosses it is short, the next one fails, as on a full disk."""
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    yield lambda most: resource.setrlimit(resource.RLIMIT_FSIZE, (most or before[0], before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


def test_whole_or_not_at_all(tmp_path, room):
    path = tmp_path / "x"
    append(path, b"kept\n")
    room(8)
    with pytest.raises(OSError, match="too large"):
        append(path, b"too much\n")
    room(None)
    assert path.read_bytes() == b"kept\n"
    append(path, b"more\n")
    assert path.read_bytes() == b"kept\nmore\n"


def test_rounds_of_a_time_without_a_disk_are_recorded_after_it(tmp_path, room):
    run = RunDir(tmp_path / "run", {})
    run.record({"round": 1})
    room((tmp_path / "run/metrics.jsonl").stat().st_size + 5)
    for number in (2, 3):
        with pytest.raises(OSError, match="too large"):
            run.record({"round": number})
    room(None)
    run.record({"round": 4})
    run.close()
    assert [line["round"] for line in run.metrics()] == [1, 2, 3, 4]
    lines = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["round"] for line in lines] == [1, 2, 3, 4]
