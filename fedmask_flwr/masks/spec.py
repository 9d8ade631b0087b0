"""Where bit i of a mask lives in a network: everything else is algebra on flat vectors of d bits."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from hashlib import blake2b
from math import prod
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from .keyed import encode

Granularity = Literal["weight", "filter"]


def named_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Parameters by name, tied ones once, named as if the model had not been through `torch.compile`."""
    for name, p in model.named_parameters():
        yield name.replace("_orig_mod.", ""), p


@dataclass(frozen=True, slots=True)
class MaskSpec:
    """The order of the mask bits: parameter by parameter, row-major inside each.

    Attributes
    ----------
    names, shapes
        The masked parameters in model order and their shapes (each with at least 2 dimensions).
    granularity
        ``"weight"``: a bit per weight. ``"filter"``: a bit per output row (``shape[0]``), which is
        shared by all weights of that filter or neuron.
    units
        Filter granularity only: parameter i has the bits of unit ``units[i]``, so that parameters whose
        filters must go together share them (see `couple`). Units are numbered from 0 without gaps, and
        the bits of unit 0 come first. ``()``: every parameter has bits of its own.

    Raises
    ------
    ValueError
        The fields do not describe a mask.
    """

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    granularity: Granularity = "weight"
    units: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.granularity not in get_args(Granularity):
            raise ValueError(f"granularity must be 'weight' or 'filter', not {self.granularity!r}")
        if not self.names or len(self.names) != len(self.shapes) or len(set(self.names)) != len(self.names):
            raise ValueError("a mask needs at least one name, each once, and one shape for each name")
        if any(len(shape) < 2 or prod(shape) < 1 for shape in self.shapes):
            raise ValueError(f"masked parameters have 2 or more dimensions and no empty one, got {self.shapes}")
        if self.units:
            self._check_units()

    def _check_units(self) -> None:
        if self.granularity != "filter":
            raise ValueError("a mask with units has granularity 'filter': a bit per weight cannot be shared")
        if len(self.units) != len(self.names) or set(self.units) != set(range(max(self.units) + 1)):
            raise ValueError(
                f"a mask needs one unit for each name, numbered from 0 without gaps, got {self.units} "
                f"for {len(self.names)} names"
            )
        rows = dict(zip(self.units, self.shapes, strict=True))
        for name, shape, unit in zip(self.names, self.shapes, self.units, strict=True):
            if shape[0] != rows[unit][0]:
                raise ValueError(f"parameters of mask unit {unit} differ in rows: {name!r} has shape {shape}")

    @classmethod
    def of(
        cls,
        model: nn.Module,
        include: Sequence[str] = ("*",),
        exclude: Sequence[str] = (),
        granularity: Granularity = "weight",
    ) -> MaskSpec:
        """Mask the floating parameters with 2 or more dimensions that the patterns select.

        Parameters
        ----------
        include, exclude
            Shell patterns (`fnmatch`) over parameter names, such as ``"features.*.weight"``. A
            parameter is taken if some `include` and no `exclude` matches; tied ones are taken once.

        Raises
        ------
        ValueError
            Nothing is left to mask, or a pattern matches nothing; the message lists the candidates.
        """
        parameters = list(named_parameters(model))
        candidates = [
            (name, tuple(p.shape)) for name, p in parameters if p.ndim >= 2 and p.numel() and p.is_floating_point()
        ]
        chosen = select([name for name, _ in candidates], [name for name, _ in parameters], include, exclude)
        taken = [(name, shape) for name, shape in candidates if name in chosen]
        return cls(tuple(name for name, _ in taken), tuple(shape for _, shape in taken), granularity)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Bits per layer, or per unit if there are units: the number of weights, or of filters."""
        if self.units:
            rows = dict(zip(self.units, self.shapes, strict=True))
            return tuple(rows[unit][0] for unit in range(len(rows)))
        if self.granularity == "filter":
            return tuple(shape[0] for shape in self.shapes)
        return tuple(prod(shape) for shape in self.shapes)

    @property
    def numel(self) -> int:
        """Number of bits d."""
        return sum(self.sizes)

    @property
    def weights(self) -> int:
        """Number of weights that the d bits cover; equal to d at weight granularity."""
        return sum(prod(shape) for shape in self.shapes)

    @property
    def digest(self) -> bytes:
        """8 bytes that differ when names, shapes, granularity or units differ (BLAKE2b)."""
        parts: list[int | str] = ["mask-spec", self.granularity, len(self.names)]
        for name, shape in zip(self.names, self.shapes, strict=True):
            parts += [name, len(shape), *shape]
        if self.units:
            parts += ["units", *self.units]
        return blake2b(encode(*parts), digest_size=8).digest()

    def split(self, flat: Tensor) -> dict[str, Tensor]:
        """View a vector of d values as one tensor per layer, without a copy.

        At weight granularity a view has the parameter's shape; at filter granularity it has shape
        (out, 1, 1, ...), which broadcasts over the parameter. Parameters of one unit get the same values.

        Raises
        ------
        ValueError
            `flat` is not a vector of d values.
        """
        if flat.shape != (self.numel,):
            raise ValueError(f"expected a flat vector of {self.numel} values, got shape {tuple(flat.shape)}")
        shapes = self.shapes
        if self.granularity == "filter":
            shapes = tuple((shape[0], *(1,) * (len(shape) - 1)) for shape in shapes)
        if self.units:
            parts = torch.split(flat, list(self.sizes))
            rows = zip(self.names, self.units, shapes, strict=True)
            return {name: parts[unit].view(shape) for name, unit, shape in rows}
        return self._views(flat, shapes)

    def split_weights(self, flat: Tensor) -> dict[str, Tensor]:
        """View a vector of all covered weights as one tensor of the parameter's shape per layer.

        Raises
        ------
        ValueError
            `flat` is not a vector of `weights` values.
        """
        if flat.shape != (self.weights,):
            raise ValueError(f"expected a flat vector of {self.weights} weights, got shape {tuple(flat.shape)}")
        return self._views(flat, self.shapes)

    def _views(self, flat: Tensor, shapes: tuple[tuple[int, ...], ...]) -> dict[str, Tensor]:
        parts = torch.split(flat, [prod(shape) for shape in shapes])
        return {n: part.view(shape) for n, part, shape in zip(self.names, parts, shapes, strict=True)}

    def params(self, model: nn.Module) -> list[nn.Parameter]:
        """Find the masked parameters of `model`, in mask order.

        Raises
        ------
        ValueError
            `model` lacks one of them, or has it with another shape.
        """
        have: Mapping[str, nn.Parameter] = dict(named_parameters(model))
        found = []
        for name, shape in zip(self.names, self.shapes, strict=True):
            if name not in have:
                raise ValueError(f"the model has no parameter {name!r}: it is not the model this mask is for")
            if tuple(have[name].shape) != shape:
                raise ValueError(
                    f"parameter {name!r} has shape {tuple(have[name].shape)}, the mask is for {shape}: "
                    "build the model with the options the spec was made with"
                )
            found.append(have[name])
        return found


def select(
    candidates: Sequence[str], everything: Sequence[str], include: Sequence[str], exclude: Sequence[str]
) -> frozenset[str]:
    """Names of `candidates` that some `include` and no `exclude` pattern matches.

    Raises
    ------
    ValueError
        Nothing is left, an `include` matches no candidate, or an `exclude` nothing of `everything`.
    """
    listing = ", ".join(candidates) or "none"
    include, exclude = _patterns(include), _patterns(exclude)
    for patterns, names in ((include, candidates), (exclude, everything)):
        for pattern in patterns:
            if not any(fnmatchcase(name, pattern) for name in names):
                raise ValueError(f"pattern {pattern!r} matches no parameter; candidates: {listing}")
    taken = frozenset(
        name
        for name in candidates
        if any(fnmatchcase(name, p) for p in include) and not any(fnmatchcase(name, p) for p in exclude)
    )
    if not taken:
        raise ValueError(f"include={include} exclude={exclude} leave nothing to mask; candidates: {listing}")
    return taken


def _patterns(patterns: Sequence[str]) -> tuple[str, ...]:
    if isinstance(patterns, str):
        raise TypeError(f"give a sequence of patterns, such as ({patterns!r},), not one string")
    return tuple(patterns)
