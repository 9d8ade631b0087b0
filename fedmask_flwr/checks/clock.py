"""The clock: against what is known to have happened, and against the SuperLink's."""

from __future__ import annotations

import ctypes
import math
import os
import time
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path

from .base import Asked, Finding, check, endpoint, fail, ok, warn
from .network import SECONDS, health
from .signed import AHEAD, BEHIND, ahead
from .software import speaks

__all__ = ["clock"]

_SLACK = 60.0  # seconds: file systems of other machines, written pages


@check("clock", limit=16.0)
def clock(asked: Asked) -> Finding:
    """What can be told of this clock without a time server: it is not before what is known to have happened."""
    now = time.time()
    here = f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC"
    latest, what = max([_installed(), *_written(asked), *_issued(asked)])
    remedy = (
        "set it (timedatectl set-ntp true; a Raspberry Pi has no clock of its own): TLS refuses certificates, and "
        f"Flower, without a word, a node whose clock is more than {AHEAD} s ahead of the SuperLink's or {BEHIND} s "
        "behind"
    )
    try:
        off = _off(asked, now)
    except OSError:
        off = None  # the channel's finding says why
    known = ""
    if off is not None:
        far = f"{abs(off):.0f} s {'ahead of' if off > 0 else 'behind'}" if math.isfinite(off) else "hours from"
        known = f"{here}, {far} the SuperLink's"
        if not -BEHIND < off < AHEAD:
            return fail(known, remedy)
    if latest > now + _SLACK:
        return fail(f"{here} is {latest - now:.0f} s before {what}", remedy)
    if known:
        return ok(known)
    seen = f"{here}, after {what}"
    unknown = (
        "" if not asked.superlink else "; the SuperLink does not tell its time: compare `date -u` on both machines"
    )
    if _disciplined():
        return ok(f"{seen}; the kernel says that a time service keeps it{unknown}")
    return warn(f"{seen}; the kernel knows of no time service that keeps it{unknown}", remedy)


def _installed() -> tuple[float, str]:
    return Path(__file__).stat().st_mtime, "fedmask-flwr was installed"


def _written(asked: Asked) -> list[tuple[float, str]]:
    files = [] if asked.run is None else [p for p in asked.run.glob("*") if p.is_file()]
    return [(p.stat().st_mtime, f"{p.name} of the run was written") for p in files]


def _issued(asked: Asked) -> list[tuple[float, str]]:
    if not asked.superlink:
        return []
    from .peer import peer

    try:
        shown = peer(*endpoint(asked.superlink)).certificate
    except OSError:
        return []
    return [] if shown is None else [(shown.not_valid_before_utc.timestamp(), "the server's certificate starts")]


def _off(asked: Asked, now: float) -> float | None:
    """Seconds by which this clock is ahead of the SuperLink's, by HTTP's Date or what it says to signed calls."""
    if not asked.superlink:
        return None
    from .peer import peer

    secure = peer(*endpoint(asked.superlink)).kind == "tls"
    if speaks() == "grpc":
        os.environ.setdefault("GRPC_VERBOSITY", "NONE")
        roots = None if asked.root_certificates is None else asked.root_certificates.read_bytes()
        return ahead(asked.superlink, roots, secure=secure, wait=SECONDS)
    _, date = health(asked, secure)
    return now - parsedate_to_datetime(date).timestamp() if date else None


def _disciplined() -> bool:
    """Whether the kernel's clock is set by a time service; False where nobody can tell."""
    try:
        # struct timex is at most 208 bytes; modes = 0 only reads. TIME_ERROR (5): not synchronised.
        return ctypes.CDLL(None).adjtimex(ctypes.create_string_buffer(512)) in range(5)
    except (OSError, AttributeError):
        return False
