"""Versions, Flower's transport and how long an import takes."""

from __future__ import annotations

import pytest
from findings import at, told

from fedmask_flwr.checks import Asked, software


def test_versions():
    told(software.versions(Asked()), "ok", "flwr ", "torch ", "grpcio ", "Python ")


def test_versions_out_of_range(monkeypatch):
    monkeypatch.setattr(
        software, "requirements", lambda: [("flwr", "<1.0"), ("no-such-thing", ">=2"), ("numpy", ">=1")]
    )
    told(
        software.versions(Asked()), "fail", "no-such-thing missing", "needed: flwr<1.0, no-such-thing>=2",
        "pip install 'flwr<1.0' 'no-such-thing>=2'",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("version", "kind", "port", "wrong"),
    [("1.39.0", "gRPC", 9092, 8000), ("1.40.1", "HTTP", 8000, 9092), ("1.41.0", "HTTP", 8000, 9092)],
)
def test_transport(monkeypatch, version, kind, port, wrong):
    monkeypatch.setattr(software.metadata, "version", lambda _name: version)
    told(software.transport(at(port)), "ok", kind, str(port))
    told(software.transport(at(wrong)), "warn", kind, f"port {wrong} is what")
    monkeypatch.setenv("FLWR_INTERNAL_GRPC_FLEET_API", "1")
    assert software.speaks() == "grpc"


def test_import_seconds():
    total, packages = software.import_seconds("json.decoder")
    assert 0 < packages["json"] < total < 30
    assert list(packages.values()) == sorted(packages.values(), reverse=True)


def test_import_time_over_budget_or_broken(monkeypatch):
    monkeypatch.setattr(software, "import_seconds", lambda: (99.0, {"torch": 90.0, "flwr": 5.0}))
    told(software.imports(Asked()), "warn", "99.0 s", "torch 90.0, flwr 5.0")
    monkeypatch.undo()
    with pytest.raises(RuntimeError, match="No module named 'no_such_module'"):
        software.import_seconds("no_such_module")
