"""Start Flower's SuperNode in this process, with a warm server beside it."""

from __future__ import annotations

import os
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from fedmask_flwr.memory import default_folder

from . import node, shim

PREFIX, STALE = "fedmask-warm-", 60.0  # seconds after which a folder has its sockets, or never will
LONGEST = 103  # bytes of a socket's path; Linux takes 107, macOS no more
POLL = "FLWR_SUPEREXEC_TASK_POLL_INTERVAL"


def supernode(arguments: Sequence[str]) -> NoReturn:
    """Become ``flower-supernode`` with ``arguments``, with a warm server beside it.

    Raises
    ------
    FileNotFoundError
        When Flower's program is not on PATH.
    """
    # Flower finds its own programs on PATH: those of this environment, also where it is not activated.
    path = f"{os.environ.get('PATH', os.defpath)}{os.pathsep}{Path(sys.executable).parent}"
    program = shutil.which(node.SUPERNODE, path=path)
    if program is None:
        raise FileNotFoundError("flower-supernode is not installed beside this Python: pip install fedmask-flwr")
    # A message waits for its process half of this on average; Flower's own is 1 s. It asks on this machine only.
    environment = {POLL: "0.2", **os.environ, "PATH": path}
    try:
        folder = _folder()
    except OSError as error:  # a device without such a place trains as well, only later
        print(f"fedmask: client processes start cold, {error}", file=sys.stderr)
        os.execve(program, [program, *arguments], environment)  # noqa: S606
    environment |= {"PATH": f"{folder / shim.BIN}{os.pathsep}{path}", shim.FOLDER: str(folder)}
    command = [sys.executable, "-P", "-c", f"from {node.__name__} import main; main()", str(folder), *arguments]
    os.execve(sys.executable, command, environment)  # noqa: S606


def _folder() -> Path:
    """Make a private folder with the stand-ins, where programs may be executed: not all temporary folders allow it.

    Raises
    ------
    OSError
        When there is none.
    """
    for base in (tempfile.gettempdir(), os.environ.get("XDG_RUNTIME_DIR"), str(default_folder())):
        if not base or len(os.fsencode(shim.socket_of(f"{base}/{PREFIX}12345678", node.SUPEREXEC))) > LONGEST:
            continue
        try:
            Path(base).mkdir(parents=True, exist_ok=True)
            clean(Path(base))
            folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=base))  # 0700
        except OSError:
            continue
        stand_ins = [folder / shim.BIN / name for name in (node.CLIENT, node.SUPEREXEC)]
        stand_ins[0].parent.mkdir()
        for stand_in in stand_ins:
            # -I and -S: nothing of the user's, no site packages, so that it starts in milliseconds.
            stand_in.write_text(
                f'#!/bin/sh\nexec "{sys.executable}" -I -S "{Path(shim.__file__)}" {stand_in.name} "$@"\n'
            )
            stand_in.chmod(0o700)
        if all(os.access(stand_in, os.X_OK) for stand_in in stand_ins):
            return folder
        shutil.rmtree(folder)
    raise OSError("no folder with a short path allows programs: set TMPDIR to one that is mounted without noexec")


def clean(base: Path) -> None:
    """Remove folders of SuperNodes that were killed together with their keepers: nobody listens there."""
    for folder in base.glob(f"{PREFIX}*"):
        if folder.is_symlink() or time.time() - folder.stat().st_mtime < STALE:
            continue
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as link:
            try:
                link.connect(shim.socket_of(str(folder), node.SUPEREXEC))
            except (ConnectionRefusedError, FileNotFoundError):
                shutil.rmtree(folder, ignore_errors=True)
            except OSError:  # another user's
                continue
