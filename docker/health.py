"""Exit 0 when every ``host:port`` of the arguments takes a connection, 1 with the reason otherwise."""

from __future__ import annotations

import socket
import sys

WAIT = 3.0  # seconds

for address in sys.argv[1:]:
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), WAIT).close()
    except OSError as error:
        sys.exit(f"{address}: {error}")
