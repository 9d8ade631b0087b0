"""Make and renew the CA, the SuperLink's certificate and the nodes' keys, in the formats that Flower reads.

That is PEM for TLS and OpenSSH for SuperNode authentication (Flower 1.39 to 1.42). Every key is on the curve
P-384, every certificate is signed with SHA-384.
"""

from __future__ import annotations

import ipaddress
import re
import secrets
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TypeVar

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from .files import (
    PRIVATE,
    PUBLIC,
    File,
    KeysError,
    create,
    fresh,
    plainly,
    present,
    read,
    replace,
    staged,
    too_wide,
)

__all__ = [
    "certificates",
    "extension",
    "load_ca",
    "make_ca",
    "make_node",
    "make_server",
    "renew_node",
    "renew_server",
]

SKEW = timedelta(minutes=5)  # a device whose clock is a little behind accepts a new certificate
CURVE = ec.SECP384R1
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_LABEL = re.compile(r"[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?")
E_ = TypeVar("E_", bound=x509.ExtensionType)


def make_ca(out: Path, *, days: int = 3650, now: datetime | None = None) -> list[Path]:
    """Make a certification authority: ``ca.key`` (stays where it is) and ``ca.crt`` (goes to every machine).

    Returns
    -------
    list of Path
        The two files.

    Raises
    ------
    KeysError
        If one of them exists, or cannot be written; then nothing is written.
    """
    fresh(
        out,
        ["ca.key", "ca.crt"],
        "choose another folder with --out: nodes trust a CA until they are told otherwise",
    )
    key = ec.generate_private_key(CURVE())
    # A name of its own: two CAs of one name confuse verifiers and their messages.
    name = _subject(f"fedmask CA {secrets.token_hex(4)}")
    certificate = (
        _certificate(name, name, key.public_key(), days, now)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(authority=True), critical=True)
        .sign(key, hashes.SHA384())
    )
    return create(out, [File("ca.key", _pem(key), PRIVATE), File("ca.crt", _crt(certificate), PUBLIC)])


def make_server(
    ca: Path, names: Sequence[str], out: Path, *, days: int = 365, now: datetime | None = None
) -> list[Path]:
    """Make the SuperLink's ``server.key`` and ``server.crt``, with the CA's certificate behind its own.

    Parameters
    ----------
    ca
        Folder of ``ca.key`` and ``ca.crt``.
    names
        Every DNS name and IP address by which a node, a runner or the ``flwr`` command reaches the SuperLink.
    out
        Folder of the new files.
    days
        Days of validity, cut to the CA's own.

    Raises
    ------
    KeysError
        If a name is none, the CA is unfit (`load_ca`), or a file exists or cannot be written.
    """
    fresh(out, ["server.key", "server.crt"], f"to renew them: fedmask keys rotate server --ca {ca} --dir {out}")
    return create(out, _server(ca, _alternatives(names), days, now))


def make_node(out: Path, *, name: str = "node", comment: str | None = None) -> list[Path]:
    """Make a SuperNode's key pair, on the node itself: ``NAME.key`` stays there, ``NAME.pub`` is registered.

    The comment in the public key, `name` when not given, becomes the node's name in the SuperLink.

    Raises
    ------
    KeysError
        If the name is unfit, or a file exists or cannot be written.
    """
    _check_name(name)
    fresh(out, [f"{name}.key", f"{name}.pub"], f"to renew them: fedmask keys rotate node --dir {out} --name {name}")
    return create(out, _pair(name, comment or name))


def renew_server(
    ca: Path, folder: Path, *, names: Sequence[str] = (), days: int = 365, now: datetime | None = None
) -> list[Path]:
    """Put a new server key and certificate in place, of the same names if not told; the old are kept as ``*.old``.

    The CA being the same, no node has to be told: old and new are trusted until they expire.

    Raises
    ------
    KeysError
        If there is nothing to renew, ``*.old`` of an earlier renewal is still there, or as for `make_server`.
    """
    where = [folder / "server.key", folder / "server.crt"]
    present(where, f"make them first: fedmask keys server --ca {ca} --out {folder} --name ...")
    alternatives = (
        _alternatives(names) if names else extension(certificates(where[1])[0], x509.SubjectAlternativeName)
    )
    if alternatives is None:
        raise KeysError(f"{where[1]} holds no names; give them with --name")
    with plainly(folder), staged(folder, _server(ca, alternatives, days, now)) as new:
        replace(list(zip(new, where, strict=True)))
    return where


def renew_node(folder: Path, *, name: str = "node", switch: bool = False) -> list[Path]:
    """Renew a node's keys in two steps, so that at every moment the node holds a key that is registered.

    First a new pair ``NAME.next.{key,pub}`` is made beside the one in use. When it has been registered, the
    same call with `switch` gives it the place of the old pair, which is kept as ``*.old``.

    Raises
    ------
    KeysError
        If there is nothing to renew, the step has been done, or a file cannot be written.
    """
    _check_name(name)
    key, public, following = folder / f"{name}.key", folder / f"{name}.pub", f"{name}.next"
    new = [folder / f"{following}.pub", folder / f"{following}.key"]
    present([key], f"make it first: fedmask keys node --out {folder} --name {name}")
    if switch:
        present(new, f"make it first, without --switch: fedmask keys rotate node --dir {folder} --name {name}")
        replace(list(zip(new, [public, key], strict=True)))  # the key last: it is what a SuperNode reads
        return [key, public]
    fresh(folder, [path.name for path in new], "register the .pub, then call again with --switch")
    words = read(public).decode(errors="replace").split(maxsplit=2) if public.exists() else []
    return create(folder, _pair(following, words[2] if len(words) == 3 else name))


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


def _server(ca: Path, names: x509.SubjectAlternativeName, days: int, now: datetime | None) -> list[File]:
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


def _pair(name: str, comment: str) -> list[File]:
    key = ec.generate_private_key(CURVE())
    public = key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption()
    )
    line = public + f" {' '.join(comment.split())}\n".encode()
    return [File(f"{name}.key", private, PRIVATE), File(f"{name}.pub", line, PUBLIC)]


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


def _alternatives(names: Sequence[str]) -> x509.SubjectAlternativeName:
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


def _check_name(name: str) -> None:
    if not _NAME.fullmatch(name):
        raise KeysError(
            f"{name!r}: a node's name is 1 to 64 letters, digits, '.', '_' or '-', a letter or digit first"
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
