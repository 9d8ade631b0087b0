"""The registry of ``fedmask doctor``'s checks: one that fails or hangs is a finding."""

from __future__ import annotations

import time

import pytest
from findings import told

from fedmask_flwr.checks import CHECKS, Asked, Check, Finding, base, endpoint, examine


def checks(**looks):
    return [Check(name.replace("_", " "), look, (), 0.3) for name, look in looks.items()]


def test_a_check_that_raises_is_a_failure():
    def broken(_asked):
        raise KeyError("x")

    def leaves(_asked):
        raise SystemExit(3)

    first, second = examine(Asked(), checks(broken=broken, leaves=leaves))
    told(first, "fail", "KeyError: 'x'", "broken, line")
    told(second, "fail", "SystemExit: 3")


def test_a_check_that_hangs_is_given_up():
    began = time.monotonic()
    slow, quick = examine(Asked(), checks(slow=lambda _a: time.sleep(2), quick=lambda _a: base.ok("well")))
    told(slow, "fail", "no answer within 0.3 s")
    told(quick, "ok", "well")
    assert time.monotonic() - began < 1.5


@pytest.mark.parametrize(("status", "then"), [("ok", "ok"), ("warn", "ok"), ("fail", "skip"), ("skip", "skip")])
def test_what_a_check_needs(status, then):
    first = Check("a", lambda _a: Finding("", status, "seen"), (), 1)
    second = Check("b", lambda _a: base.ok("well"), ("a",), 1)
    assert [f.status for f in examine(Asked(), [first, second])] == [status, then]


def test_registered_in_order():
    names = list(CHECKS)
    assert names[0] == "versions"
    for one in CHECKS.values():
        assert all(names.index(need) < names.index(one.name) for need in one.needs)


@pytest.mark.parametrize("text", ["host", "host:", ":9092", "host:0", "host:65536", "host:x", "https://host:1"])
def test_endpoint_refuses(text):
    with pytest.raises(ValueError, match="HOST:PORT"):
        endpoint(text)


def test_endpoint():
    assert endpoint("a.b:9092") == ("a.b", 9092)
    assert endpoint("[::1]:1") == ("::1", 1)
