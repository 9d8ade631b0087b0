"""Certificates and keys as bytes: X.509 of a CA and of a SuperLink, OpenSSH pairs, all on the curve P-384."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TypeVar

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from .files import PRIVATE, PUBLIC, File, KeysError, present, read, too_wide

__all__ = ["alternatives", "authority", "certificates", "extension", "load_ca", "pair", "server"]

SKEW = timedelta(minutes=5)  # a device whose clock is a little behind accepts a new certificate
CURVE = ec.SECP384R1
_LABEL = re.compile(r"[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?")
E_ = TypeVar("E_", bound=x509.ExtensionType)


def authority(common: str, days: int, now: datetime | None) -> list[File]:
    """``ca.key`` and ``ca.crt`` of a new CA."""
    key, name = ec.generate_private_key(CURVE()), _subject(common)
    certificate = (
        _certificate(name, name, key.public_key(), days, now)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(authority=True), critical=True)
        .sign(key, hashes.SHA384())
    )
    return [File("ca.key", _pem(key), PRIVATE), File("ca.crt", _crt(certificate), PUBLIC)]


def server(ca: Path, names: x509.SubjectAlternativeName, days: int, now: datetime | None) -> list[File]:
    """``server.key`` and ``server.crt`` by the CA in a folder, for at most as long as that is valid."""
    signer, chain = load_ca(ca, now)
    key = ec.generate_private_key(CURVE())
    known = extension(chain[0], x509.SubjectKeyIdentifier)
    of_issuer = (
        x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key())
        if known is None
        else x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(known)
    )
    latest = chain[0].not_valid_after_utc
    certificate = (
        _certificate(_subject("fedmask SuperLink"), chain[0].subject, key.public_key(), days, now, latest)
        .add_extension(names, critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(authority=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(of_issuer, critical=False)
        .sign(signer, hashes.SHA384())
    )
    text = b"".join(_crt(part) for part in [certificate, *chain])
    return [File("server.key", _pem(key), PRIVATE), File("server.crt", text, PUBLIC)]


def pair(name: str, comment: str) -> list[File]:
    """``NAME.key`` and ``NAME.pub`` of a new SuperNode."""
    key = ec.generate_private_key(CURVE())
    public = key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption()
    )
    line = public + f" {' '.join(comment.split())}\n".encode()
    return [File(f"{name}.key", private, PRIVATE), File(f"{name}.pub", line, PUBLIC)]


def alternatives(names: Sequence[str]) -> x509.SubjectAlternativeName:
    """What a server may be called; `KeysError` for what is neither a DNS name nor an IP address."""
    if not names:
        raise KeysError("a server's certificate needs the names that nodes call it by; give each with --name")
    return x509.SubjectAlternativeName([_alternative(name) for name in dict.fromkeys(names)])


def _alternative(name: str) -> x509.GeneralName:
    """Read an IP address or a DNS name, which may begin with ``*.``."""
    try:
        return x509.IPAddress(ipaddress.ip_address(name.strip("[]")))
    except ValueError:
        pass
    try:
        plain = name.encode("idna").decode().lower()
    except UnicodeError:
        plain = ""
    labels = plain.removeprefix("*.").split(".")
    # A last label of digits only is a mistyped IP address.
    if len(plain) > 253 or not all(_LABEL.fullmatch(label) for label in labels) or labels[-1].isdigit():
        raise KeysError(f"{name!r} is no DNS name and no IP address; give it without scheme, port and path")
    return x509.DNSName(plain)


def load_ca(ca: Path, now: datetime | None = None) -> tuple[ec.EllipticCurvePrivateKey, list[x509.Certificate]]:
    """Read a CA's key and certificates, and check that they can sign: a CA's, valid now, of one pair.

    Raises
    ------
    KeysError
        If they cannot; the message says why.
    """
    where, secret, moment = ca / "ca.crt", ca / "ca.key", now or datetime.now(UTC)
    present([secret, where], "the folder of a CA is made by: fedmask keys ca")
    if too_wide(secret):
        raise KeysError(f"{secret} can be read by others than its owner; run: chmod 600 {secret}")
    chain = certificates(where)
    start, end = chain[0].not_valid_before_utc, chain[0].not_valid_after_utc
    basic = extension(chain[0], x509.BasicConstraints)
    if basic is None or not basic.ca:
        raise KeysError(f"{where} is not the certificate of a CA; make one: fedmask keys ca")
    if moment >= end:
        raise KeysError(f"{where} expired on {end:%Y-%m-%d}; make a new CA in another folder: fedmask keys ca")
    if moment < start:
        raise KeysError(f"{where} is valid from {start:%Y-%m-%d %H:%M} UTC on; is this machine's clock right?")
    try:
        key = serialization.load_pem_private_key(read(secret), None)
    except (TypeError, ValueError):
        raise KeysError(f"{secret} is not a PEM private key without a passphrase") from None
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise KeysError(f"{secret} is not an elliptic-curve key; make a CA: fedmask keys ca")
    if key.public_key() != chain[0].public_key():
        raise KeysError(f"{secret} and {where} belong to different CAs; bring the two files of one back together")
    return key, chain


def certificates(path: Path) -> list[x509.Certificate]:
    """Read the certificates of a PEM file; `KeysError` if there is none."""
    try:
        return x509.load_pem_x509_certificates(read(path))
    except ValueError:
        raise KeysError(f"{path} holds no PEM certificate") from None


def extension(certificate: x509.Certificate, kind: type[E_]) -> E_ | None:
    """Give a certificate's extension of one kind, or None."""
    try:
        return certificate.extensions.get_extension_for_class(kind).value
    except (x509.ExtensionNotFound, ValueError):
        return None


def _certificate(
    subject: x509.Name,
    issuer: x509.Name,
    public: ec.EllipticCurvePublicKey,
    days: int,
    now: datetime | None,
    latest: datetime | None = None,
) -> x509.CertificateBuilder:
    if not 1 <= days <= 36500:
        raise KeysError(f"--days {days}: give 1 to 36500 days")
    moment = (now or datetime.now(UTC)).replace(microsecond=0)
    end = moment + timedelta(days=days)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public)
        .serial_number(x509.random_serial_number())
        .not_valid_before(moment - SKEW)
        .not_valid_after(end if latest is None else min(end, latest))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
    )


def _subject(common: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common)])


def _usage(*, authority: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not authority,
        key_cert_sign=authority,
        crl_sign=authority,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def _crt(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)
