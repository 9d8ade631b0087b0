"""The frame: a self-describing, checked container of coded fields. The same bytes travel and lie in files.

Little-endian: ``FMK``, version u8, model digest 8 B, round u32, number of fields u8, meta length u16,
CRC-32 u32 (over all other bytes); per field: name length u8, ASCII name, codec u8 (id | envelope << 6),
numel u64, body length u64; then meta as compact sorted JSON (nothing if empty); then the bodies in order.
"""

from __future__ import annotations

import json
import math
import re
import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from .base import Body
from .errors import WireError
from .payload import Scalar

MAGIC = b"FMK"
VERSION = 1
DIGEST_BYTES = 8
MAX_META = 4096
MAX_FIELDS = 255
_HEAD = struct.Struct("<3sB8sIBHI")
_CRC_AT = _HEAD.size - 4
_FIELD = struct.Struct("<BQQ")
_NAME = re.compile(r"[!-~]{1,255}", re.ASCII)


@dataclass(frozen=True, slots=True)
class Field:
    """One coded field: `codec` is id | envelope << 6, `numel` its number of elements."""

    name: str
    codec: int
    numel: int
    body: Body


@dataclass(frozen=True, slots=True)
class Frame:
    """A parsed or to-be-written frame; bodies stay coded."""

    digest: bytes
    round_: int
    fields: tuple[Field, ...]
    meta: Mapping[str, Scalar]

    def to_bytes(self) -> bytes:
        """Serialise; ValueError names the limit that a part is over."""
        if len(self.digest) != DIGEST_BYTES:
            raise ValueError(f"a model digest has {DIGEST_BYTES} bytes, got {len(self.digest)}")
        if not 0 <= self.round_ < 2**32:
            raise ValueError(f"round must be within 0..2**32-1, got {self.round_}")
        if len(self.fields) > MAX_FIELDS:
            raise ValueError(f"a frame holds at most {MAX_FIELDS} fields, got {len(self.fields)}")
        if len({f.name for f in self.fields}) < len(self.fields):
            raise ValueError("a field name is used twice; names are unique over bits, counts and dense")
        for f in self.fields:
            if not _NAME.fullmatch(f.name):
                raise ValueError(f"a field name is 1..255 printable ASCII characters without spaces: {f.name!r}")
        meta = _dump_meta(self.meta)
        parts = [
            b"".join(
                bytes([len(f.name)]) + f.name.encode() + _FIELD.pack(f.codec, f.numel, len(f.body))
                for f in self.fields
            ),
            meta,
            *(f.body for f in self.fields),
        ]
        head = _HEAD.pack(MAGIC, VERSION, self.digest, self.round_, len(self.fields), len(meta), 0)[:_CRC_AT]
        crc = zlib.crc32(head)
        for part in parts:
            crc = zlib.crc32(part, crc)
        return b"".join([head, struct.pack("<I", crc), *parts])

    @classmethod
    def parse(cls, data: Body) -> Frame:
        """Check magic, version, CRC, every length and the meta; bodies are views into `data`.

        Raises
        ------
        WireError
            Anything that does not add up.
        """
        view = memoryview(data).cast("B")
        if len(view) < _HEAD.size:
            raise WireError(f"frame is truncated: {len(view)} bytes, a header has {_HEAD.size}")
        magic, version, digest, round_, count, meta_len, crc = _HEAD.unpack_from(view)
        if magic != MAGIC:
            raise WireError(f"not a fedmask frame: it starts with {magic!r}, expected {MAGIC!r}")
        if version != VERSION:
            raise WireError(
                f"frame has format version {version}, this package reads {VERSION}; update the older side"
            )
        if zlib.crc32(view[_HEAD.size :], zlib.crc32(view[:_CRC_AT])) != crc:
            raise WireError("frame is damaged: its CRC-32 does not match")
        at = _HEAD.size
        heads = []
        for _ in range(count):
            if at >= len(view) or at + 1 + view[at] + _FIELD.size > len(view):
                raise WireError("frame is truncated within its field list")
            name_at, at = at + 1, at + 1 + view[at]
            heads.append((_read_name(bytes(view[name_at:at])), *_FIELD.unpack_from(view, at)))
            at += _FIELD.size
        if len({name for name, *_ in heads}) < count:
            raise WireError("a field name appears twice in the frame")
        want = at + meta_len + sum(length for *_, length in heads)
        if meta_len > MAX_META or want != len(view):
            raise WireError(f"the lengths of the frame add up to {want} bytes, it has {len(view)}")
        meta = _load_meta(bytes(view[at : at + meta_len]))
        at += meta_len
        fields = []
        for name, codec, numel, length in heads:
            fields.append(Field(name, codec, numel, view[at : at + length]))
            at += length
        return cls(digest, round_, tuple(fields), meta)


def _read_name(raw: bytes) -> str:
    name = raw.decode("latin-1")
    if not _NAME.fullmatch(name):
        raise WireError(f"a field name of the frame is not printable ASCII: {raw!r}")
    return name


def _is_scalar(value: object) -> bool:
    if isinstance(value, float):
        return math.isfinite(value)
    return isinstance(value, int | str) and not isinstance(value, bool)


def _dump_meta(meta: Mapping[str, Scalar]) -> bytes:
    if not meta:
        return b""
    for key, value in meta.items():
        if not isinstance(key, str) or not _is_scalar(value):
            raise ValueError(f"meta holds int, finite float or str under str keys, got {key!r}: {value!r}")
    raw = json.dumps(dict(meta), sort_keys=True, separators=(",", ":"), allow_nan=False).encode("ascii")
    if len(raw) > MAX_META:
        raise ValueError(f"meta takes {len(raw)} bytes as JSON, at most {MAX_META} fit; send less, or a field")
    return raw


def _refuse(text: str) -> NoReturn:
    raise ValueError(f"{text} is not allowed")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        _refuse("a repeated key")
    return found


def _load_meta(raw: bytes) -> Mapping[str, Scalar]:
    if not raw:
        return {}
    try:
        meta = json.loads(raw.decode("ascii"), parse_constant=_refuse, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as e:
        raise WireError(f"frame meta is not valid JSON: {e}") from e
    if not isinstance(meta, dict) or not meta or not all(map(_is_scalar, meta.values())):
        raise WireError("frame meta is not a flat object of numbers and strings")
    return meta
