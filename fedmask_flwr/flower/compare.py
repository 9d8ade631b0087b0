"""The ServerApp of a comparison: one run after another on the same nodes, each in a folder of its own."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from flwr.app import Context
from flwr.common.logger import log
from flwr.serverapp import Grid

from fedmask_flwr import compare as comparison
from fedmask_flwr.compare.results import enrol, mark
from fedmask_flwr.track import LOCK, RunDirError, standing

from .apps import federate, run_folder

INFO, ERROR = 20, 40


def compare(grid: Grid, context: Context) -> None:
    """Run every method with every seed that the run config names, then write the table and the picture.

    A run that is complete in its folder is not run again, and an unfinished one goes on. One that raises is logged
    and noted; the others go on.

    Raises
    ------
    ConfigError
        ``compare`` or ``seeds`` cannot be read, or a setting in them is wrong.
    CompareError
        The folder holds runs that these cannot be compared with; or, after all others, some run failed.
    """
    runs = comparison.lineup(context.run_config)
    out = run_folder(context)
    failed = []
    with _held(out):
        enrol(out, runs)
        for number, run in enumerate(runs, 1):
            name = f"{run.label} seed {run.seed}"
            folder = out / run.folder
            log(INFO, "[run %d of %d] %s", number, len(runs), name)
            try:
                if standing(folder, run.config)[1]:
                    log(INFO, "%s is complete in %s", name, folder)
                    continue
                federate(grid, {**run.config, "out": str(folder)}, folder)
                if not standing(folder, run.config)[1]:  # a full disk is logged, not raised
                    raise OSError("its files were not saved: free the disk and start the same comparison again")
            except Exception as error:
                log(ERROR, "%s failed", name, exc_info=True)
                reason = f"{type(error).__name__}: {error}"
                failed.append(f"{name} ({reason})")
                mark(out, run.folder, reason)
        try:
            comparison.write(out)
        except OSError as error:
            log(ERROR, "the table was not written (%s): free the disk, then `fedmask report %s`", error, out)
    if failed:
        raise comparison.CompareError(f"{len(failed)} of {len(runs)} runs failed: {'; '.join(failed)}")


@contextmanager
def _held(out: Path) -> Iterator[None]:
    """Keep other comparisons out of the folder."""
    out.mkdir(parents=True, exist_ok=True)
    with (out / LOCK).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise RunDirError(f"another process is writing {out}: wait for it, or use another folder") from error
        yield
