"""Start the warm server and, in this process, Flower's SuperNode."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from fedmask_flwr.memory import default_folder

from . import shim


def supernode(arguments: Sequence[str]) -> NoReturn:
    """Become ``flower-supernode`` with ``arguments``, with a warm server beside it.

    Raises
    ------
    FileNotFoundError
        When Flower's program is not on PATH.
    """
    # Flower finds its own programs on PATH: those of this environment, also where it is not activated.
    path = f"{os.environ.get('PATH', os.defpath)}{os.pathsep}{Path(sys.executable).parent}"
    program = shutil.which("flower-supernode", path=path)
    if program is None:
        raise FileNotFoundError("flower-supernode is not installed beside this Python: pip install fedmask-flwr")
    environment = {**os.environ, "PATH": path}
    try:
        folder = _folder()
    except OSError as error:  # a device without such a place trains as well, only later
        print(f"fedmask: client processes start cold, {error}", file=sys.stderr)
        os.execve(program, [program, *arguments], environment)  # noqa: S606
    place = folder / "socket"
    environment |= {"PATH": f"{folder / shim.BIN}{os.pathsep}{path}", shim.SOCKET: str(place)}
    command = [sys.executable, "-m", "fedmask_flwr.warm.server", str(place)]
    subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL)  # noqa: S603
    os.execve(program, [program, *arguments], environment)  # noqa: S606


def _folder() -> Path:
    """Make a private folder with the stand-in, where programs may be executed: not all temporary folders allow it.

    Raises
    ------
    OSError
        When there is none.
    """
    for base in (tempfile.gettempdir(), os.environ.get("XDG_RUNTIME_DIR"), str(default_folder())):
        if not base:
            continue
        try:
            Path(base).mkdir(parents=True, exist_ok=True)
            folder = Path(tempfile.mkdtemp(prefix="fedmask-warm-", dir=base))  # 0700
        except OSError:
            continue
        stand_in = folder / shim.BIN / "flwr-clientapp"
        stand_in.parent.mkdir()
        # -I and -S: nothing of the user's, no site packages, so that it starts in milliseconds.
        stand_in.write_text(f'#!/bin/sh\nexec "{sys.executable}" -I -S "{Path(shim.__file__)}" "$@"\n')
        stand_in.chmod(0o700)
        if os.access(stand_in, os.X_OK):
            return folder
        shutil.rmtree(folder)
    raise OSError("no folder allows programs: mount the temporary one without noexec")
