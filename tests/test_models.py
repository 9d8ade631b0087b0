from __future__ import annotations

import sys

import pytest
import torch

from fedmask_flwr.masks import Backbone, MaskSpec
from fedmask_flwr.models import MODELS, backbone, spelled


@pytest.mark.parametrize(
    ("name", "in_shape", "classes", "weights"),
    [
        ("conv4", (1, 28, 28), 10, 1_932_352),
        ("conv6", (3, 32, 32), 10, 2_261_184),
        ("mlp", (1, 28, 28), 10, 784 * 300 + 300 * 100 + 100 * 10),
        ("lenet5", (1, 28, 28), 10, 150 + 2400 + 400 * 120 + 120 * 84 + 84 * 10),
        ("lenet5", (3, 32, 32), 7, 450 + 2400 + 400 * 120 + 120 * 84 + 84 * 7),
        ("leaf", (3, 32, 32), 10, 2400 + 51_200 + 4096 * 128 + 1280),
        ("leaf", (1, 30, 5), 2, 800 + 51_200 + 64 * 7 * 128 + 256),
        ("har", (6, 128), 6, 960 + 10_240 + 20_480 + 512 * 128 + 128 * 6),
        ("har", (1, 4), 3, 160 + 10_240 + 20_480 + 512 * 128 + 128 * 3),
        ("har", (9, 77), 12, 1440 + 10_240 + 20_480 + 512 * 128 + 128 * 12),
        ("lenet5", (1, 40, 28), 2, 150 + 2400 + 16 * 8 * 5 * 120 + 120 * 84 + 84 * 2),
    ],
)
def test_masked_weights_and_output(name, in_shape, classes, weights):
    model = backbone(name, "seed:1", in_shape, classes).build()
    assert MaskSpec.of(model).numel == weights
    assert model(torch.zeros(2, *in_shape)).shape == (2, classes)
    assert all(p.ndim >= 2 or not p.any() for p in model.parameters())


def test_every_short_name_builds():
    for name, path in MODELS.items():
        shape = (6, 32) if name == "har" else (1, 16, 16)
        b = backbone(name, "seed:1", shape, 5)
        assert b.arch == path
        outputs = 256 if name == "made" else 5  # a density has a logit for each input
        assert b.build()(torch.zeros(1, *shape)).shape == (1, outputs)


def test_resolution():
    assert backbone("mlp", "seed:1", [4], 2, hidden=(3,)) == Backbone(
        "fedmask_flwr.models:mlp", "seed:1", (("in_shape", (4,)), ("num_classes", 2), ("hidden", (3,)))
    )
    assert backbone("torchvision:resnet18", "seed:1", (3, 32, 32), 7) == Backbone(
        "torchvision:resnet18", "seed:1", (("num_classes", 7),)
    )
    assert backbone("my.nets:build", "seed:1", (4,), 2).arch == "my.nets:build"
    hash(backbone("mlp", "seed:1", [4], 2))


def test_without_torchvision_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision.models", None)
    with pytest.raises(ValueError, match=r"needs torchvision: pip install 'fedmask-flwr\[vision\]'"):
        backbone("torchvision:resnet18", "seed:1", (3, 32, 32), 7).build()


def test_clear_refusals():
    with pytest.raises(ValueError, match="conv4, conv6, har, leaf, lenet5, made, mlp"):
        backbone("conv5", "seed:1", (1, 28, 28), 10)
    with pytest.raises(ValueError, match=r"shape \(3, height, width\)"):
        backbone("torchvision:resnet18", "seed:1", (1, 28, 28), 10)
    for name in ("conv4", "conv6", "leaf", "lenet5"):
        for shape in ((64,), (1, 3, 64)):
            with pytest.raises(ValueError, match="channels, height, width"):
                backbone(name, "seed:1", shape, 10).build()
    for shape in ((64,), (1, 28, 28), (0, 128), (6, 3)):
        with pytest.raises(ValueError, match=r"\(channels, time\) with at least 4 steps"):
            backbone("har", "seed:1", shape, 10).build()
    with pytest.raises(ValueError, match="sides of at least 4"):
        backbone("leaf", "seed:1", (3, 3, 32), 10).build()


@pytest.mark.parametrize(
    ("text", "name", "options"),
    [
        ("mlp", "mlp", {}),
        ("  mlp  ", "mlp", {}),
        ("mlp()", "mlp", {}),
        ("mlp(hidden=300,100)", "mlp", {"hidden": (300, 100)}),
        ("mlp(hidden=300,)", "mlp", {"hidden": (300,)}),
        ("made(hidden=110 masks=8 connect=cycle)", "made", {"hidden": 110, "masks": 8, "connect": "cycle"}),
        ("made( direct=false   order='random' )", "made", {"direct": False, "order": "random"}),
        ("pkg.nets:build(p=0.5 at=1979-05-27)", "pkg.nets:build", {"p": 0.5, "at": "1979-05-27"}),
        ("torchvision:resnet18(x=[1])", "torchvision:resnet18", {"x": "[1]"}),
    ],
)
def test_arguments_follow_a_name_in_parentheses(text, name, options):
    found = spelled(text)
    assert found == (name, options)
    assert [type(v) for v in found[1].values()] == [type(v) for v in options.values()], "8 is no 8.0, false no 0"


@pytest.mark.parametrize(
    "text",
    ["", "mlp(", "mlp)", "mlp(hidden=3", "mlp(hidden=(3,2))", "mlp (hidden=3)", "mlp(hidden=3) x", "(hidden=3)"],
)
def test_what_is_no_model_is_refused(text):
    with pytest.raises(ValueError, match=r"write NAME, or NAME\(KEY=VALUE KEY=VALUE\)"):
        spelled(text)


@pytest.mark.parametrize(
    ("inner", "word"),
    [
        ("hidden", "hidden"),
        ("=3", "=3"),
        ("hidden=", "hidden="),
        ("a-b=3", "a-b=3"),
        ("a=1 a=2", "a=2"),
        ("a=1,b=2 c", "c"),
        ("hidden=3, 2", "2"),
    ],
)
def test_a_word_that_is_no_argument_is_named(inner, word):
    with pytest.raises(
        ValueError, match=f"cannot read '{word}' in model .*write each KEY=VALUE once, with no spaces"
    ):
        spelled(f"mlp({inner})")


def test_written_arguments_reach_the_builder_and_the_caller_s_win():
    wide = backbone("mlp(hidden=5,4)", "seed:1", (8,), 3)
    assert wide == backbone("mlp", "seed:1", (8,), 3, hidden=(5, 4))
    assert [m.out_features for m in wide.build() if isinstance(m, torch.nn.Linear)] == [5, 4, 3]
    assert backbone("mlp(hidden=5,4)", "seed:1", (8,), 3, hidden=(2,)) == backbone(
        "mlp", "seed:1", (8,), 3, hidden=(2,)
    )
    made = backbone("made(hidden=6 masks=3 connect=cycle)", "seed:1", (8,), 3).build()
    assert made.masks_count == 3 and made.layers[0].weight.shape == (6, 8)
    seeds = {backbone("made(hidden=6 seed=1)", "seed:1", (8,), 1, seed=seed).build().mask_id for seed in (1, 2)}
    assert seeds == {backbone(f"made(hidden=6 seed={seed})", "seed:1", (8,), 1).build().mask_id for seed in (1, 2)}
    assert len(seeds) == 2
    named = dict(backbone("torchvision:resnet18(zero_init_residual=true)", "seed:1", (3, 32, 32), 7).options)
    assert named == {"num_classes": 7, "zero_init_residual": True}
    with pytest.raises(ValueError, match="options"):
        backbone("mlp(depth=3)", "seed:1", (8,), 3).build()
