"""The process that is warm: imports once, forks for every message."""

from __future__ import annotations

import gc
import importlib
import json
import os
import random
import shutil
import signal
import socket
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

OURS = "fedmask_flwr"  # not imported ahead: a run brings the version that it wants in its bundle
PRELOAD = ("torch", "pydantic", "safetensors.numpy", "flwr.clientapp", "flwr.supernode.runtime.run_clientapp")
ENTRY = "flwr.supernode.cli.flwr_clientapp:flwr_clientapp"
LARGEST = 1 << 24  # bytes of arguments and environment
ALIVE = 1.0  # seconds between looks whether the SuperNode is still there


def serve(path: Path, preload: Sequence[str] = PRELOAD, entry: str = ENTRY) -> None:
    """Listen at the socket ``path`` and run ``entry`` in a fork for each request, until the parent process ends.

    A module of ``preload`` that cannot be imported is left to the client, whose message then says what is wrong.
    """
    parent = os.getppid()
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(path))
        path.chmod(0o600)
        for name in preload:
            try:
                importlib.import_module(name)
            except ImportError as error:
                print(f"fedmask: {name} is not imported ahead: {error}", file=sys.stderr)
        gc.collect()
        gc.freeze()  # objects that are never looked at again stay shared between the processes
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # finished children leave nothing behind
        listener.listen(64)
        listener.settimeout(ALIVE)
        while os.getppid() == parent:
            try:
                link, _ = listener.accept()
            except TimeoutError:
                continue
            with link:
                _answer(listener, link, entry)


def _answer(listener: socket.socket, link: socket.socket, entry: str) -> None:
    fds: list[int] = []
    try:
        link.settimeout(30)
        head, fds, _, _ = socket.recv_fds(link, 8, 2)
        size = int.from_bytes(head, "little")
        if len(head) != 8 or len(fds) != 2 or size > LARGEST:
            return
        raw = b""
        while len(raw) < size and (part := link.recv(size - len(raw))):
            raw += part
        told = json.loads(raw)
        if os.fork() == 0:
            listener.close()
            _become(told, fds, entry, link)
        link.sendall(b"1")
    except (OSError, ValueError, KeyError):  # whoever asked runs the real program then
        traceback.print_exc()
    finally:
        for fd in fds:
            os.close(fd)


def _become(told: dict[str, object], fds: list[int], entry: str, link: socket.socket) -> NoReturn:
    """Be the program that was asked for, in the child."""
    code = 1
    try:
        link.close()
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for target, fd in enumerate(fds, 1):
            os.dup2(fd, target)
        environment, argv = told["env"], told["argv"]
        assert isinstance(environment, dict)
        assert isinstance(argv, list)
        os.environ.clear()
        os.environ.update(environment)
        os.chdir(str(told["cwd"]))
        sys.argv = ["flwr-clientapp", *argv]
        for name in [name for name in sys.modules if name.partition(".")[0] == OURS]:
            del sys.modules[name]
        _reseed()
        module, _, name = entry.partition(":")
        getattr(importlib.import_module(module), name)()
        code = 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _reseed() -> None:
    """Give global generators what a fresh process would have: their own seed, not the parent's."""
    random.seed()
    if (numpy := sys.modules.get("numpy")) is not None:
        numpy.random.seed()
    if (torch := sys.modules.get("torch")) is not None:
        torch.seed()


if __name__ == "__main__":
    try:
        serve(Path(sys.argv[1]))
    finally:
        shutil.rmtree(Path(sys.argv[1]).parent, ignore_errors=True)
