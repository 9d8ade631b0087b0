"""The encode-side choice ``auto``: the smallest exact codec by expected size, nothing is coded twice."""

from __future__ import annotations

from .base import BitCodec
from .bits import Bits, ones_per_layer
from .context import ContextCodec
from .entropy import EntropyCodec
from .packed import PackedCodec
from .rice import RiceCodec
from .sideinfo import SideInfo

_CANDIDATES: tuple[BitCodec, ...] = (PackedCodec(), RiceCodec(), EntropyCodec())
_BY_CLASS = ContextCodec()


def choose(bits: Bits, known: SideInfo) -> BitCodec:
    """Codec of ``bits``, ``rice``, ``entropy``, ``context`` with the smallest expected body."""
    return _smallest(bits, known)[1]


def expected_bytes(bits: Bits, known: SideInfo) -> float:
    """Bytes that a packed vector is expected to take with codec ``auto``, frame apart."""
    return _smallest(bits, known)[0]


def coded_bytes(bits: Bits, known: SideInfo) -> int:
    """Bytes that it does take."""
    return len(choose(bits, known).encode(bits, known))


def _smallest(bits: Bits, known: SideInfo) -> tuple[float, BitCodec]:
    delta = known.delta(bits)
    ones = ones_per_layer(delta, known.sizes)
    sizes: list[tuple[float, BitCodec]] = [(c.size(ones, known), c) for c in _CANDIDATES]
    if known.classes is not None and any(ones):
        sizes.append((_BY_CLASS.measure(delta, known), _BY_CLASS))
    return min(sizes, key=lambda found: found[0])
