"""Short waits, a CA, and what the trial of a device found."""

from __future__ import annotations

import pytest
import servers

from fedmask_flwr.checks import clock, content, machine, network, peer, trial

STAGES = {
    "torch": {"version": "2.8", "threads": 4, "cuda": "", "built": "", "product": 1.0},
    "client": {"anonymous": 200_000_000, "mapped": 100_000_000},
    "data": {"name": "x", "shape": [8], "classes": 3, "examples": {"train": 5, "test": 4}},
    "network": {
        "digest": "0123456789abcdef", "named": "mlp, weights seed:7", "parameters": 2_000_000, "masked": 1_900_000,
        "activations": 8_000_000,
    },
}  # fmt: skip


@pytest.fixture(autouse=True)
def _fresh(monkeypatch):
    monkeypatch.setattr(peer, "SECONDS", 0.5)
    monkeypatch.setattr(network, "SECONDS", 0.7)
    monkeypatch.setattr(clock, "SECONDS", 0.7)
    for room in (network, clock):
        monkeypatch.setattr(room, "speaks", lambda: "grpc")
    trial.trial.cache_clear()


@pytest.fixture(scope="session")
def ca(tmp_path_factory):
    return servers.Authority(tmp_path_factory.mktemp("ca"))


@pytest.fixture
def stages(monkeypatch):
    got = {name: dict(stage) for name, stage in STAGES.items()}
    for room in (machine, content):
        monkeypatch.setattr(room, "trial", lambda _asked: got)
    return got
