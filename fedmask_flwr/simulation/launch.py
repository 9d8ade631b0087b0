"""What ``fedmask run`` does: check everything that can be checked first, then run, show and sum up."""

from __future__ import annotations

import fcntl
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from fedmask_flwr import data, track
from fedmask_flwr.config import ConfigError, RunConfig, load_config, patterns, scalar
from fedmask_flwr.memory import forget
from fedmask_flwr.methods import Method, resolve
from fedmask_flwr.setting import importable, network, scenario_of, settled, shape
from fedmask_flwr.share import share
from fedmask_flwr.show import RoundTable, summary
from fedmask_flwr.simulation import stage
from fedmask_flwr.simulation.runtime import LOG, SimulationError
from fedmask_flwr.simulation.runtime import run as simulate
from fedmask_flwr.simulation.sandbox import LeftoverError
from fedmask_flwr.standing import INDEX, stand
from fedmask_flwr.train import device_of, evaluate, losses_of, tensors

__all__ = ["Plan", "RunError", "UsageError", "launch", "prepare"]

MEMORY = "memory"
_WEIGHTS = re.compile(r"file:(?P<path>.+)(?P<hash>#sha256=.*)")
_FILES = (track.CONFIG, track.TOKEN, track.METRICS, track.CHECKPOINT, track.MASK, track.CURVE, track.FAILED, LOG)


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
    with usage():
        overrides = options(given, pairs, out, clients=clients)
        if "compare" in overrides or "seeds" in overrides:
            raise UsageError("several runs are a command of their own: use fedmask compare")
        told = {**stage.defaults(), **overrides}
        config, settings = load_config(told, given=overrides)
        check_clients(config, clients)
        check_model(config, settings)
        after = _check_folder(out, told, overwrite=overwrite)
    return Plan(out, overrides, config, after)


@contextmanager
def usage() -> Iterator[None]:
    """Turn what is found wrong before anything starts into a `UsageError`.

    torch says with a RuntimeError that a network is too large, and a width of 0 is divided by.
    """
    try:
        with importable():
            yield
    except UsageError:
        raise
    except (ConfigError, data.DataError, track.RunDirError, OSError, ValueError) as error:
        raise UsageError(str(error)) from error
    except (RuntimeError, ArithmeticError, MemoryError) as error:
        said = (str(error) or type(error).__name__).splitlines()[0]
        raise UsageError(f"this cannot be built: {said}") from error


def options(
    given: Mapping[str, stage.Scalar], pairs: Sequence[str], out: Path, *, clients: int
) -> dict[str, stage.Scalar]:
    """Merge options and ``key=value`` pairs into run-config keys, paths absolute; devices' memory lies in `out`.

    Raises
    ------
    UsageError, ConfigError
        For a pair that cannot be read, or a key that is an option.
    """
    overrides = {**given, **_parse(pairs, stage.defaults())}
    if "out" in overrides:
        raise UsageError("the folder is an option of its own: use --out")
    if "clients" in overrides:
        raise UsageError("the number of clients is an option of its own: use --clients")
    for key in ("data-dir", "memory-dir"):
        if isinstance(where := overrides.get(key), str) and where:
            overrides[key] = str(Path(where).expanduser().absolute())
    if str(table := overrides.get("scenario", "")).endswith(".toml"):
        overrides["scenario"] = str(Path(str(table)).expanduser().absolute())
    if (found := _WEIGHTS.fullmatch(str(overrides.get("weights", "")))) is not None:
        overrides["weights"] = f"file:{Path(found['path']).expanduser().absolute()}{found['hash']}"
    overrides["clients"] = clients
    overrides["memory-dir"] = overrides.get("memory-dir") or str(out / MEMORY)
    return overrides


def _parse(pairs: Sequence[str], defaults: Mapping[str, stage.Scalar]) -> dict[str, stage.Scalar]:
    got: dict[str, stage.Scalar] = {}
    for pair in pairs:
        key, equals, text = (part.strip() for part in pair.partition("="))
        if not equals or not key:
            raise UsageError(f"-c {pair}: write KEY=VALUE")
        got[key] = scalar(f"-c {key}", text, defaults.get(key))
    return got


def check_clients(config: RunConfig, clients: int) -> None:
    """Check that there are enough clients, and that each of them gets rows.

    Raises
    ------
    UsageError, DataError
        With the fix in its message.
    """
    if config.min_nodes > clients:
        raise UsageError(
            f"{clients} clients are fewer than min-nodes = {config.min_nodes}; add -c min-nodes={clients}"
        )
    if (scenario := scenario_of(config)) is not None:
        if clients != scenario.clients:
            raise UsageError(
                f"scenario {scenario.name} is of {scenario.clients} clients: use --clients {scenario.clients}"
            )
        for client in range(clients):
            for task in range(scenario.tasks):
                for split in ("train", "test"):  # all clients evaluate
                    data.cell_data(scenario, client, task, split, config.data_dir, config.seed)
        return
    if ":" in config.data:  # your own functions run where the clients do
        return
    train = data.load(config.data, "train", config.data_dir)
    if clients > len(train):
        raise UsageError(f"{clients} clients cannot share {len(train)} training rows; use fewer --clients")
    # Clients evaluate when told to, or where nobody else can.
    both = config.fraction_evaluate > 0 or not resolve(config.method).modes
    test = data.load(config.data, "test", config.data_dir) if both else None
    scheme, alpha, classes = config.partition, config.alpha, config.classes_per_client
    parts: tuple[data.Split, ...] = ("train", "test") if both else ("train",)
    for split in parts:
        for i in range(clients):
            share(train, test, split, i, clients, scheme, alpha=alpha, classes_per_client=classes, seed=config.seed)


def check_model(config: RunConfig, settings: Mapping[str, Any]) -> None:
    """Build network and method once: a wrong model, pattern or checkpoint is found before anything is started.

    Raises
    ------
    ValueError, FileNotFoundError, DataError
        With the fix in its message.
    """
    method = resolve(config.method)
    if config.adapt_epochs > 0 and method.adapt is Method.adapt:
        raise UsageError(f"{config.method} does not adapt before it evaluates: leave adapt-epochs at -1, or set 0")
    try:
        device_of(config.device)
    except RuntimeError as error:
        raise UsageError(str(error)) from error
    if ":" in config.data and not config.scenario:
        return
    model = network(config, *shape(config))
    spec = method.layout(model, patterns(config.include), patterns(config.exclude))
    method(spec, model, method.Config(**settled(config, settings)), fraction=config.fraction_train)
    if not config.scenario:
        test = data.load(config.data, "test", config.data_dir)
        few = data.Dataset(test.x[:8], test.y[:8], test.num_classes, None, test.valid, test.labels)
        with torch.no_grad():
            evaluate(model, *tensors(few.x, few.y, torch.device("cpu")), losses_of(model, few))


def _check_folder(out: Path, told: Mapping[str, Any], *, overwrite: bool) -> int:
    """Give the last round of the run to resume, 0 where there is none."""
    check_free(out)
    if (out / INDEX).exists():
        raise UsageError(f"{out} holds a comparison, whose devices' memory lies there too; give another --out")
    if overwrite:
        clear(out)
        return 0
    last, complete = track.standing(out, told)
    if complete:
        raise UsageError(
            f"{out} holds a finished run of {last} rounds; use --overwrite to replace it, or another --out"
        )
    # Rounds in which nobody answered are recorded and not checkpointed.
    return min(last, stand(out).checkpoint_round or 0) if last else 0


def check_free(out: Path) -> None:
    """Raise `UsageError` when `out` is no folder, or another process writes there."""
    if out.exists() and not out.is_dir():
        raise UsageError(f"{out} is a file; give another --out")
    if _held(out / track.LOCK):
        raise UsageError(f"another run is writing {out}; wait for it, or give another --out")


def clear(out: Path) -> None:
    """Delete a run's files and its devices' memory, and nothing else."""
    for name in _FILES:
        (out / name).unlink(missing_ok=True)
    forget(out / MEMORY)


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
    c = plan.config
    what = f"{c.method} on {c.scenario or c.data}, {c.model}, weights {c.weights}"
    say(console, f"{what}: {num_clients} clients, {c.num_server_rounds} rounds")
    say(console, f"Flower {version('flwr')} simulation; folder {plan.out}", "dim")
    if plan.after:
        say(console, f"resuming the unfinished run after round {plan.after}")
    table = RoundTable(console, c.num_server_rounds)
    with failures(), table:
        simulate(
            plan.overrides,
            num_clients=num_clients,
            out=plan.out,
            on_round=table.add,
            cpus_per_client=cpus,
            gpus_per_client=gpus,
        )
    if not (plan.out / track.MASK).exists():
        raise RunError(
            f"every round is there, {plan.out / track.MASK} was not saved: free the disk and start the same "
            "command again"
        )
    say(console, summary(read_metrics(plan.out)), "bold")
    say(console, "files: " + ", ".join(n for n in _FILES if n != track.TOKEN and (plan.out / n).exists()), "dim")


@contextmanager
def failures() -> Iterator[None]:
    """Turn what a simulation raises into a `RunError`."""
    try:
        yield
    except (SimulationError, LeftoverError, stage.StageError, OSError) as error:
        raise RunError(str(error)) from error


def say(console: Console, text: str, style: str | None = None) -> None:
    """Print a line as it is: no markup, no wrapping."""
    console.print(text, style=style, markup=False, highlight=False, emoji=False, soft_wrap=True)
