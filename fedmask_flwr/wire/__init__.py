"""What a mask is in bytes: packed bits, codecs and frames. Needs numpy only."""

from __future__ import annotations

from .auto import coded_bytes as coded_bytes
from .auto import expected_bytes as expected_bytes
from .base import BitCodec as BitCodec
from .base import Codec as Codec
from .base import CountCodec as CountCodec
from .base import DenseCodec as DenseCodec
from .bits import Bits as Bits
from .bits import from_positions as from_positions
from .bits import ones_per_layer as ones_per_layer
from .bits import pack_bits as pack_bits
from .bits import popcount as popcount
from .bits import positions as positions
from .bits import slice_bits as slice_bits
from .bits import unpack_bits as unpack_bits
from .errors import FilterBuildError as FilterBuildError
from .errors import WireError as WireError
from .frame import Field as Field
from .frame import Frame as Frame
from .packing import Received as Received
from .packing import pack as pack
from .packing import read as read
from .packing import unpack as unpack
from .payload import Counts as Counts
from .payload import Dense as Dense
from .payload import Payload as Payload
from .payload import Scalar as Scalar
from .registry import CODECS as CODECS
from .registry import codec as codec
from .registry import codec_names as codec_names
from .sideinfo import SideInfo as SideInfo
from .varint import get_varint as get_varint
from .varint import put_varint as put_varint

__all__ = [
    "CODECS",
    "BitCodec",
    "Bits",
    "Codec",
    "CountCodec",
    "Counts",
    "Dense",
    "DenseCodec",
    "Field",
    "FilterBuildError",
    "Frame",
    "Payload",
    "Received",
    "Scalar",
    "SideInfo",
    "WireError",
    "codec",
    "codec_names",
    "coded_bytes",
    "expected_bytes",
    "from_positions",
    "get_varint",
    "ones_per_layer",
    "pack",
    "pack_bits",
    "popcount",
    "positions",
    "put_varint",
    "read",
    "slice_bits",
    "unpack",
    "unpack_bits",
]
