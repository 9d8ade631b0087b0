"""What a container or service may use: memory and processor limits of control groups, version 1 and 2."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Limits", "cores", "free_memory", "limits"]

ROOT = Path("/sys/fs/cgroup")
OWN = Path("/proc/self/cgroup")
MEMINFO = Path("/proc/meminfo")
_NO_LIMIT = 1 << 60  # version 1 writes a huge number where there is none


@dataclass(frozen=True, slots=True)
class Limits:
    """The tightest limits above this process: bytes that are left of ``memory``, processors; inf: none."""

    memory: float = math.inf
    left: float = math.inf
    processors: float = math.inf


def limits(root: Path = ROOT, own: Path = OWN) -> Limits:
    """Read the limits of this process's groups and of all above them."""
    memory = left = processors = math.inf
    for folder in _folders(root, own):
        for limit, used in (
            ("memory.max", "memory.current"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes"),
        ):
            most = _number(folder / limit)
            if most < _NO_LIMIT:
                # Pages of files that nobody maps go when memory is short.
                spare = most - (_number(folder / used, 0.0) - _idle_files(folder / "memory.stat"))
                memory, left = min(memory, most), min(left, spare)
        processors = min(processors, _quota(folder))
    return Limits(memory, left, processors)


def _folders(root: Path, own: Path) -> Iterator[Path]:
    """Folders of this process's groups, outermost first; in a container only the root is there."""
    lines = []
    with contextlib.suppress(OSError):
        lines = [line.split(":", 2) for line in own.read_text().splitlines()]
    places = {(root, "/"), *((root / name, "/") for name in ("memory", "cpu", "cpu,cpuacct"))}
    for parts in lines:
        if len(parts) == 3:
            places.add((root / parts[1] if parts[1] else root, parts[2]))
    seen = set()
    for base, path in sorted(places):
        here = base
        for part in ("", *(p for p in path.split("/") if p and p != "..")):
            here = here / part if part else here
            if here not in seen and here.is_dir():
                seen.add(here)
                yield here


def _number(path: Path, missing: float = math.inf) -> float:
    try:
        return float(path.read_text().strip())
    except (OSError, ValueError):  # "max"
        return missing


def _idle_files(path: Path) -> float:
    with contextlib.suppress(OSError, ValueError):
        pairs = dict(line.split() for line in path.read_text().splitlines())
        return float(pairs.get("total_inactive_file", pairs.get("inactive_file", 0)))
    return 0.0


def _quota(folder: Path) -> float:
    """Processors' worth of time, of either version."""
    with contextlib.suppress(OSError, ValueError):
        most, period = (folder / "cpu.max").read_text().split()
        return math.inf if most == "max" else float(most) / float(period)
    most_, period_ = _number(folder / "cpu.cfs_quota_us"), _number(folder / "cpu.cfs_period_us")
    return most_ / period_ if 0 < most_ < math.inf and 0 < period_ < math.inf else math.inf


def free_memory(meminfo: Path = MEMINFO) -> float:
    """Bytes that the machine can still give, inf where nobody can tell."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024.0
    return math.inf


def cores() -> int:
    """Processors that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
