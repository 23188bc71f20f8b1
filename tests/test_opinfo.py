"""PyTorch's operator database through eager torch: the tests of the Triton path over again, with every sample."""

from __future__ import annotations

import pytest
import torch

from .kernels.test_opinfo import *  # noqa: F403
from .kernels.test_opinfo import close, every_operator, samples
from .on_eager import *  # noqa: F403 - fixtures


@pytest.mark.slow
@every_operator
def test_forward_mode_and_vmap(name: str, device: torch.device) -> None:
    for sample in samples(name, torch.float64, device):
        x = sample.input.detach()
        tangent = torch.linspace(-1, 1, x.numel(), dtype=x.dtype, device=device).view(x.shape)
        close(name, torch.func.jvp(sample.pack, (x,), (tangent,)), torch.func.jvp(sample.torch, (x,), (tangent,)))
        several = torch.stack([x, x / 2, x * 0.75])
        close(name, torch.func.vmap(sample.pack)(several), torch.stack([sample.torch(each) for each in several]))
        per_sample = torch.func.vmap(torch.func.grad(lambda x, f=sample.pack: f(x).sum()))(several)
        alone = [torch.func.grad(lambda x, f=sample.torch: f(x).sum())(each) for each in several]
        close(name, per_sample, torch.stack(alone))
