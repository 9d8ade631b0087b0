"""Who answers at an address: TLS, gRPC without it, HTTP without it, or something else."""

from __future__ import annotations

import socket
import ssl
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from cryptography import x509

__all__ = ["SECONDS", "Peer", "authorities", "days", "host_names", "named", "peer", "refusal"]

SECONDS = 4.0  # for each connection
# An HTTP/2 client's preface, then an empty SETTINGS frame: a gRPC server answers with its own.
_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(3) + b"\x04" + bytes(5)
_SETTINGS = 4


@dataclass(frozen=True, slots=True)
class Peer:
    """What speaks there; with TLS its certificate, unverified, and what it agreed to speak inside ("" or "h2")."""

    kind: Literal["tls", "grpc", "http", "other"]
    certificate: x509.Certificate | None = None
    inside: str = ""
    reason: str = ""


def peer(host: str, port: int) -> Peer:
    """Find out who answers.

    Raises
    ------
    OSError
        Nobody does.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False  # only to look at it; `refusal` is what verifies
    context.verify_mode = ssl.CERT_NONE
    context.set_alpn_protocols(["h2", "http/1.1"])
    try:
        with (
            socket.create_connection((host, port), timeout=SECONDS) as plain,
            context.wrap_socket(plain, server_hostname=host) as tls,
        ):
            raw = tls.getpeercert(binary_form=True)
            certificate = x509.load_der_x509_certificate(raw) if raw else None
            return Peer("tls", certificate, tls.selected_alpn_protocol() or "")
    except (ssl.SSLError, ConnectionResetError, TimeoutError) as error:
        return Peer(_without_tls(host, port), reason=str(error))


def _without_tls(host: str, port: int) -> Literal["grpc", "http", "other"]:
    with socket.create_connection((host, port), timeout=SECONDS) as plain:
        try:
            plain.sendall(_PREFACE)
            got = plain.recv(64)
        except OSError:
            return "other"
    if got.startswith(b"HTTP/"):
        return "http"
    return "grpc" if len(got) >= 9 and got[3] == _SETTINGS else "other"


def refusal(host: str, port: int, roots: Path | None) -> ssl.SSLCertVerificationError | None:
    """Connect as a node does, trusting ``roots`` (None: this machine's); why it is refused, or None.

    Raises
    ------
    OSError
        Nobody answers with TLS.
    """
    context = ssl.create_default_context(cafile=None if roots is None else str(roots))
    context.verify_flags &= ~ssl.VERIFY_X509_STRICT  # gRPC is not as strict
    context.set_alpn_protocols(["h2", "http/1.1"])
    try:
        with (
            socket.create_connection((host, port), timeout=SECONDS) as plain,
            context.wrap_socket(plain, server_hostname=host),
        ):
            return None
    except ssl.SSLCertVerificationError as error:
        return error


def authorities(path: Path) -> list[x509.Certificate]:
    """Certificates in a PEM file.

    Raises
    ------
    OSError, ValueError
        It cannot be read, or holds none.
    """
    return x509.load_pem_x509_certificates(path.read_bytes())


def host_names(certificate: x509.Certificate) -> list[str]:
    """Names and addresses that a certificate is for; gRPC looks at these alone, not at the common name."""
    try:
        found = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return []
    names = [str(name) for name in found.get_values_for_type(x509.DNSName)]
    return names + [str(address) for address in found.get_values_for_type(x509.IPAddress)]


def named(name: x509.Name) -> str:
    """Write a subject or issuer."""
    return name.rfc4514_string() or "(no name)"


def days(until: datetime) -> float:
    """Days from now; negative when it is past."""
    return (until - datetime.now(UTC)).total_seconds() / 86400
