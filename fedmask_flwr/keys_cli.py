"""The command line ``fedmask keys``."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

__all__ = ["keys_app"]

keys_app = typer.Typer(
    no_args_is_help=True,
    help="Make, register, renew and show the keys of a deployment: TLS and SuperNode authentication.",
)
rotate_app = typer.Typer(no_args_is_help=True, help="Renew the server's certificate, or a node's keys.")
keys_app.add_typer(rotate_app, name="rotate")

Out = Annotated[Path, typer.Option(help="Folder of the new files.")]
Ca = Annotated[Path, typer.Option(help="Folder of ca.key and ca.crt.")]
Days = Annotated[int, typer.Option(min=1, help="Days of validity.")]
Link = Annotated[
    str,
    typer.Option(
        help="HOST:PORT of the SuperLink's Control API (8000), or the name of a connection in Flower's config."
    ),
]
Roots = Annotated[Path | None, typer.Option("--root-certificates", help="ca.crt, where --superlink is an address.")]
Book = Annotated[
    Path | None, typer.Option(help="The book of registered nodes; nodes.jsonl beside the key, or here.")
]


@contextlib.contextmanager
def _plainly() -> Iterator[None]:
    """End with a message and exit code 1 where keys could not be handled."""
    from fedmask_flwr.keys import KeysError

    try:
        yield
    except KeysError as error:
        Console(stderr=True).print(str(error), style="red", markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(1) from None


def _tell(files: Iterable[Path], *lines: str) -> None:
    for path in files:
        typer.echo(f"{path}  {path.stat().st_mode & 0o777:04o}")
    for line in lines:
        typer.echo(line)


@keys_app.command()
def ca(out: Out, days: Days = 3650) -> None:
    """Make a certification authority of your own: ca.key, ca.crt."""
    from fedmask_flwr import keys

    with _plainly():
        made = keys.make_ca(out, days=days)
    _tell(made, "ca.key signs server certificates: keep it off every other machine. ca.crt goes to every node.")


@keys_app.command()
def server(
    ca: Ca,
    name: Annotated[
        list[str], typer.Option(help="A DNS name or IP address by which the SuperLink is reached; repeatable.")
    ],
    out: Out,
    days: Days = 365,
) -> None:
    """Make the SuperLink's key and certificate: server.key, server.crt."""
    from fedmask_flwr import keys

    with _plainly():
        made = keys.make_server(ca, name, out, days=days)
    _tell(
        made,
        f"flower-superlink --ssl-certfile {out / 'server.crt'} --ssl-keyfile {out / 'server.key'} "
        f"--ssl-ca-certfile {ca / 'ca.crt'} --enable-supernode-auth",
    )


@keys_app.command()
def node(
    out: Out,
    name: Annotated[
        str | None, typer.Option(help="Name of the files and of the node; 'node' and the host's name if not given.")
    ] = None,
) -> None:
    """Make a SuperNode's key pair, on the node itself: NAME.key, NAME.pub."""
    import socket

    from fedmask_flwr import keys

    with _plainly():
        made = keys.make_node(out, name=name or "node", comment=name or socket.gethostname())
    _tell(made, f"Only {made[1]} leaves this machine, to be registered: fedmask keys register")


@keys_app.command()
def register(
    public: Annotated[list[Path], typer.Argument(help="Public keys of nodes, NAME.pub.")],
    superlink: Link,
    root_certificates: Roots = None,
    name: Annotated[str | None, typer.Option(help="Name of the node, where one key is given.")] = None,
    book: Book = None,
) -> None:
    """Register nodes' public keys with the SuperLink; one that is registered stays so."""
    from fedmask_flwr import keys

    with _plainly():
        if name and len(public) > 1:
            raise keys.KeysError("--name is for one key; without it, each node has the name in its key")
        for path in public:
            keys.public_key(path)  # nothing is registered where one file is wrong
        for path in public:
            entry = keys.register(path, keys.SuperLink(superlink, root_certificates), name=name, book=book)
            typer.echo(f"{path}: node {entry.node_id}, {entry.name}, registered {entry.at}")


@keys_app.command()
def unregister(
    who: Annotated[list[str], typer.Argument(help="Nodes: NAME.pub, a name in the book, or an id.")],
    superlink: Link,
    root_certificates: Roots = None,
    book: Book = None,
    force: Annotated[bool, typer.Option("--force", help="Also a node that is online: it is locked out.")] = False,
) -> None:
    """Unregister nodes: their keys are refused from now on, for ever."""
    from fedmask_flwr import keys

    with _plainly():
        for one in who:
            link = keys.SuperLink(superlink, root_certificates)
            typer.echo(f"{one}: node {keys.unregister(one, link, book=book, force=force)} unregistered")


@keys_app.command("list")
def list_(superlink: Link, root_certificates: Roots = None, book: Book = None) -> None:
    """List the nodes that the SuperLink knows."""
    from rich.table import Table
    from rich.text import Text

    from fedmask_flwr import keys
    from fedmask_flwr.show import printable

    with _plainly():
        found = keys.nodes(keys.SuperLink(superlink, root_certificates), book or Path(keys.BOOK))
    table = Table("node", "name", "status", "since", "key", box=None)
    for one in found:
        entry = ("", "") if one.entry is None else (one.entry.name, one.entry.fingerprint)
        cells = (str(one.node_id), entry[0], one.status, one.since, entry[1])
        table.add_row(*(Text(printable(cell)) for cell in cells))  # a name is a comment of a site's file
    Console(soft_wrap=True).print(table)


@rotate_app.command("server")
def rotate_server(
    folder: Annotated[Path, typer.Option("--dir", help="Folder of server.key and server.crt.")],
    ca: Annotated[Path | None, typer.Option(help="Folder of ca.key and ca.crt.")] = None,
    name: Annotated[list[str] | None, typer.Option(help="New names, in place of those it has; repeatable.")] = None,
    days: Days = 365,
    drop_old: Annotated[bool, typer.Option("--drop-old", help="Only delete what the last renewal kept.")] = False,
) -> None:
    """Renew the SuperLink's key and certificate, of the same CA; the old ones are kept as *.old."""
    from fedmask_flwr import keys

    with _plainly():
        if drop_old:
            _deleted(keys.drop(folder, "server"))
            return
        if ca is None:
            raise keys.KeysError("which CA signs the new certificate? Give its folder with --ca")
        made = keys.renew_server(ca, folder, names=name or [], days=days)
    _tell(made, "Restart the SuperLink; nodes need nothing new. Then: fedmask keys rotate server ... --drop-old")


@rotate_app.command("node")
def rotate_node(
    folder: Annotated[Path, typer.Option("--dir", help="Folder of the node's keys.")],
    name: Annotated[str, typer.Option(help="Name of the files.")] = "node",
    switch: Annotated[
        bool,
        typer.Option("--switch", help="Second step: the new pair, registered by now, takes the old one's place."),
    ] = False,
    drop_old: Annotated[bool, typer.Option("--drop-old", help="Only delete what the switch kept.")] = False,
) -> None:
    """Renew a node's keys, on the node: first a new pair beside the old; once it is registered, --switch."""
    from fedmask_flwr import keys

    with _plainly():
        if drop_old:
            _deleted(keys.drop(folder, name))
            return
        made = keys.renew_node(folder, name=name, switch=switch)
    _tell(
        made,
        "Restart the SuperNode. Once it is online as a new node, unregister the old one: fedmask keys unregister"
        if switch
        else f"Now register {made[1]} at the server, and only then: fedmask keys rotate node ... --switch",
    )


@keys_app.command()
def show(files: Annotated[list[Path], typer.Argument(help="Keys and certificates.")]) -> None:
    """Print what a key or certificate is, its names, expiry, fingerprint, and what is wrong with it."""
    from fedmask_flwr import keys
    from fedmask_flwr.show import printable

    with _plainly():
        for path in files:
            shown = keys.show(path)
            typer.echo(f"{path}: {printable(shown.what)}")
            for fact, value in shown.facts:
                typer.echo(f"  {fact}: {printable(str(value))}")
            for warning in shown.warnings:
                typer.secho(f"  warning: {printable(warning)}", fg=typer.colors.YELLOW)


def _deleted(files: Iterable[Path]) -> None:
    for path in files:
        typer.echo(f"{path}  deleted")
