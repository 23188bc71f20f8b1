"""The public functions. Each is the registry's op of the same name, with its documentation."""

from __future__ import annotations

import torch
from torch import Tensor

from .registry import OPS
from .rules import ByLoss, ByPrediction, ByProximity, Operand, Rule

__all__ = [
    "binary_threshold",
    "exceedance_mse_loss",
    "hardshrink",
    "proximity_mse_loss",
    "softshrink",
    "threshold",
    "threshold_bce_loss",
    "threshold_bce_with_logits_loss",
    "threshold_loss",
    "threshold_mse_loss",
]

_threshold = OPS["threshold"]
_hardshrink = OPS["hardshrink"]
_softshrink = OPS["softshrink"]
_binary_threshold = OPS["binary_threshold"]
_threshold_bce_loss = OPS["threshold_bce_loss"]
_threshold_bce_with_logits_loss = OPS["threshold_bce_with_logits_loss"]
_threshold_mse_loss = OPS["threshold_mse_loss"]
_proximity_mse_loss = OPS["proximity_mse_loss"]
_exceedance_mse_loss = OPS["exceedance_mse_loss"]
_threshold_loss = OPS["threshold_loss"]


def threshold(input: Tensor, threshold: Operand, value: float = 0.0, *, inplace: bool = False) -> Tensor:
    return _threshold(input, threshold, value, inplace=inplace)


def hardshrink(input: Tensor, lambd: Operand = 0.5, *, inplace: bool = False) -> Tensor:
    return _hardshrink(input, lambd, inplace=inplace)


def softshrink(input: Tensor, lambd: Operand = 0.5) -> Tensor:
    return _softshrink(input, lambd)


def binary_threshold(
    input: Tensor,
    threshold: Operand,
    above_value: float = 1.0,
    below_value: float = 0.0,
    *,
    dtype: torch.dtype | None = None,
) -> Tensor:
    return _binary_threshold(input, threshold, above_value, below_value, dtype=dtype)


def threshold_bce_loss(
    input: Tensor,
    target: Tensor,
    threshold: Operand = 0.7,
    weight_above: Operand = 1.0,
    weight_below: Operand = 0.1,
    *,
    weight: Operand | None = None,
    reduction: str = "mean",
) -> Tensor:
    rule = ByPrediction(threshold, weight_above, weight_below)
    return _threshold_bce_loss(input, target, rule, weight=weight, reduction=reduction)


def threshold_bce_with_logits_loss(
    input: Tensor,
    target: Tensor,
    threshold: Operand = 0.7,
    weight_above: Operand = 1.0,
    weight_below: Operand = 0.1,
    *,
    weight: Operand | None = None,
    pos_weight: Operand | None = None,
    reduction: str = "mean",
) -> Tensor:
    rule = ByPrediction(threshold, weight_above, weight_below)
    return _threshold_bce_with_logits_loss(input, target, rule, weight=weight, pos_weight=pos_weight, reduction=reduction)


def threshold_mse_loss(
    input: Tensor,
    target: Tensor,
    threshold: Operand,
    weight_above: Operand = 1.0,
    weight_below: Operand = 0.1,
    *,
    weight: Operand | None = None,
    reduction: str = "mean",
) -> Tensor:
    rule = ByPrediction(threshold, weight_above, weight_below)
    return _threshold_mse_loss(input, target, rule, weight=weight, reduction=reduction)


def proximity_mse_loss(
    input: Tensor,
    target: Tensor,
    threshold: Operand,
    penalty_range: Operand = 0.2,
    penalty_factor: Operand = 1.5,
    *,
    weight: Operand | None = None,
    reduction: str = "mean",
) -> Tensor:
    rule = ByProximity(threshold, penalty_range, penalty_factor)
    return _proximity_mse_loss(input, target, rule, weight=weight, reduction=reduction)


def exceedance_mse_loss(
    input: Tensor,
    target: Tensor,
    loss_threshold: Operand = 1.0,
    penalty_factor: Operand = 2.0,
    *,
    weight: Operand | None = None,
    reduction: str = "mean",
) -> Tensor:
    return _exceedance_mse_loss(input, target, ByLoss(loss_threshold, penalty_factor), weight=weight, reduction=reduction)


def threshold_loss(
    input: Tensor,
    target: Tensor,
    rule: Rule,
    *,
    base: str = "bce_with_logits",
    weight: Operand | None = None,
    pos_weight: Operand | None = None,
    reduction: str = "mean",
) -> Tensor:
    return _threshold_loss(input, target, rule, base=base, weight=weight, pos_weight=pos_weight, reduction=reduction)
