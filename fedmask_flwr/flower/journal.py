"""What a strategy writes of its rounds: the state first, the line of metrics once the round is evaluated."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, final

from flwr.common.logger import log

from fedmask_flwr.checkpoint import CheckpointError
from fedmask_flwr.track import RunDir

INFO, ERROR = 20, 40
SHOWN = ("accuracy_threshold", "uplink_bpp", "downlink_bpp", "clients_ok", "clients_failed", "seconds")
Line = dict[str, Any]


@final
class Journal:
    """Rounds of one run, in ``run_dir`` (None: nowhere); ``on_round`` hears each line.

    A round is checkpointed before the next is asked for, and evaluated while that one is trained. So that a server
    which is killed in between loses nothing, the checkpoint holds what was known of the round by then.
    """

    def __init__(
        self, run_dir: RunDir | None, digest: bytes, on_round: Callable[[Mapping[str, Any]], None] | None
    ) -> None:
        self._run_dir, self._digest, self._on_round = run_dir, digest.hex(), on_round
        self._unsaved = 0

    def resume(self, cls: type[Any]) -> tuple[Any, int, Line | None]:
        """State and number of the last checkpointed round, and its line where that is still to be completed.

        Raises
        ------
        CheckpointError
            It cannot be read, or is of another model.
        """
        found: tuple[Any, dict[str, Any]] | None = None if self._run_dir is None else self._run_dir.restore(cls)
        if self._run_dir is None or found is None:
            return None, 0, None
        state, meta = found
        if meta["digest"] != self._digest:
            raise CheckpointError("the checkpoint is of another model: use another folder, or --overwrite")
        last, line = int(meta["round"]), meta.get("line")
        log(INFO, "resuming after round %d", last)
        if line is None or any(seen["round"] == last for seen in self._run_dir.metrics()):
            return state, last, None
        return state, last, dict(line)

    def keep(self, state: Any, line: Mapping[str, Any]) -> None:
        """Checkpoint a round."""
        if self._run_dir is None:
            return
        # Not how long it took: two runs of the same settings write the same checkpoint.
        known = {name: value for name, value in line.items() if name != "seconds"}
        try:
            self._run_dir.save(state, {"round": line["round"], "digest": self._digest, "line": known})
        except OSError as error:  # a full disk must not cost the round that was just trained
            self._lose(line["round"], error)

    def complete(self, line: Mapping[str, Any]) -> None:
        """Tell, and record, all about a round."""
        log(INFO, "[round %d] %s", line["round"], ", ".join(f"{k} {line[k]:.4g}" for k in SHOWN if k in line))
        if self._on_round is not None:
            self._on_round(line)
        if self._run_dir is None:
            return
        try:
            self._run_dir.record(line)
        except OSError as error:
            self._lose(line["round"], error)

    def _lose(self, number: int, error: OSError) -> None:
        if self._unsaved != number:
            log(ERROR, "round %d was not saved (%s): free the disk; training goes on", number, error)
        self._unsaved = number
