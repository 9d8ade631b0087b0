"""A frame in words, for ``fedmask inspect``."""

from __future__ import annotations

from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from fedmask_flwr.show import human_bytes, printable
from fedmask_flwr.wire import Field, Frame, WireError, codec_names, popcount, unpack
from fedmask_flwr.wire import codec as codec_by_name
from fedmask_flwr.wire.frame import VERSION

__all__ = ["describe"]

# A few bytes can claim any number of elements, so density is worked out up to 256 MB of bits.
_MOST_BITS = 1 << 31


def describe(raw: bytes) -> RenderableType:
    """Describe a frame: version, model digest, round, meta, and a row a field.

    Bits per parameter are 8 * body bytes / numel. The density of a bit field is worked out as if it was coded in
    one layer and without a reference mask, as a mask file is; "?" where that does not fit.

    Raises
    ------
    WireError
        The bytes are not a frame, or name a codec that is not known.
    """
    frame = Frame.parse(raw)
    head = Table(box=None, show_header=False, pad_edge=False)
    rows = {
        "format": f"version {VERSION}, {len(raw)} bytes ({human_bytes(len(raw))})",
        "model": frame.digest.hex(),
        "round": str(frame.round_),
        **{f"meta {key}": _short(value) for key, value in sorted(frame.meta.items())},
    }
    for name, value in rows.items():
        head.add_row(Text(printable(name)), Text(printable(value)))
    table = Table(box=None, pad_edge=False)
    for name in ("field", "codec", "numel", "bytes", "bits/param", "density"):
        table.add_column(name, justify="left" if name in ("field", "codec") else "right", no_wrap=True)
    for field in frame.fields:
        name, kind = _codec(field.codec)
        bpp = f"{8 * len(field.body) / field.numel:.4f}" if field.numel else "-"
        density = _density(frame, field) if kind == "bits" else "-"
        table.add_row(Text(printable(field.name)), name, str(field.numel), str(len(field.body)), bpp, density)
    return Group(head, Text(), table)


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _codec(byte: int) -> tuple[str, str]:
    for kind in ("bits", "counts", "dense"):
        for name in codec_names(kind):
            if name != "auto":
                codec, envelope = codec_by_name(name)
                if codec.id | envelope << 6 == byte:
                    return name, kind
    raise WireError(f"unknown codec byte {byte:#04x}; the sender runs a newer version of fedmask-flwr")


def _density(frame: Frame, field: Field) -> str:
    if not 0 < field.numel <= _MOST_BITS:
        return "-"
    one = Frame(frame.digest, frame.round_, (field,), {})
    try:
        got = unpack(one.to_bytes(), digest=None, round_=None, known=None, expect={field.name: field.numel})
    except WireError:
        return "?"  # a message: its layers are known to the two ends only
    return f"{popcount(got.payload.bits[field.name]) / field.numel:.4f}"
