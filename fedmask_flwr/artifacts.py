"""A network as files that need nothing of this package: safetensors, a PyTorch program, ONNX, and what it costs.

Every file is checked before anything is written: what it computes is compared with the network on random input.
"""

from __future__ import annotations

import copy
import io
import json
import time
from collections.abc import Mapping, Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from .checkpoint import write_atomic
from .masks import Coupling, MaskSpec, count_macs, count_parameters, couple, slim_

__all__ = ["FILES", "ExportError", "cut_silent", "latencies", "need_onnx", "save_network"]

WEIGHTS, PROGRAM, ONNX, REPORT = "model.safetensors", "model.pt2", "model.onnx", "report.json"
FILES = (WEIGHTS, PROGRAM, ONNX, REPORT)
SLIM_TOLERANCE, FILE_TOLERANCE = 1e-5, 1e-4  # of the largest output, at least 1


class ExportError(RuntimeError):
    """Nothing was exported; the message names the fix."""


def need_onnx() -> None:
    """Raise `ExportError` where the packages for ONNX are not installed."""
    missing = [name for name in ("onnx", "onnxruntime", "onnxscript") if find_spec(name) is None]
    if missing:
        raise ExportError(f"ONNX needs {', '.join(missing)}: pip install 'fedmask-flwr[export]'")


def save_network(
    model: nn.Module,
    in_shape: Sequence[int],
    out: Path,
    *,
    full: nn.Module | None = None,
    onnx: bool = False,
    overwrite: bool = False,
    about: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Write a network in evaluation mode: ``model.safetensors``, ``model.pt2``, ``report.json``, ``model.onnx``.

    The program and the ONNX file take any batch size where PyTorch can export that, else batches of one.

    Parameters
    ----------
    model
        Takes float32 of shape (n, *in_shape), returns one tensor. It is copied, not changed.
    full
        The masked network that `model` was cut from: both must compute the same, and both are measured.
    onnx
        Write ``model.onnx`` too.
    about
        Further entries of the report.

    Returns
    -------
    The report: for each network its parameters, the share of them that are 0, multiply-accumulates of one example,
    milliseconds for ``latency_batch`` examples on one thread, bytes as safetensors; the files and their bytes; the
    largest differences that were found, relative to the largest output (at least 1).

    Raises
    ------
    ExportError
        A file is there already, `model` computes something else than `full`, it cannot be exported, or packages
        for ONNX are missing.
    OSError
        The disk refuses.
    """
    check_free(out, overwrite=overwrite)
    if onnx:
        need_onnx()
    model = _plain(model)
    networks = {"full": model} if full is None else {"full": _plain(full), "slim": model}
    # BatchNorm on the statistics of the batch may refuse a batch of one.
    least = 2 if (batch_statistics := _uses_batch(model)) else 1
    inputs = [torch.randn(n, *in_shape, generator=torch.Generator().manual_seed(n)) for n in (least, 3)]
    report: dict[str, Any] = {
        **(about or {}),
        "in_shape": list(in_shape),
        "torch": torch.__version__,
        "batch_statistics": batch_statistics,
        "latency_batch": least,
        "networks": measure(networks, in_shape, inputs[0]),
        "differences": {},
    }
    if full is not None:
        worst = max(difference(networks["full"](x), model(x)) for x in inputs)
        report["differences"]["slim"] = worst
        if worst > SLIM_TOLERANCE:
            raise ExportError(
                f"the slim network differs from the masked one by {worst:.2g} of its largest output: "
                "export without --slim, and please report the network"
            )
    program, any_batch = _program(model, inputs)
    _forget_paths(program)
    checked = inputs if any_batch else inputs[:1]
    files = {WEIGHTS: _weights(model), PROGRAM: _program_bytes(program, model, checked, report)}
    if onnx:
        files[ONNX] = _onnx_bytes(program, model, checked, any_batch, report)
    report["batch"] = "any" if any_batch else least
    report["files"] = {name: len(data) for name, data in files.items()}
    out.mkdir(parents=True, exist_ok=True)
    for name in FILES:  # of an earlier export
        (out / name).unlink(missing_ok=True)
    for name, data in files.items():
        write_atomic(out / name, data)
    write_atomic(out / REPORT, (json.dumps(report, indent=2) + "\n").encode())
    return report


def check_free(out: Path, *, overwrite: bool) -> None:
    """Raise `ExportError` when `out` holds an export already, unless it may be replaced."""
    if out.exists() and not out.is_dir():
        raise ExportError(f"{out} is a file; give another --out")
    there = [name for name in FILES if (out / name).exists()]
    if there and not overwrite:
        raise ExportError(f"{out} holds {', '.join(there)}: give another --out, or --overwrite")


def cut_silent(model: nn.Module, in_shape: Sequence[int]) -> tuple[nn.Module, int]:
    """Cut the channels that are 0 for every input out of a copy of `model`; return it and how many went.

    Such a channel has no weight but zeros, in all layers that make it, no bias, and BatchNorm does not shift it.
    What only such channels fed is silent then too, and goes as well. One channel of each unit stays.

    Raises
    ------
    ValueError
        The model cannot be traced, or has no channels that could go.
    """
    slim, gone = copy.deepcopy(model), 0
    while True:
        coupling = couple(slim, in_shape)
        spec = coupling.spec()
        keep = ~_silent(slim, coupling, spec)
        for start, size in zip(np.cumsum([0, *spec.sizes]), spec.sizes, strict=False):
            if not keep[start : start + size].any():
                keep[start] = True
        if keep.all():
            return slim, gone
        gone += int((~keep).sum())
        slim_(slim, coupling, spec, keep)


def _silent(model: nn.Module, coupling: Coupling, spec: MaskSpec) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """Channels (d,) of `spec` that are 0 for every input."""
    state = model.state_dict()
    heard = [np.zeros(n, np.bool_) for n in coupling.channels]
    for entry in coupling.entries:
        leaf = entry.name.rpartition(".")[2]
        if leaf == "running_var" or (leaf == "weight" and len(entry.shape) == 1):
            continue  # these only scale
        rows = (state[entry.name].reshape(entry.shape[0], -1) != 0).any(1).cpu().numpy() if entry.dims else None
        for s in entry.segments(0):
            assert rows is not None
            part = rows[s.offset : s.offset + coupling.channels[s.unit] * s.block]
            heard[s.unit] |= part.reshape(-1, s.block).any(1)
    unit = {entry.name: entry.unit for entry in coupling.entries}
    first = [unit[spec.names[spec.units.index(i)]] for i in range(len(spec.sizes))]
    return ~np.concatenate([heard[u] for u in first if u is not None])


@torch.inference_mode()
def latencies(models: Sequence[nn.Module], x: Tensor, seconds: float = 1.0) -> list[float]:
    """Median milliseconds of a forward pass of each model on `x`, one thread, the models taking turns."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for model in [*models] * 3:
            model(x)
        taken: list[list[float]] = [[] for _ in models]
        end = time.perf_counter() + seconds * len(models)
        while len(taken[0]) < 7 or (time.perf_counter() < end and len(taken[0]) < 1000):
            for model, own in zip(models, taken, strict=True):
                began = time.perf_counter()
                model(x)
                own.append(1e3 * (time.perf_counter() - began))
        return [median(own) for own in taken]
    finally:
        torch.set_num_threads(threads)


def measure(networks: Mapping[str, nn.Module], in_shape: Sequence[int], x: Tensor) -> dict[str, dict[str, Any]]:
    """What each network costs; `x` is what its latency is measured on."""
    times = latencies([*networks.values()], x)
    return {
        name: {
            "parameters": (n := count_parameters(model)),
            "zeros": sum(int((p == 0).sum()) for p in model.parameters()) / max(n, 1),
            "macs": count_macs(model, in_shape),
            "latency_ms": milliseconds,
            "bytes": len(_weights(model)),
        }
        for (name, model), milliseconds in zip(networks.items(), times, strict=True)
    }


def difference(a: Tensor, b: Tensor) -> float:
    """Largest difference, relative to the largest of `a` (at least 1); infinite for other shapes or values."""
    if a.shape != b.shape or not bool(a.isfinite().all() and b.isfinite().all()):
        return float("inf")
    return float((a - b).abs().max()) / max(1.0, float(a.abs().max()))


def _plain(model: nn.Module) -> nn.Module:
    plain: nn.Module = copy.deepcopy(getattr(model, "_orig_mod", model)).cpu()
    for module in plain.modules():
        module.training = False  # past any override of train()
    return plain.requires_grad_(False)


def _uses_batch(model: nn.Module) -> bool:
    return any(isinstance(m, _NormBase) and m.running_mean is None for m in model.modules())


def _weights(model: nn.Module) -> bytes:
    return save({name: t.detach().clone().contiguous() for name, t in model.state_dict().items()})


def _program(model: nn.Module, inputs: list[Tensor]) -> tuple[torch.export.ExportedProgram, bool]:
    """The traced network, and whether it takes any batch size."""
    if not isinstance(found := model(inputs[0]), Tensor):
        raise ExportError(f"{type(model).__name__} returns {type(found).__name__}: one tensor is needed")
    try:
        batch = ({0: torch.export.Dim("batch")},)
        return torch.export.export(model, (inputs[1],), dynamic_shapes=batch), True
    except Exception:  # whatever its forward or the exporter raises: the fixed size is tried next
        try:
            return torch.export.export(model, (inputs[0],)), False
        except Exception as error:
            raise ExportError(f"torch.export cannot export {type(model).__name__}: {error}") from error


def _forget_paths(program: torch.export.ExportedProgram) -> None:
    """Drop the stack traces, which would tell where the sources lie on this machine."""
    for module in program.graph_module.modules():
        if isinstance(module, torch.fx.GraphModule):
            for node in module.graph.nodes:
                node.meta.pop("stack_trace", None)


def _program_bytes(
    program: torch.export.ExportedProgram, model: nn.Module, inputs: list[Tensor], report: dict[str, Any]
) -> bytes:
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    read = torch.export.load(file).module()
    _check(PROGRAM, [(model(x), read(x)) for x in inputs], report)
    return file.getvalue()


def _onnx_bytes(
    program: torch.export.ExportedProgram,
    model: nn.Module,
    inputs: list[Tensor],
    any_batch: bool,
    report: dict[str, Any],
) -> bytes:
    onnxruntime = import_module("onnxruntime")
    try:
        made = torch.onnx.export(
            program, dynamo=True, verbose=False, input_names=["input"], output_names=["output"]
        )
        assert made is not None
        raw: bytes = made.model_proto.SerializeToString()
    except Exception as error:
        raise ExportError(f"torch.onnx cannot export {type(model).__name__}: {error}") from error
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(raw, options, providers=["CPUExecutionProvider"])
    runs = [torch.from_numpy(session.run(None, {"input": x.numpy()})[0]) for x in inputs]
    _check(ONNX, [(model(x), y) for x, y in zip(inputs, runs, strict=True)], report)
    return raw


def _check(name: str, pairs: list[tuple[Tensor, Tensor]], report: dict[str, Any]) -> None:
    worst = max(difference(a, b) for a, b in pairs)
    report["differences"][name] = worst
    if worst > FILE_TOLERANCE:
        raise ExportError(f"{name} is {worst:.2g} of the largest output off the network: please report the network")
