from __future__ import annotations

import pytest
import torch
from torch import nn

from fedmask_flwr.masks import MaskAdam, MaskSpec, derive, words, words_torch
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
    # theta may differ in its last place, so a bit may differ with probability 2**-23 or so.
    s = torch.linspace(-9, 9, 100_001)
    here, there = torch.empty_like(s), torch.empty(s.shape, device="cuda")
    sample_(s, derive(1), here)
    sample_(s.cuda(), derive(1), there)
    assert torch.equal(here, there.cpu())
    assert torch.allclose(probabilities(s.cuda()).cpu(), probabilities(s), rtol=1e-6, atol=1e-9)


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
