"""Targets of a cross entropy outside [0, 1] on Triton, and targets that require grad there."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import triton_thresh as tt

from ..test_drop_in import OUTSIDE

RULES = [tt.ByPrediction(0.5), tt.ByProximity(0.5), tt.ByLoss(0.5)]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: type(rule).__name__)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("target", OUTSIDE, ids=str)
def test_outside_0_to_1(target: Tensor, dtype: torch.dtype, rule: Any, device: torch.device) -> None:
    """NaN, loss and gradient, and nowhere else."""
    y = target.to(device)
    wide = y.to(torch.float64 if dtype is torch.float64 else torch.float32)
    outside = ~((wide >= 0) & (wide <= 1))
    p = torch.tensor([0.3, 0.6, 0.2, 0.9], dtype=dtype, device=device, requires_grad=True)
    due = tt.threshold_loss(p.detach(), wide.where(~outside, 0.5), rule, base="bce", reduction="none")
    for reduction in ("none", "mean", "sum"):
        loss = tt.threshold_loss(p, y, rule, base="bce", reduction=reduction)
        (slope,) = torch.autograd.grad(loss.sum(), p)
        assert torch.equal(slope.isnan(), outside)
        if reduction == "none":
            torch.testing.assert_close(loss.detach(), due.where(~outside, torch.nan), equal_nan=True)
        else:
            assert loss.isnan().item() == bool(outside.any())


def test_a_target_that_requires_grad(device: torch.device) -> None:
    x, y = (torch.rand(4, 5, device=device, requires_grad=True) for _ in range(2))
    loss = tt.threshold_mse_loss(x, y, 0.5, 2.0, 0.5)
    dx, dy = torch.autograd.grad(loss, (x, y))
    assert torch.equal(dy, -dx)
    torch.testing.assert_close(dx, torch.autograd.grad(tt.threshold_mse_loss(x, y.detach(), 0.5, 2.0, 0.5), x)[0])
