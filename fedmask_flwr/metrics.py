"""Rounds, bytes and failures for Prometheus, from the ServerApp while it runs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .config import ConfigError

COUNTED = {
    "uplink_bytes": "Bytes of frames that clients sent.",
    "downlink_bytes": "Bytes of frames that clients were sent to train.",
    "evaluate_bytes": "Bytes of frames that clients were sent to evaluate.",
    "clients_ok": "Replies that were folded into the state.",
    "clients_failed": "Clients that were asked and gave no usable reply.",
    "evaluations_failed": "Clients that were asked to evaluate and gave no usable reply.",
}
SECONDS = (1, 2, 5, 10, 20, 30, 60, 120, 300, 600, 1800, 3600)


class Exporter:
    """A page of metrics at ``http://address:port/metrics``; ``round`` takes one line of a run's metrics.

    Totals are counters, the latest accuracies and losses gauges, seconds a histogram; ``method`` is a label.

    Raises
    ------
    ConfigError
        When prometheus-client is not installed, or the port is taken.
    """

    def __init__(self, port: int, address: str, *, method: str, rounds: int) -> None:
        try:
            import prometheus_client as prometheus
        except ImportError as error:
            raise ConfigError("metrics-port needs: pip install 'fedmask-flwr[metrics]'") from error
        registry = prometheus.CollectorRegistry()
        label = ["method"]
        self._counters = {
            name: prometheus.Counter(f"fedmask_{name}", text, label, registry=registry).labels(method)
            for name, text in COUNTED.items()
        }
        self._round = prometheus.Gauge("fedmask_round", "The last complete round.", label, registry=registry)
        self._seconds = prometheus.Histogram(
            "fedmask_round_seconds", "How long rounds took.", label, buckets=SECONDS, registry=registry
        ).labels(method)
        self._value = prometheus.Gauge(
            "fedmask_metric", "The latest value of a metric of the run.", [*label, "name"], registry=registry
        )
        planned = prometheus.Gauge("fedmask_rounds", "Rounds that the run will have.", label, registry=registry)
        planned.labels(method).set(rounds)
        self._method = method
        try:
            self._server, self._thread = prometheus.start_http_server(port, address, registry)
        except OSError as error:
            raise ConfigError(
                f"metrics cannot be served at {address}:{port} ({error}): use another metrics-port, or 0"
            ) from error

    def round(self, line: Mapping[str, Any]) -> None:
        """Take one round's figures."""
        for name, counter in self._counters.items():
            counter.inc(float(line.get(name, 0.0)))
        self._round.labels(self._method).set(float(line["round"]))
        if "seconds" in line:
            self._seconds.observe(float(line["seconds"]))
        for name, value in line.items():
            if isinstance(value, int | float) and name not in (*COUNTED, "round", "seconds"):
                self._value.labels(self._method, name).set(float(value))

    def close(self) -> None:
        """Stop serving."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
