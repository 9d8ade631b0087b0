"""The run config: declared keys and defaults agree, wrong ones are named."""

from __future__ import annotations

import pytest
import tiny

from fedmask_flwr.config import ConfigError, RunConfig, load_config, method_keys
from fedmask_flwr.methods import BUILTIN, Turn, resolve


def test_pyproject_declares_every_key_with_its_default():
    table = tiny.declared_config()
    fields = {f.alias: f.default for f in RunConfig.model_fields.values()}
    for name in BUILTIN:
        own = {f.alias: f.default for f in resolve(name).Config.model_fields.values()}
        # Flower hands every declared key over, so a default must be the same for all that have the key.
        assert {key: fields[key] for key in own if key in fields} == {k: v for k, v in own.items() if k in fields}
        fields |= own
    assert table == fields


def test_a_methods_own_settings_survive_the_declared_ones():
    """What its card says is what `fedmask run` does."""
    last, own = Turn(1, 9, 9, 0), {}
    for name in ("deltastep", "drawstep", "klms"):
        _, settings = load_config(tiny.declared_config() | {"method": name})
        model = tiny.net()
        method = resolve(name)(resolve(name).layout(model), model, resolve(name).Config(**settings))
        own[name] = method.step(last) if name != "klms" else (method.config.size, method.config.spare, method.each)
    assert own == {"deltastep": 1.25, "drawstep": 1.0, "klms": (8, 2.0, 8)}
    drawstep = resolve("drawstep").Config()
    assert (drawstep.trellis, drawstep.size, drawstep.spare) == (True, 10, 1.0)


def test_flat_config_is_split():
    config, settings = load_config(tiny.declared_config() | {"kappa": 0.25})
    assert config.method == "deltamask"
    assert settings["kappa"] == 0.25
    assert not set(settings) & {f.alias for f in RunConfig.model_fields.values()}


def test_settings_of_other_methods_are_ignored():
    _, settings = load_config(tiny.declared_config() | {"method": "fedavg"})
    assert settings == {"weights-codec": "float32"}
    _, settings = load_config(tiny.declared_config() | {"method": "fedpm"})
    assert "kappa" not in settings


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"kapa": 1.0},
            r"unknown run-config key kapa\. Did you mean kappa.*keys of deltamask are: .*num-server-rounds",
        ),
        ({"method": "fedbm"}, "no method 'fedbm': use one of .*deltamask, .*fedpm"),
        ({"method": "json:loads"}, "no method"),
        ({"method": "no_such_pkg:X"}, "cannot import"),
        ({"codec": "gzip"}, "codec = 'gzip'.*auto.*rice"),
        ({"fraction-train": 0.0}, "fraction-train"),
        ({"fraction-train": 1.5}, "fraction-train"),
        ({"kappa": 0.0}, "kappa"),
        ({"theta0": 1.0}, "theta0"),
        ({"seed": -1}, "seed"),
        ({"batch-size": "many"}, "batch-size"),
        ({"partition": "random"}, "partition.*iid"),
        ({"ste": "wrong"}, "ste.*identity"),
    ],
)
def test_bad_values_are_named(change, message):
    with pytest.raises(ConfigError, match=message):
        load_config(tiny.declared_config() | change)


def test_a_given_key_of_another_method_is_refused():
    told = tiny.declared_config() | {"method": "fedpm", "kappa": 0.5}
    load_config(told)
    with pytest.raises(ConfigError, match=r"unknown run-config key kappa\..*keys of fedpm"):
        load_config(told, given=["method", "kappa"])


def test_method_keys_cover_the_built_in_methods():
    keys = method_keys()
    assert set(keys) == set(BUILTIN)
    assert {"kappa", "kappa-min", "theta0"} <= keys["deltamask"]
