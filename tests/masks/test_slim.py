from __future__ import annotations

import copy
import io

import numpy as np
import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fedmask_flwr.masks import (
    MaskSpec,
    count_macs,
    count_parameters,
    couple,
    filter_scores,
    freeze,
    frozen_weights,
    gather,
    mask_filters,
    scatter,
    slim_,
    slim_numel,
    write_mask,
)
from fedmask_flwr.models import conv4, conv6, lenet5, mlp

from .prunable import Dense, close, entries, outputs, randomise, read, some, write

SMALL = {
    "mlp": (mlp((1, 6, 6), 10, (20, 30)), (1, 6, 6)),
    "lenet5": (lenet5((1, 28, 28), 10), (1, 28, 28)),
    "dense": (Dense(), (3, 8, 8)),
}
LARGE = {
    "conv4": lambda: (conv4((3, 32, 32), 10), 32),
    "conv6": lambda: (conv6((3, 32, 32), 10), 32),
    "resnet18": lambda: (torchvision.models.resnet18(num_classes=10), 32),
    "vgg11": lambda: (torchvision.models.vgg11(num_classes=10, init_weights=False), 32),
    "vgg11_bn": lambda: (torchvision.models.vgg11_bn(num_classes=10, init_weights=False), 32),
    "mobilenet_v2": lambda: (torchvision.models.mobilenet_v2(num_classes=10), 32),
    "mobilenet_v3": lambda: (torchvision.models.mobilenet_v3_small(num_classes=10), 32),
}


def dense(seed: int = 0):
    model = randomise(Dense(), seed)
    coupling = couple(model)
    spec = coupling.spec()
    return model, coupling, spec, some(spec, seed)


@pytest.mark.parametrize("name", SMALL)
@settings(max_examples=10)
@given(seed=st.integers(0, 10**6), share=st.floats(0, 1))
def test_slim_computes_what_masked_does(name, seed, share):
    model, shape = SMALL[name]
    model = randomise(copy.deepcopy(model), seed)
    coupling = couple(model)
    spec = coupling.spec()
    keep = some(spec, seed, share)
    full, masked, slim = outputs(model, coupling, spec, keep, shape)
    assert close(slim, masked)
    if keep.all():
        assert close(full, masked)


def test_pruning_half_changes_what_is_computed():
    """A single pruned unit may have been idle."""
    model, shape = SMALL["mlp"]
    model = randomise(copy.deepcopy(model), 0)
    coupling = couple(model)
    spec = coupling.spec()
    full, masked, _ = outputs(model, coupling, spec, some(spec, 0, 0.5), shape)
    assert not close(full, masked)


@pytest.mark.parametrize("name", LARGE)
def test_slim_networks_of_every_kind(name):
    with torch.device("meta"):
        model, side = LARGE[name]()
    model = randomise(model.to_empty(device="cpu"))
    coupling = couple(model)
    spec = coupling.spec()
    keep = some(spec, 1)
    full, masked, slim = outputs(model, coupling, spec, keep, (3, side, side))
    assert close(slim, masked)
    assert not close(full, masked)
    smaller = slim_(model, coupling, spec, torch.from_numpy(keep))
    assert sum(t.numel() for _, t in entries(smaller)) == slim_numel(coupling, spec, keep) < coupling.numel / 2


def test_pruned_channels_are_zero_behind_batchnorm():
    model, coupling, spec, keep = dense()
    mask_filters(model, coupling, spec, keep)
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        out = model.bn(model.stem(x))
        assert torch.equal(out.abs().amax((0, 2, 3)) > 0, torch.from_numpy(keep[:5]))
        assert not model.grow(out.relu())[:, ~keep[5:9]].any()
    # Nothing but the pruned rows has changed.
    fresh = randomise(Dense())
    changed = {n: (t != fresh.state_dict()[n]) for n, t in model.state_dict().items()}
    assert not any(changed[n].any() for n in changed if "running" in n or n.startswith("head"))
    assert torch.equal(changed["grow.weight"].flatten(1).any(1), torch.from_numpy(~keep[5:9]))


def test_masking_and_write_mask_agree_on_weights():
    model, coupling, spec, keep = dense()
    written = copy.deepcopy(model)
    write_mask(written, spec, frozen_weights(written, spec), torch.from_numpy(keep))
    mask_filters(model, coupling, spec, keep)
    for name in spec.names:
        assert torch.equal(model.get_parameter(name), written.get_parameter(name))


def test_slim_network_is_a_plain_module():
    model = randomise(torchvision.models.mobilenet_v2(num_classes=10, width_mult=0.1))
    coupling = couple(model)
    spec = coupling.spec()
    model.features[0][0].weight.requires_grad_(False)
    names = list(model.state_dict())
    slim = slim_(model, coupling, spec, some(spec, 3))
    assert slim is model
    assert list(slim.state_dict()) == names
    assert not slim.features[0][0].weight.requires_grad
    assert slim.features[0][1].weight.requires_grad
    for m in slim.modules():
        if isinstance(m, nn.Conv2d):
            assert tuple(m.weight.shape[:2]) == (m.out_channels, m.in_channels // m.groups)
        elif isinstance(m, nn.Linear):
            assert tuple(m.weight.shape) == (m.out_features, m.in_features)
        elif isinstance(m, nn.BatchNorm2d):
            assert m.running_var is not None
            assert m.running_var.shape == m.weight.shape == (m.num_features,)
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    out = slim(x)
    buffer = io.BytesIO()
    torch.save(slim.state_dict(), buffer)
    buffer.seek(0)
    twin = copy.deepcopy(slim)
    randomise(twin, 9)
    twin.load_state_dict(torch.load(buffer, weights_only=True))
    assert torch.equal(twin(x), out)
    # Coupled and cut again.
    again = couple(slim)
    _, masked, slimmer = outputs(slim, again, again.spec(), some(again.spec(), 4), (3, 32, 32))
    assert close(slimmer, masked)
    slim.train()(x).sum().backward()
    assert slim.classifier[1].weight.grad.shape == slim.classifier[1].weight.shape


def test_slim_network_exports_and_trains_frozen():
    model, coupling, spec, keep = dense()
    freeze(model, spec)
    slim = slim_(model, coupling, spec, keep)
    assert [n for n, p in slim.named_parameters() if p.requires_grad] == list(spec.names)
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    exported = torch.export.export(slim, (x,)).module()
    assert close(exported(x), slim(x))


def test_networks_without_running_statistics():
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6, track_running_stats=False), nn.Conv2d(6, 4, 3))
    randomise(model)
    coupling = couple(model)
    full, masked, slim = outputs(model, coupling, coupling.spec(), np.arange(6) % 2 == 0, (3, 8, 8))
    assert close(slim, masked)
    assert not close(full, masked)


@settings(max_examples=10)
@given(st.integers(0, 10**6))
def test_gather_and_scatter(seed):
    model, coupling, spec, keep = dense(seed)
    full = read(model)
    assert coupling.numel == full.size
    slim = slim_(copy.deepcopy(model), coupling, spec, keep)
    part = gather(full, coupling, spec, keep)
    assert part.dtype == np.float32
    assert slim_numel(coupling, spec, keep) == part.size
    np.testing.assert_array_equal(part, read(slim))
    back = scatter(part, coupling, spec, keep)
    assert back.dtype == np.float32
    # Positions that stay, found by gathering numbers.
    stays = np.zeros(full.size, bool)
    stays[gather(np.arange(full.size), coupling, spec, keep)] = True
    np.testing.assert_array_equal(back[stays], full[stays])
    variance = np.concatenate([np.full(t.numel(), n.endswith("running_var")) for n, t in entries(model)])
    np.testing.assert_array_equal(back[~stays], variance[~stays])
    np.testing.assert_array_equal(gather(back, coupling, spec, keep), part)
    # In the full network, what was scattered computes what the slim one does.
    write(model, back)
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        assert close(slim(x), model(x))


def test_keeping_all_changes_nothing():
    model, coupling, spec, _ = dense()
    keep = np.ones(spec.numel, bool)
    floats = read(model)
    before = dict(model.named_parameters())
    mask_filters(slim_(model, coupling, spec, keep), coupling, spec, keep)
    assert all(before[n] is p for n, p in model.named_parameters())
    np.testing.assert_array_equal(gather(floats, coupling, spec, keep), floats)
    np.testing.assert_array_equal(scatter(floats, coupling, spec, keep), floats)


def test_scores_are_norms_over_the_unit():
    model = randomise(torchvision.models.resnet18(num_classes=10))
    coupling = couple(model)
    spec = coupling.spec()
    scores = filter_scores(model, coupling, spec)
    assert (scores.shape, scores.dtype) == ((spec.numel,), np.float64)
    members = ("conv1", "layer1.0.conv2", "layer1.1.conv2")
    rows = [model.get_submodule(name).weight[7].detach().double().numpy() for name in members]
    assert np.isclose(
        scores[spec.units[spec.names.index("conv1.weight")] * 64 + 7], np.sqrt(sum((r**2).sum() for r in rows))
    )
    assert {name.removesuffix(".weight") for name, u in zip(spec.names, spec.units, strict=True) if u == 0} == set(
        members
    )


def test_costs():
    model = torchvision.models.resnet18(num_classes=1000)
    assert count_parameters(model) == 11_689_512
    model.bn1.eval()
    flags = [m.training for m in model.modules()]
    statistics = model.bn1.running_mean.clone()
    assert count_macs(model, (3, 224, 224)) == 1_814_073_344
    assert [m.training for m in model.modules()] == flags
    assert torch.equal(model.bn1.running_mean, statistics)
    assert not any(m._forward_hooks for m in model.modules())
    assert count_macs(nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4, track_running_stats=False)), (5,)) == 20
    depthwise = nn.Conv2d(6, 6, 3, padding=1, groups=6)
    assert count_macs(depthwise, (6, 4, 4)) == 6 * 9 * 16


def test_what_does_not_fit_is_refused():
    model, coupling, spec, keep = dense()
    for bad in (keep[1:], keep.astype(np.float32), torch.from_numpy(keep).float()):
        with pytest.raises(ValueError, match="keep must be 12 bools"):
            slim_numel(coupling, spec, bad)
    empty = keep.copy()
    empty[5:9] = False
    with pytest.raises(ValueError, match=r"every channel of 'grow\.weight' \(unit 1\)"):
        slim_(model, coupling, spec, empty)
    n = coupling.numel
    with pytest.raises(ValueError, match=f"full must be a vector of {n} values"):
        gather(np.zeros(n + 1), coupling, spec, keep)
    with pytest.raises(ValueError, match="slim must be a vector of"):
        scatter(np.zeros(n), coupling, spec, keep)
    filters = MaskSpec.of(model, granularity="filter")
    wrong = [
        filters,
        MaskSpec(spec.names[:1], ((5, 3, 1, 1),), "filter", (0,)),  # other shape
        MaskSpec(filters.names, filters.shapes, "filter", tuple(range(len(filters.names)))),  # head, depthwise
    ]
    for other in wrong:
        with pytest.raises(ValueError, match=r"coupling\.spec\(\)"):
            filter_scores(model, coupling, other)
    slim = slim_(copy.deepcopy(model), coupling, spec, keep)
    for use in (slim_, mask_filters):
        with pytest.raises(ValueError, match="give the full network"):
            use(slim, coupling, spec, keep)
    with pytest.raises(ValueError, match="the model has none"):
        mask_filters(nn.Sequential(nn.Linear(2, 2)), coupling, spec, keep)


def test_a_unit_must_be_whole():
    model = torchvision.models.resnet18(num_classes=10)
    coupling = couple(model)
    spec = coupling.spec()
    part = MaskSpec(spec.names[1:], spec.shapes[1:], "filter", spec.units[1:])
    apart = MaskSpec(spec.names, spec.shapes, "filter", tuple(range(len(spec.names))))
    for other in (part, apart):
        with pytest.raises(ValueError, match="units are not those of the coupling"):
            filter_scores(model, coupling, other)


def test_failed_cuts_leave_the_model_whole():
    model, coupling, spec, keep = dense()
    floats = read(model)
    with pytest.raises(ValueError, match="keep"):
        slim_(model, coupling, spec, np.zeros_like(keep))
    np.testing.assert_array_equal(read(model), floats)
