"""What the commands share: options of those that train, and how one ends that cannot go on."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, NoReturn

import typer
from rich.console import Console

FAILED, USAGE = 1, 2


def stop(message: str, code: int) -> NoReturn:
    """End the command with a message and an exit code."""
    Console(stderr=True).print(
        message, style="red" if code else None, markup=False, highlight=False, emoji=False, soft_wrap=True
    )
    raise typer.Exit(code)


# Options of every command that trains; what is not given keeps the app's default.
Clients = Annotated[int, typer.Option(min=1, help="Simulated clients.")]
Data = Annotated[
    str | None,
    typer.Option(help="digits, mnist, fashion-mnist, cifar10, npz, debd/NAME or 'package.module:function'."),
]
DataDir = Annotated[Path | None, typer.Option(help="Folder of the data set.")]
Model = Annotated[
    str | None,
    typer.Option(help="mlp, lenet5, leaf, har, conv4, conv6, made, torchvision:NAME or 'package.module:builder'."),
]
Rounds = Annotated[int | None, typer.Option(help="Rounds.")]
LocalEpochs = Annotated[int | None, typer.Option(help="Epochs a client trains in a round.")]
BatchSize = Annotated[int | None, typer.Option(help="Examples in a batch.")]
Partition = Annotated[str | None, typer.Option(help="iid, dirichlet, classes or group.")]
Alpha = Annotated[float | None, typer.Option(help="Concentration of the Dirichlet partition.")]
Config = Annotated[
    list[str] | None,
    typer.Option("-c", "--config", metavar="KEY=VALUE", help="Any other run-config key; repeatable."),
]
Cpus = Annotated[int, typer.Option(min=1, help="CPU cores a client task reserves.")]
Gpus = Annotated[float, typer.Option(min=0, help="GPUs (or a share of one) a client task reserves.")]


def given(**options: str | int | float | Path | None) -> dict[str, str | int | float | bool]:
    """Run-config keys of the options that were given; data_dir becomes data-dir."""
    named = {name.replace("_", "-"): value for name, value in options.items() if value is not None}
    return {name: str(value) if isinstance(value, Path) else value for name, value in named.items()}
