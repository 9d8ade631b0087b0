"""What ``fedmask doctor`` looks at: one function a check, each with its remedy.

Nothing here imports torch, flwr or grpc before a check needs it; torch runs in a process of its own, so that
one that crashes is a finding, not the end of the doctor.
"""

from __future__ import annotations

from importlib import import_module

from .base import CHECKS as CHECKS
from .base import Asked as Asked
from .base import Check as Check
from .base import Finding as Finding
from .base import check as check
from .base import endpoint as endpoint
from .base import examine as examine

__all__ = ["CHECKS", "Asked", "Check", "Finding", "check", "endpoint", "examine"]

for _room in ("software", "network", "clock", "machine", "disks", "content"):  # the order in which they are run
    import_module(f"{__name__}.{_room}")
