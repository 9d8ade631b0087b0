"""``fedmask doctor``: look at this machine before, or after, something does not work."""

from __future__ import annotations

import contextlib
import json
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.text import Text

from .checks import Asked, Finding, endpoint, examine
from .config import RunConfig, scalar

__all__ = ["UsageError", "asking", "diagnose"]

_STYLES = {"ok": "green", "warn": "yellow", "fail": "bold red", "skip": "dim"}


class UsageError(ValueError):
    """An option cannot be read; the message says how to write it."""


def asking(
    *,
    superlink: str | None = None,
    root_certificates: Path | None = None,
    auth_key: Path | None = None,
    memory_dir: Path | None = None,
    run: Path | None = None,
    options: Mapping[str, str | int | float | bool] | None = None,
    pairs: Sequence[str] = (),
) -> Asked:
    """Check what the command line says; ``options`` are run-config keys, ``pairs`` further ``KEY=VALUE``.

    Raises
    ------
    UsageError
        With the fix in its message.
    """
    told = dict(options or {})
    fields = {field.alias or name: field for name, field in RunConfig.model_fields.items()}
    for pair in pairs:
        key, equals, text = (part.strip() for part in pair.partition("="))
        if not equals or not key:
            raise UsageError(f"-c {pair}: write KEY=VALUE")
        default = fields[key].default if key in fields else None
        try:
            told[key] = scalar(f"-c {key}", text, default)
        except ValueError as error:
            raise UsageError(str(error)) from error
    try:
        if superlink is not None:
            endpoint(superlink)
    except ValueError as error:
        raise UsageError(f"--superlink: {error}") from error
    if run is not None and not run.is_dir():
        raise UsageError(f"--run: {run} is no folder")
    asked = Asked(superlink or "", root_certificates, auth_key, memory_dir, run, tuple(sorted(told.items())))
    try:
        asked.flat()
    except (OSError, ValueError) as error:
        raise UsageError(f"--run: {error}; name the folder of a run's --out") from error
    return asked


def diagnose(asked: Asked, console: Console, *, as_json: bool = False) -> int:
    """Run every check and print its finding; 1 when any failed, else 0."""
    found: list[Finding] = []
    quiet = contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext()
    with quiet:  # whatever a data set of somebody's own prints
        for finding in examine(asked):
            found.append(finding)
            if not as_json:
                console.print(_line(finding), soft_wrap=True)
    count = Counter(finding.status for finding in found)
    if as_json:
        told = {"failed": count["fail"], "warned": count["warn"], "findings": [asdict(one) for one in found]}
        console.print(json.dumps(told, indent=1), soft_wrap=True, markup=False, highlight=False, emoji=False)
    else:
        summary = f"{count['ok']} ok, {count['warn']} to look at, {count['fail']} failed, {count['skip']} skipped"
        console.print(Text(summary, style="bold red" if count["fail"] else "bold"), soft_wrap=True)
    return int(count["fail"] > 0)


def _line(finding: Finding) -> Text:
    text = Text.assemble((f"{finding.status:<4}", _STYLES[finding.status]), f"  {finding.name}: {finding.seen}")
    if finding.remedy:
        text.append(f"\n      -> {finding.remedy}", style="italic")
    return text
