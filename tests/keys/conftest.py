"""Keys and certificates that tests only read."""

from __future__ import annotations

import pytest
from keyring import NAMES

from fedmask_flwr import keys


@pytest.fixture(scope="session")
def place(tmp_path_factory):
    """A CA, another one, a server's files and a node's: read only."""
    folder = tmp_path_factory.mktemp("keys")
    keys.make_ca(folder / "ca")
    keys.make_ca(folder / "other")
    keys.make_server(folder / "ca", NAMES, folder / "server")
    keys.make_node(folder / "node", name="site-0")
    return folder
