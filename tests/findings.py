"""What a check is asked, and what it should have found."""

from __future__ import annotations

from fedmask_flwr.checks import Asked

TINY = (("data", "tiny:blobs"), ("model", "tiny:net"))


def at(port, host="127.0.0.1", **asked):
    return Asked(superlink=f"{host}:{port}", **asked)


def told(finding, status, *words):
    assert finding.status == status, finding
    for word in words:
        assert word in f"{finding.seen} -> {finding.remedy}"
    assert bool(finding.remedy) == (status in ("warn", "fail"))
