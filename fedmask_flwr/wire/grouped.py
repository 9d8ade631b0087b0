"""Codec ``counts-by-class``: counts whose likely values both ends know, such as votes given the votes before.

Body: as ``counts``, of the values sorted by ``SideInfo.classes`` (stably); what `joined` puts together is a layer.
"""

from __future__ import annotations

from typing import final

import numpy as np
from numpy.typing import NDArray

from .base import Body, CountCodec
from .counts import LAYER_VALUES, CountsCodec
from .payload import Counts
from .sideinfo import SideInfo

_PLAIN = CountsCodec()


@final
class ClassCountsCodec(CountCodec):
    """The sum over groups of classes of their entropies, tables apart; ``counts`` where there are no classes."""

    id = 17
    name = "counts-by-class"

    def encode(self, counts: Counts, known: SideInfo) -> bytes:
        """Sort, then write."""
        if known.classes is None:
            return _PLAIN.encode(counts, known)
        order, sorted_ = _order(known)
        return _PLAIN.encode(Counts(counts.values[order], counts.top), sorted_)

    def decode(self, body: Body, known: SideInfo) -> Counts:
        """Read, then put back in place."""
        if known.classes is None:
            return _PLAIN.decode(body, known)
        order, sorted_ = _order(known)
        found = _PLAIN.decode(body, sorted_)
        values = np.empty_like(found.values)
        values[order] = found.values
        return Counts(values, found.top)

    def max_body(self, numel: int, layers: int) -> int:
        """As ``counts``."""
        return _PLAIN.max_body(numel, 256)


def joined(sizes: NDArray[np.int64]) -> NDArray[np.int64]:
    """Group of each class, ascending, for classes of these sizes: as many as ``counts`` has tables for.

    Neighbours go together where the middle of both lies in the same one of so many equal shares.
    """
    numel = int(sizes.sum())
    most = max(1, numel // LAYER_VALUES)
    middle = np.cumsum(sizes) - sizes + sizes // 2
    found: NDArray[np.int64] = np.minimum(middle * most // max(numel, 1), most - 1)
    return found


def _order(known: SideInfo) -> tuple[NDArray[np.intp], SideInfo]:
    classes = known.checked_classes()
    sizes = np.bincount(classes)
    layers = np.bincount(joined(sizes), sizes).astype(np.int64)
    return np.argsort(classes, kind="stable"), SideInfo(tuple(layers[layers > 0].tolist()))
