"""The port, the TLS chain and the channel: each fault is found, named, and comes with its remedy."""

from __future__ import annotations

import errno
import socket

import pytest
import servers
from findings import at, told

from fedmask_flwr.checks import Asked, network


def test_reach():
    told(network.reach(Asked()), "skip")
    with servers.saying() as port:
        told(network.reach(at(port)), "ok", "127.0.0.1")
    told(network.reach(at(servers.closed_port())), "fail", "nothing listens", "start the SuperLink")


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (socket.gaierror(-2, "Name or service not known"), "leads nowhere"),
        (TimeoutError(), "a firewall"),
        (OSError(errno.ENETUNREACH, "Network is unreachable"), "Network is unreachable"),
    ],
)
def test_reach_otherwise(monkeypatch, error, words):
    def refuse(*_args, **_kwargs):
        raise error

    monkeypatch.setattr(network.socket, "create_connection", refuse)
    told(network.reach(at(1)), "fail", words)


def tls_of(ca, host="127.0.0.1", alpn=("h2",), trust=None, **server):
    with servers.tls(ca.server(**server), alpn) as port:
        return network.tls(at(port, host, root_certificates=trust or ca.path))


def test_tls_well(ca):
    told(tls_of(ca), "ok", "CN=test CA", "localhost, 127.0.0.1", "days left")
    told(tls_of(ca, "localhost"), "ok")


def test_tls_ends_soon(ca):
    told(tls_of(ca, last=12), "warn", " 12 days left", "renew")


def test_tls_expired(ca):
    told(tls_of(ca, first=-9, last=-3), "fail", "CN=superlink expired 3 days ago", "clock is right")


def test_tls_not_yet_valid(ca):
    told(tls_of(ca, first=2), "fail", "starts at", "set this machine's clock")


def test_tls_other_name(ca):
    told(tls_of(ca, names=("other.example",)), "fail", "for other.example, not for 127.0.0.1")
    told(tls_of(ca, "localhost", names=("other.example",)), "fail", "for other.example, not for localhost")
    told(tls_of(ca, names=()), "fail", "no name at all")


def test_tls_wrong_ca(ca, tmp_path):
    other = servers.Authority(tmp_path / "a", "another CA")
    told(tls_of(ca, trust=other.path), "fail", "wrong CA", "issued by CN=test CA", "holds CN=another CA")
    again = servers.Authority(tmp_path / "b")
    told(tls_of(ca, trust=again.path), "fail", "wrong CA", "a CA of that name, but with another key")


def test_tls_expired_ca(tmp_path):
    old = servers.Authority(tmp_path, "old CA", last=-2)
    told(tls_of(old), "fail", "CN=old CA expired 2 days ago")


def test_tls_that_is_not_grpc(ca):
    told(tls_of(ca, alpn=()), "warn", "does not speak HTTP/2")


def test_tls_without_a_ca_given(ca):
    with servers.tls(ca.server()) as port:
        told(network.tls(at(port)), "fail", "does not trust CN=test CA", "--root-certificates")


def test_tls_no_certificates_in_the_file(ca, tmp_path):
    empty = tmp_path / "x.pem"
    for content_ in (None, b"", b"-----BEGIN CERTIFICATE-----\nxx\n-----END CERTIFICATE-----\n"):
        if content_ is not None:
            empty.write_bytes(content_)
        told(network.tls(at(1, root_certificates=empty)), "fail", "is no file of certificates", "ca.crt")


def test_plaintext_servers(ca):
    with servers.grpc_server() as port:
        told(network.tls(at(port)), "warn", "gRPC without TLS", "--ssl-certfile")
        told(network.tls(at(port, root_certificates=ca.path)), "fail", "gRPC without TLS", "--ssl-certfile")
    with servers.saying(b"HTTP/1.1 400 Bad Request\r\n\r\n") as port:
        told(network.tls(at(port)), "warn", "HTTP without TLS")
    with servers.saying(b"SSH-2.0-OpenSSH_9\r\n") as port:
        told(network.tls(at(port)), "fail", "neither TLS, nor gRPC, nor HTTP")
    with servers.saying() as port:
        told(network.tls(at(port)), "fail", "neither TLS")


def test_channel(ca):
    with servers.grpc_server() as port:
        told(network.channel(at(port)), "ok", "without TLS ready")
    with servers.grpc_server(ca.server()) as port:
        asked = at(port, root_certificates=ca.path)
        told(network.tls(asked), "ok")
        told(network.channel(asked), "ok", "with TLS ready")
    with servers.saying() as port:
        told(network.channel(at(port)), "fail", "not ready within 0.7 s", "9092")
