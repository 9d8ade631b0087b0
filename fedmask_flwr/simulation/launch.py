"""What ``fedmask run`` does: check everything that can be checked first, then run, show and sum up."""

from __future__ import annotations

import fcntl
import json
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console

from fedmask_flwr import data, track
from fedmask_flwr.config import ConfigError, RunConfig, load_config, patterns
from fedmask_flwr.masks import MaskSpec
from fedmask_flwr.models import backbone
from fedmask_flwr.show import RoundTable, summary
from fedmask_flwr.simulation import stage
from fedmask_flwr.simulation.runtime import LOG, SimulationError
from fedmask_flwr.simulation.runtime import run as simulate
from fedmask_flwr.simulation.sandbox import LeftoverError

__all__ = ["Plan", "RunError", "UsageError", "launch", "prepare"]

_FILES = (track.CONFIG, track.METRICS, track.CHECKPOINT, track.MASK, track.CURVE, LOG)


class UsageError(ValueError):
    """An option or the folder is wrong; nothing was started."""


class RunError(RuntimeError):
    """The run was started and did not complete."""


@dataclass(frozen=True, slots=True)
class Plan:
    """A checked run: what differs from the app's defaults, all of it, and the round it goes on after."""

    out: Path
    overrides: Mapping[str, stage.Scalar]
    config: RunConfig
    after: int


def prepare(
    given: Mapping[str, stage.Scalar], pairs: Sequence[str], out: Path, *, clients: int, overwrite: bool
) -> Plan:
    """Check options, data and folder.

    Parameters
    ----------
    given : mapping
        Run-config keys that have an option of their own.
    pairs : sequence of str
        ``key=value`` for any key; these win.
    out : Path
        The run's folder.
    clients : int
    overwrite : bool
        Delete an earlier run in `out`.

    Raises
    ------
    UsageError
        With the fix in its message.
    """
    out = out.absolute()
    defaults = stage.defaults()
    overrides = {**given, **_parse(pairs, defaults)}
    if "out" in overrides:
        raise UsageError("the folder is an option of its own: use --out")
    if isinstance(where := overrides.get("data-dir"), str) and where:
        overrides["data-dir"] = str(Path(where).absolute())
    if "clients" in overrides:
        raise UsageError("the number of clients is an option of its own: use --clients")
    overrides["clients"] = clients
    told = {**defaults, **overrides}
    try:
        config, _ = load_config(told, given=overrides)
        _check_clients(config, clients)
        _check_model(config)
    except (ConfigError, data.DataError, FileNotFoundError, ValueError) as error:
        raise UsageError(str(error)) from error
    return Plan(out, overrides, config, _check_folder(out, told, config.num_server_rounds, overwrite=overwrite))


def _parse(pairs: Sequence[str], defaults: Mapping[str, stage.Scalar]) -> dict[str, stage.Scalar]:
    got: dict[str, stage.Scalar] = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not equals or not key.strip():
            raise UsageError(f"-c {pair}: write KEY=VALUE")
        key, text = key.strip(), text.strip()
        got[key] = _value(key, text, defaults.get(key))
    return got


def _value(key: str, text: str, default: stage.Scalar | None) -> stage.Scalar:
    try:
        value = tomllib.loads(f"v = {text}")["v"]
    except tomllib.TOMLDecodeError:
        value = text  # a bare word
    if isinstance(default, str) and not isinstance(value, str):
        value = text
    if isinstance(default, float) and type(value) is int:
        value = float(value)
    if not isinstance(value, str | int | float | bool):
        raise UsageError(f"-c {key}={text}: a value is one string, number or true/false")
    return value


def _check_clients(config: RunConfig, clients: int) -> None:
    if config.min_nodes > clients:
        raise UsageError(
            f"{clients} clients are fewer than min-nodes = {config.min_nodes}; add -c min-nodes={clients}"
        )
    if ":" not in config.data:  # your own functions run where the clients do
        rows = len(data.load(config.data, "train", config.data_dir))
        if clients > rows:
            raise UsageError(f"{clients} clients cannot share {rows} training rows; use fewer --clients")


def _check_model(config: RunConfig) -> None:
    """Build the network once: a wrong model, pattern or checkpoint is found before anything is started."""
    if ":" not in config.data:
        rows = data.load(config.data, "train", config.data_dir)
        model = backbone(config.model, config.weights_source, rows.in_shape, rows.num_classes).build()
        MaskSpec.of(model, patterns(config.include), patterns(config.exclude))


def _check_folder(out: Path, told: Mapping[str, Any], rounds: int, *, overwrite: bool) -> int:
    """Give the last round of the run to resume, 0 where there is none."""
    if out.exists() and not out.is_dir():
        raise UsageError(f"{out} is a file; give another --out")
    if _held(out / track.LOCK):
        raise UsageError(f"another run is writing {out}; wait for it, or give another --out")
    if overwrite:
        for name in _FILES:
            (out / name).unlink(missing_ok=True)
        return 0
    if not (out / track.CONFIG).exists() or not (out / track.CHECKPOINT).exists():
        return 0
    try:
        track.same_run(out, json.loads((out / track.CONFIG).read_text("utf-8")), dict(told))
    except (track.RunDirError, ValueError) as error:
        raise UsageError(str(error)) from error
    done = [row["round"] for row in read_metrics(out)]
    last = max(done, default=0)
    if last >= rounds and (out / track.MASK).exists():
        raise UsageError(
            f"{out} holds a finished run of {last} rounds; use --overwrite to replace it, or another --out"
        )
    return last


def _held(lock: Path) -> bool:
    """Say whether a server is writing there now; it takes the lock itself later, this only says so sooner."""
    if not lock.exists():
        return False
    with lock.open("r") as f:
        try:
            fcntl.flock(f, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:
            return True
    return False


def read_metrics(out: Path) -> list[dict[str, Any]]:
    """Read every complete line of a run's metrics."""
    path = out / track.METRICS
    return track.read_lines(path)


def launch(plan: Plan, console: Console, *, num_clients: int, cpus: int, gpus: float) -> None:
    """Run the plan; print a header, a row a round, and what came of it.

    Raises
    ------
    RunError
        The run failed; the message is Flower's reason and the end of its log.
    """

    def say(text: str, style: str | None = None) -> None:
        console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)

    c = plan.config
    what = f"{c.method} on {c.data}, {c.model}, weights {c.weights}"
    say(f"{what}: {num_clients} clients, {c.num_server_rounds} rounds")
    say(f"Flower {version('flwr')} simulation; folder {plan.out}", "dim")
    if plan.after:
        say(f"resuming the unfinished run after round {plan.after}")
    table = RoundTable(console, c.num_server_rounds)
    try:
        with table:
            simulate(
                plan.overrides,
                num_clients=num_clients,
                out=plan.out,
                on_round=table.add,
                cpus_per_client=cpus,
                gpus_per_client=gpus,
            )
    except (SimulationError, LeftoverError, stage.StageError) as error:
        raise RunError(str(error)) from error
    say(summary(read_metrics(plan.out)), "bold")
    say("files: " + ", ".join(name for name in _FILES if (plan.out / name).exists()), "dim")
