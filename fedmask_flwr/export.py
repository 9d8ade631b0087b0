"""What ``fedmask export`` does: from a run's folder to a plain network that needs nothing of this package."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text
from torch import nn

from .artifacts import ExportError, check_free, cut_silent, need_onnx, save_network
from .config import ConfigError, RunConfig, load_config
from .masks import derive, frozen_weights, model_digest, slim_, write_mask
from .memory import DeviceMemory, DeviceMemoryError, default_folder
from .methods import Fields, Memory, Method, View
from .methods.dense import float_entries, write_tensors
from .methods.slimming import Slimming
from .plan import Plan
from .setting import importable, network, settled, structure_id
from .setting import shape as shape_of
from .show import human_bytes
from .track import CONFIG, MASK, read_token
from .wire import Frame, Payload, WireError, unpack, unpack_bits

__all__ = ["ExportError", "Network", "export", "read_run", "show", "slimmed"]

MEMORY = "memory"  # below a run's folder, where `fedmask run` lets its devices remember


@dataclass(frozen=True, slots=True)
class Network:
    """What a run learned.

    ``model`` is masked at full size, a plain module with plain weights; ``in_shape`` is the shape of one example.
    """

    model: nn.Module
    in_shape: tuple[int, ...]
    num_classes: int
    method: Method[Any]
    result: Payload
    config: RunConfig
    round: int


def export(
    run: Path,
    out: Path,
    *,
    slim: bool = False,
    onnx: bool = False,
    data_dir: str | None = None,
    client: int | None = None,
    task: int | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Write the network of a finished run to `out` (see `save_network`) and return the report.

    Parameters
    ----------
    slim
        Cut pruned filters, and channels that are 0 for every input, out of the network.
    data_dir
        Where the run's data set lies now; it says what shape an example has.
    client
        The device whose own network is wanted, for methods that have none on the server.
    task
        Its network for that task, where it has several; None: the latest.

    Raises
    ------
    ExportError
        With the fix in its message; nothing was written.
    OSError
        The disk refuses.
    """
    check_free(out, overwrite=overwrite)
    if onnx:
        need_onnx()
    network = read_run(run, data_dir=data_dir, client=client, task=task)
    config = network.config
    about = {
        "method": config.method,
        "data": config.data,
        "model": config.model,
        "weights": config.weights_source,
        "round": network.round,
        **({} if client is None else {"client": client}),
        **({} if task is None else {"task": task}),
        "num_classes": network.num_classes,
        "mask_bytes": (run / MASK).stat().st_size,
    }
    model, full = (slimmed(network), network.model) if slim else (network.model, None)
    return save_network(model, network.in_shape, out, full=full, onnx=onnx, overwrite=overwrite, about=about)


def read_run(
    run: Path, *, data_dir: str | None = None, client: int | None = None, task: int | None = None
) -> Network:
    """Build the network of a finished run, on the CPU; see `export`.

    Raises
    ------
    ExportError
        With the fix in its message.
    """
    with importable():
        config, settings = _config(run)
        raw = _frame(run)
        shape, num_classes = _shape(config, data_dir)
        try:
            model = network(config, shape, num_classes)
            own = settled(config, settings)
            plan = Plan.of(config, own, read_token(run), structure_id(model))
            method = plan.build(model, config.fraction_train)
        except (ValueError, FileNotFoundError) as error:
            raise ExportError(f"the network of {run} cannot be built: {error}") from error
    digest = model_digest(method.spec, model)
    identity = plan.identity(digest)
    if client is None and not method.modes:
        raise ExportError(
            f"{config.method} leaves a network on each device and none on the server: add --client N for the one "
            f"of device N{_known_clients(run, config, identity)}"
        )
    if client is not None and method.modes:
        raise ExportError(f"{config.method} has one network for all: leave out --client")
    if task is not None and client is None:
        raise ExportError("tasks have networks on devices only: add --client N")
    try:
        told = Frame.parse(raw)
        if told.digest != digest:
            raise ExportError(
                f"{run / MASK} is of another network than {CONFIG} describes: use the files of one run, and the "
                "data, code and checkpoint that it ran with"
            )
        result = _result(raw, method)
        if client is None:
            _install(method, result, model, config.seed)
        else:
            memory = _memory(run, config, identity, client, told.round_)
            got = _only(result, method.down(memory))
            if task is not None and task not in method.tasks(memory):
                met = ", ".join(map(str, method.tasks(memory)))
                only = f"only for {met}" if met else f"{config.method} has one for all"
                raise ExportError(f"device {client} has no network for task {task}, {only}")
            method.install(got, model, frozen_weights(model, method.spec), View(memory=memory, task=task))
    except WireError as error:
        raise ExportError(f"{run / MASK}: {error}") from error
    return Network(model.eval(), shape, num_classes, method, result, config, told.round_)


def slimmed(network: Network) -> nn.Module:
    """Return a smaller network that computes the same: without pruned filters, or without silent channels.

    Raises
    ------
    ExportError
        Nothing could be cut.
    """
    method = network.method
    if isinstance(method, Slimming):
        keep = method.keep(network.result)
        if keep.all():
            raise ExportError("no filter was pruned: leave out --slim, or let the search run to its end")
        return slim_(copy.deepcopy(network.model), method.coupling, method.spec, keep)
    try:
        model, gone = cut_silent(network.model, network.in_shape)
    except ValueError as error:
        raise ExportError(f"--slim: {error}") from error
    if not gone:
        raise ExportError(
            f"--slim has nothing to cut: no channel of this {network.config.method} network is 0 for every input; "
            "leave it out, or train with a method that prunes whole filters, such as mpfl"
        )
    return model


def show(report: Mapping[str, Any], out: Path) -> RenderableType:
    """A report in words: a table of the networks, the files, and what to mind."""
    table = Table(box=None, pad_edge=False)
    for name in ("network", "parameters", "zeros", "MACs", "latency", "weights"):
        table.add_column(name, justify="left" if name == "network" else "right", no_wrap=True)
    for name, n in report["networks"].items():
        figures = f"{n['parameters']:,}", f"{n['zeros']:.1%}", f"{n['macs']:,}", f"{n['latency_ms']:.3g} ms"
        table.add_row(name, *figures, human_bytes(n["bytes"]))
    files = ", ".join(f"{name} {human_bytes(size)}" for name, size in report["files"].items())
    lines = [f"{out}: {files}; the run's mask file {human_bytes(report['mask_bytes'])}"]
    if report["batch"] != "any":
        lines.append(f"batches of {report['batch']} only: PyTorch could not export this network for any size")
    if report["batch_statistics"]:
        lines.append(
            "BatchNorm has no statistics of its own here (a network from a seed): what it computes for an example "
            "depends on the batch"
        )
    return Group(table, *map(Text, lines))


def _config(run: Path) -> tuple[RunConfig, dict[str, Any]]:
    path = run / CONFIG
    try:
        flat = json.loads(path.read_text("utf-8"))
        if not isinstance(flat, dict):
            raise ExportError(f"{path} is damaged: it is not a table of keys")
        return load_config(flat)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ExportError(f"{run} is not a run's folder: there is no {CONFIG} in it") from error
    except ConfigError as error:
        raise ExportError(f"{path}: {error}") from error
    except ValueError as error:
        raise ExportError(f"{path} is damaged: {error}") from error


def _frame(run: Path) -> bytes:
    try:
        return (run / MASK).read_bytes()
    except FileNotFoundError as error:
        raise ExportError(f"{run} has no {MASK}: the run is not finished; fedmask run resumes it") from error


def _shape(config: RunConfig, data_dir: str | None) -> tuple[tuple[int, ...], int]:
    try:
        return shape_of(config, data_dir)
    except Exception as error:  # a user's own loader may raise anything
        raise ExportError(
            f"the data set {config.scenario or config.data!r} says what shape the network takes, and it cannot be "
            f"loaded: {error} (--data-dir gives its folder)"
        ) from error


def _result(raw: bytes, method: Method[Any]) -> Payload:
    """Read a result frame; it has at most the fields of a broadcast, a whole mask, or all weights.

    Raises
    ------
    WireError
        It holds anything else.
    """
    expect: dict[str, int | range] = {"mask": method.spec.numel, "weights": range(method.floats + 1)}
    expect |= {name: numel for name, (_, numel) in method.down({}).items()}
    return unpack(raw, digest=None, round_=None, known=None, expect=expect).payload


def _install(method: Method[Any], result: Payload, model: nn.Module, seed: int) -> None:
    """Write the network that a result describes into `model`: what a broadcast says, a mask, or all weights."""
    frozen = frozen_weights(model, method.spec)
    fields = {*result.bits, *result.counts, *result.dense}
    own = _only(result, method.down({}))
    if fields and fields == {*own.bits, *own.counts, *own.dense}:
        mode = "threshold" if "threshold" in method.modes else method.modes[0]
        method.install(result, model, frozen, View(mode, derive(seed, "export")))
    elif fields == {*result.bits} == {"mask"}:
        bits = unpack_bits(result.bits["mask"], method.spec.numel)
        write_mask(model, method.spec, frozen, torch.from_numpy(bits))
    elif fields == {*result.dense} == {"weights"} and result.dense["weights"].size == method.floats:
        write_tensors((t for _, t in float_entries(model)), result.dense["weights"])
    else:
        raise ExportError(
            f"the result of {method.name} holds {', '.join(sorted(fields)) or 'nothing'}, which is no network: "
            "result() must return fields of a broadcast, the bits 'mask', or all weights as 'weights'"
        )


def _only(payload: Payload, fields: Fields) -> Payload:
    """The fields of a payload that a broadcast may hold."""
    kinds = {name: kind for name, (kind, _) in fields.items()}
    return Payload(
        bits={k: v for k, v in payload.bits.items() if kinds.get(k) == "bits"},
        counts={k: v for k, v in payload.counts.items() if kinds.get(k) == "counts"},
        dense={k: v for k, v in payload.dense.items() if kinds.get(k) == "dense"},
    )


def _folders(run: Path, config: RunConfig) -> list[Path]:
    told = Path(config.memory_dir).expanduser() if config.memory_dir else default_folder()
    return [run / MEMORY, told]  # the run's own first: it may have been moved with its folder


def _memory(run: Path, config: RunConfig, identity: str, client: int, round_: int) -> Memory:
    try:
        for folder in _folders(run, config):
            if memory := DeviceMemory(folder, identity, client).recall(round_ + 1):
                return memory
    except DeviceMemoryError as error:
        raise ExportError(str(error)) from error
    raise ExportError(f"no memory of device {client} of this run{_known_clients(run, config, identity)}")


def _known_clients(run: Path, config: RunConfig, identity: str) -> str:
    folders = _folders(run, config)
    names = {p.name.split(".")[0] for folder in folders for p in (folder / identity).glob("*.safetensors")}
    found = sorted(int(name) for name in names if name.isdecimal())
    where = " or ".join(str(folder) for folder in folders)
    return f"; found: {', '.join(map(str, found))}" if found else f"; there is none of any device in {where}"
