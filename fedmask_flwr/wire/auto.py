"""The encode-side choice ``auto``: the smallest exact codec by analytic size, nothing is coded twice."""

from __future__ import annotations

from .base import BitCodec
from .bits import Bits, ones_per_layer
from .entropy import EntropyCodec
from .packed import PackedCodec
from .rice import RiceCodec
from .sideinfo import SideInfo

_CANDIDATES: tuple[BitCodec, ...] = (PackedCodec(), RiceCodec(), EntropyCodec())


def choose(bits: Bits, known: SideInfo) -> BitCodec:
    """Codec of ``bits``, ``rice`` and ``entropy`` with the smallest expected body; the plainest on a tie."""
    ones = ones_per_layer(known.delta(bits), known.sizes)
    return min(_CANDIDATES, key=lambda c: c.size(ones, known))
