"""Say what a key or certificate file is, for whom, until when, and what is wrong with it."""

from __future__ import annotations

import base64
import binascii
import hashlib
import stat
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from .certificate import certificates, extension
from .files import KeysError, read, too_wide

__all__ = ["Shown", "fingerprint", "public_key", "show"]

SOON = timedelta(days=30)


@dataclass(frozen=True, slots=True)
class Shown:
    """What a file is, facts as (name, value) pairs, and warnings that each name a remedy."""

    what: str
    facts: tuple[tuple[str, str], ...]
    warnings: tuple[str, ...]


def show(path: Path, *, now: datetime | None = None) -> Shown:
    """Describe a file that `fedmask keys` made, or one of its kind; a private key is never shown.

    Raises
    ------
    KeysError
        If the file cannot be read, or is neither key nor certificate.
    """
    data = read(path)
    if b"-----BEGIN CERTIFICATE-----" in data:
        return _certificate(path, now or datetime.now(UTC))
    if b"PRIVATE KEY-----" in data:
        return _private(path, data)
    public, comment = public_key(path)
    warnings = () if _fits(public) else ("Flower takes elliptic-curve keys only; make one: fedmask keys node",)
    facts = (("key", _kind(public)), ("name", comment or "-"), ("fingerprint", fingerprint(public)))
    return Shown("public key of a SuperNode (OpenSSH)", facts, warnings)


def public_key(path: Path) -> tuple[serialization.SSHPublicKeyTypes, str]:
    """Read an OpenSSH public key and its comment.

    Raises
    ------
    KeysError
        If the file is no such key; with a word on it if it is a private key, which must not travel.
    """
    data = read(path)
    if b"PRIVATE KEY-----" in data:
        raise KeysError(f"{path} is a private key, which stays on its machine; give the .pub beside it")
    try:
        key = serialization.load_ssh_public_key(data.strip())
    except (ValueError, UnsupportedAlgorithm, binascii.Error):
        raise KeysError(f"{path} is neither a key nor a certificate that fedmask knows") from None
    words = data.decode(errors="replace").split(maxsplit=2)
    return key, words[2].strip() if len(words) == 3 else ""


def fingerprint(key: serialization.SSHPublicKeyTypes) -> str:
    """Give a public key's fingerprint as ``ssh-keygen -l`` prints it."""
    line = key.public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    digest = hashlib.sha256(base64.b64decode(line.split()[1])).digest()
    return "SHA256:" + base64.b64encode(digest).decode().rstrip("=")


def _certificate(path: Path, now: datetime) -> Shown:
    chain = certificates(path)
    first = chain[0]
    basic = extension(first, x509.BasicConstraints)
    authority = basic is not None and basic.ca
    names = extension(first, x509.SubjectAlternativeName)
    start, end = first.not_valid_before_utc, first.not_valid_after_utc
    key = first.public_key()
    remedy = (
        "make a new CA in another folder (fedmask keys ca) and bring its ca.crt to every node"
        if authority
        else "renew it: fedmask keys rotate server"
    )
    warnings = []
    if now >= end:
        warnings.append(f"expired on {end:%Y-%m-%d}; {remedy}")
    elif now + SOON >= end:
        warnings.append(f"expires in {(end - now).days} days, on {end:%Y-%m-%d}; {remedy}")
    if now < start:
        warnings.append(f"not valid before {start:%Y-%m-%d %H:%M} UTC; is this machine's clock right?")
    warnings += _exposed(path)
    facts = [
        ("subject", first.subject.rfc4514_string()),
        ("issuer", first.issuer.rfc4514_string()),
        *([("names", ", ".join(str(name.value) for name in names))] if names else []),
        ("valid", f"{start:%Y-%m-%d %H:%M} to {end:%Y-%m-%d %H:%M} UTC, {max((end - now).days, 0)} days left"),
        ("key", _kind(key) if isinstance(key, ec.EllipticCurvePublicKey) else type(key).__name__),
        ("certificates in file", str(len(chain))),
        ("fingerprint", "SHA256 " + first.fingerprint(hashes.SHA256()).hex(":").upper()),
    ]
    return Shown("certificate of a CA" if authority else "certificate of a server", tuple(facts), tuple(warnings))


def _private(path: Path, data: bytes) -> Shown:
    ssh = b"OPENSSH PRIVATE KEY" in data
    what = f"private key ({'OpenSSH: of a SuperNode' if ssh else 'PEM: of a server or a CA'})"
    warnings = [f"others may read it; run: chmod 600 {path}"] if too_wide(path) else []
    warnings += _exposed(path)
    try:
        key = (serialization.load_ssh_private_key if ssh else serialization.load_pem_private_key)(data, None)
    except TypeError:
        remedy = "has a passphrase, which Flower cannot ask for; make one without: fedmask keys"
        return Shown(what, (), (*warnings, remedy))
    except (ValueError, UnsupportedAlgorithm):
        raise KeysError(f"{path} is a damaged private key, or of a kind that fedmask does not know") from None
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        return Shown(what, (("key", type(key).__name__),), (*warnings, "Flower takes elliptic-curve keys only"))
    public = key.public_key()
    facts = (("key", _kind(public)), ("fingerprint of its public key", fingerprint(public)))
    return Shown(what, facts, tuple(warnings))


def _exposed(path: Path) -> list[str]:
    """Warn of a folder in which someone else could put another file in this one's place."""
    mode = path.absolute().parent.stat().st_mode
    if mode & 0o022 and not mode & stat.S_ISVTX:
        return [f"others may replace it; run: chmod go-w {path.absolute().parent}"]
    return []


def _fits(key: serialization.SSHPublicKeyTypes) -> bool:
    return isinstance(key, ec.EllipticCurvePublicKey)


def _kind(key: serialization.SSHPublicKeyTypes) -> str:
    return f"elliptic curve {key.curve.name}" if isinstance(key, ec.EllipticCurvePublicKey) else type(key).__name__
