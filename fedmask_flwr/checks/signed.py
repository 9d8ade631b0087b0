"""The SuperLink's clock, out of what it says to signed calls: gRPC tells no time, but a node's is checked."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

__all__ = ["AHEAD", "BEHIND", "ahead", "seek"]

AHEAD, BEHIND = 5, 305  # seconds that Flower allows the clock of a node that signs its messages
FARTHEST = 26 * 3600  # seconds that are searched: a wrong time zone, a wrong day
PATIENCE = 8.0  # seconds for the search
_CALL = "/flwr.proto.Fleet/SendNodeHeartbeat"
_REFUSED = "invalid timestamp"


def ahead(address: str, roots: bytes | None, *, secure: bool, wait: float) -> float | None:
    """Seconds by which this clock is ahead of the SuperLink's; None where it does not say. ``wait``: s a call.

    Each call of a node is signed with its time (flwr 1.39 over gRPC), and the time is checked before the key. The
    key here is thrown away, and the heartbeat is nobody's.

    Raises
    ------
    OSError
        Nobody answers.
    """
    import grpc  # type: ignore[import-untyped]
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP384R1())
    public = key.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    opened = (
        grpc.secure_channel(address, grpc.ssl_channel_credentials(roots))
        if secure
        else grpc.insecure_channel(address)
    )
    call: Any = opened.unary_unary(_CALL)

    def says(shift: float) -> str:
        moment = (datetime.now(UTC) + timedelta(seconds=shift)).isoformat()
        signature = key.sign(moment.encode("ascii"), ec.ECDSA(hashes.SHA256()))
        told = ("flwr-public-key-bin", public), ("flwr-timestamp", moment), ("flwr-signature-bin", signature)
        try:
            call(b"", metadata=told, timeout=wait)
        except grpc.RpcError as error:
            if error.code() is not grpc.StatusCode.UNAUTHENTICATED:
                raise OSError(error.details()) from error
            return str(error.details())
        return ""

    try:
        # Only a SuperLink that refuses a call from the year 2000 looks at the time at all.
        if _REFUSED not in says(-time.time() + 946684800).lower():
            return None
        return seek(lambda shift: _REFUSED not in says(shift).lower(), time.monotonic() + PATIENCE)
    finally:
        opened.close()


def seek(accepts: Callable[[float], bool], deadline: float) -> float:
    """Seconds by which this clock is ahead, where times from ``BEHIND`` before to ``AHEAD`` after are accepted.

    Infinite when it is farther off than ``FARTHEST``, or than could be searched in time.
    """
    step, low = AHEAD + BEHIND - 10, None
    for far in range(0, FARTHEST + step, step):
        for shift in {float(far), float(-far)}:
            if time.monotonic() > deadline:
                return float("inf")
            if low is None and accepts(shift):
                low = shift
        if low is not None:
            break
    if low is None:
        return float("inf")
    high = low + AHEAD + BEHIND  # refused, or just so
    while high - low > 1.0:
        middle = (low + high) / 2
        low, high = (middle, high) if accepts(middle) else (low, middle)
    return AHEAD - low
