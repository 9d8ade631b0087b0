"""Payload to frame bytes and back: the two calls the rest of the package makes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from .auto import choose
from .base import BitCodec, Codec, CountCodec, DenseCodec
from .bits import Bits
from .envelope import NONE, unwrap, wrap
from .errors import FilterBuildError, WireError
from .frame import Field, Frame
from .packed import PackedCodec
from .payload import Counts, Dense, Payload
from .registry import AUTO, codec, codec_names, codec_of_byte
from .rice import RiceCodec
from .sideinfo import SideInfo

DEFAULT_CODECS: Mapping[str, str] = {"bits": AUTO, "counts": "counts", "dense": "float32"}
"""Codec name of each kind where the caller names none."""


@dataclass(frozen=True, slots=True, eq=False)
class Received:
    """A decoded frame: its payload, the codec each field came in, and its length in bytes."""

    payload: Payload
    codecs: Mapping[str, Codec]
    nbytes: int
    frame: Frame


def pack(
    payload: Payload,
    *,
    digest: bytes,
    round_: int,
    known: SideInfo | Mapping[str, SideInfo] | None,
    codecs: Mapping[str, str] = DEFAULT_CODECS,
) -> bytes:
    """Code a payload into one frame.

    Parameters
    ----------
    payload
        What to send.
    digest
        8 bytes that name the model (``MaskSpec.digest``).
    round_
        Round number, 0..2**32-1.
    known
        Layer sizes and reference mask, of all fields or of each by name; needed for bit fields, used for counts
        of the same length.
    codecs
        Codec name by kind ("bits", "counts", "dense").

    Raises
    ------
    ValueError
        A field, name or codec that cannot be coded; the text says what to change.
    """
    names = {**DEFAULT_CODECS, **codecs}
    for kind, name in names.items():
        if kind not in DEFAULT_CODECS or name not in codec_names(kind):
            raise ValueError(f"codec {name!r} does not code {kind!r}; use one of {', '.join(codec_names(kind))}")
    fields = [
        *(_pack_bits(name, value, _known_of(known, name), names["bits"]) for name, value in payload.bits.items()),
        *(
            _pack_counts(name, value, _known_of(known, name), names["counts"])
            for name, value in payload.counts.items()
        ),
        *(_pack_dense(name, value, names["dense"]) for name, value in payload.dense.items()),
    ]
    return Frame(digest, round_, tuple(fields), payload.meta).to_bytes()


def _known_of(known: SideInfo | Mapping[str, SideInfo] | None, name: str) -> SideInfo | None:
    return known if known is None or isinstance(known, SideInfo) else known.get(name)


def _pack_bits(name: str, bits: Bits, known: SideInfo | None, codec_name: str) -> Field:
    if known is None:
        raise ValueError(f"bit field {name!r} needs known=SideInfo(sizes of its layers)")
    coder: Codec
    coder, envelope = (choose(bits, known), NONE) if codec_name == AUTO else codec(codec_name)
    try:
        body = _bit_codec(coder).encode(bits, known)
    except FilterBuildError:
        coder, envelope = RiceCodec(), NONE
        body = coder.encode(bits, known)
    plain = PackedCodec()
    if codec_name == AUTO and len(body) > plain.max_body(known.numel, 0):  # the promise: never above 1 bit each
        coder, body = plain, plain.encode(bits, known)
    return Field(name, coder.id | envelope << 6, known.numel, wrap(body, envelope))


def _pack_counts(name: str, counts: Counts, known: SideInfo | None, codec_name: str) -> Field:
    coder, envelope = codec(codec_name)
    if not isinstance(coder, CountCodec):  # pragma: no cover - the caller has checked
        raise TypeError(coder.name)
    numel = counts.values.size
    body = coder.encode(counts, _layers(known, numel))
    return Field(name, coder.id | envelope << 6, numel, wrap(body, envelope))


def _pack_dense(name: str, values: Dense, codec_name: str) -> Field:
    coder, envelope = codec(codec_name)
    if not isinstance(coder, DenseCodec):  # pragma: no cover - the caller has checked
        raise TypeError(coder.name)
    return Field(name, coder.id | envelope << 6, values.size, wrap(coder.encode(values), envelope))


def _bit_codec(coder: Codec) -> BitCodec:
    if not isinstance(coder, BitCodec):  # pragma: no cover - the caller has checked
        raise TypeError(coder.name)
    return coder


def _layers(known: SideInfo | None, numel: int) -> SideInfo:
    return known if known is not None and known.numel == numel else SideInfo((numel,))


def unpack(
    data: bytes | memoryview,
    *,
    digest: bytes | None,
    round_: int | None,
    known: SideInfo | Mapping[str, SideInfo] | None,
    expect: Mapping[str, int | range],
    require: Mapping[str, str] | None = None,
) -> Received:
    """Check and decode a frame from an untrusted peer.

    Parameters
    ----------
    data
        The frame.
    digest, round_
        What the frame must carry; None accepts any.
    known
        The sender's layer sizes and reference, of all fields or of each by name; None: one layer, no reference.
    expect
        Allowed field names and their number of elements, or the range it must be in.
    require
        Fields that must be present, and their kind ("bits", "counts" or "dense").

    Raises
    ------
    WireError
        Anything else than a valid frame of this model, round and these fields.
    """
    frame = Frame.parse(data)
    return read(frame, digest=digest, round_=round_, known=known, expect=expect, require=require, nbytes=len(data))


def read(
    frame: Frame,
    *,
    digest: bytes | None,
    round_: int | None,
    known: SideInfo | Mapping[str, SideInfo] | None,
    expect: Mapping[str, int | range],
    require: Mapping[str, str] | None = None,
    nbytes: int = 0,
) -> Received:
    """`unpack` a frame that is parsed already; ``nbytes`` is what it took."""
    coders = _check_heads(frame, digest, round_, expect, require or {})
    bits: dict[str, Bits] = {}
    counts: dict[str, Counts] = {}
    dense: dict[str, Dense] = {}
    for f in frame.fields:
        coder, envelope = codec_of_byte(f.codec)
        own = _known_of(known, f.name)
        layers = _layers(own, f.numel)
        body = unwrap(f.body, envelope, coder.max_body(f.numel, len(layers.sizes)))
        if isinstance(coder, BitCodec):
            if own is not None and own.numel != f.numel:
                raise WireError(f"bit field {f.name!r} has {f.numel} bits, the layers known here {own.numel}")
            bits[f.name] = coder.decode(body, layers)
        elif isinstance(coder, CountCodec):
            counts[f.name] = coder.decode(body, layers)
        elif isinstance(coder, DenseCodec):
            dense[f.name] = coder.decode(body, f.numel)
    return Received(Payload(bits, counts, dense, frame.meta), coders, nbytes, frame)


def _check_heads(
    frame: Frame,
    digest: bytes | None,
    round_: int | None,
    expect: Mapping[str, int | range],
    require: Mapping[str, str],
) -> Mapping[str, Codec]:
    # all headers are checked before any body is decoded
    if digest is not None and frame.digest != digest:
        raise WireError(
            f"frame is for another model: digest {frame.digest.hex()}, expected {digest.hex()}; check that "
            "client and server use the same model, include/exclude patterns and weights source, and data of the "
            "same shape and number of classes"
        )
    if round_ is not None and frame.round_ != round_:
        raise WireError(f"frame is of round {frame.round_}, expected round {round_}; a late or replayed message")
    coders: dict[str, Codec] = {}
    for f in frame.fields:
        if f.name not in expect:
            raise WireError(f"unexpected field {f.name!r}; expected only {', '.join(expect) or 'none'}")
        allowed = expect[f.name]
        if f.numel not in allowed if isinstance(allowed, range) else f.numel != allowed:
            raise WireError(f"field {f.name!r} has {f.numel} elements, expected {_said(allowed)}")
        coders[f.name] = codec_of_byte(f.codec)[0]
    for name, kind in require.items():
        if name not in coders:
            raise WireError(f"field {name!r} is missing; the frame has {', '.join(coders) or 'none'}")
        if coders[name].kind != kind:
            raise WireError(f"field {name!r} came as {coders[name].kind}, expected {kind}")
    return coders


def _said(allowed: int | range) -> str:
    if isinstance(allowed, range) and len(allowed) > 2:
        return f"{allowed.start} to {allowed[-1]}" + (f" in steps of {allowed.step}" if allowed.step > 1 else "")
    return " or ".join(map(str, allowed)) if isinstance(allowed, range) else str(allowed)
