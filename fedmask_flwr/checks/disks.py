"""The places that must take writes: a device's memory and a run's folder; and what a device remembers."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
from pathlib import Path

from fedmask_flwr.show import human_bytes

from .base import Asked, Finding, check, fail, ok, skip, warn

__all__ = ["memory_disk", "remembered", "run_disk"]

LEAST, LITTLE = 50_000_000, 500_000_000  # bytes free: below, a checkpoint may not fit; below, look at it soon


@check("disk: device memory")
def memory_disk(asked: Asked) -> Finding:
    """Where devices keep what they remember."""
    return writable(memory_folder(asked))


@check("disk: run")
def run_disk(asked: Asked) -> Finding:
    """Where the server writes a run."""
    return skip("no run was named: give --run DIR on the server") if asked.run is None else writable(asked.run)


def memory_folder(asked: Asked) -> Path:
    """Folder of devices' memory: as told, or where it lies when nobody says."""
    from fedmask_flwr.memory import default_folder

    told = dict(asked.told).get("memory-dir")
    return asked.memory_dir or (Path(str(told)) if told else default_folder())


def writable(folder: Path) -> Finding:
    """Write, sync and delete a small file in a folder, or where it would be made; and look at what is free."""
    there = next(p for p in (folder.absolute(), *folder.absolute().parents) if p.exists())
    where = str(folder) if there == folder.absolute() else f"{folder} (to be made in {there})"
    if not there.is_dir():
        return fail(f"{there} is a file", "name another folder, or move that file away")
    probe = there / f".fedmask-doctor-{secrets.token_hex(4)}"
    try:
        with probe.open("wb") as file:
            file.write(bytes(4096))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return fail(
            f"{where} takes no writes: {error.strerror or error}",
            "free the disk, mount it writable, or let the user who runs this own the folder (a read-only container "
            "needs a volume there)",
        )
    finally:
        with contextlib.suppress(OSError):
            probe.unlink(missing_ok=True)
    state = os.statvfs(there)
    free = state.f_bavail * state.f_frsize
    seen = f"{where}: {human_bytes(free)} free, takes writes, fsync works"
    if state.f_files and state.f_favail < 1000:
        return fail(f"{seen}; {state.f_favail} files can still be made", "delete small files: inodes have run out")
    if free < LEAST:
        return fail(
            seen, f"free the disk: less than {human_bytes(LEAST)} may not hold a checkpoint beside the last"
        )
    if free < LITTLE:
        return warn(seen, f"free the disk: {human_bytes(LITTLE)} is comfortable")
    return ok(seen)


@check("device memory", limit=60.0)
def remembered(asked: Asked) -> Finding:
    """Whether every generation that devices kept can be read."""
    folder = memory_folder(asked)
    files = sorted(folder.glob("*/*.safetensors")) if folder.is_dir() else []
    if not files:
        return skip(f"{folder} holds no device's memory yet")
    damaged = {file: reason for file in files if (reason := damage(file))}
    groups: dict[tuple[str, str], list[Path]] = {}
    for file in files:
        groups.setdefault((file.parent.name, file.name.partition(".")[0]), []).append(file)
    lost = [files for files in groups.values() if all(f in damaged for f in files)]
    seen = f"{folder}: {len(files)} generations of {len(groups)} clients in {len({run for run, _ in groups})} runs"
    if not damaged:
        return ok(f"{seen}, all readable")
    first, reason = next(iter(damaged.items()))
    seen += f"; {len(damaged)} cannot be read, such as {first.relative_to(folder)} ({reason})"
    if lost:
        return fail(
            f"{seen}; nothing older stands in for {lost[0][0].relative_to(folder)}",
            "restore the file from a backup, or delete it so that this device begins anew; then check the disk "
            "(dmesg, smartctl, the SD card)",
        )
    return warn(
        seen, "an older generation stands in; delete the damaged file and check the disk (dmesg, the SD card)"
    )


def damage(file: Path) -> str:
    """Why a generation cannot be read, or ""."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="numpy") as opened:
            told = json.loads((opened.metadata() or {})["fedmask"])
        client, round_, _ = file.name.split(".")
        if (str(told["client"]), str(told["run"])) != (client, file.parent.name) or told["round"] != int(round_):
            return f"it is of client {told['client']}, round {told['round']}, run {told['run']}"
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        return str(error) or type(error).__name__
    return ""
