from __future__ import annotations

import copy
import math
import subprocess
import sys
from itertools import product

import numpy as np
import oracles_made as oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmask_flwr.made import MADE, made
from fedmask_flwr.masks import Backbone, count_macs, derive

CYCLES = [
    (order, connect, masks)
    for order, connect, masks in product(("natural", "random", "cycle"), ("fixed", "cycle"), (1, 3))
    if masks == 1 or "cycle" in (order, connect)
]


def network(inputs=5, hidden=(7,), spread=1.0, **options):
    """A MADE with weights far from zero, so that a mask that is wrong shows."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = MADE(inputs, hidden, **options)
        for p in model.parameters():
            torch.nn.init.normal_(p, std=spread)
    return model


def every(n, inputs=None):
    """All vectors of n bits, then zeros up to `inputs`."""
    x = torch.zeros(2**n, inputs or n)
    x[:, :n] = torch.tensor(oracle.vectors(n))
    return x


def total(model, x, valid=None):
    return model.nll(x, valid).double().neg().exp().sum().item()


@st.composite
def options(draw):
    order, connect, masks = draw(st.sampled_from(CYCLES))
    return {
        "hidden": tuple(draw(st.lists(st.integers(1, 9), min_size=1, max_size=3))),
        "masks": masks,
        "order": order,
        "connect": connect,
        "direct": draw(st.booleans()),
        "condition": draw(st.booleans()),
        "activation": draw(st.sampled_from(["relu", "softplus"])),
        "seed": draw(st.integers(0, 99)),
    }


@pytest.mark.parametrize(("order", "connect", "masks"), CYCLES)
@pytest.mark.parametrize("direct", [True, False])
@pytest.mark.parametrize("condition", [True, False])
@pytest.mark.parametrize("hidden", [(9,), (9, 6), (9, 6, 8)])
def test_probabilities_sum_to_one(order, connect, masks, direct, condition, hidden):
    model = network(
        6, hidden, masks=masks, order=order, connect=connect, direct=direct, condition=condition, seed=len(hidden)
    )
    x = every(6)
    for index in range(masks):  # training mode: each mask is a density of its own
        model.select(index)
        assert total(model, x) == pytest.approx(1, abs=1e-5)
    model.eval()
    assert total(model, x) == pytest.approx(1, abs=1e-5)
    for valid in (1, 4):
        assert total(model, every(valid, 6), valid) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("inputs", [2, 3, 12])
def test_probabilities_sum_to_one_at_the_smallest_and_at_twelve(inputs):
    model = network(inputs, (20, 15), masks=3, order="cycle", connect="cycle", condition=True).eval()
    assert total(model, every(inputs)) == pytest.approx(1, abs=1e-5)
    assert total(model, every(inputs - 1, inputs), inputs - 1) == pytest.approx(1, abs=1e-5)


def test_averaging_logits_would_be_no_density():
    """Why nll averages probabilities; were this sum 1, the tests above could not tell the two apart."""
    model, x = network(6, (9,), masks=2, order="cycle"), every(6)
    with torch.no_grad():
        z = []
        for index in range(2):
            model.select(index)
            z.append(model(x))
    mean = (z[0] + z[1]) / 2
    p = torch.nn.functional.binary_cross_entropy_with_logits(mean, x, reduction="none").sum(1).neg().exp().sum()
    assert abs(p.item() - 1) > 1e-2


@settings(max_examples=60)
@given(st.integers(2, 7), options(), st.data())
def test_equals_the_oracle(inputs, chosen, data):
    chosen["activation"] = "relu"
    model = network(inputs, spread=0.7, **chosen).double()
    weights = {name: p.detach().numpy() for name, p in model.named_parameters()}
    valid = data.draw(st.integers(1, inputs))
    x = data.draw(st.sampled_from(oracle.vectors(valid))) + (0,) * (inputs - valid)
    nlls, ever = [], 0
    for r in range(chosen["masks"]):
        m = oracle.degrees(inputs, chosen["hidden"], chosen["seed"], chosen["order"], chosen["connect"], r)
        layers, direct = oracle.masks(m)
        model.select(r + chosen["masks"] * data.draw(st.integers(0, 2)))
        z = oracle.logits(x, layers, direct, weights)
        nlls.append(oracle.nll(x, z, valid))
        bits = torch.tensor([x])
        np.testing.assert_allclose(model(bits).detach().numpy()[0], z, rtol=1e-9, atol=1e-9)
        assert model.train().nll(bits, valid).item() == pytest.approx(nlls[-1], rel=1e-9)
        ever = [a + b for a, b in zip(ever or [0] * (len(layers) + 1), [*layers, direct], strict=True)]
    expected = -math.log(sum(math.exp(-n) for n in nlls) / len(nlls))
    assert model.eval().nll(torch.tensor([x]), valid).item() == pytest.approx(expected, rel=1e-9)

    structure = model.structure()
    names = [f"layers.{i}.weight" for i in range(len(ever) - 1)]
    want = dict(zip(names, ever[:-1], strict=True))
    if chosen["direct"]:
        want["direct.weight"] = ever[-1]
    if chosen["condition"]:
        want |= {name.replace("layers", "condition"): want[name] for name in names}
    assert structure.keys() == want.keys() == {n for n, p in model.named_parameters() if p.ndim > 1}
    for name, mask in structure.items():
        assert mask.dtype is torch.bool
        np.testing.assert_array_equal(mask.numpy(), want[name] > 0)


@given(st.integers(2, 9), options())
def test_no_path_from_an_input_to_itself_or_an_earlier_one(inputs, chosen):
    model = MADE(inputs, **chosen)
    for r in range(chosen["masks"]):
        m0 = oracle.degrees(inputs, chosen["hidden"], chosen["seed"], chosen["order"], chosen["connect"], r)[0]
        layers = [layer.mask[r].numpy() for layer in model.layers]
        direct = model.direct.masked(r, torch.ones(inputs, inputs)).numpy() if chosen["direct"] else None
        ways = oracle.paths(layers, direct)
        later = np.array(m0)[:, None] > np.array(m0)[None, :]
        assert not ways[~later].any()
        if chosen["direct"]:
            assert ways[later].all()


@settings(max_examples=40)
@given(st.integers(2, 6), options())
def test_masked_weights_change_no_bit_and_get_no_gradient(inputs, chosen):
    """Under the selected mask; and outside the structure, under every mask and in evaluation."""
    model, x = network(inputs, **chosen), every(inputs)
    poisoned = copy.deepcopy(model)
    masks = chosen["masks"]
    structure = model.structure()
    with torch.no_grad():
        for name, p in poisoned.named_parameters():
            if name in structure:
                p[~structure[name]] = 1e6
    assert torch.equal(model.eval().nll(x), poisoned.eval().nll(x))
    for r in range(masks):
        now = MADE(inputs, **chosen)
        for layer, stack in zip(now.layers, model.layers, strict=True):
            layer.mask = stack.mask[r : r + 1]
        only = now.structure()
        poisoned = copy.deepcopy(model).train()
        poisoned.select(r)
        model.train().select(r)
        model.zero_grad()
        loss = model.nll(x)
        loss.sum().backward()
        with torch.no_grad():
            for name, p in poisoned.named_parameters():
                if name.startswith(("layers", "condition")) and name in only:
                    p[~only[name]] = 1e6
        assert torch.equal(loss, poisoned.nll(x))
        for name, p in model.named_parameters():
            if name.startswith(("layers", "condition")) and name in only:
                assert not p.grad[~only[name]].any()
            elif name == "direct.weight":
                assert not p.grad[~structure[name]].any() or chosen["order"] == "cycle"


def test_gradients_reach_exactly_what_is_not_masked():
    model = network(6, (9,), condition=True, activation="softplus")  # one layer: no unit is a dead end
    model.nll(every(6)).sum().backward()
    for name, mask in model.structure().items():
        grad = dict(model.named_parameters())[name].grad
        assert torch.equal(grad != 0, mask), name


def test_mask_id_is_the_same_in_another_process():
    options = "hidden=(30, 20), masks=4, order='cycle', connect='cycle', seed=5"
    code = f"from fedmask_flwr.made import MADE; print(MADE(17, {options}).mask_id)"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    mine = MADE(17, (30, 20), masks=4, order="cycle", connect="cycle", seed=5)
    assert other.stdout.strip() == mine.mask_id
    assert len(mine.mask_id) == 32
    int(mine.mask_id, 16)


def test_mask_id_is_pinned():
    """Masks are named by a seed: these change only with a new major version."""
    assert MADE(6, (8,)).mask_id == "f6ee19723df1d5e36dd82948a8a0b419"
    assert (
        MADE(784, (500,), masks=2, order="cycle", connect="cycle", seed=1).mask_id
        == "ef1dcd51f2839c4431538b83519265df"
    )


def test_mask_id_tells_masks_apart_and_nothing_else():
    ids = [
        MADE(9, (12,), seed=0).mask_id,
        MADE(9, (12,), seed=1).mask_id,
        MADE(9, (12,), order="random").mask_id,
        MADE(9, (12,), masks=2, connect="cycle").mask_id,
        MADE(9, (12,), masks=3, connect="cycle").mask_id,
        MADE(9, (12,), masks=3, order="cycle").mask_id,
        MADE(9, (12, 12)).mask_id,
        MADE(9, (12,), direct=False).mask_id,
    ]
    assert len(set(ids)) == len(ids)
    assert MADE(9, (12,), masks=1, order="cycle").mask_id == ids[2]
    assert MADE(9, (12,), condition=True, activation="softplus").mask_id == ids[0]
    torch.manual_seed(1)
    assert MADE(9, (12,)).mask_id == ids[0]


def test_degrees_are_uniform():
    """Densities of 784-500 (published: near 1/2 each), and the union over eight connectivities."""
    density = {name: mask.float().mean().item() for name, mask in MADE(784, (500,)).structure().items()}
    assert density == {
        "layers.0.weight": pytest.approx(0.5, abs=0.03),
        "layers.1.weight": pytest.approx(0.5, abs=0.03),
        "direct.weight": pytest.approx(0.5, abs=0.001),
    }
    union = MADE(784, (500,), masks=8, connect="cycle").structure()["layers.0.weight"].float().mean()
    assert union == pytest.approx(8 / 9, abs=0.02)


def test_select_cycles():
    model, x = network(6, (9,), masks=3, connect="cycle"), every(6)
    seen = []
    for index in range(7):
        model.select(index)
        seen.append(model(x))
    assert all(torch.equal(seen[i], seen[i + 3]) for i in range(4))
    assert not torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[1], seen[2])
    assert model.masks_count == 3
    model.eval()  # which mask is selected makes no difference to the mean of all
    a = model.nll(x)
    model.select(0)
    assert torch.equal(a, model.nll(x))


@pytest.mark.parametrize("options", [{}, {"masks": 3, "order": "cycle", "connect": "cycle", "condition": True}])
@pytest.mark.parametrize("hidden", [(6,), (6, 5)])
def test_samples_have_the_models_distribution(options, hidden):
    n, model = 20_000, network(4, hidden, spread=0.8, **options)
    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    for index in (None, 0):
        model.select(0)
        p = model.train(index is not None).nll(every(4)).neg().exp().double()
        x = model.sample(n, derive(1, "sample"), index)
        assert x.shape == (n, 4)
        assert ((x == 0) | (x == 1)).all()
        counts = torch.bincount((x @ torch.tensor([8.0, 4, 2, 1])).long(), minlength=16)
        assert ((counts - n * p) ** 2 / (n * p)).sum() < 44.3  # chi-square, 15 degrees of freedom, p = 1e-4
    assert torch.equal(before, torch.random.get_rng_state())


def test_equal_keys_give_equal_samples_and_more_begin_with_fewer():
    model = network(8, (9,), masks=2, order="cycle")
    a = model.sample(50, derive(1))
    assert torch.equal(a, model.sample(50, derive(1)))
    assert torch.equal(a[:20], model.sample(20, derive(1)))
    assert not torch.equal(a, model.sample(50, derive(2)))
    assert torch.equal(model.sample(50, derive(1), 5), model.sample(50, derive(1), 1))
    assert model.sample(0, derive(1)).shape == (0, 8)


def test_training_learns_what_bits_share():
    """Eight bits that copy one of two coins with 5 % noise: no independent bits can go below 8 ln 2."""
    rng = np.random.default_rng(0)
    coins = rng.integers(0, 2, (600, 2)).repeat(4, axis=1)
    x = torch.from_numpy((coins ^ (rng.random(coins.shape) < 0.05)).astype(np.float32))
    torch.manual_seed(0)
    model = MADE(8, (32,), masks=2, order="cycle", connect="cycle", condition=True)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    rates = x.mean(0).double()
    independent = -(rates * rates.log() + (1 - rates) * (1 - rates).log()).sum().item()
    for step in range(200):
        model.select(step)
        optimizer.zero_grad()
        model.nll(x[:400]).mean().backward()
        optimizer.step()
    assert model.eval().nll(x[400:]).mean().item() < 0.65 * independent


@pytest.mark.parametrize(
    ("options", "fix"),
    [
        ({"inputs": 1}, "at least 2 inputs"),
        ({"inputs": 0}, "at least 2 inputs"),
        ({"hidden": ()}, "at least one width"),
        ({"hidden": (5, 0)}, "at least one width"),
        ({"masks": 0}, "at least 1"),
        ({"masks": 2}, "order='cycle' or connect='cycle'"),
        ({"masks": 2, "order": "random"}, "order='cycle' or connect='cycle'"),
        ({"order": "rand"}, "natural, random, cycle"),
        ({"connect": "natural"}, "fixed, cycle"),
        ({"activation": "tanh"}, "relu, softplus"),
    ],
)
def test_bad_settings_name_the_fix(options, fix):
    with pytest.raises(ValueError, match=fix):
        MADE(**{"inputs": 5, **options})


def test_bad_inputs_name_the_fix():
    model = MADE(4, (5,))
    for x in (torch.zeros(3, 5), torch.zeros(4), torch.zeros(2, 3, 2)):
        with pytest.raises(ValueError, match=r"expected \(n, 4\)"):
            model(x)
    for valid in (0, 5, -1):
        with pytest.raises(ValueError, match=r"1\.\.4"):
            model.nll(torch.zeros(1, 4), valid)
    model.eval()
    for bad in (0.5, 2.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="binarise"):
            model.nll(torch.tensor([[0, 1, bad, 1]]))
    with pytest.raises(ValueError, match="padding"):
        model.nll(torch.tensor([[0, 1, 0, 1]]), 3)


def test_the_builder_fits_a_backbone():
    options = (("in_shape", (2, 3)), ("num_classes", 7), ("hidden", 8), ("masks", 2), ("connect", "cycle"))
    before = torch.random.get_rng_state()
    model = Backbone("fedmask_flwr.made:made", "seed:1", options).build()
    assert torch.equal(before, torch.random.get_rng_state())
    assert model.mask_id == MADE(6, (8,), masks=2, connect="cycle").mask_id
    assert model(torch.zeros(3, 2, 3, dtype=torch.uint8)).shape == (3, 6)
    assert count_macs(model, (2, 3)) == 6 * 8 + 8 * 6 + 6 * 6
    assert set(model.state_dict()) == {name for name, _ in model.named_parameters()}
    clone = copy.deepcopy(model).double()
    assert torch.allclose(clone.nll(every(6)).float(), model.nll(every(6)), atol=1e-5)
    assert made((6,), 0).mask_id == MADE(6).mask_id


def test_new_weights_are_glorot_uniform():
    model = MADE(40, (60,), condition=True)
    for name, p in model.named_parameters():
        bound = math.sqrt(6 / sum(p.shape)) if p.ndim > 1 else 0
        assert bound * 0.9 <= p.abs().max() <= bound, name
