"""Server state on disk: one safetensors file, replaced atomically, never a pickle."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

S = TypeVar("S")


class CheckpointError(RuntimeError):
    """A checkpoint cannot be read or does not fit; the message names the fix."""


def write_atomic(path: Path, data: bytes, mode: int = 0o666) -> None:
    """Replace ``path`` by ``data``: after a crash or a full disk it holds the old bytes or the new, never a mix.

    ``mode`` is the file's, less what the process's umask takes away.

    Raises
    ------
    OSError
        When the disk refuses; the old file is untouched and the temporary one is gone.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        temporary.unlink(missing_ok=True)  # of a process that was killed, perhaps with another mode
        with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def save_state(path: Path, state: Any, meta: Mapping[str, Any]) -> None:
    """Write a frozen dataclass of arrays, numbers and dataclasses of these, with JSON-able ``meta`` beside it."""
    arrays, scalars = _flat(state)
    # One entry: safetensors writes several in an order that changes from process to process.
    header = {"fedmask": json.dumps({"meta": dict(meta), "scalars": scalars}, sort_keys=True)}
    write_atomic(path, save({k: np.ascontiguousarray(v) for k, v in arrays.items()}, metadata=header))


def load_state(path: Path, cls: type[S]) -> tuple[S, dict[str, Any]]:
    """Read what ``save_state`` wrote.

    Raises
    ------
    CheckpointError
        When the file is damaged or holds another state.
    """
    try:
        with safe_open(path, framework="numpy") as file:
            header = json.loads((file.metadata() or {})["fedmask"])
            values = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return _build(cls, {**values, **header["scalars"]}), dict(header["meta"])
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{path} is not a checkpoint of {cls.__name__} ({error}): restore it from a backup, or start again "
            "with --overwrite or another output folder"
        ) from error


def _flat(state: Any, prefix: str = "") -> tuple[dict[str, Any], dict[str, Any]]:
    """Arrays and numbers by name, "outer.inner" for those of a dataclass inside."""
    arrays: dict[str, Any] = {}
    scalars: dict[str, Any] = {}
    for field in dataclasses.fields(state):
        value, name = getattr(state, field.name), prefix + field.name
        if dataclasses.is_dataclass(value):
            inner = _flat(value, f"{name}.")
            arrays, scalars = arrays | inner[0], scalars | inner[1]
        else:
            (arrays if isinstance(value, np.ndarray) else scalars)[name] = value
    return arrays, scalars


def _build(cls: type[S], values: Mapping[str, Any]) -> S:
    """Undo ``_flat``; TypeError for a name too many or too few."""
    own = {name: value for name, value in values.items() if "." not in name}
    for name in {name.partition(".")[0] for name in values if "." in name}:
        inner = {key.partition(".")[2]: value for key, value in values.items() if key.startswith(f"{name}.")}
        own[name] = _build(get_type_hints(cls)[name], inner)
    return cls(**own)
