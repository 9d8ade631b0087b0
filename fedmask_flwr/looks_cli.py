"""The commands that only look: ``fedmask inspect``, ``status`` and ``doctor``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from fedmask_flwr.options import FAILED, USAGE, Config, Data, DataDir, Model, given, stop

__all__ = ["looks_app"]

looks_app = typer.Typer()


@looks_app.command()
def inspect(file: Annotated[Path, typer.Argument(help="A frame: mask.fedmask, or a captured message.")]) -> None:
    """Print what a frame holds: header, fields, codecs, bits per parameter, density of bit fields."""
    from fedmask_flwr.describe import describe
    from fedmask_flwr.wire import WireError

    try:
        Console().print(describe(file.read_bytes()))
    except (OSError, WireError) as error:
        stop(f"{file}: {getattr(error, 'strerror', None) or error}", FAILED)


@looks_app.command()
def status(
    folder: Annotated[Path, typer.Argument(help="Folder of a run, or of a comparison.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    stall: Annotated[
        float | None, typer.Option(min=0, help="Seconds without a round after which a run counts as stalled.")
    ] = None,
) -> None:
    """Say where a run stands: round, pace, accuracy, bytes, failures, checkpoint. The folder is only read.

    Exit code 0: it runs or is finished. 1: stalled, stopped or failed. 2: there is no run.
    """
    from fedmask_flwr import status as standing

    try:
        code = standing.report(folder, Console(), as_json=as_json, stall=stall)
    except (standing.NoRunError, OSError) as error:
        stop(str(error), USAGE)
    raise typer.Exit(code)


@looks_app.command()
def doctor(
    superlink: Annotated[
        str | None, typer.Option(metavar="HOST:PORT", help="The SuperLink's address for nodes.")
    ] = None,
    root_certificates: Annotated[Path | None, typer.Option(help="The CA's certificate, as nodes get it.")] = None,
    auth_key: Annotated[Path | None, typer.Option(help="The node's private key.")] = None,
    data: Data = None,
    data_dir: DataDir = None,
    model: Model = None,
    weights: Annotated[str | None, typer.Option(help="Frozen weights: seed:N, file:PATH#sha256=HEX, ...")] = None,
    memory_dir: Annotated[Path | None, typer.Option(help="Folder of this device's memory.")] = None,
    run: Annotated[
        Path | None, typer.Option(help="Folder of a run: its settings are taken, its files are looked at.")
    ] = None,
    config: Config = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Look at this device or server: versions, way to the SuperLink, TLS, clock, disks, memory, data, network.

    Each finding comes with its remedy. Exit code 0: nothing failed. 1: something did. 2: a wrong option.
    """
    from fedmask_flwr import doctor as doctoring

    try:
        asked = doctoring.asking(
            superlink=superlink,
            root_certificates=root_certificates,
            auth_key=auth_key,
            memory_dir=memory_dir,
            run=run,
            options=given(data=data, data_dir=data_dir, model=model, weights=weights),
            pairs=config or [],
        )
    except doctoring.UsageError as error:
        stop(str(error), USAGE)
    raise typer.Exit(doctoring.diagnose(asked, Console(), as_json=as_json))
