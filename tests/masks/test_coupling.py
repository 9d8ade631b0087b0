from __future__ import annotations

from itertools import pairwise

import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from fedmask_flwr.masks import MaskSpec, Segment, couple
from fedmask_flwr.models import lenet5, mlp

from .prunable import Dense, Wild, close, outputs, randomise, some


class Forward(nn.Module):
    """Layers a, b, ... (as given) and a forward that is given too."""

    def __init__(self, forward, **layers: nn.Module) -> None:
        super().__init__()
        for name, layer in layers.items():
            setattr(self, name, layer)
        self.run = forward

    def forward(self, x):
        return self.run(self, x)


def segments(coupling, name: str, dim: int):
    return next(e for e in coupling.entries if e.name == name).segments(dim)


def unit(coupling, name: str):
    return next(e for e in coupling.entries if e.name == name).unit


def prunable(coupling) -> set[str]:
    """Names of the weights whose rows can go."""
    return {e.name for e in coupling.entries if e.unit is not None and coupling.prunable[e.unit]}


def test_flatten_gives_blocks_and_the_classes_are_fixed():
    coupling = couple(lenet5((1, 28, 28), 10))
    assert coupling.channels == (6, 16, 120, 84, 10)
    assert coupling.prunable == (True, True, True, True, False)
    assert segments(coupling, "0.weight", 1) == ()  # the image
    assert segments(coupling, "3.weight", 1) == (Segment(0, 1, 0),)
    assert segments(coupling, "3.bias", 0) == (Segment(1, 1, 0),)
    assert segments(coupling, "7.weight", 1) == (Segment(1, 25, 0),)
    assert segments(coupling, "11.weight", 0) == (Segment(4, 1, 0),)
    assert coupling.numel == sum(t.numel() for t in lenet5((1, 28, 28), 10).state_dict().values())
    assert couple(lenet5((1, 28, 28), 10)) == coupling


def test_vgg_and_its_25088():
    with torch.device("meta"):
        coupling = couple(torchvision.models.vgg11(num_classes=10, init_weights=False))
    assert segments(coupling, "classifier.0.weight", 1) == (Segment(7, 49, 0),)
    assert coupling.channels == (64, 128, 256, 256, 512, 512, 512, 512, 4096, 4096, 10)


def test_residual_stages_are_one_unit():
    with torch.device("meta"):
        coupling = couple(torchvision.models.resnet18(num_classes=10))
    for stage, first in (("layer1", "conv1.weight"), ("layer2", "layer2.0.downsample.0.weight")):
        tied = {unit(coupling, name) for name in (first, f"{stage}.0.conv2.weight", f"{stage}.1.conv2.weight")}
        assert len(tied) == 1
        alone = {unit(coupling, f"{stage}.{i}.conv1.weight") for i in (0, 1)}
        assert len(alone | tied) == 3
    assert segments(coupling, "layer2.1.bn2.running_var", 0) == segments(coupling, "layer2.0.conv2.weight", 0)
    fc = unit(coupling, "fc.weight")
    assert [u for u, ok in enumerate(coupling.prunable) if not ok] == [fc]


def test_residual_spec_shares_bits():
    with torch.device("meta"):
        coupling = couple(torchvision.models.resnet18(num_classes=10))
    spec = coupling.spec()
    assert (len(spec.names), len(spec.sizes)) == (20, 12)
    assert spec.numel == sum(c for c, ok in zip(coupling.channels, coupling.prunable, strict=True) if ok)
    parts = spec.split(torch.arange(float(spec.numel)))
    a, b = parts["layer1.0.conv2.weight"], parts["conv1.weight"]
    assert a.shape == (64, 1, 1, 1)
    assert a.data_ptr() == b.data_ptr()
    assert parts["layer1.0.conv1.weight"][0] != b[0]


def test_depthwise_follows_its_input():
    with torch.device("meta"):
        coupling = couple(torchvision.models.mobilenet_v2(num_classes=10))
    depth = unit(coupling, "features.2.conv.1.0.weight")
    assert depth == unit(coupling, "features.2.conv.0.0.weight") is not None
    assert segments(coupling, "features.2.conv.1.0.weight", 1) == ()
    assert segments(coupling, "features.2.conv.2.weight", 1) == (Segment(depth, 1, 0),)
    assert coupling.prunable == (True,) * 25 + (False,)


def test_concatenations_are_offset():
    coupling = couple(Dense())
    assert coupling.channels == (5, 4, 3, 10)
    both = (Segment(0, 1, 0), Segment(1, 1, 5))
    assert segments(coupling, "bn2.weight", 0) == segments(coupling, "depth.weight", 0) == both
    assert segments(coupling, "head.weight", 1) == (Segment(0, 16, 0), Segment(1, 16, 80), Segment(2, 16, 144))
    assert coupling.spec().names == ("stem.weight", "grow.weight", "grow2.weight")
    # The depthwise layer has the rows of both, so without it neither can go.
    assert coupling.spec(exclude=("depth.*",)).names == ("grow2.weight",)


def conv(a: int = 4, b: int = 4, **options) -> nn.Module:
    return nn.Conv2d(a, b, 1, **options)


IMAGES = {
    "plain": (lambda m, x: m.c(F.relu(m.b(m.a(x)))), {"a.weight", "b.weight"}),
    "parameter read": (lambda m, x: m.c(m.b(m.a(x))) + m.b.weight.sum(), set()),
    "called twice": (lambda m, x: m.c(m.b(m.b(m.a(x)))), set()),
    "chunk": (lambda m, x: m.c(torch.cat(m.b(m.a(x)).chunk(2, 1)[::-1], 1)), {"a.weight"}),
    "roll": (lambda m, x: m.c(m.b(m.a(x)).roll(1, 1)), {"a.weight"}),
    "mean over channels": (lambda m, x: m.c(m.b(m.a(x)) - m.a(x).mean(1, keepdim=True)), set()),
    "nonzero": (lambda m, x: m.c(torch.sigmoid(m.b(m.a(x)))), {"a.weight"}),
    "gate": (lambda m, x: m.c(m.a(x) * torch.sigmoid(m.b(m.a2(x)))), {"a.weight", "a2.weight", "b.weight"}),
    "constant added": (lambda m, x: m.c(m.b(m.a(x)) + 1), {"a.weight"}),
    "number of channels": (lambda m, x: m.c(m.b(m.a(x))) / m.a2(x).size(1), {"a.weight", "b.weight"}),
    "height": (lambda m, x: m.c(m.b(m.a(x))) / m.a2(x).shape[2], {"a.weight", "a2.weight", "b.weight"}),
    "an output": (lambda m, x: (m.c(m.b(y := m.a(x))), y), {"b.weight"}),
    "sum with the input": (lambda m, x: m.c(m.b(m.a(x)) + m.a2(x)[:, :1]), {"a.weight"}),
    "linear over width": (lambda m, x: m.c(m.line(m.b(m.a(x)))), {"a.weight"}),
    "batch mixed": (lambda m, x: m.line(m.b(m.a(x)).view(-1, 4)), {"a.weight"}),
    "pooling of channels": (lambda m, x: F.max_pool1d(m.b(m.a(x)).mean((2, 3)), 2), {"a.weight"}),
}


@pytest.mark.parametrize("case", IMAGES)
def test_what_is_not_understood_is_fixed(case):
    forward, expected = IMAGES[case]
    model = Forward(forward, a=conv(3), a2=conv(3), b=conv(), c=conv(), line=nn.Linear(4, 4))
    found = prunable(couple(model)) - {"c.weight"}
    if "a2" not in forward.__code__.co_names:
        found -= {"a2.weight"}
    assert found - {"line.weight"} == expected


def test_tied_and_reparametrised_weights_are_fixed():
    tied = nn.Sequential(conv(), conv(), conv(), conv())
    tied[2].weight = tied[1].weight
    assert prunable(couple(tied)) == set()  # 0 enters a tied one, 3 is the output
    assert prunable(couple(nn.Sequential(conv(), conv(), conv(), conv()))) == {f"{i}.weight" for i in range(3)}
    normed = nn.Sequential(conv(), nn.utils.parametrizations.weight_norm(conv()), conv(), conv())
    assert prunable(couple(normed)) == {"2.weight"}


def test_groups_and_group_norms_are_fixed():
    grouped = nn.Sequential(conv(), conv(), conv(groups=2), conv(), conv(4, 8, groups=4), conv(8, 4), conv())
    assert prunable(couple(grouped)) == {"0.weight", "5.weight"}
    assert prunable(couple(nn.Sequential(conv(), nn.GroupNorm(2, 4), conv(), conv()))) == {"2.weight"}


def test_batchnorm_over_time_is_not_mistaken():
    widths = (5, 4, 4, 3)
    layers = [layer for a, b in pairwise(widths) for layer in (nn.Linear(a, b), nn.BatchNorm1d(b))]
    model = nn.Sequential(*layers)
    assert prunable(couple(model)) == set()
    assert prunable(couple(model, (5,))) == {"0.weight", "2.weight"}
    assert prunable(couple(model, (4, 5))) == set()
    assert prunable(couple(nn.Sequential(nn.Linear(5, 4), nn.GELU(), nn.Linear(4, 3)))) == {"0.weight"}


@settings(max_examples=60)
@given(st.integers(0, 10**6))
def test_random_networks(seed):
    model = randomise(Wild(seed), seed)
    coupling = couple(model)
    assert coupling.prunable[unit(coupling, "layers.hidden.weight")]
    spec = coupling.spec()
    _, masked, slim = outputs(model, coupling, spec, some(spec, seed, 0.5), (3, 6, 6))
    assert close(slim, masked), model.steps


def test_patterns_take_whole_units():
    coupling = couple(Forward(lambda m, x: m.c(m.a(x) + m.b(x)), a=conv(3), b=conv(3), c=conv()))
    assert coupling.spec() == MaskSpec(("a.weight", "b.weight"), ((4, 3, 1, 1),) * 2, "filter", (0, 0))
    for patterns in ({"exclude": ("b.*",)}, {"include": ("a.*",)}):
        with pytest.raises(ValueError, match=r"a member of every unit out.*candidates: a\.weight, b\.weight"):
            coupling.spec(**patterns)
    with pytest.raises(ValueError, match="'d' matches no parameter"):
        coupling.spec(include=("d",))
    assert couple(mlp((4,), 2, (3, 3))).spec(exclude=("1.*",)).names == ("3.weight",)


def test_coupling_leaves_the_model_alone():
    model = lenet5((1, 28, 28), 10)
    model[3].eval()
    before = [m.training for m in model.modules()]
    couple(model)
    assert [m.training for m in model.modules()] == before
    assert couple(torch.compile(model)) == couple(model)


def test_untraceable_networks():
    model = Forward(lambda m, x: m.a(x) if x.sum() > 0 else x, a=conv(3))
    with pytest.raises(ValueError, match=r"cannot trace Forward: .*torch\.fx\.wrap"):
        couple(model)


def test_units_of_a_spec():
    shapes = ((4, 2), (3, 4), (4, 3))
    spec = MaskSpec(("a", "b", "c"), shapes, "filter", (1, 0, 1))
    assert (spec.sizes, spec.numel, spec.weights) == ((3, 4), 7, 32)
    parts = spec.split(torch.arange(7.0))
    assert {name: part.flatten().tolist() for name, part in parts.items()} == {
        "a": [3, 4, 5, 6],
        "b": [0, 1, 2],
        "c": [3, 4, 5, 6],
    }
    others = [MaskSpec(("a", "b", "c"), shapes, "filter", units) for units in ((), (0, 1, 0), (0, 1, 2))]
    assert len({s.digest for s in (spec, *others)}) == 4
    # As before there were units.
    assert MaskSpec(("a", "b"), ((2, 3), (4, 5)), "filter").digest.hex() == "76c6ddc495544833"


@pytest.mark.parametrize(
    ("granularity", "units", "match"),
    [
        ("weight", (0, 0), "granularity 'filter'"),
        ("filter", (0,), "one unit for each name"),
        ("filter", (0, 2), "without gaps"),
        ("filter", (-1, 0), "without gaps"),
        ("filter", (1, 1), "without gaps"),
        ("filter", (0, 0), "differ in rows"),
    ],
)
def test_nonsense_units(granularity, units, match):
    with pytest.raises(ValueError, match=match):
        MaskSpec(("a", "b"), ((2, 3), (4, 5)), granularity, units)
