"""What a benchmark measured against what it should reach: the rows that `benchmarks/bench.py` gathers."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True, slots=True)
class Ratio:
    """One figure; ``target`` None is a figure without one."""

    name: str
    value: float
    target: float | None = None
    bound: Literal["at least", "at most"] = "at least"

    @property
    def met(self) -> bool | None:
        """Whether the target is reached; None without one."""
        if self.target is None:
            return None
        return self.value >= self.target if self.bound == "at least" else self.value <= self.target


def save(path: Path, ratios: Iterable[Ratio], **more: object) -> None:
    """Write JSON: ``ratios``, and whatever else the benchmark keeps."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"ratios": [asdict(r) for r in ratios], **more}, indent=1) + "\n")


def load(path: Path) -> list[Ratio]:
    """Read what `save` wrote."""
    return [Ratio(**row) for row in json.loads(path.read_text())["ratios"]]


def table(ratios: Iterable[Ratio]) -> str:
    """Markdown: figure, target, whether it is met."""
    lines = ["| figure | measured | target | |", "|---|---:|---:|---|"]
    for r in ratios:
        target = "" if r.target is None else f"{r.bound} {r.target:g}"
        lines.append(
            f"| {r.name} | {r.value:.4g} | {target} | {({None: '', True: 'met', False: 'MISSED'})[r.met]} |"
        )
    return "\n".join(lines)
