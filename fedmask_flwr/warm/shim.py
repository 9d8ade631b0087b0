"""The stand-in for ``flwr-clientapp``: hands its arguments, environment and output to the warm server, and is done.

Run with ``python -I -S`` and importing almost nothing, since it is what each message waits for.
"""

import array
import os
import socket
import sys

SOCKET, BIN = "FEDMASK_WARM_SOCKET", "bin"  # the stand-in lies in a folder beside the socket


def ask(path: str, argv: list[str]) -> bool:
    """Have ``argv`` run in a fork of the server at ``path``; False when nobody is there."""
    import json

    told = json.dumps({"argv": argv, "env": dict(os.environ), "cwd": os.getcwd()}).encode()  # noqa: PTH109
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as link:
            link.settimeout(30)
            link.connect(path)
            fds = array.array("i", [1, 2]).tobytes()
            link.sendmsg([len(told).to_bytes(8, "little")], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, fds)])
            link.sendall(told)
            return link.recv(1) == b"1"
    except OSError:
        return False


def main() -> None:
    """Ask the server; where there is none, become the real program."""
    if ask(os.environ.get(SOCKET, ""), sys.argv[1:]):
        return
    here = os.path.join(os.path.dirname(os.environ.get(SOCKET, "")), BIN)  # noqa: PTH118, PTH120
    for folder in os.environ.get("PATH", "").split(os.pathsep):
        program = os.path.join(folder, "flwr-clientapp")  # noqa: PTH118
        if os.path.realpath(folder) != os.path.realpath(here) and os.access(program, os.X_OK):
            os.execv(program, ["flwr-clientapp", *sys.argv[1:]])  # noqa: S606
    sys.exit("flwr-clientapp is not on PATH: install flwr")


if __name__ == "__main__":
    main()
