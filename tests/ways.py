"""With machine code or without, whatever the size."""

from __future__ import annotations

from contextlib import contextmanager

import pytest

from fedmask_flwr import jit

needs_numba = pytest.mark.skipif(not jit.available(), reason="numba is the optional extra 'fast'")
WAYS = ["numpy", pytest.param("compiled", marks=needs_numba)]


@contextmanager
def machine_code(on):
    """Use it for everything, or for nothing."""
    with pytest.MonkeyPatch.context() as patch:
        for least in ("PAYS_FROM", "LOADED_FROM"):
            patch.setattr(jit, least, 0 if on else 1 << 62)
        yield
