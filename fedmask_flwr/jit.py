"""The one module that knows numba: kernels that are compiled at their first call.

numba is the optional extra ``fast``. It is used where it is installed, and imported only when the first kernel
runs: that takes 0.2 to 0.5 seconds and 120 MB. ``FEDMASK_JIT=0`` in the environment turns it off.
Whoever calls a kernel asks `available` first and has a way in numpy or torch that gives the same bits.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable
from functools import cache
from typing import Any, ParamSpec, TypeVar, cast, final

P = ParamSpec("P")
R = TypeVar("R")
log = logging.getLogger(__name__)

PAYS_FROM = 1 << 20
"""Positions from which machine code pays: numba takes a third of a second to load, and 120 MB."""
LOADED_FROM = 1 << 16
"""The same where something else has loaded it."""
PAYS_AFTER = 1 << 24
"""Positions after which it would have paid: a server decodes hundreds of replies."""
_passed = {"positions": 0}  # of calls between the two sizes, while numba was not loaded


@cache
def _importable() -> bool:
    try:
        import numba
    except ModuleNotFoundError as error:
        if error.name != "numba":
            log.warning("numba is installed and cannot be imported, so nothing is compiled: %s", error)
        return False
    except Exception as error:  # another numpy or LLVM than it was built for
        log.warning("numba is installed and cannot be imported, so nothing is compiled: %s", error)
        return False
    return not getattr(numba.config, "DISABLE_JIT", 0)


def available() -> bool:
    """Whether kernels can be compiled: numba can be imported and ``FEDMASK_JIT`` is not 0."""
    return os.environ.get("FEDMASK_JIT") != "0" and _importable()


def pays(numel: int) -> bool:
    """Whether to use kernels on this many positions; imports numba once they are enough."""
    if numel < LOADED_FROM:
        return False
    if numel < PAYS_FROM and "numba" not in sys.modules:
        _passed["positions"] += numel
        if _passed["positions"] < PAYS_AFTER:
            return False
    return available()


@final
class Kernel:
    """A function that numba compiles when it is first called; other kernels may call it, too.

    Machine code is kept on disk where numba finds a folder to write to, and compiled for this process alone where
    there is none or what lies there cannot be read.
    """

    def __init__(self, function: Callable[..., Any], options: dict[str, Any]) -> None:
        self._function, self._options = function, options
        self._own: Any = None  # called from Python
        self._inner: Any = None  # called by kernels, whose own machine code contains it
        self._kept = True
        self.__name__, self.__doc__, self.__wrapped__ = function.__name__, function.__doc__, function

    def __call__(self, *args: Any) -> Any:
        """Run it; positional arguments only."""
        if self._kept:
            try:
                if self._own is None:
                    self._own = self._dispatcher(cache=True)
                return self._own(*args)
            except Exception as error:  # whatever a foreign or broken file can raise
                log.debug("no machine code on disk for %s: %s", self.__name__, error)
            self._kept, self._own = False, self._dispatcher(cache=False)
        return self._own(*args)

    @property
    def _numba_type_(self) -> Any:
        if self._inner is None:
            self._inner = self._dispatcher(cache=False, forceinline=True)
        return self._inner._numba_type_

    def _dispatcher(self, **more: Any) -> Any:
        import numba

        # Division as in C, or no loop with a division is vectorised. No fastmath: it would change bits.
        return numba.njit(error_model="numpy", nogil=True, **self._options, **more)(self._function)


def compiled(**options: Any) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Decorate a kernel: nopython, without the interpreter's lock, bits as written (no fastmath, no contraction).

    Call it with positional arguments, and only if `available`. A kernel raises nothing itself: a call that fails
    is compiled anew and repeated. One that kernels call lies in the same module, or a change to it goes unnoticed.

    Parameters
    ----------
    options
        Further ones of ``numba.njit``.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        return cast("Callable[P, R]", Kernel(function, options))

    return decorate
