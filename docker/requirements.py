"""Say what the image installs, for pip: ``needed.txt`` and ``pinned.txt`` of pyproject.toml and constraints.txt.

Where the base image has torch, that very build stays. Arguments are packages to install besides, or instead of a
requirement of the same name.
"""

from __future__ import annotations

import re
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


def name_of(requirement: str) -> str:
    """``torch`` of ``torch>=2.6``."""
    found = re.match(r"[A-Za-z0-9._-]+", requirement)
    return found[0].lower().replace("_", "-") if found else ""


def main(extra: list[str]) -> None:
    """Write both files to the current folder."""
    project = tomllib.loads(Path("pyproject.toml").read_text("utf-8"))["project"]
    needed = [line for line in project["dependencies"] if name_of(line) not in set(map(name_of, extra))]
    pinned = Path("constraints.txt").read_text("utf-8").splitlines()
    try:
        torch = version("torch")
    except PackageNotFoundError:
        pass
    else:  # torchvision then follows torch, not the file
        pinned = [line for line in pinned if name_of(line) not in {"torch", "torchvision"}]
        pinned.append(f"torch=={torch}")
    Path("needed.txt").write_text("\n".join([*needed, *extra, ""]), "utf-8")
    Path("pinned.txt").write_text("\n".join([*pinned, ""]), "utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
