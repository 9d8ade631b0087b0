"""``fedmask keys`` called, and what a folder of keys holds."""

from __future__ import annotations

import contextlib
import ssl
import stat
from datetime import UTC, datetime

from typer.testing import CliRunner

from fedmask_flwr.cli import app

NAMES = ["localhost", "superlink", "fl.example.org", "127.0.0.1", "::1", "*.farm.example"]
NOW = datetime.now(UTC)


def fedmask(*args, code=0):
    result = CliRunner().invoke(app, ["keys", *map(str, args)])
    assert result.exit_code == code, (result.output, result.exception)
    return " ".join(result.output.split())


def modes(folder):
    return {path.name: stat.S_IMODE(path.stat().st_mode) for path in sorted(folder.iterdir())}


def files(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def shake(server, roots, host):
    """A TLS handshake in memory, as strict as Python 3.13 is."""
    ours = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    ours.load_cert_chain(server / "server.crt", server / "server.key")
    theirs = ssl.create_default_context(cafile=roots)
    theirs.verify_flags |= ssl.VERIFY_X509_STRICT
    up, down = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = [
        theirs.wrap_bio(down, up, server_hostname=host),
        ours.wrap_bio(up, down, server_side=True),
    ]
    for _ in range(4):
        for end in ends:
            with contextlib.suppress(ssl.SSLWantReadError):
                end.do_handshake()
    return ends[0].cipher()
