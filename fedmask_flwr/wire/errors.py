"""The two errors of the wire package."""

from __future__ import annotations


class WireError(ValueError):
    """A frame or a codec body is damaged, hostile, or meant for another model, round or field."""


class FilterBuildError(WireError):
    """The binary fuse filter of these keys could not be built; `pack` then falls back to ``rice``."""
