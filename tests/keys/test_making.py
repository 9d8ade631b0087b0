"""Who may read keys, what is never overwritten, and their renewal."""

from __future__ import annotations

import errno
import os
import re
import ssl
from pathlib import Path

import pytest
from keyring import fedmask, files, modes, shake

from fedmask_flwr import keys


@pytest.mark.parametrize("umask", [0o000, 0o077, 0o777])
def test_modes_whatever_the_umask(tmp_path, umask, monkeypatch):
    born = []
    real = os.open

    def watching(path, flags, mode=0o777, **rest):
        if flags & os.O_CREAT:
            born.append((flags & os.O_EXCL, mode))
        return real(path, flags, mode, **rest)

    monkeypatch.setattr(os, "open", watching)
    before = os.umask(umask)
    try:
        keys.make_ca(tmp_path / "deep/ca")
        keys.make_server(tmp_path / "deep/ca", ["a"], tmp_path / "server")
        keys.make_node(tmp_path / "node")
        keys.renew_server(tmp_path / "deep/ca", tmp_path / "server")
        keys.renew_node(tmp_path / "node")
        keys.renew_node(tmp_path / "node", switch=True)
    finally:
        os.umask(before)
    assert modes(tmp_path) == {"deep": 0o700, "server": 0o700, "node": 0o700}
    assert modes(tmp_path / "deep") == {"ca": 0o700}
    assert modes(tmp_path / "deep/ca") == {"ca.crt": 0o644, "ca.key": 0o600}
    pair = {"server.crt": 0o644, "server.key": 0o600}
    assert modes(tmp_path / "server") == pair | {f"{name}.old": mode for name, mode in pair.items()}
    pair = {"node.pub": 0o644, "node.key": 0o600}
    assert modes(tmp_path / "node") == pair | {f"{name}.old": mode for name, mode in pair.items()}
    assert len(born) == 10
    assert all(exclusive and mode == 0o600 for exclusive, mode in born)


MAKING = [
    ("ca.key", lambda out, ca: keys.make_ca(out), "--out"),
    ("ca.crt", lambda out, ca: keys.make_ca(out), "--out"),
    ("server.key", lambda out, ca: keys.make_server(ca, ["a"], out), "fedmask keys rotate server"),
    ("server.crt", lambda out, ca: keys.make_server(ca, ["a"], out), "fedmask keys rotate server"),
    ("node.key", lambda out, ca: keys.make_node(out), "fedmask keys rotate node"),
    ("node.pub", lambda out, ca: keys.make_node(out), "fedmask keys rotate node"),
]


@pytest.mark.parametrize(("name", "make", "remedy"), MAKING)
def test_nothing_is_overwritten(place, tmp_path, name, make, remedy):
    (tmp_path / name).write_bytes(b"precious")
    with pytest.raises(keys.KeysError, match=re.escape(remedy)):
        make(tmp_path, place / "ca")
    assert files(tmp_path) == {name: b"precious"}
    (tmp_path / name).unlink()
    (tmp_path / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(keys.KeysError, match="exists"):
        make(tmp_path, place / "ca")
    assert files(tmp_path) == {}


def test_nor_what_appears_in_the_last_moment(place, tmp_path, monkeypatch):
    real = os.link

    def late(source, target, **rest):
        if Path(target).name == "server.crt":
            Path(target).write_bytes(b"someone else's")
        real(source, target, **rest)

    monkeypatch.setattr(os, "link", late)
    with pytest.raises(keys.KeysError, match=r"server\.crt"):
        keys.make_server(place / "ca", ["a"], tmp_path)
    assert files(tmp_path) == {"server.crt": b"someone else's"}


STEPS = {
    "make": lambda at: keys.make_server(at / "ca", ["a"], at / "new/folder"),
    "renew": lambda at: keys.renew_server(at / "ca", at / "server"),
    "next": lambda at: keys.renew_node(at / "node", name="site-0"),
    "switch": lambda at: keys.renew_node(at / "rotating", switch=True),
}


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("call", ["open", "fchmod", "fsync", "link", "rename"])
def test_a_failure_leaves_all_as_it_was(place, tmp_path, step, call, monkeypatch):
    """A disk that is full at any of the calls: no partial set, no lost key, no hidden leftovers."""
    for folder in ("ca", "server", "node"):
        (tmp_path / folder).mkdir()
        for path in (place / folder).iterdir():
            (tmp_path / folder / path.name).write_bytes(path.read_bytes())
            (tmp_path / folder / path.name).chmod(path.stat().st_mode)
    keys.make_node(tmp_path / "rotating")
    keys.renew_node(tmp_path / "rotating")
    before = files(tmp_path)
    owner, name = (Path, "replace") if call == "rename" else (os, call)
    real, failed = getattr(owner, name), 0
    for number in range(20):
        calls = iter(range(100))

        def full(*args, calls=calls, number=number, real=real, **kwargs):
            if next(calls) == number:
                raise OSError(errno.ENOSPC, "No space left on device")
            return real(*args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(owner, name, full)
            try:
                STEPS[step](tmp_path)
            except keys.KeysError as error:
                assert "No space left on device" in str(error)
                assert "nothing was changed" in str(error)
                assert files(tmp_path) == before
                assert not (tmp_path / "new").exists()
                failed += 1
                continue
        break
    wanted = {"make": {"rename": 0}, "next": {"rename": 0}, "switch": {"open": 1, "fchmod": 0, "fsync": 1}}
    assert failed >= wanted.get(step, {}).get(call, 2)
    assert files(tmp_path) != before


def test_no_secret_is_told(place, tmp_path):
    """Neither by a command, nor in an error, nor in the text of an object."""
    said = fedmask("ca", "--out", tmp_path / "ca")
    said += fedmask("server", "--ca", tmp_path / "ca", "--name", "a", "--out", tmp_path / "server")
    said += fedmask("node", "--out", tmp_path / "node")
    private = sorted(tmp_path.rglob("*.key"))
    assert len(private) == 3
    said += fedmask("show", *private)
    for path in private:
        said += fedmask("register", path, "--superlink", "127.0.0.1:1", code=1)
    (tmp_path / "bad").mkdir()
    for path in private:
        damaged = path.read_text().replace("A", "B", 3)
        (tmp_path / "bad" / path.name).write_text(damaged)
        said += fedmask("show", tmp_path / "bad" / path.name, code=1)
    for path in private:
        body = path.read_text().splitlines()[1:-1]
        assert len(body) >= 3
        assert not any(line in said or line.replace("A", "B", 3) in said for line in body)
    from fedmask_flwr.keys.files import File

    assert "secret" not in repr(File("x", b"secret", 0o600))


def test_a_server_is_renewed_and_old_nodes_still_trust_it(place, tmp_path):
    keys.make_server(place / "ca", ["old.example", "10.0.0.1"], tmp_path)
    before = files(tmp_path)
    said = fedmask("rotate", "server", "--ca", place / "ca", "--dir", tmp_path)
    assert "Restart the SuperLink" in said
    after = files(tmp_path)
    assert {f"{name}.old": data for name, data in before.items()}.items() <= after.items()
    assert len(set(after.values())) == 4
    for host in ("old.example", "10.0.0.1"):
        assert shake(tmp_path, place / "ca/ca.crt", host)
    assert "--drop-old" in fedmask("rotate", "server", "--ca", place / "ca", "--dir", tmp_path, code=1)
    assert files(tmp_path) == after
    fedmask("rotate", "server", "--dir", tmp_path, "--drop-old")
    assert set(files(tmp_path)) == {"server.key", "server.crt"}
    assert "nothing to delete" in fedmask("rotate", "server", "--dir", tmp_path, "--drop-old", code=1)
    assert "--ca" in fedmask("rotate", "server", "--dir", tmp_path, code=1)
    fedmask("rotate", "server", "--ca", place / "ca", "--dir", tmp_path, "--name", "new.example")
    assert shake(tmp_path, place / "ca/ca.crt", "new.example")
    with pytest.raises(ssl.SSLCertVerificationError):
        shake(tmp_path, place / "ca/ca.crt", "old.example")
    assert "make them first" in fedmask("rotate", "server", "--ca", place / "ca", "--dir", place / "ca", code=1)


def test_a_node_has_a_registered_key_at_every_step(tmp_path):
    fedmask("node", "--out", tmp_path, "--name", "site-0")
    old = files(tmp_path)
    rotate = ["rotate", "node", "--dir", tmp_path, "--name", "site-0"]
    assert "make it first" in fedmask(*rotate, "--switch", code=1)
    assert "only then" in fedmask(*rotate)
    assert old.items() <= files(tmp_path).items()
    new = files(tmp_path)
    assert "--switch" in fedmask(*rotate, code=1)
    assert "unregister" in fedmask(*rotate, "--switch")
    assert files(tmp_path) == {
        "site-0.key": new["site-0.next.key"],
        "site-0.pub": new["site-0.next.pub"],
        "site-0.key.old": old["site-0.key"],
        "site-0.pub.old": old["site-0.pub"],
    }
    assert new["site-0.next.pub"].split()[2] == b"site-0"
    fedmask(*rotate)
    assert "--drop-old" in fedmask(*rotate, "--switch", code=1)
    fedmask(*rotate, "--drop-old")
    fedmask(*rotate, "--switch")
    assert "make it first" in fedmask("rotate", "node", "--dir", tmp_path, code=1)
