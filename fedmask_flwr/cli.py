"""The command line: ``fedmask run`` and ``fedmask inspect``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, NoReturn

import typer
from rich.console import Console

from fedmask_flwr import __version__

__all__ = ["app"]

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Ship masks, not weights: federated learning of binary masks over frozen networks, on Flower.",
)

FAILED, USAGE = 1, 2


def _stop(message: str, code: int) -> NoReturn:
    Console(stderr=True).print(
        message, style="red" if code else None, markup=False, highlight=False, soft_wrap=True
    )
    raise typer.Exit(code)


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
    clients: Annotated[int, typer.Option(min=1, help="Simulated clients.")] = 10,
    method: Annotated[str | None, typer.Option(help="fedpm, deltamask, fedavg or 'package.module:Class'.")] = None,
    data: Annotated[
        str | None,
        typer.Option(help="digits, mnist, fashion-mnist, cifar10, npz or 'package.module:function'."),
    ] = None,
    data_dir: Annotated[Path | None, typer.Option(help="Folder of the data set.")] = None,
    model: Annotated[
        str | None,
        typer.Option(help="mlp, lenet5, conv4, conv6, torchvision:NAME or 'package.module:builder'."),
    ] = None,
    rounds: Annotated[int | None, typer.Option(help="Rounds.")] = None,
    local_epochs: Annotated[int | None, typer.Option(help="Epochs a client trains in a round.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Examples in a batch.")] = None,
    lr: Annotated[float | None, typer.Option(help="Learning rate; 0 is the method's own.")] = None,
    partition: Annotated[str | None, typer.Option(help="iid, dirichlet or classes.")] = None,
    alpha: Annotated[float | None, typer.Option(help="Concentration of the Dirichlet partition.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of everything random.")] = None,
    codec: Annotated[str | None, typer.Option(help="Codec of the bits that clients send.")] = None,
    config: Annotated[
        list[str] | None,
        typer.Option("-c", "--config", metavar="KEY=VALUE", help="Any other run-config key; repeatable."),
    ] = None,
    cpus_per_client: Annotated[int, typer.Option(min=1, help="CPU cores a client task reserves.")] = 1,
    gpus_per_client: Annotated[
        float, typer.Option(min=0, help="GPUs (or a share of one) a client task reserves.")
    ] = 0,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Delete the earlier run in the folder first.")
    ] = False,
) -> None:
    """Train in simulation: one machine, many clients, the same app as on real devices.

    Exit code 0: completed. 1: the run failed. 2: a wrong option or folder, nothing was started.
    """
    from fedmask_flwr.simulation import launch

    given = {
        "method": method,
        "data": data,
        "data-dir": None if data_dir is None else str(data_dir.absolute()),
        "model": model,
        "num-server-rounds": rounds,
        "local-epochs": local_epochs,
        "batch-size": batch_size,
        "learning-rate": lr,
        "partition": partition,
        "alpha": alpha,
        "seed": seed,
        "codec": codec,
    }
    console = Console()
    try:
        options = {k: v for k, v in given.items() if v is not None}
        plan = launch.prepare(options, config or [], out, clients=clients, overwrite=overwrite)
    except launch.UsageError as error:
        _stop(str(error), USAGE)
    try:
        launch.launch(plan, console, num_clients=clients, cpus=cpus_per_client, gpus=gpus_per_client)
    except launch.RunError as error:
        _stop(str(error), FAILED)
    except KeyboardInterrupt:
        _stop(f"stopped; the same command resumes {plan.out}", 130)


@app.command()
def inspect(file: Annotated[Path, typer.Argument(help="A frame: mask.fedmask, or a captured message.")]) -> None:
    """Print what a frame holds: header, fields, codecs, bits per parameter, density of bit fields."""
    from fedmask_flwr.describe import describe
    from fedmask_flwr.wire import WireError

    try:
        Console().print(describe(file.read_bytes()))
    except (OSError, WireError) as error:
        _stop(f"{file}: {getattr(error, 'strerror', None) or error}", FAILED)


if __name__ == "__main__":
    app()
