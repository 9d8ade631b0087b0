"""What a forked process is called in lists of processes: it has its parent's command line otherwise."""

from __future__ import annotations

import contextlib
import ctypes
import sys
from pathlib import Path


def rename(title: str) -> None:
    """Write ``title`` over this process's command line, as far as it reaches; only Linux shows it."""
    if sys.platform != "linux":
        return
    with contextlib.suppress(OSError, ValueError, IndexError):
        # proc(5): arg_start and arg_end are fields 48 and 49; the second, a name in parentheses, may hold blanks.
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        start, room = int(fields[45]), int(fields[46]) - int(fields[45])
        if start and room > 1:
            text = title.encode()[: room - 1]
            ctypes.memmove(start, text.ljust(room, b"\0"), room)
