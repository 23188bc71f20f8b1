"""The pack's formulas as one writes them by hand: masks, reduction "none", then the mean; autograd does the rest."""

import torch
from torch import Tensor, nn
from torch.nn import functional


def threshold_bce_with_logits_loss(
    input: Tensor, target: Tensor, threshold: float, weight_above: float, weight_below: float, pos_weight: Tensor
) -> Tensor:
    loss = functional.binary_cross_entropy_with_logits(input, target, pos_weight=pos_weight, reduction="none")
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


class Hardshrink(nn.Module):
    def __init__(self, lambd: float) -> None:
        super().__init__()
        self.lambd = lambd

    def forward(self, input: Tensor) -> Tensor:
        return torch.where(input.abs() <= self.lambd, 0.0, input)
