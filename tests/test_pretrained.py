"""benchmarks/pretrained: the tails are the ends of the whole networks, the cut has no row twice."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def prepare():
    sys.path.insert(0, str(ROOT))
    try:
        from benchmarks.pretrained import prepare

        yield prepare
    finally:
        sys.path.remove(str(ROOT))


def pretend(prepare, kind):
    """The network with weights and statistics that nobody trained."""
    chance = torch.Generator().manual_seed(3)
    net = prepare.BUILDERS[kind]((3, 32, 32), prepare.CLASSES).eval()
    for name, t in net.state_dict().items():
        if t.ndim > 1:  # by what comes in, or nothing gets through torchvision's depthwise convolutions
            t.normal_(0.0, (2 / t[0].numel()) ** 0.5, generator=chance)
        elif name.endswith(("running_mean", "bias")):
            t.uniform_(-0.1, 0.1, generator=chance)
        elif name.endswith("running_var"):
            t.uniform_(0.5, 1.5, generator=chance)
    return net


@pytest.mark.parametrize("kind", ["mobilenetv2", "resnet20"])
def test_a_tail_of_the_activations_is_the_whole_network(prepare, kind):
    net = pretend(prepare, kind)
    grey = np.random.default_rng(0).integers(0, 256, (4, 28, 28), np.uint8)
    images = np.repeat(np.pad(grey, ((0, 0), (2, 2), (2, 2)))[..., None], 3, 3) if kind == "mobilenetv2" else grey
    x = prepare.activations(kind, net, images)
    end = prepare.tail(kind, net, x.shape[1:])
    head = prepare.HEADS[kind]
    assert not end.get_parameter(f"{head}.weight").any()
    own = {name: t for name, t in net.state_dict().items() if name.startswith(head)}
    end.load_state_dict({**end.state_dict(), **own})
    assert set(end.state_dict()) < set(net.state_dict())
    with torch.no_grad():
        want = net(prepare.pixels(kind, images))
        assert torch.equal(end(torch.from_numpy(x)), want)
        assert (want[0] - want[1]).abs().max() > 1e-3  # an image matters
        assert torch.equal(end.train()(torch.from_numpy(x)), want) or kind == "mobilenetv2"  # which has dropout


def test_norms_keep_their_statistics_in_training(prepare):
    end = prepare.tail("resnet20", pretend(prepare, "resnet20"), (32, 16, 16)).train()
    before = {name: t.clone() for name, t in end.state_dict().items() if "running" in name}
    end(torch.randn(5, 32, 16, 16)).sum().backward()
    assert before and all(torch.equal(end.state_dict()[name], t) for name, t in before.items())


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 40), st.integers(0, 5))
def test_no_image_is_in_two_parts(prepare, train, held, test, seed):
    sizes = {"train": train, "held": held, "test": test}
    rows = prepare.cut(train + held, 40, sizes, seed)
    assert {part: len(set(r.tolist())) for part, r in rows.items()} == sizes
    assert not set(rows["train"]) & set(rows["held"])
    assert all(
        np.array_equal(rows[part], again) for part, again in prepare.cut(train + held, 40, sizes, seed).items()
    )
    with pytest.raises(SystemExit, match="ask for fewer"):
        prepare.cut(train + held - 1, 40, sizes, seed)


def test_grey_images_are_centred_in_a_black_margin(prepare):
    x = prepare.pixels("resnet20", np.full((1, 28, 28), 255, np.uint8))
    black = (0.0 - np.float32(prepare.MEAN)) / np.float32(prepare.STD)
    assert x.shape == (1, 3, 32, 32)
    np.testing.assert_allclose(x[0, :, 1, 30], black, rtol=1e-6)
    np.testing.assert_allclose(x[0, :, 2, 29], black + 1 / np.float32(prepare.STD), rtol=1e-6)


def test_a_vector_is_refused(prepare):
    with pytest.raises(ValueError, match=r"run prepare\.py"):
        prepare.BUILDERS["resnet20"]((64,), 10)
