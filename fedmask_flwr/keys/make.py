"""Make and renew the CA, the SuperLink's certificate and the nodes' keys, in the formats that Flower reads.

That is PEM for TLS and OpenSSH for SuperNode authentication (Flower 1.39 to 1.42). Every key is on the curve
P-384, every certificate is signed with SHA-384.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from cryptography.x509 import SubjectAlternativeName

from .certificate import alternatives, authority, certificates, extension, pair, server
from .files import KeysError, create, fresh, plainly, present, read, replace, staged

__all__ = ["make_ca", "make_node", "make_server", "renew_node", "renew_server"]

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


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
    # A name of its own: two CAs of one name confuse verifiers and their messages.
    return create(out, authority(f"fedmask CA {secrets.token_hex(4)}", days, now))


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
    return create(out, server(ca, alternatives(names), days, now))


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
    return create(out, pair(name, comment or name))


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
    called = alternatives(names) if names else extension(certificates(where[1])[0], SubjectAlternativeName)
    if called is None:
        raise KeysError(f"{where[1]} holds no names; give them with --name")
    with plainly(folder), staged(folder, server(ca, called, days, now)) as new:
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
    return create(folder, pair(following, words[2] if len(words) == 3 else name))


def _check_name(name: str) -> None:
    if not _NAME.fullmatch(name):
        raise KeysError(
            f"{name!r}: a node's name is 1 to 64 letters, digits, '.', '_' or '-', a letter or digit first"
        )
