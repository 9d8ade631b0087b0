"""Frozen weights are named, never shipped: a seed, or a checkpoint and its hash.

Policy for what is not masked. Networks from a seed: biases 0, norm weights 1, norm biases 0, and
BatchNorm normalises with the statistics of the batch, in training and in evaluation, and keeps none;
so nothing but the mask has to travel. Pretrained networks: everything keeps its trained value, and
BatchNorm always uses its stored statistics and never updates them, also after ``model.train()``.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from hashlib import blake2b, file_digest, sha256
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from .keyed import derive, encode, words
from .spec import MaskSpec, named_parameters

Option = int | str | float | tuple[Any, ...]

_ARCH = re.compile(r"torchvision:(?P<name>\w+)|(?P<module>[A-Za-z_][\w.]*):(?P<builder>[A-Za-z_]\w*)")
_SEED = re.compile(r"seed:(?P<seed>-?\d{1,20})(?::(?P<scale>\w+))?")
_FILE = re.compile(r"file:(?P<path>.+)#sha256=(?P<sha>[0-9a-fA-F]{64})")
_SCALES = {"signed_e": math.e, "kaiming_keep": 2.0, "glorot": math.sqrt(6.0)}
_GRAMMAR = (
    "a source is 'seed:<int>', 'seed:<int>:signed_e', 'seed:<int>:kaiming_keep', 'seed:<int>:glorot', "
    "'file:<path>#sha256=<64 hex digits>', or 'torchvision:DEFAULT' (for a torchvision arch)"
)
_NORMS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


@dataclass(frozen=True, slots=True)
class Backbone:
    """An architecture and the name of its frozen weights.

    Attributes
    ----------
    arch
        ``"pkg.mod:builder"``, called with `options` and imported from the local machine, or
        ``"torchvision:<name>"``.
    source
        ``"seed:<int>[:<scale>]"``: each weight is -c or +c. ``signed_e`` (default): c = e/sqrt(fan_in),
        FedPM's; ``kaiming_keep``: c = 2/sqrt(fan_in), Kaiming's when half of the weights are kept.
        fan_in is prod(shape[1:]), and 1 for an embedding. ``glorot``, for weights that are trained: uniform
        between -c and +c, c = sqrt(6/(fan_in + fan_out)). All are the same on every machine.
        ``"file:<path>#sha256=<hex>"``: safetensors, or a .pt/.pth/.th state dict.
        ``"torchvision:DEFAULT"``: torchvision's pretrained weights; with another `num_classes` than
        theirs, the parameters that no longer fit (the head) are those of ``seed:0``.
    options
        Keyword arguments of the builder, as pairs.

    Raises
    ------
    ValueError
        `arch` or `source` is malformed; the message gives the grammar.
    """

    arch: str
    source: str
    options: tuple[tuple[str, Option], ...] = ()

    def __post_init__(self) -> None:
        arch = _ARCH.fullmatch(self.arch)
        if not arch:
            raise ValueError(f"an arch is 'pkg.mod:builder' or 'torchvision:<name>', not {self.arch!r}")
        seed = _SEED.fullmatch(self.source)
        if seed and (seed["scale"] or "signed_e") not in _SCALES:
            raise ValueError(f"unknown scale in source {self.source!r}: {_GRAMMAR}")
        if not (seed or _FILE.fullmatch(self.source) or (self.source == "torchvision:DEFAULT" and arch["name"])):
            raise ValueError(f"malformed source {self.source!r} for arch {self.arch!r}: {_GRAMMAR}")

    def build(self) -> nn.Module:
        """Build the network with its frozen weights, on the CPU; no global random state is touched.

        Raises
        ------
        ValueError
            The builder cannot be found or takes other options, or the checkpoint's hash or tensors
            do not match.
        FileNotFoundError
            There is no checkpoint at the path.
        """
        if self.source == "torchvision:DEFAULT":
            return self._pretrained()
        model = self._make()
        initialise(model, self.source)
        return model

    def _make(self, **changes: Any) -> nn.Module:
        options = {k: v for k, v in {**dict(self.options), **changes}.items() if v is not None}
        builder = self._builder()
        # Builders initialise weights from torch's global generator; give them a private, fixed one, so
        # that buffers drawn in __init__ are the same everywhere too.
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)
            try:
                model = builder(**options)
            except TypeError as error:
                raise ValueError(f"{self.arch} could not be built with options {options}: {error}") from error
        if not isinstance(model, nn.Module):
            raise ValueError(f"{self.arch} returned {type(model).__name__}, not an nn.Module")
        return model

    def _builder(self) -> Callable[..., Any]:
        arch = _ARCH.fullmatch(self.arch)
        assert arch is not None  # __post_init__ has checked the grammar
        if arch["name"]:
            try:
                from torchvision.models import get_model, list_models
            except ImportError as error:
                raise ValueError(f"{self.arch} needs torchvision: pip install 'fedmask-flwr[vision]'") from error
            if arch["name"] not in list_models():
                raise ValueError(f"torchvision has no model {arch['name']!r}: see torchvision.models.list_models()")
            return partial(get_model, arch["name"])
        try:
            builder = getattr(import_module(arch["module"]), arch["builder"])
        except (ImportError, AttributeError) as error:
            raise ValueError(f"cannot import {self.arch}: {error}") from error
        if not callable(builder):
            raise ValueError(f"{self.arch} is not callable: name a function or class")
        return builder  # type: ignore[no-any-return]

    def _pretrained(self) -> nn.Module:
        trained = self._make(weights="DEFAULT", num_classes=None)
        if "num_classes" not in dict(self.options):
            return trained
        model = self._make(weights=None)
        have, want = trained.state_dict(), model.state_dict()
        if all(have[name].shape == t.shape for name, t in want.items()):
            return trained
        _sow(model, 0, "signed_e")
        same = {name: t for name, t in have.items() if name in want and t.shape == want[name].shape}
        model.load_state_dict(same, strict=False)
        return model


def initialise(model: nn.Module, source: str) -> None:
    """Give `model` the frozen weights that `source` names ("seed:..." or "file:..."), in place.

    Raises
    ------
    ValueError
        The source is malformed, or the checkpoint's hash or tensors do not match.
    FileNotFoundError
        There is no checkpoint at the path.
    """
    if seed := _SEED.fullmatch(source):
        if (seed["scale"] or "signed_e") not in _SCALES:
            raise ValueError(f"unknown scale in source {source!r}: {_GRAMMAR}")
        _sow(model, int(seed["seed"]), seed["scale"] or "signed_e")
        _drop_statistics(model)
    elif match := _FILE.fullmatch(source):
        state = _read(Path(match["path"]), match["sha"].lower())
        try:
            model.load_state_dict(state, strict=True)
        except RuntimeError as error:
            raise ValueError(f"checkpoint {match['path']} does not fit {type(model).__name__}: {error}") from error
    else:
        raise ValueError(f"malformed source {source!r}: {_GRAMMAR}")


def _sow(model: nn.Module, seed: int, scale: str) -> None:
    """Set every parameter from the seed, in place: signed constants or uniform values, ones and zeros."""
    gain = _SCALES[scale]
    names = {id(p): name for name, p in named_parameters(model)}
    with torch.no_grad():
        for module in model.modules():
            for leaf, p in module.named_parameters(recurse=False):
                name = names.pop(id(p), None)
                if name is None:  # tied to one that is done
                    continue
                if p.ndim < 2:
                    is_norm = isinstance(module, _NORMS) or "norm" in type(module).__name__.lower()
                    p.fill_(1.0 if is_norm and leaf == "weight" else 0.0)
                    continue
                fan_in = 1 if isinstance(module, nn.Embedding | nn.EmbeddingBag) else math.prod(p.shape[1:])
                if scale == "glorot":
                    bound = gain / math.sqrt(fan_in + p.numel() // p.shape[1])
                    uniform = words(derive(seed, "backbone", name), p.numel()).astype(np.float64) / 2.0**31
                    p.copy_(torch.from_numpy((uniform * bound).astype(np.float32)).view(p.shape))
                    continue
                c = np.float32(gain / math.sqrt(fan_in))
                signs = words(derive(seed, "backbone", name), p.numel()) < 0
                p.copy_(torch.from_numpy(np.where(signs, -c, c)).view(p.shape))


def _drop_statistics(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, _NormBase):
            module.track_running_stats = False
            module.running_mean = module.running_var = module.num_batches_tracked = None


def _read(path: Path, sha: str) -> dict[str, Tensor]:
    """Read a checkpoint whose SHA-256 is `sha`; nothing is parsed before the hash is checked."""
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}: copy the file with SHA-256 {sha} there")
    with path.open("rb") as file:
        found = file_digest(file, "sha256").hexdigest()
    if found != sha:
        raise ValueError(f"checkpoint {path} has SHA-256 {found}, expected {sha}: it is another file or damaged")
    if path.suffix in (".pt", ".pth", ".th"):
        state = torch.load(path, map_location="cpu", weights_only=True)
        if isinstance(state, Mapping) and isinstance(state.get("state_dict"), Mapping):
            state = state["state_dict"]
    elif path.suffix == ".safetensors":
        from safetensors.torch import load_file

        state = load_file(path)
    else:
        raise ValueError(f"checkpoint {path} must end in .safetensors, .pt, .pth or .th")
    if not (isinstance(state, Mapping) and all(isinstance(t, Tensor) for t in state.values())):
        raise ValueError(f"checkpoint {path} holds no state dict: save model.state_dict()")
    return {str(name).removeprefix("module."): t for name, t in state.items()}


def freeze(model: nn.Module, spec: MaskSpec | None = None) -> None:
    """Freeze all of `model` but the masked parameters; `spec=None` freezes those as well.

    Biases, norm weights and every other parameter outside `spec` get ``requires_grad=False`` and no
    gradient. BatchNorm (and InstanceNorm) that stores running statistics uses them and never updates
    them: it is put in evaluation mode and stays there when ``model.train()`` is called.

    Raises
    ------
    ValueError
        The model does not fit the spec.
    """
    masked = {id(p) for p in spec.params(model)} if spec else set()
    for p in model.parameters():
        p.requires_grad_(id(p) in masked)
        if not p.requires_grad:
            p.grad = None
    for module in model.modules():
        if isinstance(module, _NormBase) and module.running_mean is not None:
            module.eval()
            # An instance attribute, not another class: names, hooks, copies and pickles stay as they were.
            module.train = partial(_stay_in_eval, module)  # type: ignore[assignment]


def _stay_in_eval(module: nn.Module, mode: bool = True) -> nn.Module:
    del mode
    module.training = False
    return module


def weights_digest(model: nn.Module) -> bytes:
    """SHA-256 (32 bytes) of all weights and buffers: sorted names, dtypes, shapes, little-endian bytes.

    Take it from a fresh backbone: a mask that is written into the model changes it.
    """
    h = sha256()
    state = {name.replace("_orig_mod.", ""): t for name, t in model.state_dict().items()}
    for name, t in sorted(state.items()):
        h.update(encode(name, str(t.dtype), t.ndim, *t.shape))
        raw = t.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        if sys.byteorder == "big":
            raw = np.ascontiguousarray(raw.reshape(-1, t.element_size())[:, ::-1])
        h.update(raw.data)
    return h.digest()


def model_digest(spec: MaskSpec, model: nn.Module) -> bytes:
    """8 bytes that travel in every frame: another model, mask or frozen weight is refused.

    BLAKE2b of ``spec.digest + weights_digest(model)``; take it before a mask is written.
    """
    return blake2b(spec.digest + weights_digest(model), digest_size=8).digest()
