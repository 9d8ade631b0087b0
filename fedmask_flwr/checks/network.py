"""The way to the SuperLink: the port, its TLS chain, and a channel as a node opens one."""

from __future__ import annotations

import os
import socket
import ssl
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from .base import Asked, Finding, check, endpoint, fail, ok, skip, warn
from .software import PORTS, speaks

if TYPE_CHECKING:
    from cryptography.x509 import Certificate

    from .peer import Peer

__all__ = ["SECONDS", "channel", "health", "reach", "tls"]

SECONDS = 4.0
SOON = 30  # days before a certificate ends
_NO_ADDRESS = "not asked: give --superlink HOST:PORT"
_NOT_YET, _EXPIRED, _OTHER_NAME, _OTHER_ADDRESS = 9, 10, 62, 64  # OpenSSL's X509_V_ERR_*


@check("reachability", limit=8.0)
def reach(asked: Asked) -> Finding:
    """A TCP connection to the SuperLink."""
    if not asked.superlink:
        return skip(_NO_ADDRESS)
    host, port = endpoint(asked.superlink)
    began = time.monotonic()
    try:
        with socket.create_connection((host, port), timeout=SECONDS) as connection:
            took = 1000 * (time.monotonic() - began)
            there = connection.getpeername()[0]
    except socket.gaierror as error:
        return fail(
            f"the name {host} leads nowhere ({error.strerror})",
            "check its spelling and this machine's name server (/etc/resolv.conf), or add it to /etc/hosts; the "
            "certificate must hold the name that is used",
        )
    except ConnectionRefusedError:
        return fail(
            f"{host} answers, nothing listens on port {port}",
            "start the SuperLink, and let it listen beyond its own machine (--fleet-api-address 0.0.0.0:"
            f"{PORTS['grpc']}, or --host 0.0.0.0 for HTTP); a container must publish the port",
        )
    except TimeoutError:
        return fail(
            f"no answer from {host}:{port} within {SECONDS:g} s",
            "a firewall drops it, the machine is off, or the link is down: try on the SuperLink's machine, then "
            f"open TCP port {port} for incoming connections there; nodes need no open port",
        )
    except OSError as error:
        return fail(
            f"{host}:{port}: {error.strerror or error}", "check this machine's network: ip route, cable, Wi-Fi"
        )
    return ok(f"{host}:{port} ({there}) answered in {took:.0f} ms")


@check("TLS chain", needs=("reachability",), limit=16.0)
def tls(asked: Asked) -> Finding:
    """The certificate that the SuperLink shows, verified as a node would."""
    if not asked.superlink:
        return skip(_NO_ADDRESS)
    from .peer import authorities, peer

    host, port = endpoint(asked.superlink)
    roots = asked.root_certificates
    trusted: list[Certificate] = []
    if roots is not None:
        try:
            trusted = authorities(roots)
        except (OSError, ValueError) as error:
            return fail(
                f"{roots} is no file of certificates ({getattr(error, 'strerror', None) or error})",
                "give the CA's certificate, the ca.crt that `fedmask keys ca` wrote, not its key",
            )
    there = peer(host, port)
    if there.kind != "tls":
        return _no_tls(there, roots)
    return _chain(host, port, there, roots, trusted)


def _no_tls(there: Peer, roots: Path | None) -> Finding:
    what = {"grpc": "gRPC without TLS", "http": "HTTP without TLS"}.get(there.kind)
    if what is None:
        return fail(
            f"it speaks neither TLS, nor gRPC, nor HTTP ({there.reason})",
            "that is not the SuperLink's port, or something between cuts the connection: check the address",
        )
    start = "start the SuperLink with --ssl-ca-certfile, --ssl-certfile and --ssl-keyfile (`fedmask keys server`)"
    if roots is not None:
        return fail(f"the server speaks {what}, a node with --root-certificates cannot connect", start)
    return warn(f"the server speaks {what}: anyone on the way can read and change everything", start)


def _chain(host: str, port: int, there: Peer, roots: Path | None, trusted: list[Certificate]) -> Finding:
    from .peer import days, host_names, named, refusal

    shown = there.certificate
    if shown is None:
        return fail("the server shows no certificate", "give the SuperLink --ssl-certfile")
    error = refusal(host, port, roots)
    if error is not None:
        return _refused(error, host, shown, roots, trusted)
    signers = [ca for ca in trusted if ca.subject == shown.issuer]
    left = min(days(one.not_valid_after_utc) for one in (shown, *signers))
    seen = f"issued by {named(shown.issuer)} for {', '.join(host_names(shown))}; {left:.0f} days left"
    if speaks() == "grpc" and there.inside != "h2":
        return warn(f"{seen}; inside TLS it does not speak HTTP/2", "that is not the SuperLink's gRPC port (9092)")
    if left < SOON:
        return warn(
            seen,
            "renew the server's certificate (`fedmask keys rotate server`) and restart the SuperLink before then",
        )
    return ok(seen)


def _refused(
    error: ssl.SSLCertVerificationError,
    host: str,
    shown: Certificate,
    roots: Path | None,
    trusted: list[Certificate],
) -> Finding:
    from .peer import days, host_names, named

    code, names = error.verify_code, ", ".join(host_names(shown)) or "no name at all"
    if code == _NOT_YET:
        start = max(one.not_valid_before_utc for one in (shown, *trusted))
        return fail(
            f"the certificate starts at {start:%Y-%m-%d %H:%M} UTC, here it is {datetime.now(UTC):%Y-%m-%d %H:%M}",
            "set this machine's clock (timedatectl set-ntp true); when it is right, the machine that made the "
            "certificate had a clock that is ahead: make it again",
        )
    if code == _EXPIRED:
        ended = min((shown, *trusted), key=lambda one: one.not_valid_after_utc)
        return fail(
            f"{named(ended.subject)} expired {-days(ended.not_valid_after_utc):.0f} days ago, by this clock",
            "first check that this clock is right; then `fedmask keys rotate server`, and restart the SuperLink",
        )
    if code in (_OTHER_NAME, _OTHER_ADDRESS):
        return fail(
            f"the certificate is for {names}, not for {host}",
            f"connect by one of its names, or make the server's certificate again, with --name {host} too",
        )
    if roots is None:
        return fail(
            f"this machine does not trust {named(shown.issuer)} ({error.verify_message})",
            "give the CA's certificate with --root-certificates, here and to the SuperNode",
        )
    again = any(ca.subject == shown.issuer for ca in trusted)
    held = "a CA of that name, but with another key" if again else " and ".join(named(ca.subject) for ca in trusted)
    return fail(
        f"wrong CA: the server's certificate is issued by {named(shown.issuer)}, {roots.name} holds {held} "
        f"({error.verify_message})",
        "copy ca.crt from where the server's certificate was signed, or sign the server's with this CA",
    )


@check("channel", needs=("reachability", "TLS chain"), limit=16.0)
def channel(asked: Asked) -> Finding:
    """A channel as a node opens it: gRPC until it is ready, or an HTTP GET."""
    if not asked.superlink:
        return skip(_NO_ADDRESS)
    from .peer import peer

    secure = peer(*endpoint(asked.superlink)).kind == "tls"
    return _grpc(asked, secure) if speaks() == "grpc" else _http(asked, secure)


def _grpc(asked: Asked, secure: bool) -> Finding:
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # the finding says it
    import grpc  # type: ignore[import-untyped]

    roots = None if asked.root_certificates is None else asked.root_certificates.read_bytes()
    how = "with TLS" if secure else "without TLS"
    opened = (
        grpc.secure_channel(asked.superlink, grpc.ssl_channel_credentials(roots))
        if secure
        else grpc.insecure_channel(asked.superlink)
    )
    began = time.monotonic()
    try:
        grpc.channel_ready_future(opened).result(timeout=SECONDS)
    except grpc.FutureTimeoutError:
        proxies = [k for k in ("grpc_proxy", "https_proxy", "http_proxy") if os.environ.get(k)]
        through = f"; gRPC goes through {proxies[0]}: add the SuperLink to no_proxy" if proxies else ""
        return fail(
            f"the port is open, a gRPC channel {how} is not ready within {SECONDS:g} s",
            "give the SuperLink's Fleet port (9092 by default), the same flwr on both machines, the CA that signed "
            f"its certificate{through}",
        )
    finally:
        opened.close()
    return ok(f"gRPC channel {how} ready in {1000 * (time.monotonic() - began):.0f} ms")


def _http(asked: Asked, secure: bool) -> Finding:
    status, _ = health(asked, secure)
    how = "https" if secure else "http"
    if status == 200:
        return ok(f"GET {how}://{asked.superlink}/health answered 200")
    return fail(
        f"GET {how}://{asked.superlink}/health answered {status}",
        f"give the SuperLink's HTTP port ({PORTS['http']} by default), and the same flwr on both machines",
    )


def health(asked: Asked, secure: bool) -> tuple[int, str]:
    """Status and Date of the SuperLink's health page."""
    from http.client import HTTPConnection, HTTPSConnection

    host, port = endpoint(asked.superlink)
    if secure:
        roots = asked.root_certificates
        context = ssl.create_default_context(cafile=None if roots is None else str(roots))
        connection: HTTPConnection = HTTPSConnection(host, port, timeout=SECONDS, context=context)
    else:
        connection = HTTPConnection(host, port, timeout=SECONDS)
    try:
        connection.request("GET", "/health")
        answer = connection.getresponse()
        return answer.status, answer.headers.get("Date", "")
    finally:
        connection.close()
