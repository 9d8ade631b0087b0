"""What a tree of processes takes, looked at once a second in /proc: resident memory and CPU time, by kind.

Ray's daemons leave their parent, so the processes are known by a variable in the environment that they inherit.
"""

from __future__ import annotations

import os
import secrets
import threading
import time
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

MARK = "FEDMASK_SCALE"
PAGE, TICK = os.sysconf("SC_PAGE_SIZE"), os.sysconf("SC_CLK_TCK")
KINDS = {  # the first that its command line holds
    "ray::ClientAppActor": "clients",
    "ray::": "ray",
    "/ray/": "ray",
    "flwr-simulation": "server",  # the ServerApp and Flower's engine: threads of one process
    "flower-superlink": "superlink",
    "flower-superexec": "superlink",
}


@dataclass(slots=True)
class Sample:
    """One look: seconds since the start, bytes, and CPU seconds so far by kind."""

    at: float
    rss: int = 0
    pss: int = 0  # 0 where nobody looked: the kernel walks all pages for it
    parts: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    cpu: dict[str, float] = field(default_factory=lambda: defaultdict(float))


class Watch:
    """Samples of all processes started while it is on, a second apart; every fifth of proportional memory too."""

    def __init__(self, every: float = 1.0, shared: int = 5) -> None:
        self.every, self.shared, self.token = every, shared, secrets.token_hex(8)
        self.samples: list[Sample] = []
        self._cpu: dict[tuple[int, str], tuple[str, float]] = {}
        self._stop, self._began = threading.Event(), time.monotonic()
        self._thread = threading.Thread(target=self._loop, daemon=True)

    def __enter__(self) -> Watch:
        os.environ[MARK] = self.token
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        os.environ.pop(MARK)
        self._stop.set()
        self._thread.join()

    @property
    def now(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self._began

    def between(self, start: float, end: float) -> list[Sample]:
        """Samples of a stretch of time."""
        return [sample for sample in self.samples if start <= sample.at <= end]

    def cpu_between(self, start: float, end: float) -> dict[str, float]:
        """CPU seconds that each kind took, to a second's precision at the edges."""
        inside = self.between(start, end)
        if not inside:
            return {}
        first, last = inside[0].cpu, inside[-1].cpu
        return {kind: round(last[kind] - first.get(kind, 0.0), 2) for kind in sorted(last)}

    def _loop(self) -> None:
        needle = f"{MARK}={self.token}".encode()
        while not self._stop.wait(self.every):
            self.samples.append(self._look(needle))

    def _look(self, needle: bytes) -> Sample:
        sample = Sample(self.now)
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit():
                continue
            try:
                if needle not in (entry / "environ").read_bytes().split(b"\0"):
                    continue
                command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode("utf-8", "replace")
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
                rss = int((entry / "statm").read_text().split()[1]) * PAGE
                rollup = (entry / "smaps_rollup").read_text() if len(self.samples) % self.shared == 0 else ""
            except OSError:  # it ended
                continue
            kind = next((name for part, name in KINDS.items() if part in command), "other")
            sample.rss += rss
            sample.pss += sum(int(x.split()[1]) for x in rollup.splitlines() if x.startswith("Pss:")) * 1024
            sample.parts[kind] += rss
            self._cpu[int(entry.name), fields[19]] = kind, (int(fields[11]) + int(fields[12])) / TICK
        for kind, seconds in self._cpu.values():
            sample.cpu[kind] += seconds
        return sample
