"""Who holds a lock file, asked of the kernel: to try the lock could refuse a server that starts in that moment."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["held", "sees_all"]

LOCKS = Path("/proc/locks")
_FIRST = "pid:[4026531836]"  # the namespace of the machine itself, a constant of Linux


def held(lock: Path, locks: Path | None = None) -> bool | None:
    """Whether a process has the file locked (flock); None where the kernel does not say.

    From inside a container only its own processes are seen (`sees_all`).
    """
    locks = LOCKS if locks is None else locks
    try:
        lines = locks.read_text().splitlines()
    except OSError:
        return None
    try:
        own = lock.stat()
    except OSError:
        return False
    for line in lines:
        words = line.split()
        if len(words) < 6 or words[1] != "FLOCK":
            continue
        major, minor, inode = words[5].split(":")
        device = os.makedev(int(major, 16), int(minor, 16))
        # Layered file systems (overlay, btrfs) tell another device than `stat` does, one without a major number.
        if int(inode) == own.st_ino and (device == own.st_dev or os.major(own.st_dev) == 0):
            return True
    return False


def sees_all() -> bool:
    """Whether the locks of every process of this machine are seen here."""
    try:
        return str(Path("/proc/self/ns/pid").readlink()) == _FIRST
    except OSError:
        return False
