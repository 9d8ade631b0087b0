from __future__ import annotations

import pytest
import torch
from torch import nn

from fedmask_flwr.masks import MaskAdam, MaskSGD, MaskSpec, derive, words, words_torch
from fedmask_flwr.masks.kernels import probabilities, sample_

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def test_words_are_those_of_the_cpu():
    for start, n in ((0, 1_000_003), (2**31 - 5, 10), (2**32 - 7, 7)):
        key = derive("gpu", start)
        assert torch.equal(words_torch(key, n, "cuda", start).cpu(), torch.from_numpy(words(key, n, start)))


def test_masks_are_those_of_the_cpu():
    s = torch.linspace(-9, 9, 100_001)
    here, there = torch.empty_like(s), torch.empty(s.shape, device="cuda")
    sample_(s, derive(1), here)
    sample_(s.cuda(), derive(1), there)
    assert torch.equal(here, there.cpu())
    assert torch.equal(probabilities(s.cuda()).cpu(), probabilities(s))


@pytest.mark.parametrize("make", [MaskAdam, MaskSGD])
@pytest.mark.parametrize("ste", ["identity", "p"])
def test_given_gradients_leave_the_bits_that_they_leave_on_the_cpu(make, ste):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        here = nn.Linear(3000, 1700)
    there = nn.Linear(3000, 1700)
    there.load_state_dict(here.state_dict())
    pairs = [(m, make(m, lr=0.3, key=1, ste=ste, sparsity=2.0)) for m in (here, there.cuda())]
    rng = torch.Generator().manual_seed(1)
    for _ in range(4):
        size = 10 ** (6 * torch.rand(here.weight.shape, generator=rng) - 4)
        grad = size * torch.randn(here.weight.shape, generator=rng)
        for model, optimiser in pairs:
            model.weight.grad = grad.to(model.weight.device)
            optimiser.step()
    states = [optimiser.state_dict() for _, optimiser in pairs]
    for a, b in zip(*([s["scores"], *s["moments"].values()] for s in states), strict=True):
        assert torch.equal(a.view(torch.int32), b.cpu().view(torch.int32))
    assert torch.equal(here.weight, there.weight.cpu())


@pytest.mark.parametrize("granularity", ["weight", "filter"])
def test_a_step_is_that_of_the_cpu(granularity):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        here = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 3))
    there = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 3))
    there.load_state_dict(here.state_dict())
    there.cuda()
    x = torch.randn(8, 6, generator=torch.Generator().manual_seed(0))
    spec = MaskSpec.of(here, granularity=granularity)
    a, b = MaskAdam(here, spec, key=1), MaskAdam(there, spec, key=1)
    for _ in range(3):
        for model, optimiser, inputs in ((here, a, x), (there, b, x.cuda())):
            optimiser.zero_grad()
            model(inputs).square().mean().backward()
            optimiser.step()
        assert torch.allclose(a.scores, b.scores.cpu(), atol=1e-4)
        assert torch.equal(a.mask(), b.mask().cpu())
    assert b.frozen.is_cuda
    state = b.state_dict()
    a.load_state_dict(state)
    assert torch.equal(a.scores, b.scores.cpu())
