"""The run config: Flower's flat, kebab-case table, checked once, before anything starts."""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Collection, Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator


class ConfigError(ValueError):
    """A key or value of the run config is wrong; the message lists the right ones."""


def kebab(name: str) -> str:
    """local_epochs -> local-epochs."""
    return name.replace("_", "-")


class RunConfig(BaseModel):
    """Everything a run can be told, except the method's own settings (``method_config``)."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, alias_generator=kebab, populate_by_name=True
    )

    method: str = Field("deltamask", description="a built-in method, or 'package.module:Class'")
    data: str = Field(
        "digits",
        description="digits, mnist, fashion-mnist, cifar10, npz (a folder of train.npz and test.npz), debd/NAME "
        "or 'package.module:function'",
    )
    data_dir: str = Field("", description="folder of the data set")
    scenario: str = Field(
        "",
        description="a continual federation: mnist-3x5, mnist-split, debd-latin, ..., or the path of a .toml "
        "table; it names data and clients, and its tasks share the rounds evenly",
    )
    stream: Literal["sequential", "cumulative"] = Field(
        "sequential", description="whether a client keeps the data of its earlier tasks (the upper bound)"
    )
    task_identity: Literal["told", "found"] = Field(
        "told", description="whether the server says which task it is, or devices find out by their losses"
    )
    partition: Literal["iid", "dirichlet", "classes", "group"] = "iid"
    alpha: float = Field(0.5, gt=0.0, description="concentration of the Dirichlet partition")
    classes_per_client: int = Field(2, ge=1)
    model: str = Field(
        "mlp",
        description="mlp, lenet5, leaf, har, conv4, conv6, made, torchvision:NAME, or 'package.module:builder'; "
        "arguments in parentheses: made(hidden=110 masks=8 connect=cycle)",
    )
    same_masks: bool = Field(
        True, description="all devices build the structural masks of a network such as made from the same seed"
    )
    weights: str = Field(
        "seed",
        description="seed (the run's), glorot (the run's seed, for weights that are trained), seed:N[:scale], "
        "file:PATH#sha256=HEX, or torchvision:DEFAULT",
    )
    include: str = Field("*", description="comma-separated patterns of parameter names to mask")
    exclude: str = Field("", description="comma-separated patterns of parameter names to leave frozen")
    num_server_rounds: int = Field(20, ge=1)
    local_epochs: int = Field(3, ge=1)
    adapt_epochs: int = Field(
        -1, ge=-1, description="epochs a device fine-tunes before it evaluates; -1 means the method's own"
    )
    batch_size: int = Field(0, ge=0, description="0 means an eighth of a client's examples, within 32 and 128")
    optimizer: Literal["adam", "sgd"] = "adam"
    learning_rate: float = Field(0.0, ge=0.0, description="0 means the method's own")
    fraction_train: float = Field(1.0, gt=0.0, le=1.0)
    fraction_evaluate: float = Field(
        0.0,
        ge=0.0,
        le=1.0,
        description="share of clients that evaluate each round; all, where only devices can",
    )
    evaluate_every: int = Field(
        1, ge=1, description="rounds between evaluations on clients; the last always is one"
    )
    eval_samples: int = Field(3, ge=1, description="networks drawn for accuracy_sampled")
    min_nodes: int = Field(2, ge=1, description="nodes to wait for, and the fewest that train in a round")
    clients: int = Field(
        0, ge=0, description="nodes to wait for before round 1; `fedmask run` says how many it made"
    )
    node_timeout: float = Field(600.0, gt=0.0, description="seconds to wait for min-nodes")
    round_timeout: float = Field(3600.0, gt=0.0, description="seconds to wait for a round's replies")
    max_silent_rounds: int = Field(
        3, ge=0, description="rounds in a row without one usable reply that end a run as failed; 0: none does"
    )
    codec: str = Field(
        "auto", description="codec of the uplink bits: auto, bits, rice, entropy, fuse8, fuse16, ..."
    )
    seed: int = Field(7, ge=0, lt=2**63)
    threads: int = Field(1, ge=1, description="torch threads in a client")
    server_threads: int = Field(1, ge=1, description="replies that the server decodes at a time")
    device: str = Field("auto", description="auto, cpu, cuda or cuda:N")
    memory_dir: str = Field(
        "", description="folder of a device's memory; empty: fedmask-flwr below $XDG_STATE_HOME or ~/.local/state"
    )
    metrics_port: int = Field(
        0, ge=0, lt=2**16, description="port of the server's Prometheus metrics; 0: none (extra 'metrics')"
    )
    metrics_address: str = Field("127.0.0.1", description="address that they are served at; 0.0.0.0: all")
    log_format: Literal["text", "json"] = Field("text", description="json: one object a line")
    out: str = Field("", description="absolute folder of the run; empty: runs/<run id> below the server's folder")
    compare: str = Field(
        "",
        description="methods to run one after another, such as 'fedpm, deltamask(kappa=1.0 codec=rice)'; `method` "
        "and `seed` are then filled in for each run",
    )
    seeds: str = Field("", description="comma-separated seeds of the compared runs; empty: seed, seed+1, seed+2")

    @field_validator("codec")
    @classmethod
    def _known_codec(cls, name: str) -> str:
        from .wire import codec_names

        if name not in codec_names("bits"):
            raise ValueError(f"use one of {', '.join(codec_names('bits'))}")
        return name

    @property
    def weights_source(self) -> str:
        """Where the frozen weights come from, with the run's seed filled in."""
        return {"seed": f"seed:{self.seed}", "glorot": f"seed:{self.seed}:glorot"}.get(self.weights, self.weights)

    @property
    def lr(self) -> float | None:
        """Learning rate, or None for the method's own."""
        return self.learning_rate or None


def patterns(text: str) -> tuple[str, ...]:
    """Split a comma-separated list of name patterns."""
    return tuple(part.strip() for part in text.split(",") if part.strip())


def scalar(key: str, text: str, default: str | int | float | bool | None) -> str | int | float | bool:
    """Read the value of ``key=text`` as TOML does, a bare word as a string, in the type of the default.

    Raises
    ------
    ConfigError
        When it is a list, a table or a date.
    """
    try:
        value = tomllib.loads(f"v = {{ v = {text} }}")["v"]["v"]  # where neither a comment nor a second line may be
    except (ValueError, RecursionError):
        value = text  # a bare word
    if isinstance(default, str) and not isinstance(value, str):
        value = text
    if isinstance(default, float) and type(value) is int:
        value = float(value)
    if not isinstance(value, str | int | float | bool):
        raise ConfigError(f"{key}={text}: a value is one string, number or true/false")
    return value


def method_keys() -> dict[str, set[str]]:
    """Run-config keys of each built-in method's own settings."""
    from .methods import BUILTIN, resolve

    return {name: _keys(resolve(name).Config) for name in BUILTIN}


def relevant(flat: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of a run config that say what it computes: not those of other built-in methods.

    A key that is missing, as another version did not have it, is as declared now.
    """
    from .methods import resolve

    try:
        method = resolve(str(flat.get("method", "deltamask")))
    except ValueError:
        return dict(flat)
    fields = (*RunConfig.model_fields.values(), *method.Config.model_fields.values())
    declared = {field.alias: field.default for field in fields if field.alias}
    others = set().union(*method_keys().values()) - set(declared)
    return {**declared, **{key: value for key, value in flat.items() if key not in others}}


def load_config(flat: Mapping[str, Any], given: Collection[str] = ()) -> tuple[RunConfig, dict[str, Any]]:
    """Check a flat run config and split it into ``RunConfig`` and the method's own settings.

    Keys of other built-in methods are accepted and ignored, since Flower hands over every declared key; but not
    when a person ``given`` them.

    Raises
    ------
    ConfigError
        For an unknown key (with the nearest right ones), an unknown method or codec, or a bad value.
    """
    from .methods import resolve

    common = _keys(RunConfig)
    try:
        method = resolve(str(flat.get("method", "deltamask")))
    except ValueError as error:
        raise ConfigError(str(error)) from error
    own = _keys(method.Config)
    known = common | own | set().union(*method_keys().values())
    wrong = sorted((set(flat) - known) | (set(given) - common - own))
    if wrong:
        near = [m for key in wrong for m in difflib.get_close_matches(key, sorted(common | own), 3, 0.5)]
        hint = f" Did you mean {', '.join(dict.fromkeys(near))}?" if near else ""
        raise ConfigError(
            f"unknown run-config key{'s' if len(wrong) > 1 else ''} {', '.join(wrong)}.{hint} "
            f"The keys of {method.name} are: {', '.join(sorted(common | own))}."
        )
    try:
        config = RunConfig(**{k: v for k, v in flat.items() if k in common})
        settings = {k: v for k, v in flat.items() if k in own}
        method.Config(**settings)
    except ValidationError as error:
        lines = [f"{'.'.join(map(str, e['loc']))} = {e['input']!r}: {e['msg']}" for e in error.errors()]
        raise ConfigError("bad run config: " + "; ".join(lines)) from error
    return config, settings


def _keys(model: type[BaseModel]) -> set[str]:
    return {field.alias or name for name, field in model.model_fields.items()}
