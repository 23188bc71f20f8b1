"""The pack's formulas as one writes them by hand.

Losses are written with masks, reduction "none" and the mean, and differentiated by autograd. JumpReLU takes two
straight-through Functions. Gradients take a loop over the parameters.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional


def threshold_bce_with_logits_loss(
    input: Tensor, target: Tensor, threshold: float, weight_above: float, weight_below: float
) -> Tensor:
    loss = functional.binary_cross_entropy_with_logits(input, target, reduction="none")
    return (loss * torch.where(torch.sigmoid(input) >= threshold, weight_above, weight_below)).mean()


def proximity_mse_loss(
    input: Tensor, target: Tensor, threshold: float, penalty_range: float, penalty_factor: float
) -> Tensor:
    distance = (input - threshold).abs()
    penalty = torch.where(distance < penalty_range, penalty_factor * (1 - distance / penalty_range), 0.0)
    return (functional.mse_loss(input, target, reduction="none") * (1 + penalty)).mean()


def exceedance_mse_loss(input: Tensor, target: Tensor, loss_threshold: float, penalty_factor: float) -> Tensor:
    loss = functional.mse_loss(input, target, reduction="none")
    return torch.where(loss > loss_threshold, penalty_factor * loss, loss).mean()


def softshrink(input: Tensor, lambd: Tensor) -> Tensor:
    return torch.where(input > lambd, input - lambd, torch.where(input < -lambd, input + lambd, 0.0))


def rectangle(x: Tensor) -> Tensor:
    return ((x > -0.5) & (x < 0.5)).to(x.dtype)


class JumpReLUFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(x, threshold)
        ctx.bandwidth = bandwidth
        return x * (x > threshold).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        x, threshold = ctx.saved_tensors
        x_gradient = (x > threshold).to(x.dtype) * gradient
        window = rectangle((x - threshold) / ctx.bandwidth)
        return x_gradient, (-(threshold / ctx.bandwidth) * window * gradient).sum_to_size(threshold.shape), None


class StepFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(x, threshold)
        ctx.bandwidth = bandwidth
        return (x > threshold).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        x, threshold = ctx.saved_tensors
        window = rectangle((x - threshold) / ctx.bandwidth)
        return torch.zeros_like(x), (-(1.0 / ctx.bandwidth) * window * gradient).sum_to_size(threshold.shape), None


class JumpReLU(nn.Module):
    """After the pseudo-code of Rajamanoharan et al. 2024 (arXiv:2407.14435)."""

    def __init__(self, num_features: tuple[int, ...], threshold: float, bandwidth: float) -> None:
        super().__init__()
        self.threshold = nn.Parameter(torch.full(num_features, threshold))
        self.bandwidth = bandwidth

    def l0(self, input: Tensor) -> tuple[Tensor, Tensor]:
        code = JumpReLUFunction.apply(input, self.threshold, self.bandwidth)  # type: ignore[no-untyped-call]
        return code, StepFunction.apply(input, self.threshold, self.bandwidth).sum(-1)  # type: ignore[no-untyped-call]


def threshold_gradients(optimizer: torch.optim.Optimizer, threshold: float) -> None:
    def loop(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        for group in optimizer.param_groups:
            for p in group["params"]:
                p.grad = torch.where((p.grad.abs() > threshold) | p.grad.isnan(), p.grad, 0)

    optimizer.register_step_pre_hook(loop)
