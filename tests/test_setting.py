"""What a run config says of data and network."""

from __future__ import annotations

import pytest
import tiny
import torch

from fedmask_flwr.config import ConfigError, RunConfig
from fedmask_flwr.setting import network, scenario_of, settled, shape, structure_id


def config(tmp_path, *rows, table=None, **changes):
    name = tiny.table(tmp_path / "two.toml", *(rows or ("0 1", "1 2")), binary=True, **(table or {}))
    kw = {"scenario": name, "num_server_rounds": 4, "method": "confedmade", "model": "made(hidden=6)", **changes}
    return RunConfig(**kw)


def test_a_scenario_is_read_and_fits_its_rounds(tmp_path):
    found = scenario_of(config(tmp_path))
    assert (found.name, found.clients, found.tasks, found.binary) == ("two", 2, 2, True)
    assert scenario_of(RunConfig()) is None
    with pytest.raises(ConfigError, match=r"num-server-rounds is 5.*has 2 tasks, use a multiple of it"):
        scenario_of(config(tmp_path, num_server_rounds=5))


def test_a_lag_cannot_be_told_but_found(tmp_path):
    (tmp_path / "lag").mkdir()
    with pytest.raises(ConfigError, match=r"scenario two clients change .*\(lag 1\).*: set task-identity to found"):
        scenario_of(config(tmp_path / "lag", table={"lag": 1}))
    assert scenario_of(config(tmp_path / "lag", table={"lag": 1}, task_identity="found")).lag == 1


def test_a_method_with_tasks_hears_how_many(tmp_path):
    given = {"lambda1": 0.5, "tasks": 7}
    assert settled(config(tmp_path), given) == {"lambda1": 0.5, "tasks": 2}
    assert settled(config(tmp_path, task_identity="found"), given)["tasks"] == 0
    assert settled(config(tmp_path, method="fedavg"), {}) == {}
    assert settled(RunConfig(method="confedmade"), given) == given
    assert given == {"lambda1": 0.5, "tasks": 7}


def test_the_shape_is_the_scenario_s_or_the_data_s(tmp_path):
    assert shape(config(tmp_path)) == ((8,), 4)
    assert shape(RunConfig(data="tiny:blobs")) == ((8,), 3)


def test_a_network_has_masks_with_a_name(tmp_path):
    plain = network(RunConfig(model="tiny:net"), (8,), 3)
    assert structure_id(plain) == ""
    made = config(tmp_path, weights="glorot")
    one, two, other = (network(made, (8,), 4, masks) for masks in (None, None, 9))
    assert structure_id(one) == structure_id(two) == one.mask_id != structure_id(other)
    assert len(structure_id(one)) == 32
    assert structure_id(network(config(tmp_path, model="made(hidden=6 seed=9)"), (8,), 4)) == structure_id(other)
    weights = [list(model.parameters()) for model in (one, two, other)]
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(*weights, strict=True)), (
        "named, not drawn"
    )
    signs = network(config(tmp_path), (8,), 4)
    assert len(signs.layers[0].weight.abs().unique()) == 1 < len(one.layers[0].weight.abs().unique())


def test_confedmade_needs_the_same_masks_on_all_devices():
    with pytest.raises(ConfigError, match="leave same-masks at true, or use fedweit"):
        settled(RunConfig(method="confedmade", same_masks=False), {})
    assert settled(RunConfig(method="fedweit", same_masks=False), {}) == {}
