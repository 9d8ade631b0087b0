"""This machine's clock, and the SuperLink's over HTTP."""

from __future__ import annotations

import os
import time

import servers
from findings import at, told

from fedmask_flwr.checks import Asked, clock, network


def http(date, status=b"200 OK"):
    return b"HTTP/1.1 " + status + b"\r\nDate: " + date.encode() + b"\r\nContent-Length: 0\r\n\r\n"


def test_http_channel_and_clock(monkeypatch):
    for room in (network, clock):
        monkeypatch.setattr(room, "speaks", lambda: "http")

    def date(off):
        return time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(time.time() - off))

    with servers.saying(http(date(0))) as port:
        told(network.channel(at(port)), "ok", "answered 200")
        told(clock.clock(at(port)), "ok", "the SuperLink's")
    with servers.saying(http(date(0), b"404 Not Found")) as port:
        told(network.channel(at(port)), "fail", "answered 404", "8000")
    with servers.saying(http(date(60))) as port:
        told(clock.clock(at(port)), "fail", "ahead of the SuperLink's", "timedatectl")
    with servers.saying(http(date(-3600))) as port:
        told(clock.clock(at(port)), "fail", "behind the SuperLink's")


def test_clock(monkeypatch, tmp_path, ca):
    monkeypatch.setattr(clock, "_disciplined", lambda: True)
    told(clock.clock(Asked()), "ok", "time service keeps it")
    monkeypatch.setattr(clock, "_disciplined", lambda: False)
    told(clock.clock(Asked()), "warn", "no time service")
    (tmp_path / "metrics.jsonl").write_text("")
    told(clock.clock(Asked(run=tmp_path)), "warn", "after metrics.jsonl of the run was written")
    future = time.time() + 3600
    os.utime(tmp_path / "metrics.jsonl", (future, future))
    told(clock.clock(Asked(run=tmp_path)), "fail", "s before metrics.jsonl of the run was written", "timedatectl")
    with servers.tls(ca.server(first=2)) as port:
        told(clock.clock(at(port)), "fail", "before the server's certificate starts")
    with servers.tls(ca.server()) as port:
        told(clock.clock(at(port)), "warn", "the SuperLink does not tell its time")
