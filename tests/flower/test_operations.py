"""What an operator sees of a run: metrics over HTTP while it lasts, and what its processes keep of memory."""

from __future__ import annotations

import socket
import urllib.request

import pytest
from rounds import run

from fedmask_flwr import heap

pytestmark = pytest.mark.flower


def test_metrics_are_served_while_rounds_run(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    pages = []

    def tamper(reply, message, context):
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as page:
            pages.append(page.read().decode())
        return reply

    lines, _ = run(tmp_path / "run", 2, tamper, num_server_rounds=3, metrics_port=port)
    assert 'fedmask_round{method="deltamask"} 2.0' in pages[-1]
    two = sum(line["uplink_bytes"] for line in lines[:2])
    assert f'fedmask_uplink_bytes_total{{method="deltamask"}} {float(two)}' in pages[-1]
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port), timeout=5)


def test_devices_keep_freed_memory_and_the_server_only_while_it_evaluates(tmp_path, monkeypatch):
    told, names = [], {id(heap._KEPT): "keep", id(heap._BATCHES): "batches", id(heap._GIVEN): "back"}
    monkeypatch.setattr(heap, "_ample", lambda: True)
    monkeypatch.setattr(heap, "_set", lambda options: told.append(names[id(options)]) or True)

    def tamper(reply, message, context):
        told.append("reply")
        return reply

    run(tmp_path / "run", 2, tamper, num_server_rounds=1)
    evaluation = ["batches", "back"]
    assert told == ["back", *evaluation, "keep", "reply", "keep", "reply", *evaluation]
