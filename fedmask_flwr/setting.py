"""What a run config says of data and network: the shape of an example, the network that every end builds."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from . import data
from .config import ConfigError, RunConfig
from .methods import resolve
from .models import backbone

__all__ = ["importable", "network", "scenario_of", "settled", "shape", "structure_id"]


def scenario_of(config: RunConfig) -> data.Scenario | None:
    """Return the continual federation that the run config names, checked against its rounds, or None.

    Raises
    ------
    ConfigError
        The scenario cannot be read, or other settings do not fit it.
    """
    if not config.scenario:
        return None
    found = data.scenario(config.scenario)
    found.task_at(0, 1, config.num_server_rounds)
    if config.adapt_epochs > 0:
        raise ConfigError(
            "in a scenario nothing is fine-tuned before it is tested, since the data of earlier tasks are gone: "
            "leave adapt-epochs at -1"
        )
    if found.lag and config.task_identity == "told":
        raise ConfigError(
            f"in scenario {found.name} clients change tasks at different times (lag {found.lag}), so the server "
            "cannot tell them: set task-identity to found"
        )
    return found


def settled(config: RunConfig, settings: Mapping[str, Any]) -> dict[str, Any]:
    """A method's settings with what the scenario says: how many tasks the server tells, 0: devices find them.

    Raises
    ------
    ConfigError
        The scenario cannot be read, or masks that differ do not fit the method.
    """
    if resolve(config.method).packed and not config.same_masks:
        raise ConfigError(
            f"{config.method} sends what its structural masks let through, so all devices need the same: "
            "leave same-masks at true, or use fedweit to see what masks of their own cost"
        )
    scenario = scenario_of(config)
    if scenario is None or "tasks" not in resolve(config.method).Config.model_fields:
        return dict(settings)
    return {**settings, "tasks": scenario.tasks if config.task_identity == "told" else 0}


def shape(config: RunConfig, data_dir: str | None = None) -> tuple[tuple[int, ...], int]:
    """Shape of one example, and the number of classes.

    Raises
    ------
    ConfigError, DataError
        With the fix in its message.
    """
    where = config.data_dir if data_dir is None else data_dir
    if (found := scenario_of(config)) is not None:
        return data.shape_of(found, where)
    return data.form(config.data, "test", where)


def network(config: RunConfig, in_shape: tuple[int, ...], num_classes: int, masks: int | None = None) -> nn.Module:
    """Build the network with its named weights; ``masks`` replaces the seed of its structural masks.

    Raises
    ------
    ValueError, FileNotFoundError
        The model cannot be built; the message says why.
    """
    own = {} if masks is None else {"seed": masks}
    return backbone(config.model, config.weights_source, in_shape, num_classes, **own).build()


def structure_id(model: nn.Module) -> str:
    """Name of the structural masks of a network, such as ``MADE.mask_id``; "" where it has none."""
    return str(getattr(model, "mask_id", ""))


@contextmanager
def importable() -> Iterator[None]:
    """Let 'package.module:function' name what lies in the working folder, as in a run."""
    before = [*sys.path]
    sys.path.append(str(Path.cwd()))
    try:
        yield
    finally:
        sys.path[:] = before
