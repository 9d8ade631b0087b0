from __future__ import annotations

import pytest
import torch
from torch import nn

from fedmask_flwr.masks import MaskSpec, frozen_weights


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 3)
        self.body = nn.Linear(3, 3)
        self.head = nn.Linear(3, 5, bias=False)
        self.head.weight = self.embed.weight
        self.index = nn.Parameter(torch.zeros(2, 2, dtype=torch.int64), requires_grad=False)


def net() -> nn.Module:
    return nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 3))


def test_order_sizes_and_counts():
    spec = MaskSpec.of(net())
    assert spec == MaskSpec(("0.weight", "3.weight"), ((4, 2, 3, 3), (3, 16)))
    assert (spec.sizes, spec.numel, spec.weights) == ((72, 48), 120, 120)
    rows = MaskSpec.of(net(), granularity="filter")
    assert (rows.sizes, rows.numel, rows.weights) == ((4, 3), 7, 120)


def test_tied_parameters_are_taken_once():
    assert MaskSpec.of(Tied()).names == ("embed.weight", "body.weight")


def test_patterns():
    assert MaskSpec.of(net(), include=("3.*",)).names == ("3.weight",)
    assert MaskSpec.of(net(), exclude=("3.*",)).names == ("0.weight",)
    assert MaskSpec.of(net(), exclude=("*.bias",)) == MaskSpec.of(net())


@pytest.mark.parametrize(
    "kwargs",
    [{"include": ("*.bias",)}, {"include": ("0.*", "fc.*")}, {"exclude": ("fc.*",)}, {"exclude": ("*",)}],
)
def test_patterns_that_miss_list_the_candidates(kwargs):
    with pytest.raises(ValueError, match=r"candidates: 0\.weight, 3\.weight"):
        MaskSpec.of(net(), **kwargs)


def test_nothing_to_mask():
    with pytest.raises(ValueError, match="candidates: none"):
        MaskSpec.of(nn.BatchNorm2d(3))
    with pytest.raises(TypeError, match="sequence"):
        MaskSpec.of(net(), include="*")


@pytest.mark.parametrize(
    "fields",
    [
        ((), ()),
        (("a",), ()),
        (("a", "a"), ((2, 2), (2, 2))),
        (("a",), ((2,),)),
        (("a",), ((2, 0),)),
        (("a",), ((2, 2),), "row"),
    ],
)
def test_nonsense_is_refused(fields):
    with pytest.raises(ValueError, match=r"mask|granularity"):
        MaskSpec(*fields)


def test_digest_tells_masks_apart():
    a = MaskSpec(("a", "b"), ((2, 3), (4, 5)))
    others = [
        MaskSpec(("a", "c"), ((2, 3), (4, 5))),
        MaskSpec(("a", "b"), ((3, 2), (4, 5))),
        MaskSpec(("b", "a"), ((4, 5), (2, 3))),
        MaskSpec(("a", "b"), ((2, 3), (4, 5)), "filter"),
        MaskSpec(("a",), ((2, 3),)),
    ]
    assert len({s.digest for s in (a, *others)}) == 6
    assert a.digest == MaskSpec(("a", "b"), ((2, 3), (4, 5))).digest
    assert a.digest.hex() == "bf33151999071b13"


def test_split_gives_views():
    spec = MaskSpec.of(net())
    flat = torch.arange(120.0)
    parts = spec.split(flat)
    assert [tuple(p.shape) for p in parts.values()] == list(spec.shapes)
    parts["3.weight"][0, 0] = -1
    assert flat[72] == -1
    rows = MaskSpec.of(net(), granularity="filter")
    values = torch.arange(7.0)
    parts = rows.split(values)
    assert [tuple(p.shape) for p in parts.values()] == [(4, 1, 1, 1), (3, 1)]
    parts["0.weight"][2] = 9
    assert values[2] == 9
    weights = rows.split_weights(flat)
    assert [tuple(p.shape) for p in weights.values()] == list(rows.shapes)
    for method, wrong in ((spec.split, flat[1:]), (rows.split, flat), (rows.split_weights, values)):
        with pytest.raises(ValueError, match="expected a flat vector"):
            method(wrong)


def test_params_are_the_models_own():
    model = Tied()
    spec = MaskSpec.of(model)
    assert spec.params(model)[0] is model.head.weight
    assert torch.equal(frozen_weights(model, spec)[:15], model.embed.weight.detach().flatten())


def test_params_of_another_model():
    spec = MaskSpec.of(net())
    with pytest.raises(ValueError, match=r"no parameter '0\.weight'"):
        spec.params(Tied())
    other = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 3))
    with pytest.raises(ValueError, match=r"'0\.weight' has shape \(4, 3, 3, 3\), the mask is for \(4, 2, 3, 3\)"):
        spec.params(other)


def test_compiled_models_have_the_same_spec():
    model = net()
    compiled = torch.compile(model)
    assert MaskSpec.of(compiled) == MaskSpec.of(model)
    assert MaskSpec.of(model).params(compiled)[0] is model[0].weight
