"""Flower's simulation as one call that leaves nothing behind; what ``fedmask run`` starts.

It drives Flower's programs (``flower-superlink``, ``flwr``) from outside and imports nothing of flwr.
"""

from .runtime import Interrupted as Interrupted
from .runtime import SimulationError as SimulationError
from .runtime import run as run

__all__ = ["Interrupted", "SimulationError", "run"]
