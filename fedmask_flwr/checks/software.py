"""Versions, the transport that they speak, and what importing the client costs."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from importlib import metadata

from .base import Asked, Finding, check, endpoint, fail, ok, warn

__all__ = ["BUDGET", "CLIENT", "imports", "transport", "versions"]

PACKAGE = "fedmask-flwr"
SHOWN = ("flwr", "torch", "grpcio", "numpy", "safetensors")
# Python and all that a client imports before it can train.
CLIENT = "fedmask_flwr.flower.apps"
BUDGET = 20.0  # seconds; a Raspberry Pi 4 imports torch in about ten
PORTS = {"grpc": 9092, "http": 8000}  # of the Fleet API, by Flower's defaults
HTTP_SINCE = (1, 40)
_LINE = re.compile(r"import time:\s*(\d+) \|\s*\d+ \| *([\w.]+)")


def requirements() -> Iterator[tuple[str, str]]:
    """Name and version range of every package that this one needs here, without extras."""
    from packaging.requirements import Requirement

    for text in metadata.requires(PACKAGE) or ():
        one = Requirement(text)
        if one.marker is None or one.marker.evaluate({"extra": ""}):
            yield one.name, str(one.specifier)


@check("versions")
def versions(_asked: Asked) -> Finding:
    """Installed packages against the ranges that fedmask-flwr declares."""
    from packaging.specifiers import SpecifierSet

    try:
        ours = metadata.version(PACKAGE)
        asks = metadata.metadata(PACKAGE)["Requires-Python"]
    except metadata.PackageNotFoundError:
        return warn(
            f"Python {platform.python_version()}; {PACKAGE} is not installed, so its ranges are unknown",
            f"pip install {PACKAGE}",
        )
    python = platform.python_version()
    if not SpecifierSet(asks).contains(python, prereleases=True):
        return fail(f"Python {python}, {PACKAGE} needs {asks}", f"install Python {asks} and {PACKAGE} in it")
    found, wrong = {"Python": python, PACKAGE: ours}, {}
    for name, wanted in requirements():
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "missing"
        if found[name] == "missing" or not SpecifierSet(wanted).contains(found[name], prereleases=True):
            wrong[name] = f"{name}{wanted}"
    names = dict.fromkeys(("Python", PACKAGE, *SHOWN, *wrong))
    seen = ", ".join(f"{name} {found[name]}" for name in names if name in found)
    seen += f"; {platform.system()} {platform.machine()}"
    if wrong:
        needs = list(wrong.values())
        return fail(f"{seen}; needed: {', '.join(needs)}", "pip install " + " ".join(f"'{one}'" for one in needs))
    return ok(seen)


def speaks() -> str:
    """What flwr of this version speaks between node and SuperLink: "grpc" or "http", "" without flwr."""
    try:
        release = metadata.version("flwr").split(".")
    except metadata.PackageNotFoundError:
        return ""
    number = tuple(int(part) if part.isdecimal() else 0 for part in release[:2])
    asked_for = os.environ.get("FLWR_INTERNAL_GRPC_FLEET_API") == "1"
    return "grpc" if number < HTTP_SINCE or asked_for else "http"


@check("transport")
def transport(asked: Asked) -> Finding:
    """What Flower speaks between node and SuperLink, and on which port by default."""
    kind = speaks()
    if not kind:
        return fail("flwr is not installed", f"pip install {PACKAGE}")
    version, port = metadata.version("flwr"), PORTS[kind]
    what = "gRPC (HTTP/2)" if kind == "grpc" else "protobuf over HTTP"
    seen = f"flwr {version}: node and SuperLink speak {what}, by default on port {port}"
    other = PORTS["http" if kind == "grpc" else "grpc"]
    if asked.superlink and endpoint(asked.superlink)[1] == other:
        return warn(
            f"{seen}; the port given is {other}",
            f"port {other} is what {'flwr 1.40 and later' if kind == 'grpc' else 'flwr up to 1.39'} uses: give the "
            f"SuperLink's Fleet port ({port} unless told another), and install the same flwr on all machines",
        )
    return ok(seen)


@check("import time", limit=200.0)
def imports(_asked: Asked) -> Finding:
    """What a client imports before it can train, in a fresh process: Flower starts one for every message."""
    try:
        total, packages = import_seconds()
    except RuntimeError as error:
        return fail(str(error), "install what is missing, or the wheels of this processor, then ask again")
    heavy = ", ".join(f"{name} {seconds:.1f}" for name, seconds in list(packages.items())[:5])
    seen = f"{total:.1f} s to import what a client needs ({heavy})"
    if total > BUDGET:
        return warn(
            f"{seen}; more than {BUDGET:g} s",
            "every message pays this: use a faster disk than an SD card, more than half a core, and compile once "
            "as the user that runs it (python -m compileall on the environment)",
        )
    return ok(seen)


def import_seconds(module: str = CLIENT) -> tuple[float, dict[str, float]]:
    """Seconds to import ``module`` in a fresh Python, start-up included, and by top-level package, heaviest first.

    Raises
    ------
    RuntimeError
        It cannot be imported.
    """
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    done = subprocess.run(  # noqa: S603 - this Python
        [sys.executable, "-X", "importtime", "-c", f"import {module}"],
        capture_output=True,
        text=True,
        env=env,
        timeout=180,
        check=False,
    )
    spent: Counter[str] = Counter()
    for micros, name in _LINE.findall(done.stderr):
        spent[name.partition(".")[0]] += int(micros)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip() and not line.startswith("import time:")]
        raise RuntimeError(f"{module} cannot be imported: {lines[-1] if lines else f'exit {done.returncode}'}")
    return spent.total() / 1e6, {name: micros / 1e6 for name, micros in spent.most_common()}
