"""Read what a method allows out of a frame, and nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fedmask_flwr.wire import BitCodec, Frame, Payload, Received, WireError, read

from .base import Fields, Known, Memory, Method, Turn


def read_fields(
    frame: Frame,
    allowed: Fields,
    known: Known,
    *,
    digest: bytes | None = None,
    round_: int | None = None,
    require: Mapping[str, str] | None = None,
    nbytes: int = 0,
) -> Received:
    """Decode fields of the allowed names, kinds and numbers of elements.

    Raises
    ------
    WireError
        When the frame is of another model or round, or holds other fields.
    """
    expect = {name: numel for name, (_, numel) in allowed.items()}
    received = read(frame, digest=digest, round_=round_, known=known, expect=expect, require=require, nbytes=nbytes)
    for name, codec in received.codecs.items():
        if codec.kind != allowed[name][0]:
            raise WireError(f"field {name!r} came as {codec.kind}, expected {allowed[name][0]}")
    return received


def read_reply(
    frame: Frame | bytes,
    method: Method[Any],
    got: Payload,
    turn: Turn,
    shared: Memory,
    *,
    digest: bytes | None = None,
    lossy: str = "",
) -> Received:
    """Decode a client's reply to ``got``; ``shared`` is what the server holds of its memory.

    ``lossy`` is the run's codec, where it may flip bits.

    Raises
    ------
    WireError
        When the frame is of another model or round, is not one of the replies that the method allows, or may have
        flipped bits that the run's codec would not have.
    """
    nbytes = 0
    if isinstance(frame, bytes):
        nbytes = len(frame)
        frame = Frame.parse(frame)
    forms = method.up(got, shared)
    allowed = {name: field for form in forms for name, field in form.items()}
    require = {name: kind for name, (kind, _) in allowed.items()} if len(forms) == 1 else {}
    known = method.known(got, turn, shared)
    received = read_fields(frame, allowed, known, digest=digest, round_=turn.round, require=require, nbytes=nbytes)
    if not any(set(received.codecs) == set(form) for form in forms):
        wanted = " or ".join(", ".join(form) or "nothing" for form in forms)
        raise WireError(f"the reply holds {', '.join(received.codecs) or 'nothing'}, expected {wanted}")
    for name, codec in received.codecs.items():
        if isinstance(codec, BitCodec) and codec.flip_rate > 0.0 and plain(codec.name) != plain(lossy):
            raise WireError(f"{name!r} came as {codec.name}, which may flip bits: the run's codec is another one")
    return received


def plain(codec: str) -> str:
    """A codec's name without its envelope."""
    return codec.partition("+")[0]
