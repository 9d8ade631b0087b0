"""Prometheus metrics: what a scraper reads is what the rounds' lines say."""

from __future__ import annotations

import socket
import urllib.request

import pytest

from fedmask_flwr.config import ConfigError
from fedmask_flwr.metrics import Exporter


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def scrape(port):
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as page:
        lines = page.read().decode().splitlines()
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if line[0] != "#")}


def test_totals_gauges_and_seconds():
    port = free_port()
    exporter = Exporter(port, "127.0.0.1", method="fedpm", rounds=9)
    try:
        for number, failed in ((1, 0), (2, 3)):
            exporter.round(
                {"round": number, "seconds": 4.5, "uplink_bytes": 100, "clients_ok": 5, "clients_failed": failed,
                 "client_accuracy": 0.5 + number / 10, "attention": [[0, 1, 2, 3, 0.5]]}
            )  # fmt: skip
        seen = scrape(port)
    finally:
        exporter.close()
    assert seen['fedmask_uplink_bytes_total{method="fedpm"}'] == 200
    assert seen['fedmask_clients_failed_total{method="fedpm"}'] == 3
    assert (seen['fedmask_round{method="fedpm"}'], seen['fedmask_rounds{method="fedpm"}']) == (2, 9)
    assert seen['fedmask_round_seconds_count{method="fedpm"}'] == 2
    assert seen['fedmask_round_seconds_bucket{le="5.0",method="fedpm"}'] == 2
    assert seen['fedmask_metric{method="fedpm",name="client_accuracy"}'] == pytest.approx(0.7)
    assert not any("attention" in name for name in seen)
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port), timeout=5)


def test_a_taken_port_names_the_fix():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(ConfigError, match="use another metrics-port"):
            Exporter(taken.getsockname()[1], "127.0.0.1", method="fedpm", rounds=1)
