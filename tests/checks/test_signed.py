"""The SuperLink's clock, by what it says to signed calls."""

from __future__ import annotations

import math
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime

import grpc
import pytest
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from fedmask_flwr.checks import clock, signed
from fedmask_flwr.checks.base import Asked


class Superlink(grpc.GenericRpcHandler):
    """Answers a heartbeat as one whose clock is ``off`` seconds ahead; None: one that looks at no signatures."""

    def __init__(self, off):
        self.off = off

    def service(self, call):
        def answer(_request, context):
            if self.off is None:
                return b""
            told = dict(call.invocation_metadata)
            key = serialization.load_pem_public_key(told["flwr-public-key-bin"])
            key.verify(told["flwr-signature-bin"], told["flwr-timestamp"].encode(), ec.ECDSA(hashes.SHA256()))
            late = time.time() + self.off - datetime.fromisoformat(told["flwr-timestamp"]).timestamp()
            words = "Invalid node ID" if -signed.AHEAD < late < signed.BEHIND else "Invalid timestamp"
            return context.abort(grpc.StatusCode.UNAUTHENTICATED, words)

        return grpc.unary_unary_rpc_method_handler(answer) if call.method == signed._CALL else None


@pytest.fixture
def superlink():
    started = []

    def start(off):
        server = grpc.server(ThreadPoolExecutor(2), handlers=[Superlink(off)])
        started.append(server)
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        return f"127.0.0.1:{port}"

    yield start
    for server in started:
        server.stop(None)


@pytest.mark.parametrize("off", [0, 3, -200, 200, 3600, -3600, 40_000])
def test_it_is_told_to_the_second(superlink, off):
    found = signed.ahead(superlink(off), None, secure=False, wait=20)
    assert found == pytest.approx(-off, abs=2)


def test_without_signatures_nobody_tells(superlink):
    assert signed.ahead(superlink(None), None, secure=False, wait=20) is None


def test_nobody_answers():
    with pytest.raises(OSError, match=r"connect|UNAVAILABLE"):
        signed.ahead("127.0.0.1:9", None, secure=False, wait=20)


def test_the_search_has_an_end():
    assert signed.seek(lambda shift: False, time.monotonic() + 60) == math.inf
    assert signed.seek(lambda shift: True, time.monotonic() - 1) == math.inf


def test_the_doctor_names_the_clock(superlink, monkeypatch):
    monkeypatch.setattr(clock, "SECONDS", 4.0)
    for off, status, words in (
        (-3600, "fail", "ahead of the SuperLink's"),
        (3600, "fail", "behind"),
        (0, "ok", "0 s"),
    ):
        found = clock.clock(Asked(superlink(off)))
        assert (found.status, words in found.seen) == (status, True), found
    assert datetime.now(UTC).strftime("%Y-%m-%d") in found.seen
