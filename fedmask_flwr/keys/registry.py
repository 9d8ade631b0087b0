"""Tell a SuperLink which nodes' public keys it accepts, by Flower's own command line.

Flower does not tell which key a registered node has. So what is registered is noted in a book, a file of JSON
lines beside the public keys; it holds nothing secret.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import ssl
import subprocess
import sysconfig
import tempfile
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric import ec

from .facts import fingerprint, public_key
from .files import KeysError, plainly

__all__ = ["BOOK", "Entry", "Node", "SuperLink", "nodes", "register", "unregister"]

BOOK = "nodes.jsonl"
GONE = "unregistered"
_SECONDS = 120  # Flower's own time limits come first
_IN_USE = "[code: 23]"


@dataclass(frozen=True, slots=True)
class SuperLink:
    """A SuperLink's Control API: a connection of Flower's config, or HOST:PORT and the CA that vouches for it."""

    where: str
    roots: Path | None = None


@dataclass(frozen=True, slots=True)
class Entry:
    """A line of the book: a node was registered with a key, or (`gone`) is not registered any more."""

    node_id: str
    name: str
    fingerprint: str
    at: str
    gone: bool = False


@dataclass(frozen=True, slots=True)
class Node:
    """A node as the SuperLink lists it; `status` is registered, online, offline or unregistered."""

    node_id: str
    status: str
    since: str
    entry: Entry | None


def register(public: Path, superlink: SuperLink, *, name: str | None = None, book: Path | None = None) -> Entry:
    """Register a node's public key; a key that is registered already is left as it is.

    Parameters
    ----------
    public
        The node's ``.pub`` file.
    superlink
        Where to register it.
    name
        Name of the node; the comment in the file when not given.
    book
        The book; ``nodes.jsonl`` beside the file when not given.

    Raises
    ------
    KeysError
        If the file is no such key, the SuperLink refuses it or cannot be reached, or the key was unregistered:
        Flower takes no key twice.
    """
    key, comment = public_key(public)
    if not isinstance(key, ec.EllipticCurvePublicKey):
        raise KeysError(f"{public} is not an elliptic-curve key, as Flower wants; make one: fedmask keys node")
    book = book or public.parent / BOOK
    mark, name = fingerprint(key), name or comment or public.stem
    reply = _flwr(superlink, "register", str(public.absolute()), "--name", name)
    if reply.get("success"):
        entry = Entry(str(reply["node-id"]), name, mark, f"{datetime.now(UTC):%Y-%m-%d %H:%M:%SZ}")
        _note(book, entry)
        return entry
    if _IN_USE not in str(reply.get("error-message")):
        raise KeysError(f"{public} was not registered: {_reason(reply)}")
    noted = [entry for entry in _entries(book) if entry.fingerprint == mark]
    if not noted:
        raise KeysError(
            f"the SuperLink knows the key {public} already, but {book} says nothing of it. If its node is refused, "
            "the key was unregistered: make the node a new one (fedmask keys rotate node) and register that"
        )
    states = {node.node_id: node.status for node in nodes(superlink)}
    if noted[-1].gone or states.get(noted[-1].node_id) == GONE:
        raise KeysError(
            f"the key {public} was unregistered, and Flower takes no key twice; make the node a new one "
            "(fedmask keys rotate node) and register that"
        )
    return noted[-1]


def unregister(who: str, superlink: SuperLink, *, book: Path | None = None, force: bool = False) -> str:
    """Unregister a node: its key is refused from its next call on, for ever. Give its id.

    Parameters
    ----------
    who
        A node's id, its public key's file, or a name in the book.
    superlink
        Where it is registered.
    book
        The book; ``nodes.jsonl`` beside the file, or here, when not given.
    force
        Do it although the node is online.

    Raises
    ------
    KeysError
        If the node is unknown, is online (unless forced), or the SuperLink cannot be reached.
    """
    public = Path(who)
    beside = public.parent if public.suffix == ".pub" else Path()
    book = book or beside / BOOK
    node_id = who if who.isdigit() else _look_up(who, public, book)
    listed = {node.node_id: node for node in nodes(superlink, book)}
    if node_id not in listed:
        raise KeysError(f"the SuperLink has no node {node_id}; see: fedmask keys list")
    node = listed[node_id]
    if node.status == "online" and not force:
        raise KeysError(
            f"node {node_id} is online with this key; move it to its new key first (fedmask keys rotate node "
            "--switch, restart its SuperNode), or lock it out now with --force"
        )
    if node.status != GONE:
        reply = _flwr(superlink, "unregister", node_id)
        if not reply.get("success"):
            raise KeysError(f"node {node_id} was not unregistered: {_reason(reply)}")
    if node.entry is not None and not node.entry.gone:
        _note(book, Entry(node_id, node.entry.name, node.entry.fingerprint, node.entry.at, gone=True))
    return node_id


def nodes(superlink: SuperLink, book: Path | None = None) -> list[Node]:
    """List the nodes of the SuperLink, with what the book says of each; `KeysError` if it does not answer."""
    reply = _flwr(superlink, "list")
    if not reply.get("success"):
        raise KeysError(f"the SuperLink did not list its nodes: {_reason(reply)}")
    noted = {entry.node_id: entry for entry in (_entries(book) if book else [])}
    return [
        Node(
            str(one["node-id"]),
            str(one["status"]),
            str(one["online-at"] if one["status"] == "online" else one["created-at"]),
            noted.get(str(one["node-id"])),
        )
        for one in reply["nodes"]
    ]


def _look_up(who: str, public: Path, book: Path) -> str:
    latest = {entry.node_id: entry for entry in _entries(book)}.values()
    if public.suffix == ".pub":
        mark = fingerprint(public_key(public)[0])
        found = [entry for entry in latest if entry.fingerprint == mark]
    else:
        found = [entry for entry in latest if entry.name == who and not entry.gone]
    if len(found) != 1:
        ids = ": " + ", ".join(f"{entry.node_id} (registered {entry.at})" for entry in found) if found else ""
        raise KeysError(
            f"{book} names {len(found)} nodes for {who}{ids}; give the node's id, see: fedmask keys list"
        )
    return found[0].node_id


def _flwr(superlink: SuperLink, command: str, *options: str) -> dict[str, Any]:
    """Run ``flwr supernode`` and give its JSON reply; its exit status says nothing, even of failures."""
    program = shutil.which("flwr", path=sysconfig.get_path("scripts")) or shutil.which("flwr")
    if program is None:
        raise KeysError("the program flwr is not installed beside this one; run: pip install flwr")
    env = dict(os.environ, FLWR_TELEMETRY_ENABLED="0", FLWR_DISABLE_UPDATE_CHECK="1")
    with plainly(Path(tempfile.gettempdir()), ""), tempfile.TemporaryDirectory(prefix="fedmask-") as home:
        name = superlink.where
        if ":" in name:
            _reach(superlink)
            env["FLWR_HOME"], name = home, "superlink"
            lines = ["[superlink.superlink]", f"address = {json.dumps(superlink.where)}"]
            if superlink.roots:
                lines.append(f"root-certificates = {json.dumps(str(superlink.roots.absolute()))}")
            (Path(home) / "config.toml").write_text("\n".join(lines) + "\n")
        first, rest = options[:1], options[1:]
        line = [program, "supernode", command, *first, name, *rest, "--format", "json"]
        try:
            done = subprocess.run(  # noqa: S603
                line,
                env=env,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=_SECONDS,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise KeysError(f"flwr supernode {command} gave no answer in {_SECONDS} s") from None
    text = done.stdout
    try:
        reply = json.loads(text[text.index("{") :])
    except ValueError:
        said = " ".join((done.stderr or text).split())[-500:]
        raise KeysError(f"flwr supernode {command} failed: {said or f'exit status {done.returncode}'}") from None
    return dict(reply)


def _reach(superlink: SuperLink) -> None:
    """Say why a SuperLink cannot be reached: Flower's command line only says that it cannot."""
    where, roots = superlink.where, superlink.roots
    host, _, port = where.rpartition(":")
    host = host.strip("[]")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise KeysError(f"--superlink {where}: give HOST:PORT of the Control API (8000), or a connection's name")
    try:
        context = ssl.create_default_context(cafile=None if roots is None else str(roots))
    except (OSError, ssl.SSLError) as error:
        raise KeysError(f"--root-certificates {roots} cannot be used: {error.strerror or error}") from None
    try:
        with (
            socket.create_connection((host, int(port)), timeout=20) as plain,
            context.wrap_socket(plain, server_hostname=host),
        ):
            pass
    except ssl.SSLCertVerificationError as error:
        by = roots or "this machine's CAs (give ca.crt with --root-certificates)"
        raise KeysError(f"{where} is not trusted, checked by {by}: {error.verify_message}") from None
    except ssl.SSLError as error:
        raise KeysError(
            f"{where} does not speak TLS ({error.reason}); the Control API has port 8000 by default"
        ) from None
    except OSError as error:
        remedy = "is the SuperLink up, with --host and --port such that this machine reaches it?"
        raise KeysError(f"{where} cannot be reached ({error.strerror or error}); {remedy}") from None


def _reason(reply: dict[str, Any]) -> str:
    return " ".join(str(reply.get("error-message", "no reason given")).split("\n\n")[-1].split())


def _entries(book: Path) -> list[Entry]:
    if not book.exists():
        return []
    with plainly(book, ""):
        lines = book.read_text().splitlines()
    try:
        return [Entry(**json.loads(line)) for line in lines if line]
    except (TypeError, ValueError):
        raise KeysError(f"{book} is damaged; move it away, and give nodes by their ids") from None


def _note(book: Path, entry: Entry) -> None:
    outcome = f"; node {entry.node_id} was not noted there, but the SuperLink has done its part"
    with plainly(book, outcome), book.open("a") as file:
        file.write(json.dumps(asdict(entry)) + "\n")
