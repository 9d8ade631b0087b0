"""All codecs by name and by wire id."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from .base import Codec
from .context import ContextCodec
from .counts import CountsCodec
from .dense import Float16Codec, Float32Codec
from .entropy import EntropyCodec
from .envelope import ENVELOPES, NONE
from .errors import WireError
from .fuse import Fuse8Codec, Fuse16Codec
from .grouped import ClassCountsCodec
from .packed import PackedCodec
from .rice import RiceCodec

AUTO = "auto"
"""Encode-side choice among the exact bit codecs; never on the wire."""

_ALL: tuple[Codec, ...] = (
    PackedCodec(),
    RiceCodec(),
    EntropyCodec(),
    ContextCodec(),
    Fuse8Codec(),
    Fuse16Codec(),
    CountsCodec(),
    ClassCountsCodec(),
    Float32Codec(),
    Float16Codec(),
)
CODECS: Mapping[str, Codec] = MappingProxyType({c.name: c for c in _ALL})
"""The codecs by plain name, without envelopes."""
_BY_ID = {c.id: c for c in _ALL}


def codec_names(kind: str | None = None) -> tuple[str, ...]:
    """Every name that `pack` accepts for this kind of field ("bits", "counts" or "dense"; None: all)."""
    plain = [c.name for c in _ALL if kind in (None, c.kind)]
    wrapped = [f"{name}+{envelope}" for name in plain for envelope in ENVELOPES]
    return (*([AUTO] if kind in (None, "bits") else []), *plain, *wrapped)


def codec(name: str) -> tuple[Codec, int]:
    """Codec and envelope number of a name such as "rice" or "fuse8+png".

    Raises
    ------
    ValueError
        Unknown name (lists the right ones), or "auto", which is `pack`'s choice and not a codec.
    """
    plain, plus, envelope = name.partition("+")
    if plain not in CODECS or (plus and envelope not in ENVELOPES):
        raise ValueError(f"unknown codec {name!r}; use one of {', '.join(codec_names())}")
    return CODECS[plain], ENVELOPES[envelope] if plus else NONE


def codec_of_byte(byte: int) -> tuple[Codec, int]:
    """Codec and envelope number of a codec byte of the wire; WireError if this version has none such."""
    found = _BY_ID.get(byte & 0x3F)
    if found is None or byte >> 6 not in (NONE, *ENVELOPES.values()):
        raise WireError(f"unknown codec byte {byte:#04x}; the sender runs a newer version of fedmask-flwr")
    return found, byte >> 6
