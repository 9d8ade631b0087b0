"""Gather what the Flower App Bundle is built from, out of a checkout or out of an installed wheel."""

from __future__ import annotations

import json
import re
import shutil
import tomllib
from collections.abc import Mapping
from pathlib import Path

__all__ = ["Scalar", "StageError", "app_root", "defaults", "stage", "toml_lines"]

Scalar = str | int | float | bool

_PACKAGE = Path(__file__).resolve().parents[1]
_TABLE = "[tool.flwr.app.config]\n"


class StageError(RuntimeError):
    """The app's files are not where the package was installed from."""


def stage(app: Path, root: Path | None = None, config: Mapping[str, Scalar] | None = None) -> None:
    """Copy what the Flower App Bundle is built from into the new folder `app`, and nothing else.

    Flower refuses run-config keys that pyproject.toml does not declare, so those of `config` that are missing
    there (a method from outside this package has its own) are declared in the copy.
    """
    source = root or app_root()
    app.mkdir(parents=True)
    shutil.copyfile(source / "LICENSE", app / "LICENSE")
    known = defaults(source)
    extra = toml_lines({k: v for k, v in (config or {}).items() if k not in known})
    text = (source / "pyproject.toml").read_text("utf-8")
    app.joinpath("pyproject.toml").write_text(text.replace(_TABLE, _TABLE + extra, 1), "utf-8")
    packages = {
        "server_app": source / "server_app",
        "client_app": source / "client_app",
        "fedmask_flwr": _PACKAGE,
    }
    for name, folder in packages.items():
        for path in sorted(folder.rglob("*.py")):
            inner = path.relative_to(folder)
            if inner.parts[0] == "_app":
                continue
            (app / name / inner).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, app / name / inner)


def app_root() -> Path:
    """Find the folder of the app's pyproject.toml: the checkout, or the copy inside an installed wheel."""
    checkout = _PACKAGE.parent / "pyproject.toml"
    if checkout.is_file() and re.search(r'^name = "fedmask-flwr"$', checkout.read_text("utf-8"), re.MULTILINE):
        return checkout.parent
    if (_PACKAGE / "_app" / "pyproject.toml").is_file():
        return _PACKAGE / "_app"
    raise StageError(f"{_PACKAGE} holds no _app folder; reinstall fedmask-flwr from a wheel or a checkout")


def defaults(root: Path | None = None) -> dict[str, Scalar]:
    """Read the app's run config: every key there is, with its default."""
    text = ((root or app_root()) / "pyproject.toml").read_text("utf-8")
    return dict(tomllib.loads(text)["tool"]["flwr"]["app"]["config"])


def toml_lines(config: Mapping[str, Scalar]) -> str:
    """Write flat scalars as TOML."""

    def quoted(text: str) -> str:
        return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")

    def value(v: Scalar) -> str:
        if isinstance(v, str):
            return quoted(v)
        return str(v).lower() if isinstance(v, bool) else repr(v)

    return "".join(f"{quoted(k)} = {value(v)}\n" for k, v in config.items())
