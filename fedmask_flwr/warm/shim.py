"""The stand-in for one of Flower's programs: hands arguments, environment and output to who forks, and is done.

Run with ``python -I -S`` and importing almost nothing, since it is what each message waits for.
"""

import array
import os
import socket
import sys

FOLDER, BIN = "FEDMASK_WARM", "bin"  # the stand-ins lie in a folder of that folder, beside the sockets
WAIT = 60  # seconds: a server that is just being started again is worth waiting for


def socket_of(folder: str, program: str) -> str:
    """Where to ask for ``program``."""
    return os.path.join(folder, f"{program}.socket")  # noqa: PTH118


def ask(program: str, argv: "list[str]") -> bool:
    """Have ``program`` run in a fork of the server; False when nobody is there."""
    import json

    folder = os.environ.get(FOLDER, "")
    told = json.dumps({"program": program, "argv": argv, "env": dict(os.environ), "cwd": os.getcwd()}).encode()  # noqa: PTH109
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as link:
            link.settimeout(WAIT)
            link.connect(socket_of(folder, program))
            fds = array.array("i", [1, 2]).tobytes()
            link.sendmsg([len(told).to_bytes(8, "little")], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, fds)])
            link.sendall(told)
            return link.recv(1) == b"1"
    except OSError:
        return False


def main() -> None:
    """Ask the server; where there is none, become the real program."""
    program, argv = sys.argv[1], sys.argv[2:]
    if ask(program, argv):
        return
    here = os.path.join(os.environ.get(FOLDER, ""), BIN)  # noqa: PTH118
    for folder in os.environ.get("PATH", "").split(os.pathsep):
        real = os.path.join(folder, program)  # noqa: PTH118
        if os.path.realpath(folder) != os.path.realpath(here) and os.access(real, os.X_OK):
            os.execv(real, [program, *argv])  # noqa: S606
    sys.exit(f"{program} is not on PATH: install flwr")


if __name__ == "__main__":
    main()
