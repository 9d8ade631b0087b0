"""Import torch, load the data, build the network: in a process of its own, one JSON line a stage.

A torch built for another processor dies here, and the lines so far say where.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

from ..data.files import OFFLINE
from .base import Asked

__all__ = ["STAGES", "Stages", "resident", "run", "trial"]

STAGES = ("torch", "client", "data", "network")
LIMIT = 240.0
Stages = dict[str, dict[str, Any]]


@lru_cache(maxsize=1)
def trial(asked: Asked) -> Stages:
    """Run every stage in a fresh process; a stage that fails, and those after it, have an "error" instead."""
    env = {**os.environ, OFFLINE: "1", "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    done = subprocess.run(
        [sys.executable, "-c", "from fedmask_flwr.checks.trial import main; main()"],
        input=json.dumps(asked.flat()),
        capture_output=True,
        text=True,
        env=env,
        timeout=LIMIT,
        check=False,
    )
    got: Stages = {}
    for line in done.stdout.splitlines():
        with contextlib.suppress(ValueError):
            got |= json.loads(line)
    last = done.stderr.strip().splitlines()[-1:]
    how = f"signal {-done.returncode}" if done.returncode < 0 else f"exit {done.returncode}"
    for stage in STAGES:
        if stage not in got:  # the process is dead
            got[stage] = {"error": f"the process ended here ({how})" + "".join(f": {line}" for line in last)}
    return got


def resident(status: Path = Path("/proc/self/status")) -> dict[str, int]:
    """Bytes that this process has in memory, its own and those mapped from files; 0 where nobody can tell."""
    found = {"anonymous": 0, "mapped": 0}
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in status.read_text().splitlines():
            name = {"RssAnon:": "anonymous", "RssFile:": "mapped"}.get(line.split()[0])
            if name is not None:
                found[name] = int(line.split()[1]) * 1024
    return found


def _torch(_told: Mapping[str, Any]) -> dict[str, Any]:
    import torch

    cuda = torch.cuda.is_available()
    return {
        "version": torch.__version__,
        "threads": torch.get_num_threads(),
        "cuda": torch.cuda.get_device_name() if cuda else "",
        "built": torch.version.cuda or "",
        "product": float(
            torch.ones(64, 64).mm(torch.ones(64, 64)).sum()
        ),  # a wrong build dies at its first product
    }


def _client(_told: Mapping[str, Any]) -> dict[str, Any]:
    import fedmask_flwr.flower.apps  # noqa: F401

    return dict(resident())


def _data(told: Mapping[str, Any]) -> dict[str, Any]:
    from fedmask_flwr import data
    from fedmask_flwr.config import load_config
    from fedmask_flwr.setting import scenario_of, shape

    config, _ = load_config(told)
    if scenario_of(config) is not None:
        inside, classes = shape(config)
        return {"name": config.scenario, "shape": list(inside), "classes": classes, "examples": {}}
    if "data" not in told:
        return {"name": ""}
    splits = {split: data.load(config.data, split, config.data_dir) for split in ("train", "test")}
    test = splits["test"]
    return {
        "name": config.data,
        "shape": list(test.in_shape),
        "classes": test.num_classes,
        "examples": {split: len(found) for split, found in splits.items()},
    }


def _network(told: Mapping[str, Any]) -> dict[str, Any]:
    from fedmask_flwr.config import load_config, patterns
    from fedmask_flwr.masks import model_digest
    from fedmask_flwr.masks.cost import count_parameters
    from fedmask_flwr.methods import resolve
    from fedmask_flwr.setting import network, shape
    from fedmask_flwr.train import EVAL_BATCH

    config, _ = load_config(told)
    inside, classes = shape(config)
    model = network(config, inside, classes)
    method = resolve(config.method)
    spec = method.layout(model, patterns(config.include), patterns(config.exclude))
    digest = model_digest(spec, model).hex()
    outputs = _outputs(model, inside)
    batch = config.batch_size or 128
    evaluates = config.fraction_evaluate > 0 or not method.modes
    pair = max((a + b for a, b in pairwise(outputs)), default=sum(outputs))
    return {
        "digest": digest,
        "named": f"{config.model}, weights {config.weights_source}",
        "parameters": count_parameters(model),
        "masked": spec.numel,
        # A training keeps every layer's output for the way back; an evaluation, where devices do it, two.
        "activations": 4 * max(batch * sum(outputs), EVAL_BATCH * pair if evaluates else 0),
    }


def _outputs(model: Any, inside: tuple[int, ...]) -> list[int]:
    """Elements that each layer puts out for one example."""
    import torch

    from fedmask_flwr.masks.tracing import modes

    found: list[int] = []

    def note(_module: object, _given: object, out: object) -> None:
        if isinstance(out, torch.Tensor):
            found.append(out.numel() // 2)

    leaves = [m for m in model.modules() if not any(m.children())]
    hooks = [m.register_forward_hook(note) for m in leaves]
    with modes(model, False), torch.no_grad():
        model(torch.zeros(2, *inside))
    for hook in hooks:
        hook.remove()
    return found


def run(told: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Run the stages one after another; once one failed, the others have its error."""
    error = ""
    for stage, work in (("torch", _torch), ("client", _client), ("data", _data), ("network", _network)):
        got: dict[str, Any] = {"error": error}
        if not error:
            began = time.monotonic()
            try:
                with contextlib.redirect_stdout(sys.stderr):
                    got = work(told)
                got["seconds"] = round(time.monotonic() - began, 3)
            except Exception as failure:
                got = {"error": f"{type(failure).__name__}: {failure}"}
                error = f"{stage} came first: {got['error']}"
        if got.get("name") == "":
            error = "no data was named"
        yield stage, got


def main() -> None:
    """Read run-config keys from the standard input, print a line a stage."""
    for stage, got in run(json.loads(sys.stdin.read())):
        print(json.dumps({stage: got}), flush=True)
