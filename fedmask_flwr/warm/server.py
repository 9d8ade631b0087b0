"""Processes that fork for those who ask: the warm one, which has imported torch, and its keeper."""

from __future__ import annotations

import contextlib
import gc
import importlib
import importlib.util
import json
import os
import random
import select
import shutil
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from . import shim
from .looks import pull_sooner
from .title import rename

OURS = "fedmask_flwr"  # not imported ahead: a run brings the version that it wants in its bundle
PRELOAD = ("torch", "pydantic", "safetensors.numpy", "flwr.clientapp", "flwr.supernode.runtime.run_clientapp")
COMPILER = "numba"  # of the extra `fast`
LARGEST = 1 << 24  # bytes of arguments and environment
ALIVE = 0.5  # seconds between looks whether the parent is still there
SOON, PATIENCE = 10.0, 60.0  # seconds: a server that ends sooner is started again later, but not later than this
VICTIM = 800  # of 1000: out of memory, the kernel ends a message's process and not the one that forks

Entry = str  # "module:function", imported in the fork


def listen(folder: Path, program: str) -> socket.socket:
    """Listen where the stand-in of ``program`` asks."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    place = shim.socket_of(str(folder), program)
    listener.bind(place)
    Path(place).chmod(0o600)
    listener.listen(64)
    return listener


def keep(
    folder: Path, parent: int, programs: dict[str, tuple[socket.socket, Entry]], preload: Sequence[str] = PRELOAD
) -> NoReturn:
    """Be the keeper: see that a warm server answers at the first of ``programs``, and fork for the others at once.

    It ends with the process ``parent``, and takes the folder along. A server that died is started again; who asks
    in the meantime waits. Without torch the keeper is small, so the kernel looks for memory elsewhere.
    """
    (warm, warm_entry), *others = programs.values()
    me, server, born, quick = os.getpid(), 0, 0.0, 0

    def look() -> None:
        nonlocal server, born, quick
        with contextlib.suppress(ChildProcessError):
            while (ended := os.waitpid(-1, os.WNOHANG)[0]) != 0:
                if ended == server:
                    quick = quick + 1 if time.monotonic() - born < SOON else 0
                    print("fedmask: the warm server ended and is started again", file=sys.stderr, flush=True)
                    server = 0
        if server == 0 and time.monotonic() - born >= min(quick and 2.0**quick, PATIENCE):
            born = time.monotonic()
            server = os.fork()
            if server == 0:
                _work(folder, me, lambda: _warm(warm, warm_entry, me, preload))

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    rename("fedmask: keeper of the warm server")
    _work(folder, 0, lambda: serve([(listener, entry, 0) for listener, entry in others], parent, look))


def _warm(listener: socket.socket, entry: Entry, parent: int, preload: Sequence[str]) -> None:
    rename("fedmask: warm server")
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    compiles = os.environ.get("FEDMASK_JIT") != "0" and importlib.util.find_spec(COMPILER) is not None
    imported([*preload, COMPILER] if compiles else preload)
    pull_sooner()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # finished children leave nothing behind
    serve([(listener, entry, VICTIM)], parent)


def _work(folder: Path, needed: int, work: Callable[[], None]) -> NoReturn:
    """Work, and end the process here whatever happens; the folder goes too, unless its process ``needed`` lives."""
    code = 1
    try:
        work()
        code = 0
    except SystemExit:
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        if os.getppid() != needed:
            shutil.rmtree(folder, ignore_errors=True)
        os._exit(code)


def imported(preload: Sequence[str]) -> None:
    """Import ahead; what cannot be is left to the client, whose message then says what is wrong."""
    for name in preload:
        try:
            importlib.import_module(name)
        except ImportError as error:
            print(f"fedmask: {name} is not imported ahead: {error}", file=sys.stderr)
    gc.collect()
    gc.freeze()  # objects that are never looked at again stay shared between the processes


def serve(
    places: Sequence[tuple[socket.socket, Entry, int]], parent: int, look: Callable[[], None] | None = None
) -> None:
    """Run each place's entry in a fork for every request, until the process ``parent`` is no longer this one's.

    The number is the fork's ``oom_score_adj``. ``look`` is called twice a second.
    """
    listeners = [listener for listener, *_ in places]
    while os.getppid() == parent:
        if look is not None:
            look()
        ready, _, _ = select.select(listeners, [], [], ALIVE)
        for listener, entry, adjust in places:
            if listener in ready:
                link, _ = listener.accept()
                with link:
                    _answer(link, listeners, entry, adjust)


def _answer(link: socket.socket, listeners: Sequence[socket.socket], entry: Entry, adjust: int) -> None:
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
            for listener in listeners:
                listener.close()
            _become(told, fds, entry, link, adjust)
        link.sendall(b"1")
    except (OSError, ValueError, KeyError):  # whoever asked runs the real program then
        traceback.print_exc()
    finally:
        for fd in fds:
            os.close(fd)


def _become(told: dict[str, object], fds: list[int], entry: Entry, link: socket.socket, adjust: int) -> NoReturn:
    """Be the program that was asked for, in the child."""
    code = 1
    try:
        link.close()
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if adjust:
            with contextlib.suppress(OSError):
                Path("/proc/self/oom_score_adj").write_text(f"{adjust}\n")
        for target, fd in enumerate(fds, 1):
            os.dup2(fd, target)
        environment, argv, program = told["env"], told["argv"], str(told["program"])
        assert isinstance(environment, dict)
        assert isinstance(argv, list)
        rename(" ".join([program, *argv[:2]]))  # not its token
        os.environ.clear()
        os.environ.update(environment)
        os.chdir(str(told["cwd"]))
        sys.argv = [program, *argv]
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
