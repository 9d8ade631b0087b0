"""A check is a function from what was asked to a finding; the registry runs them and lets none of them escape."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

__all__ = ["CHECKS", "Asked", "Check", "Finding", "check", "endpoint", "examine", "fail", "ok", "skip", "warn"]

Status = Literal["ok", "warn", "fail", "skip"]
Scalar = str | int | float | bool


@dataclass(frozen=True, slots=True)
class Finding:
    """What one check saw; ``remedy`` says what to do where it is not well."""

    name: str
    status: Status
    seen: str
    remedy: str = ""
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Asked:
    """What the doctor was told to look at; everything may be missing.

    ``told`` are pairs of run-config keys and values; they win over those in the folder ``run``.
    """

    superlink: str = ""
    root_certificates: Path | None = None
    auth_key: Path | None = None
    memory_dir: Path | None = None
    run: Path | None = None
    told: tuple[tuple[str, Scalar], ...] = ()

    def flat(self) -> dict[str, Any]:
        """Run-config keys: those of the run's folder, then those that were told.

        Raises
        ------
        OSError, ValueError
            The folder's ``config.json`` cannot be read.
        """
        written = {} if self.run is None else json.loads((self.run / "config.json").read_text("utf-8"))
        if not isinstance(written, dict):
            raise ValueError(f"{self.run}/config.json holds no table of settings")
        # Folders of the machine that wrote them: this may be another.
        here = {k: v for k, v in written.items() if k not in ("out", "memory-dir", "compare", "seeds")}
        return {**here, **dict(self.told)}


Look = Callable[[Asked], Finding]


@dataclass(frozen=True, slots=True)
class Check:
    """One check: it is skipped unless those it ``needs`` were well, and given up after ``limit`` seconds."""

    name: str
    look: Look
    needs: tuple[str, ...]
    limit: float


CHECKS: dict[str, Check] = {}


def check(name: str, *, needs: tuple[str, ...] = (), limit: float = 15.0) -> Callable[[Look], Look]:
    """Register a function as a check; checks run in the order of registration."""

    def register(look: Look) -> Look:
        CHECKS[name] = Check(name, look, needs, limit)
        return look

    return register


def ok(seen: str) -> Finding:
    """Nothing to do."""
    return Finding("", "ok", seen)


def warn(seen: str, remedy: str) -> Finding:
    """It works, but somebody should look."""
    return Finding("", "warn", seen, remedy)


def fail(seen: str, remedy: str) -> Finding:
    """It cannot work like this."""
    return Finding("", "fail", seen, remedy)


def skip(seen: str) -> Finding:
    """Not looked at, and why."""
    return Finding("", "skip", seen)


def examine(asked: Asked, checks: Iterable[Check] | None = None) -> Iterator[Finding]:
    """Run the checks in their order, one finding each. None raises, none takes longer than its limit."""
    found: dict[str, Finding] = {}
    for one in CHECKS.values() if checks is None else checks:
        began = time.monotonic()
        lacking = [name for name in one.needs if name in found and found[name].status not in ("ok", "warn")]
        got = skip(f"needs {' and '.join(lacking)}") if lacking else _answer(one, asked)
        found[one.name] = replace(got, name=one.name, seconds=round(time.monotonic() - began, 3))
        yield found[one.name]


def _answer(one: Check, asked: Asked) -> Finding:
    """Ask in a thread: a name server or a network disk that never answers must not hold up the rest."""
    got: list[Finding] = []

    def work() -> None:
        try:
            got.append(one.look(asked))
        except BaseException as error:
            got.append(fail(f"{type(error).__name__}: {error}", f"the check itself failed on {_where(error)}"))

    thread = threading.Thread(target=work, name=f"doctor: {one.name}", daemon=True)
    thread.start()
    thread.join(one.limit)
    slow = fail(
        f"no answer within {one.limit:g} s",
        "something that it waits for hangs: a name server, a network disk, or a machine short of memory or cores",
    )
    return got[0] if got else slow


def _where(error: BaseException) -> str:
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return "an unknown line" if trace is None else f"{trace.tb_frame.f_code.co_name}, line {trace.tb_lineno}"


def endpoint(text: str) -> tuple[str, int]:
    """Split ``HOST:PORT`` or ``[IPV6]:PORT``.

    Raises
    ------
    ValueError
        It is neither.
    """
    host, colon, port = text.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not colon or not host or "/" in host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise ValueError(f"{text!r} is no address: write HOST:PORT, such as superlink.example.org:9092")
    return host, int(port)
