"""The command line: ``fedmask run``, ``compare``, ``report`` and ``export``; others look, or make keys."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from fedmask_flwr import __version__
from fedmask_flwr.keys_cli import keys_app
from fedmask_flwr.looks_cli import looks_app
from fedmask_flwr.options import (
    FAILED,
    USAGE,
    Alpha,
    BatchSize,
    Clients,
    Config,
    Cpus,
    Data,
    DataDir,
    Gpus,
    LocalEpochs,
    Model,
    Partition,
    Rounds,
    given,
    stop,
)

__all__ = ["app"]

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Ship masks, not weights: federated learning of binary masks over frozen networks, on Flower.",
)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"fedmask {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


@app.command()
def run(
    out: Annotated[Path, typer.Option(help="Folder of this run; an unfinished run in it is resumed.")] = Path(
        "runs/first"
    ),
    clients: Clients = 10,
    method: Annotated[
        str | None, typer.Option(help="A built-in method, such as deltamask or fedavg, or 'package.module:Class'.")
    ] = None,
    data: Data = None,
    data_dir: DataDir = None,
    model: Model = None,
    rounds: Rounds = None,
    local_epochs: LocalEpochs = None,
    batch_size: BatchSize = None,
    lr: Annotated[float | None, typer.Option(help="Learning rate; 0 is the method's own.")] = None,
    partition: Partition = None,
    alpha: Alpha = None,
    seed: Annotated[int | None, typer.Option(help="Seed of everything random.")] = None,
    codec: Annotated[str | None, typer.Option(help="Codec of the bits that clients send.")] = None,
    config: Config = None,
    cpus_per_client: Cpus = 1,
    gpus_per_client: Gpus = 0,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Delete the earlier run in the folder first.")
    ] = False,
) -> None:
    """Train in simulation: one machine, many clients, the same app as on real devices.

    Exit code 0: completed. 1: the run failed. 2: a wrong option or folder, nothing was started.
    """
    from fedmask_flwr.simulation import launch

    chosen = given(
        method=method,
        data=data,
        data_dir=data_dir,
        model=model,
        num_server_rounds=rounds,
        local_epochs=local_epochs,
        batch_size=batch_size,
        learning_rate=lr,
        partition=partition,
        alpha=alpha,
        seed=seed,
        codec=codec,
    )
    console = Console()
    try:
        plan = launch.prepare(chosen, config or [], out, clients=clients, overwrite=overwrite)
    except launch.UsageError as error:
        stop(str(error), USAGE)
    try:
        launch.launch(plan, console, num_clients=clients, cpus=cpus_per_client, gpus=gpus_per_client)
    except launch.RunError as error:
        stop(str(error), FAILED)
    except KeyboardInterrupt:
        stop(f"stopped; the same command resumes {plan.out}", 130)


@app.command()
def compare(
    methods: Annotated[
        str,
        typer.Option(
            help="Comma-separated, each with settings of its own where it has some: "
            "'fedpm, deltamask(kappa=1.0 codec=rice)'."
        ),
    ],
    out: Annotated[
        Path, typer.Option(help="Folder of the comparison, one folder a run in it; runs complete there are kept.")
    ] = Path("runs/compare"),
    clients: Clients = 10,
    data: Data = None,
    data_dir: DataDir = None,
    model: Model = None,
    rounds: Rounds = None,
    local_epochs: LocalEpochs = None,
    batch_size: BatchSize = None,
    partition: Partition = None,
    alpha: Alpha = None,
    seeds: Annotated[
        int | None, typer.Option(min=1, help="How many seeds, from the run config's on; 3 when not given.")
    ] = None,
    seed_list: Annotated[str | None, typer.Option(help="The seeds, comma-separated, instead.")] = None,
    config: Config = None,
    cpus_per_client: Cpus = 1,
    gpus_per_client: Gpus = 0,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Delete the earlier comparison in the folder first.")
    ] = False,
) -> None:
    """Run several methods, several seeds, all else equal, in one simulation; then print a table of them.

    Exit code 0: completed. 1: some run failed. 2: a wrong option or folder, nothing was started.
    """
    from fedmask_flwr.simulation import comparing, launch

    chosen = given(
        data=data,
        data_dir=data_dir,
        model=model,
        num_server_rounds=rounds,
        local_epochs=local_epochs,
        batch_size=batch_size,
        partition=partition,
        alpha=alpha,
    )
    try:
        plan = comparing.prepare(
            chosen,
            config or [],
            out,
            methods=methods,
            seeds=seeds,
            seed_list=seed_list,
            clients=clients,
            overwrite=overwrite,
        )
    except launch.UsageError as error:
        stop(str(error), USAGE)
    try:
        comparing.launch_all(plan, Console(), num_clients=clients, cpus=cpus_per_client, gpus=gpus_per_client)
    except launch.RunError as error:
        stop(str(error), FAILED)
    except KeyboardInterrupt:
        stop(f"stopped; the same command resumes {plan.out}", 130)


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(help="Folder of a comparison, or of one continual run.")],
) -> None:
    """Print and write a comparison's table and picture again, or a continual run's, from what was recorded."""
    from fedmask_flwr.compare import results
    from fedmask_flwr.continual import report as tasks
    from fedmask_flwr.simulation import comparing, launch
    from fedmask_flwr.track import CONFIG

    try:
        single = (folder / CONFIG).exists() and not (folder / results.INDEX).exists()
        (tasks.show if single else comparing.show)(folder, Console())
    except (tasks.ReportError, launch.RunError, OSError) as error:
        stop(str(error), FAILED)


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="Folder of a finished run.")],
    out: Annotated[Path, typer.Option(help="Folder for the network's files.")],
    slim: Annotated[
        bool, typer.Option("--slim", help="Cut pruned filters and channels that are always 0: a smaller network.")
    ] = False,
    onnx: Annotated[bool, typer.Option("--onnx", help="Write model.onnx too (extra 'export').")] = False,
    data_dir: Annotated[
        Path | None, typer.Option(help="Folder of the run's data set, which says what shape an example has.")
    ] = None,
    client: Annotated[
        int | None,
        typer.Option(min=0, help="Number of the device whose own network is wanted, from the run's memory folder."),
    ] = None,
    task: Annotated[
        int | None, typer.Option(min=0, help="With --client: its network for that task instead of the latest.")
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an earlier export in the folder.")
    ] = False,
) -> None:
    """Write a run's network as plain files that need nothing of fedmask: safetensors, a PyTorch program, ONNX.

    Exit code 0: written and checked. 1: nothing was written, the message says why.
    """
    from fedmask_flwr import export as exporting

    try:
        where = None if data_dir is None else str(data_dir.absolute())
        done = exporting.export(
            run, out, slim=slim, onnx=onnx, data_dir=where, client=client, task=task, overwrite=overwrite
        )
    except (exporting.ExportError, OSError) as error:
        stop(str(error), FAILED)
    Console().print(exporting.show(done, out), soft_wrap=True)


@app.command(context_settings={"ignore_unknown_options": True, "allow_extra_args": True, "help_option_names": []})
def supernode(context: typer.Context) -> None:
    """Start Flower's SuperNode (all its options) with client processes that start warm: torch is imported once."""
    from fedmask_flwr.warm import supernode as start

    try:
        start(context.args)
    except FileNotFoundError as error:
        stop(str(error), FAILED)


app.add_typer(looks_app)
app.add_typer(keys_app, name="keys")


if __name__ == "__main__":
    app()
