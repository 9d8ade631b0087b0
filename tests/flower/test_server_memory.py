"""A server of 100 clients and 10 million parameters takes less than 350 MB beside its libraries.

Those take 650 to 755 MB with torch's build for CUDA, by the machine; with that for CPUs, all is to be below a GB.
"""

from __future__ import annotations

import sys

import pytest
import torch
from tiny import ROOT

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(("method", "clients"), [("fedpm", 100), ("deltamask", 20)])
def test_a_server_of_ten_million_parameters_is_small(method, clients, monkeypatch):
    """FedPM's replies are the larger, 125 MB a round; DeltaMask's decoding is the costlier, client by client.

    Without the extra `fast`: numba and what it compiles take 120 MB more.
    """
    monkeypatch.setenv("FEDMASK_JIT", "0")
    monkeypatch.syspath_prepend(str(ROOT))
    monkeypatch.delitem(sys.modules, "benchmarks", raising=False)
    from benchmarks.server_memory import measure

    found = measure(method, clients, 2)
    assert found["parameters"] > 10_000_000
    assert found["broadcast_mb"] > 3  # votes of all clients, not the nothing of round 1
    assert found["own_mb"] < 350, str(found)
    assert torch.version.cuda is not None or found["peak_mb"] < 1000, str(found)
