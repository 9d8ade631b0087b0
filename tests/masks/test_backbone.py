from __future__ import annotations

import copy
import hashlib
import math
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from fedmask_flwr.masks import (
    Backbone,
    MaskAdam,
    MaskSpec,
    derive,
    freeze,
    initialise,
    model_digest,
    weights_digest,
    words,
)

HERE = __name__  # the builder below, under whatever name pytest imported it


class Small(nn.Module):
    def __init__(self, width: int = 4, noise: bool = True) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, width)
        self.conv = nn.Conv2d(2, width, 3)
        self.bn = nn.BatchNorm2d(width)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 3)
        self.register_buffer("noise", torch.randn(5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.bn(self.conv(x)).mean((2, 3))))


def small(source: str, **options) -> Backbone:
    return Backbone(f"{HERE}:Small", source, tuple(options.items()))


GOLDEN = "372a894261d3e3a5d09a78b8285dcc3c1d38a03cf93fbbdf547063acffbaa67a"


def test_seed_gives_signed_constants():
    model = small("seed:5").build()
    for name, fan_in in (("conv", 18), ("head", 4), ("embed", 1)):
        w = getattr(model, name).weight.detach()
        c = np.float32(math.e / math.sqrt(fan_in))
        signs = words(derive(5, "backbone", f"{name}.weight"), w.numel()) < 0
        assert np.array_equal(w.flatten().numpy(), np.where(signs, -c, c))
    for p in (model.conv.bias, model.head.bias, model.bn.bias, model.norm.bias):
        assert not p.any()
    assert torch.equal(model.bn.weight, torch.ones(4))
    assert torch.equal(model.norm.weight, torch.ones(4))
    keep = small("seed:5:kaiming_keep").build()
    assert torch.allclose(keep.head.weight * math.e / 2, model.head.weight)
    assert torch.equal(small("seed:5:signed_e").build().head.weight, model.head.weight)
    assert not torch.equal(small("seed:6").build().conv.weight, model.conv.weight)


def test_glorot_is_uniform_keyed_and_bounded_by_both_fans():
    model = small("seed:5:glorot", width=40).build()
    for name, fan_in, fan_out in (("conv", 18, 40 * 9), ("head", 40, 3), ("embed", 1, 7)):
        w = getattr(model, name).weight.detach()
        bound = math.sqrt(6 / (fan_in + fan_out))
        uniform = words(derive(5, "backbone", f"{name}.weight"), w.numel()) / 2.0**31
        assert np.allclose(w.flatten().numpy(), uniform * bound, rtol=1e-6)
        assert w.abs().max() <= bound
        assert w.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.15)
        assert len(w.unique()) > 0.9 * w.numel()
    for p in (model.conv.bias, model.head.bias, model.bn.bias, model.norm.bias):
        assert not p.any()
    assert torch.equal(model.bn.weight, torch.ones(40))
    again, other = small("seed:5:glorot", width=40).build(), small("seed:6:glorot", width=40).build()
    assert torch.equal(again.conv.weight, model.conv.weight)
    assert not torch.equal(other.conv.weight, model.conv.weight)
    with pytest.raises(ValueError, match=r"unknown scale in source 'seed:5:xavier'.*seed:<int>:glorot"):
        initialise(Small(), "seed:5:xavier")


def test_golden_weights():
    assert weights_digest(Backbone("fedmask_flwr.models:mlp", "seed:7", MLP).build()).hex() == GOLDEN


MLP = (("in_shape", (4,)), ("num_classes", 3), ("hidden", (5,)))


def test_other_process_other_global_seed():
    here = weights_digest(small("seed:7").build()).hex()
    code = (
        "import torch; torch.manual_seed(99); torch.rand(3)\n"
        "from fedmask_flwr.masks import Backbone, weights_digest\n"
        "import test_backbone\nprint(weights_digest(Backbone('test_backbone:Small', 'seed:7').build()).hex())"
    )
    paths = ":".join(p for p in [str(__import__("pathlib").Path(__file__).parent), *sys.path] if p)
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={"PYTHONPATH": paths}
    )
    assert out.stdout.strip() == here


def test_global_generator_is_untouched():
    torch.manual_seed(3)
    before = torch.get_rng_state().clone()
    small("seed:1").build()
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(
    "source",
    ["", "seed", "seed:", "seed:x", "seed:1.5", "seed:1:uniform", "file:a.pt", "file:#sha256=" + "0" * 64,
     "file:a.pt#sha256=abc", "torchvision:DEFAULT", "http://x"],
)  # fmt: skip
def test_malformed_sources_name_the_grammar(source):
    with pytest.raises(ValueError, match=r"seed:<int>.*file:<path>#sha256"):
        small(source)


@pytest.mark.parametrize("arch", ["", "resnet18", "pkg.mod:", ":f", "a b:c", "torchvision:"])
def test_malformed_archs(arch):
    with pytest.raises(ValueError, match=r"pkg\.mod:builder"):
        Backbone(arch, "seed:1")


@pytest.mark.parametrize(
    ("backbone", "message"),
    [
        (Backbone("no_such_pkg:f", "seed:1"), "cannot import"),
        (Backbone("math:no_such", "seed:1"), "cannot import"),
        (Backbone("math:pi", "seed:1"), "not callable"),
        (Backbone("builtins:dict", "seed:1"), "not an nn.Module"),
        (small("seed:1", height=3), "options"),
        (Backbone("torchvision:resnet19", "seed:1"), "list_models"),
    ],
)
def test_builders_that_fail_say_why(backbone, message):
    with pytest.raises(ValueError, match=message):
        backbone.build()


def saved(tmp_path, name: str, state: object) -> str:
    path = tmp_path / name
    if name.endswith(".safetensors"):
        save_file(state, path)
    else:
        torch.save(state, path)
    return f"file:{path}#sha256={hashlib.sha256(path.read_bytes()).hexdigest()}"


def test_checkpoints_load(tmp_path):
    model = Small()
    state = model.state_dict()
    want = weights_digest(model)
    for name, content in (
        ("w.safetensors", state),
        ("w.pt", state),
        ("w.pth", {"state_dict": {f"module.{k}": t for k, t in state.items()}, "epoch": 3}),
        ("w.th", {f"module.{k}": t for k, t in state.items()}),
    ):
        assert weights_digest(small(saved(tmp_path, name, content)).build()) == want


def test_checkpoints_that_do_not_match(tmp_path):
    source = saved(tmp_path, "w.pt", Small().state_dict())
    path = source.removeprefix("file:").split("#")[0]
    with pytest.raises(ValueError, match="another file or damaged"):
        small(f"file:{path}#sha256={'0' * 64}").build()
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        small(f"file:{tmp_path / 'none.pt'}#sha256={'0' * 64}").build()
    with pytest.raises(ValueError, match="does not fit"):
        small(source, width=5).build()
    with pytest.raises(ValueError, match="no state dict"):
        small(saved(tmp_path, "x.pt", [1, 2])).build()
    with pytest.raises(ValueError, match="must end in"):
        small(saved(tmp_path, "x.bin", Small().state_dict())).build()


def test_a_pickle_with_code_is_not_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return (pytest.fail, ("code from a checkpoint was run",))

    with pytest.raises(pickle.UnpicklingError):
        small(saved(tmp_path, "evil.pt", {"w": Evil()})).build()


def test_digests():
    a, b = Small(), Small()
    b.load_state_dict(a.state_dict())
    assert weights_digest(a) == weights_digest(b)
    spec, rows = MaskSpec.of(a), MaskSpec.of(a, granularity="filter")
    assert len(weights_digest(a)) == 32
    assert len(model_digest(spec, a)) == 8
    assert model_digest(spec, a) == model_digest(spec, b) != model_digest(rows, a)
    with torch.no_grad():
        b.bn.running_mean[0] = 1
    assert weights_digest(a) != weights_digest(b)
    assert model_digest(spec, a) != model_digest(spec, b)
    assert weights_digest(a.half()) != weights_digest(Small().half())
    assert weights_digest(a.bfloat16())
    assert weights_digest(torch.compile(a)) == weights_digest(a)


def test_seeded_batchnorm_uses_and_keeps_no_statistics():
    model = small("seed:1").build()
    assert not any(name.startswith("bn.") and "running" in name for name in model.state_dict())
    freeze(model)
    x = torch.randn(6, 2, 5, 5, generator=torch.Generator().manual_seed(0)) * 3 + 2
    assert torch.equal(model.train()(x), model.eval()(x))
    assert torch.allclose(model.bn(model.conv(x)).mean((0, 2, 3)), torch.zeros(4), atol=1e-5)


def test_pretrained_batchnorm_stays_in_eval(tmp_path):
    trained = Small()
    trained.bn.running_mean.uniform_(-1, 1, generator=torch.Generator().manual_seed(0))
    model = small(saved(tmp_path, "w.pt", trained.state_dict())).build()
    before = {k: t.clone() for k, t in model.state_dict().items() if "bn" in k}
    optimiser = MaskAdam(model)
    x = torch.randn(6, 2, 5, 5, generator=torch.Generator().manual_seed(0))
    for m in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        m.train()
        assert m.training
        assert not m.bn.training
        m(x).square().sum().backward()
        assert torch.equal(m(x), m.eval()(x))
        assert all(torch.equal(m.state_dict()[k], t) for k, t in before.items())
    optimiser.step()
    copied = copy.deepcopy(model).train()
    assert copied.bn.train().training is False
    assert copied.bn.train() is copied.bn


def test_freeze_freezes_all_but_the_mask():
    model = Small()
    model(torch.ones(2, 2, 5, 5)).sum().backward()
    freeze(model, MaskSpec.of(model, include=("conv.*",)))
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trainable == {"conv.weight"}
    assert model.head.bias.grad is None
    freeze(model)
    assert not any(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2"])
def test_torchvision_from_a_seed_trains_a_step(name):
    backbone = Backbone(f"torchvision:{name}", "seed:3", (("num_classes", 4),))
    model = backbone.build()
    spec = MaskSpec.of(model)
    optimiser = MaskAdam(model, spec)
    before = optimiser.theta()
    x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    loss = nn.functional.cross_entropy(model.train()(x), torch.tensor([0, 3]))
    loss.backward()
    optimiser.step()
    assert torch.isfinite(loss)
    assert (optimiser.theta() != before).float().mean() > 0.5


def test_torchvision_pretrained_with_another_head(monkeypatch):
    def fake(name, weights=None, **options):
        model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, options.get("num_classes", 1000)))
        if weights == "DEFAULT":
            assert "num_classes" not in options
            with torch.no_grad():
                for p in model.parameters():
                    p.fill_(0.25)
        return model

    monkeypatch.setattr("torchvision.models.get_model", fake)
    whole = Backbone("torchvision:resnet18", "torchvision:DEFAULT").build()
    assert whole[1].weight.shape == (1000, 4)
    for n in (10, 1000):
        model = Backbone("torchvision:resnet18", "torchvision:DEFAULT", (("num_classes", n),)).build()
        assert torch.equal(model[0].weight, whole[0].weight)
        assert model[1].weight.shape == (n, 4)
        assert (model[1].weight == 0.25).all() == (n == 1000)
        assert (model[1].bias == 0.25).all() == (n == 1000)
