"""A network as files: smaller ones compute the same, and every file computes what the network does."""

from __future__ import annotations

import copy
import importlib
import math

import numpy as np
import pytest
import tiny
import torch
from masks.prunable import randomise, some
from safetensors.torch import load_file
from torch import nn

from fedmask_flwr import models
from fedmask_flwr.artifacts import ExportError, cut_silent, save_network
from fedmask_flwr.masks import Backbone, couple, mask_filters, slim_, slim_numel


def test_a_slim_network_that_computes_something_else_is_not_written(tmp_path):
    full = randomise(tiny.net())
    other = randomise(tiny.net(), 1)
    with pytest.raises(ExportError, match="the slim network differs from the masked one"):
        save_network(other, (8,), tmp_path / "net", full=full)
    assert not (tmp_path / "net").exists()
    with torch.no_grad():
        other[1].weight[0, 0] = math.nan
    with pytest.raises(ExportError, match="differs"):
        save_network(other, (8,), tmp_path / "net", full=other)


class Residual(nn.Module):
    """Two layers whose outputs are added, BatchNorm, and a head that reads the sum."""

    def __init__(self, statistics=True):
        super().__init__()
        self.a, self.b = nn.Conv2d(1, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6, track_running_stats=statistics)
        self.c = nn.Conv2d(6, 5, 3, padding=1)
        self.head = nn.Linear(5 * 16, 3)

    def forward(self, x):
        x = torch.relu(self.norm(self.a(x)))
        x = torch.relu(self.c(x + self.b(x)))
        return self.head(x.flatten(1))


def silence(model, channels, but=""):
    """Set everything but scales of the sum's channels to 0, except in the tensor `but`."""
    with torch.no_grad():
        for name, t in model.state_dict().items():
            own = name.startswith(("a.", "b.", "norm.")) and t.ndim
            if own and name not in ("norm.weight", "norm.running_var", but):
                t[channels] = 0


@pytest.mark.parametrize("statistics", [True, False])
def test_silent_channels_are_cut(statistics):
    model = randomise(Residual(statistics))
    silence(model, [1, 4])
    with torch.no_grad():
        model.c.weight[:3] = 0  # its channels 0..2 hear only the silent ones, and 2 has a bias
        model.c.weight[:3, [1, 4]] = 1
        model.c.bias[:2] = 0
    slim, gone = cut_silent(model, (1, 4, 4))
    assert gone == 4
    assert (slim.a.out_channels, slim.c.out_channels, slim.head.in_features) == (4, 3, 48)
    x = torch.randn(3, 1, 4, 4, generator=torch.Generator().manual_seed(1))
    assert torch.allclose(slim(x), model(x), atol=1e-5)
    assert model.a.out_channels == 6


@pytest.mark.parametrize("but", ["", "a.weight", "a.bias", "b.weight", "b.bias", "norm.bias", "norm.running_mean"])
def test_a_channel_that_can_be_heard_stays(but):
    model = randomise(Residual())
    silence(model, [2], but)
    assert cut_silent(model, (1, 4, 4))[1] == (not but)


def test_one_channel_of_each_unit_stays():
    model = randomise(tiny.net())
    with torch.no_grad():
        model[1].weight.zero_()
        model[1].bias.zero_()
    slim, gone = cut_silent(model, (8,))
    assert gone == 31
    assert slim[1].out_features == 1


# Real networks: slim, programs and ONNX

NETWORKS = [
    ("lenet5", (1, 28, 28)),
    pytest.param("conv4", (3, 16, 16), marks=pytest.mark.slow),
    pytest.param("har", (6, 40), marks=pytest.mark.slow),
    pytest.param("torchvision:resnet18", (3, 48, 48), marks=pytest.mark.slow),
    pytest.param("torchvision:vgg11", (3, 32, 32), marks=pytest.mark.slow),
    pytest.param("torchvision:mobilenet_v2", (3, 48, 48), marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("name", "shape"), NETWORKS)
def test_onnx_of_slim_networks(name, shape, tmp_path):
    onnxruntime = importlib.import_module("onnxruntime")
    if name.startswith("torchvision:"):
        make = importlib.import_module("torchvision.models").get_model
        model = make(name.partition(":")[2], weights=None, num_classes=7)
    else:
        model = models.backbone(name, "seed:7", shape, 7).build()
    randomise(model)
    coupling = couple(model, shape)
    spec = coupling.spec()
    keep = some(spec, 1, 0.4)
    slim = slim_(copy.deepcopy(model), coupling, spec, keep)
    mask_filters(model, coupling, spec, keep)
    report = save_network(slim, shape, tmp_path / "net", full=model, onnx=True)
    assert report["batch"] == "any"
    assert report["networks"]["slim"]["macs"] < 0.8 * report["networks"]["full"]["macs"]
    state = load_file(tmp_path / "net/model.safetensors")
    assert sum(t.numel() for t in state.values() if t.is_floating_point()) == slim_numel(coupling, spec, keep)
    session = onnxruntime.InferenceSession(tmp_path / "net/model.onnx", providers=["CPUExecutionProvider"])
    for n in (1, 4):
        x = torch.randn(n, *shape, generator=torch.Generator().manual_seed(n))
        with torch.no_grad():
            wanted = slim.eval()(x)
        (got,) = session.run(None, {"input": x.numpy()})
        assert np.abs(got - wanted.numpy()).max() <= 1e-4 * max(1.0, float(wanted.abs().max()))


def test_no_path_of_this_machine_is_in_the_files(tmp_path):
    save_network(Residual().eval(), (1, 4, 4), tmp_path / "net", onnx=True)
    for path in (tmp_path / "net").iterdir():
        for inner in (str(tiny.ROOT), torch.__path__[0], "site-packages", "test_artifacts.py"):
            assert inner.encode() not in path.read_bytes(), path.name


def test_batch_statistics_are_said(tmp_path):
    model = Backbone("tiny:norm_net", "seed:7").build()
    report = save_network(model, (8,), tmp_path / "net", onnx=True, about={"mask_bytes": 1})
    assert report["batch_statistics"]
    assert report["latency_batch"] == 2
    x = torch.randn(5, 8, generator=torch.Generator().manual_seed(3))
    program = torch.export.load(tmp_path / "net/model.pt2").module()
    assert torch.allclose(program(x), model(x), atol=1e-5)


class OneByOne(nn.Module):
    """Cannot be traced for any batch size."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 3)

    def forward(self, x):
        return torch.stack([self.layer(row) for row in x.unbind(0)])


class Two(nn.Module):
    def forward(self, x):
        return x, x


def test_a_network_for_one_batch_size(tmp_path):
    report = save_network(OneByOne(), (8,), tmp_path / "net", onnx=True)
    assert report["batch"] == 1
    program = torch.export.load(tmp_path / "net/model.pt2").module()
    assert program(torch.zeros(1, 8)).shape == (1, 3)


def test_one_tensor_comes_out(tmp_path):
    with pytest.raises(ExportError, match="Two returns tuple: one tensor is needed"):
        save_network(Two(), (8,), tmp_path / "net")
