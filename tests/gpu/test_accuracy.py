"""Approximate instructions: the error of BCE against float64, beside that of torch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import triton_thresh as tt
from triton_thresh import ByPrediction

from ..losses import SLACK, Cell, Setup, Truth, truth
from .cases import DEVICE

pytestmark = pytest.mark.gpu

COUNT = 10**7
UNWEIGHTED = ByPrediction(0.0, 1.0, 1.0)


def spread_logits(u: Tensor, v: Tensor) -> Tensor:
    """Logits: random ones, wide ones, any magnitude a float32 has, and hard ones."""
    parts = [8 * u - 4, 240 * u - 120, (2 * u - 1).sign() * 10 ** (76 * v - 38)]
    hard = torch.tensor([0.0, -0.0, 1e-45, 20.0, 88.0, 88.8, 103.9, 104.1, 3.4e38], dtype=torch.float64, device=DEVICE)
    return torch.cat([*(part[i::3] for i, part in enumerate(parts)), hard, -hard]).float()


def spread_probabilities(u: Tensor, v: Tensor) -> Tensor:
    """Probabilities: random ones, ones near 0 down to denormals, ones near 1, and hard ones."""
    parts = [u, 10 ** (-44 * v), 1 - 10 ** (-7.2 * v)]
    hard = torch.tensor([0.0, 1.0, 1e-45, 1e-12, 2**-24, 1 - 2**-24, 0.5], dtype=torch.float64, device=DEVICE)
    return torch.cat([*(part[i::3] for i, part in enumerate(parts)), hard]).float().clamp(0, 1)


def exact(base: str, x: Tensor, y: Tensor) -> Truth:
    """Loss and slope in float64, accurate for every x, and the sizes that errors are measured against."""
    if base == "bce":
        return truth(Setup(Cell(base, ByPrediction), x, y, UNWEIGHTED))
    x, y = x.double(), y.double()
    e = (-x.abs()).exp()
    softplus = (-x).clamp(min=0) + e.log1p()
    size = ((1 - y) * x).abs() + softplus + x.abs() * e  # exp2 of a rounded product: relative error |x| units
    return Truth(x.clamp(min=0) - x * y + e.log1p(), x.sigmoid() - y, size, 2 - y)


@pytest.mark.parametrize("base", ["bce", "bce_with_logits"])
def test_no_less_exact_than_torch_at_ten_million_inputs(base: str) -> None:
    """The worst error in float32, of the loss and of the gradient, is that of torch plus SLACK units in the last place.

    It is measured in units of the summed magnitudes of the terms; for bce that is the relative error. Of logits also the
    absolute error (of the loss: up to a logit of 4), and that of the gradient s of a label of 0 relative to s (1 + |x|).
    Denormal results may be flushed.
    """
    generator = torch.Generator(DEVICE).manual_seed(0)
    u, v, z = torch.rand(3, COUNT, generator=generator, dtype=torch.float64, device=DEVICE)
    x = (spread_probabilities if base == "bce" else spread_logits)(u, v).requires_grad_()
    y = (3 * z - 1).clamp(0, 1).float()  # soft labels, and as many of 0 and of 1
    y = torch.cat([y, (torch.arange(x.numel() - y.numel(), device=DEVICE) % 2).float()])
    torch_loss = F.binary_cross_entropy if base == "bce" else F.binary_cross_entropy_with_logits
    ours = tt.threshold_loss(x, y, UNWEIGHTED, base=base, reduction="none")
    theirs = torch_loss(x, y, reduction="none")
    (our_slope,), (their_slope,) = (torch.autograd.grad(loss.sum(), x) for loss in (ours, theirs))
    x = x.detach()
    expected = exact(base, x, y)
    info = torch.finfo(torch.float32)

    def worst(actual: Tensor, truth: Tensor, size: Tensor | float, where: Tensor) -> float:
        error = (actual.detach().double() - truth).abs() - info.smallest_normal
        return float(torch.where(error <= 0, 0.0, error / size)[where].max())  # 0 / 0 is no error, NaN is one

    def check(ours: Tensor, theirs: Tensor, truth: Tensor, size: Tensor | float, where: Tensor) -> None:
        assert worst(ours, truth, size, where) <= worst(theirs, truth, size, where) + SLACK * info.eps

    everywhere = torch.ones_like(x, dtype=torch.bool)
    check(ours, theirs, expected.loss, expected.loss_size, everywhere)
    check(our_slope, their_slope, expected.slope, expected.slope_size, everywhere)
    if base == "bce_with_logits":
        magnitude = x.double().abs()
        check(ours, theirs, expected.loss, 1.0, magnitude <= 4)
        check(our_slope, their_slope, expected.slope, 1.0, everywhere)
        check(our_slope, their_slope, expected.slope, expected.slope * (1 + magnitude), y == 0)
