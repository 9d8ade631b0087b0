"""Appending to a file on a disk that may be full."""

from __future__ import annotations

from pathlib import Path


def append(path: Path, data: bytes) -> None:
    """Add ``data`` to the end of a file, whole or not at all.

    Raises
    ------
    OSError
        When the disk refuses; the file is as it was.
    """
    with path.open("ab", buffering=0) as file:  # a buffer would write its rest when it is closed
        end, left = file.tell(), memoryview(data)
        try:
            while left:  # a full disk takes what still fits before it refuses
                left = left[file.write(left) :]
        except OSError:
            file.truncate(end)
            raise
