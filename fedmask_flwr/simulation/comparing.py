"""What ``fedmask compare`` does: check every run first, run them in one simulation, show the table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.text import Text

from fedmask_flwr import track
from fedmask_flwr.compare import CompareError, Run, lineup, report, results
from fedmask_flwr.config import ConfigError, RunConfig, load_config
from fedmask_flwr.memory import forget
from fedmask_flwr.show import human_bytes

from . import launch, stage
from .runtime import LOG
from .runtime import run as simulate

__all__ = ["Plan", "launch_all", "prepare", "show"]

_FILES = (results.INDEX, report.REPORT, report.TABLE, report.PICTURE, LOG)
_OPTIONS = {"method": "--methods", "compare": "--methods", "seeds": "--seeds or --seed-list"}


@dataclass(frozen=True, slots=True)
class Plan:
    """A checked comparison: its runs, and the folders of those that are complete already."""

    out: Path
    overrides: Mapping[str, stage.Scalar]
    config: RunConfig
    runs: tuple[Run, ...]
    done: frozenset[str]


def prepare(
    given: Mapping[str, stage.Scalar],
    pairs: Sequence[str],
    out: Path,
    *,
    methods: str,
    seeds: int | None = None,
    seed_list: str | None = None,
    clients: int,
    overwrite: bool,
) -> Plan:
    """Check options, data, networks and folders of every run.

    Parameters
    ----------
    given, pairs, out, clients
        As for ``launch.prepare``; ``out`` gets one folder a run.
    methods : str
        See ``compare.parse``.
    seeds : int, optional
        How many, from ``seed`` on.
    seed_list : str, optional
        Comma-separated, instead.
    overwrite : bool
        Delete an earlier comparison in `out`.

    Raises
    ------
    UsageError
        With the fix in its message.
    """
    out = out.absolute()
    if seeds is not None and seed_list is not None:
        raise launch.UsageError("--seeds counts them and --seed-list names them: give one")
    with launch.usage():
        overrides = launch.options(given, pairs, out, clients=clients)
        for key, option in _OPTIONS.items():
            if key in overrides:
                raise launch.UsageError(f"{key} is an option of its own: use {option}")
        if overrides.get("fraction-evaluate") == 0:
            raise launch.UsageError("clients evaluate in a comparison: give fraction-evaluate above 0")
        defaults = stage.defaults()
        if seeds is not None:
            first = RunConfig.model_validate({"seed": overrides.get("seed", defaults["seed"])}).seed
            seed_list = ",".join(str(first + i) for i in range(seeds))
        overrides |= {"compare": methods, "seeds": seed_list or ""}
        runs = lineup({**defaults, **overrides})
        _check_keys(overrides, runs)
        configs = [load_config(run.config) for run in runs]
        for i, (config, settings) in enumerate(configs):
            if runs[i].label == runs[0].label:  # the first of its seed
                launch.check_clients(config, clients)
            if runs[i].seed == runs[0].seed:
                launch.check_model(config, settings)
        done = _check_folder(out, runs, overwrite=overwrite)
    return Plan(out, overrides, configs[0][0], runs, done)


def _check_keys(overrides: Mapping[str, stage.Scalar], runs: Sequence[Run]) -> None:
    """Refuse a key that none of the methods would read."""
    each = [run for run in runs if run.seed == runs[0].seed]
    for key in overrides:
        refused: ConfigError | None = None
        for run in each:
            try:
                load_config(run.config, given=[key])
                break
            except ConfigError as error:
                refused = error
        else:
            raise launch.UsageError(f"no method here reads {key}: {refused}")


def _check_folder(out: Path, runs: Sequence[Run], *, overwrite: bool) -> frozenset[str]:
    """Give the folders of the runs that are complete."""
    launch.check_free(out)
    if (out / track.CONFIG).exists():
        raise launch.UsageError(f"{out} holds a single run; give another --out")
    if overwrite:
        _clear(out)
        return frozenset()
    try:
        results.fits(out, runs)
    except CompareError as error:
        raise launch.UsageError(str(error)) from error
    return frozenset(run.folder for run in runs if track.standing(out / run.folder, run.config)[1])


def _clear(out: Path) -> None:
    """Delete a comparison's runs, its devices' memory and its own files, and nothing else."""
    for folder in results.folders(out):
        launch.clear(folder)
        (folder / track.LOCK).unlink(missing_ok=True)
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()
    for name in _FILES:
        (out / name).unlink(missing_ok=True)
    forget(out / launch.MEMORY)


def launch_all(plan: Plan, console: Console, *, num_clients: int, cpus: int, gpus: float) -> None:
    """Run what is not complete yet; print a line a finished run, then the table.

    Raises
    ------
    RunError
        Some run, or the simulation, failed; what is complete is shown before.
    """
    c, todo = plan.config, [run for run in plan.runs if run.folder not in plan.done]
    what = f"{len(plan.runs)} runs on {c.scenario or c.data}, {c.model}, weights {c.weights}"
    launch.say(console, f"{what}: {num_clients} clients, {c.num_server_rounds} rounds each")
    if plan.done:
        launch.say(console, f"{len(plan.done)} of them are complete in {plan.out}")
    if not todo:
        show(plan.out, console)
        return
    launch.say(console, f"Flower {version('flwr')} simulation; folder {plan.out}", "dim")
    try:
        with launch.failures(), Progress(console, todo, c.num_server_rounds) as progress:
            simulate(
                plan.overrides,
                num_clients=num_clients,
                out=plan.out,
                on_round=progress.add,
                runs=[run.folder for run in todo],
                cpus_per_client=cpus,
                gpus_per_client=gpus,
            )
    except launch.RunError:
        if (plan.out / results.INDEX).exists():
            show(plan.out, console)
        raise
    show(plan.out, console)


def show(out: Path, console: Console) -> None:
    """Write table and picture of a comparison's folder again, and print the table.

    Raises
    ------
    RunError
        The folder holds no comparison, or one that cannot be read or written.
    """
    try:
        summaries = report.write(out)
    except (CompareError, OSError) as error:
        raise launch.RunError(str(error)) from error
    for table in report.terminal_tables(summaries):
        console.print(table, highlight=False)
        console.print()
    for summary in summaries:
        for gap in summary.missing:
            launch.say(console, f"{summary.label}, {gap}", "red")
    files = [name for name in _FILES if (out / name).exists()]
    launch.say(console, f"files in {out}: {', '.join(files)}", "dim")


class Progress:
    """One line a finished run, and in a terminal which run is in which round. Use it as a context manager."""

    def __init__(self, console: Console, runs: Sequence[Run], rounds: int) -> None:
        self.console, self.rounds = console, rounds
        self.runs = {run.folder: run for run in runs}
        self.rows: dict[str, dict[int, dict[str, Any]]] = {run.folder: {} for run in runs}
        self.done: set[str] = set()
        self.status = console.status("starting Flower and Ray ...")

    def __enter__(self) -> Progress:
        if self.console.is_terminal:
            self.status.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.status.stop()

    def add(self, row: Mapping[str, Any]) -> None:
        """Take one line of one run's metrics; ``row["run"]`` is its folder."""
        folder = str(row["run"])
        run, rows = self.runs[folder], self.rows[folder]
        rows[int(row["round"])] = dict(row)
        where = f"{run.label} seed {run.seed}, round {row['round']} of {self.rounds}"
        self.status.update(Text(f"{where}; {len(self.done)} of {len(self.runs)} runs finished"))
        if int(row["round"]) < self.rounds or folder in self.done:
            return
        self.done.add(folder)
        found = results.figures([rows[r] for r in sorted(rows)])
        accuracies = {"threshold": "accuracy_threshold", "clients": "client_accuracy_mean"}
        shown = [f"{word} {found[name]:.4f}" for word, name in accuracies.items() if name in found]
        if len(rows) == self.rounds:  # a resumed run's first rounds were not seen here
            ways = (("up", "uplink_bytes"), ("down", "downlink_bytes"))
            shown += [f"{human_bytes(found[name])} {word}" for word, name in ways if name in found]
        head = f"[{len(self.done)}/{len(self.runs)}] {run.label} seed {run.seed}"
        launch.say(self.console, f"{head}: {', '.join(shown)}")
