"""Files that hold keys: named once they are whole, never put over another, private from their first byte on."""

from __future__ import annotations

import contextlib
import os
import secrets
import stat
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

__all__ = [
    "File",
    "KeysError",
    "create",
    "drop",
    "fresh",
    "plainly",
    "present",
    "read",
    "replace",
    "staged",
    "too_wide",
]

PRIVATE, PUBLIC = 0o600, 0o644
LIMIT = 1 << 20


class KeysError(Exception):
    """Keys could not be made, read or put in place; the message says why and what to do, never a secret."""


@dataclass(frozen=True, slots=True)
class File:
    """Name, content and mode of a file to be."""

    name: str
    data: bytes = field(repr=False)
    mode: int


def create(folder: Path, files: Sequence[File]) -> list[Path]:
    """Write all of `files`, or none and no folder; none of them may exist.

    Raises
    ------
    KeysError
        If one exists or cannot be written.
    """
    made: list[Path] = []
    folders: list[Path] = []
    with plainly(folder):
        try:
            _folder(folder, folders)
            with staged(folder, files) as hidden:
                for source, file in zip(hidden, files, strict=True):
                    os.link(source, folder / file.name)  # unlike a rename, it fails where a file is
                    made.append(folder / file.name)
            _sync(folder)
        except BaseException:
            for path in made:
                path.unlink(missing_ok=True)
            for path in reversed(folders):
                with contextlib.suppress(OSError):
                    path.rmdir()
            raise
    return made


def replace(moves: Sequence[tuple[Path, Path]]) -> None:
    """Give each new file the name of an old one, which is kept as ``*.old``; all of them, or none.

    A name always has a file, the old or the new one. A target that is missing is just filled.

    Raises
    ------
    KeysError
        If an ``*.old`` exists already, or a file cannot be moved.
    """
    kept = [(target, _old(target)) for _, target in moves if target.exists()]
    for _, old in kept:
        if old.exists():
            raise KeysError(
                f"{old} of an earlier renewal is still there; once nothing uses it, delete it with: "
                "fedmask keys rotate ... --drop-old"
            )
    linked: list[tuple[Path, Path]] = []
    moved: list[tuple[Path, Path]] = []
    with plainly(moves[0][1].parent):
        try:
            for target, old in kept:
                os.link(target, old)
                linked.append((target, old))
            for source, target in moves:
                source.replace(target)
                moved.append((source, target))
            _sync(moves[0][1].parent)
        except BaseException:
            for source, target in reversed(moved):
                os.link(target, source)
            for target, old in linked:
                old.replace(target)
                old.unlink(missing_ok=True)  # two names of one file: a rename between them does nothing
            raise


def drop(folder: Path, stem: str) -> list[Path]:
    """Delete what a renewal kept, ``STEM.{key,crt,pub}.old``; give the deleted files, `KeysError` if none."""
    gone = [path for kind in ("key", "crt", "pub") if (path := _old(folder / f"{stem}.{kind}")).exists()]
    if not gone:
        raise KeysError(f"{folder} holds no {stem}.*.old: nothing to delete")
    with plainly(folder, ""):
        for path in gone:
            path.unlink()
    return gone


def fresh(folder: Path, names: Iterable[str], remedy: str) -> None:
    """Raise `KeysError` if one of the files exists, even as a broken link."""
    for path in (folder / name for name in names):
        if os.path.lexists(path):
            raise KeysError(f"{path} exists and is not overwritten; {remedy}")


def present(paths: Iterable[Path], remedy: str) -> None:
    """Raise `KeysError` if one of the files is missing."""
    for path in paths:
        if not path.is_file():
            raise KeysError(f"{path} is missing; {remedy}")


def read(path: Path) -> bytes:
    """Read a small file; `KeysError` if it cannot be, or is larger than `LIMIT` bytes."""
    with plainly(path, ""), path.open("rb") as file:
        data = file.read(LIMIT + 1)
    if len(data) > LIMIT:
        raise KeysError(f"{path} is larger than {LIMIT} bytes: no key and no certificate")
    return data


def too_wide(path: Path) -> bool:
    """Whether someone else than its owner may read or write the file."""
    return bool(stat.S_IMODE(path.stat().st_mode) & 0o077)


@contextlib.contextmanager
def staged(folder: Path, files: Sequence[File]) -> Iterator[list[Path]]:
    """Write `files` in full under hidden names; what has not been moved by the end is deleted."""
    hidden: list[Path] = []
    try:
        for file in files:
            path = folder / f".{file.name}.{secrets.token_hex(8)}"
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
            handle = os.open(path, flags, PRIVATE)
            hidden.append(path)
            with open(handle, "wb") as stream:  # noqa: PTH123
                os.fchmod(handle, file.mode)  # whatever the umask
                stream.write(file.data)
                stream.flush()
                os.fsync(handle)
        yield hidden
    finally:
        for path in hidden:
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def plainly(where: Path, outcome: str = "; nothing was changed") -> Iterator[None]:
    """Turn the operating system's errors into `KeysError`."""
    try:
        yield
    except OSError as error:
        path = error.filename2 or error.filename or where
        raise KeysError(f"{path}: {error.strerror or error}{outcome}") from None


def _old(path: Path) -> Path:
    return path.with_name(f"{path.name}.old")


def _folder(path: Path, made: list[Path]) -> None:
    """Make the folder and its parents, 0700, and note those that were made."""
    missing: list[Path] = []
    while not path.exists():
        missing.append(path)
        path = path.parent
    for new in reversed(missing):
        new.mkdir(0o700)
        made.append(new)
        new.chmod(0o700)


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
