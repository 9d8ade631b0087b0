"""Several methods, several seeds, everything else equal: who runs, what came of it, a table and a picture."""

from .lineup import Entry as Entry
from .lineup import Run as Run
from .lineup import lineup as lineup
from .lineup import parse as parse
from .report import write as write
from .results import CompareError as CompareError
from .results import Result as Result
from .results import read as read

__all__ = ["CompareError", "Entry", "Result", "Run", "lineup", "parse", "read", "write"]
