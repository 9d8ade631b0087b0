"""The only room that imports flwr: a strategy, a client's turn, and the bundled apps."""

from .client import MaskTurn as MaskTurn
from .client import identify as identify
from .client import safely as safely
from .records import STYPE as STYPE
from .strategy import MaskStrategy as MaskStrategy

__all__ = ["STYPE", "MaskStrategy", "MaskTurn", "identify", "safely"]
