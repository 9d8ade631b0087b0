"""Keys and certificates of a deployment; what ``fedmask keys`` does."""

from .certificate import load_ca as load_ca
from .facts import Shown as Shown
from .facts import fingerprint as fingerprint
from .facts import public_key as public_key
from .facts import show as show
from .files import KeysError as KeysError
from .files import drop as drop
from .make import make_ca as make_ca
from .make import make_node as make_node
from .make import make_server as make_server
from .make import renew_node as renew_node
from .make import renew_server as renew_server
from .registry import BOOK as BOOK
from .registry import Entry as Entry
from .registry import Node as Node
from .registry import SuperLink as SuperLink
from .registry import nodes as nodes
from .registry import register as register
from .registry import unregister as unregister

__all__ = [
    "BOOK",
    "Entry",
    "KeysError",
    "Node",
    "Shown",
    "SuperLink",
    "drop",
    "fingerprint",
    "load_ca",
    "make_ca",
    "make_node",
    "make_server",
    "nodes",
    "public_key",
    "register",
    "renew_node",
    "renew_server",
    "show",
    "unregister",
]
