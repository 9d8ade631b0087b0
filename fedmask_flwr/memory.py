"""What a device remembers between rounds: safetensors on its own disk, two generations, replaced atomically.

Flower's ``context.state`` lives in a SuperNode's RAM: a device that reboots would lose its personal mask.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy.typing as npt
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from .checkpoint import write_atomic

GENERATIONS = 2  # the server may lose the round that it was about to checkpoint, and ask for it again
log = logging.getLogger(__name__)


class DeviceMemoryError(RuntimeError):
    """A device's memory cannot be read; the message names the file and the fix."""


def default_folder() -> Path:
    """``$XDG_STATE_HOME/fedmask-flwr``, where programs keep what must survive a restart."""
    return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local/state") / "fedmask-flwr"


def forget(folder: Path) -> None:
    """Delete the memory of all runs below ``folder``, and the folder when nothing else is in it."""
    for file in (*folder.glob("*/*.safetensors"), *folder.glob("*/*.safetensors.tmp")):
        file.unlink()
    for left in (*folder.glob("*/"), folder):
        if left.is_dir() and not any(left.iterdir()):
            left.rmdir()


@dataclass(frozen=True, slots=True)
class DeviceMemory:
    """The memory of one client in one run: ``folder/run/client.round.safetensors``.

    ``run`` names one run (``Plan.identity``), so that another never reads it; ``client`` is the device's own
    stable number.
    """

    folder: Path
    run: str
    client: int

    def recall(self, before: int) -> dict[str, npt.NDArray[Any]]:
        """Arrays as they were after the last turn before round ``before``; empty when there was none.

        A server that went back further than the generations reach, and not to the start, is answered from the
        oldest: it has lost its rounds, the device has not.

        Raises
        ------
        DeviceMemoryError
            When a generation is damaged and no older one can stand in. Nothing is deleted.
        """
        rounds = self._rounds()
        past = [r for r in rounds if r < before]
        if before <= 1:
            return {}
        if not past and sum(self._is_readable(self._path(r)) for r in rounds) < GENERATIONS:
            return {}  # its first turn is yet to come, again
        if not past:
            log.warning("the server is back at round %d, client %d at %d", before, self.client, rounds[0])
            past = rounds[:1]
        damaged = []
        for round_ in reversed(past):
            try:
                return self._read(self._path(round_))
            except DeviceMemoryError as error:
                damaged.append(str(error))
                log.warning("%s", error)
        raise DeviceMemoryError("; ".join(damaged))

    def keep(self, round_: int, arrays: dict[str, npt.NDArray[Any]]) -> None:
        """Write the arrays after a turn in ``round_``, then drop all but the generations that may be asked for.

        A damaged generation does not count as one, and stays for a person to look at.

        Raises
        ------
        OSError
            When the disk refuses; what was there before is untouched.
        """
        path = self._path(round_)
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)  # what a device learned is nobody else's
        header = {"fedmask": json.dumps({"client": self.client, "round": round_, "run": self.run}, sort_keys=True)}
        write_atomic(path, save({k: v.copy(order="C") for k, v in arrays.items()}, metadata=header), 0o600)
        for torn in path.parent.glob(f"{self.client:d}.*.tmp"):  # of a process that was killed as it wrote
            torn.unlink(missing_ok=True)
        readable = [r for r in self._rounds() if self._is_readable(self._path(r))]
        older = [r for r in readable if r <= round_]
        for stale in {*readable} - {*older[-GENERATIONS:]}:
            self._path(stale).unlink(missing_ok=True)

    def _path(self, round_: int) -> Path:
        return self.folder / self.run / f"{self.client:d}.{round_:06d}.safetensors"

    def _rounds(self) -> list[int]:
        names = (path.name.split(".") for path in self._path(0).parent.glob(f"{self.client:d}.*.safetensors"))
        rounds = [int(parts[1]) for parts in names if len(parts) == 3 and parts[1].isdecimal()]
        return sorted(r for r in rounds if self._path(r).exists())

    def _is_readable(self, path: Path) -> bool:
        try:
            self._read(path, names=())
        except DeviceMemoryError:
            return False
        return True

    def _read(self, path: Path, names: Iterable[str] | None = None) -> dict[str, npt.NDArray[Any]]:
        try:
            with safe_open(path, framework="numpy") as file:
                told = json.loads((file.metadata() or {})["fedmask"])
                if (told["client"], told["run"]) != (self.client, self.run):
                    raise ValueError(f"it is of client {told['client']} in run {told['run']}")
                return {name: file.get_tensor(name) for name in (file.keys() if names is None else names)}
        except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            raise DeviceMemoryError(
                f"{path} is not the memory of client {self.client} ({error}): restore it from a backup, or delete "
                "it so that this device begins anew"
            ) from error
