"""What a codec is. One small file a codec; an id is one byte on the wire (6 bits used), never reused."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar, Literal, TypeAlias

from .bits import Bits
from .payload import Counts, Dense
from .sideinfo import SideInfo

Kind: TypeAlias = Literal["bits", "counts", "dense"]
Body: TypeAlias = bytes | memoryview


class Codec(ABC):
    """Two pure functions, encode and decode, and what the rest of the system must know about them."""

    id: ClassVar[int]
    name: ClassVar[str]
    kind: ClassVar[Kind]
    lossless: ClassVar[bool] = True

    @abstractmethod
    def max_body(self, numel: int, layers: int) -> int:
        """Upper bound in bytes of any body an encoder writes; caps what an envelope may expand to."""


class BitCodec(Codec):
    """Codes ``bits XOR known.reference``."""

    kind = "bits"
    flip_rate: ClassVar[float] = 0.0
    """Probability that a zero of the delta decodes as one (0 for exact codecs)."""

    @abstractmethod
    def encode(self, bits: Bits, known: SideInfo) -> bytes:
        """Body bytes of a packed vector of known.numel bits; ValueError if it is not one."""

    @abstractmethod
    def decode(self, body: Body, known: SideInfo) -> Bits:
        """Packed vector of known.numel bits; WireError if `body` is not a valid one."""

    @abstractmethod
    def size(self, ones: tuple[int, ...], known: SideInfo) -> float:
        """Body bytes expected for a delta with that many ones in each layer, without coding it."""


class CountCodec(Codec):
    """Codes integers 0..top."""

    kind = "counts"

    @abstractmethod
    def encode(self, counts: Counts, known: SideInfo) -> bytes:
        """Body bytes; known.sizes are the layers of the values."""

    @abstractmethod
    def decode(self, body: Body, known: SideInfo) -> Counts:
        """Decode known.numel values; WireError if `body` is not valid."""


class DenseCodec(Codec):
    """Codes float vectors."""

    kind = "dense"

    @abstractmethod
    def encode(self, values: Dense) -> bytes:
        """Body bytes of a float32 vector of shape (d,)."""

    @abstractmethod
    def decode(self, body: Body, numel: int) -> Dense:
        """Float32 vector of shape (numel,); WireError if `body` is not valid."""
