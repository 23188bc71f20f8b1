"""The rules of threshold-weighted losses: what a rule looks at, and its settings."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Literal, Union

import torch
from torch import Tensor

from .rounding import HALF

Operand = float | int | Tensor
"""What a threshold, a weight or a factor may be: a number, a 0-dim tensor, or a tensor that broadcasts to the input's shape."""

BaseName = Literal["bce", "bce_with_logits", "mse"]
Reduction = Literal["mean", "sum", "none"]


class Numbers(tuple[float, ...]):
    """Operands that are floats alone, with what kernels take for them."""

    @functools.cached_property
    def packed(self) -> tuple[tuple[float], ...]:
        return tuple([(value,) for value in self])


def _logit(t: Operand) -> Operand:
    """The logit at which a probability reaches t: -inf for t <= 0 (every prediction is above), NaN for t > 1 (none is)."""
    if isinstance(t, Tensor):
        t = t if t.is_floating_point() else t.double()
        if t.dtype in HALF:
            t = t.float()
        return torch.where(t > 1, math.nan, torch.logit(t.clamp(min=0.0)))
    if t <= 0:
        return -math.inf
    if t == 1:
        return math.inf
    return math.log(t / (1 - t)) if t < 1 else math.nan


def _where(condition: Tensor | bool, a: Operand, b: float) -> Operand:
    """a where the condition holds, else b; numbers and integers as float64, which rounds neither."""
    if not isinstance(condition, Tensor):
        return a if condition else b
    if not isinstance(a, Tensor):
        a = torch.full((), a, dtype=torch.float64, device=condition.device)
    elif not a.is_floating_point():
        a = a.double()
    return torch.where(condition, a, torch.full((), b, dtype=a.dtype, device=condition.device))


@dataclass(frozen=True)
class ByPrediction:
    """Weigh an element by its prediction: ``weight_above where prediction >= threshold else weight_below``.

    On logits `threshold` is a probability, compared as ``x >= logit(threshold)``; 0 or less puts every prediction above, more
    than 1 none. The weight has no slope.

    Args:
        threshold: where the weight changes: a number, a 0-dim tensor, or a tensor that broadcasts to the input's shape.
        weight_above: the weight from the threshold on; likewise a number or a tensor.
        weight_below: the weight of all others; likewise.

    Equivalent to:
        ``torch.where(prediction >= threshold, weight_above, weight_below)``

    Source:
        Masks for weights, as in imbalanced classification.

    Examples:
        >>> from triton_thresh import threshold_loss
        >>> threshold_loss(torch.tensor([1.0, 3.0]), torch.zeros(2), ByPrediction(2.0, 1.0, 0.5), base="mse", reduction="none")
        tensor([0.5000, 9.0000])
    """

    threshold: Operand = 0.7
    weight_above: Operand = 1.0
    weight_below: Operand = 0.1

    def operands(self, base: str) -> tuple[Operand, ...]:
        """(threshold on the scale of the input, weight above, weight below)."""
        threshold = _logit(self.threshold) if base == "bce_with_logits" else self.threshold
        return threshold, self.weight_above, self.weight_below


@dataclass(frozen=True)
class ByProximity:
    """Weigh an element by how near its prediction q is to `threshold`.

    ``1 + penalty_factor * (1 - d / penalty_range)`` where ``d = |q - threshold| < penalty_range``, else 1; the gradient flows
    through this weight. On logits q is the sigmoid of the input. No prediction is near where the range is not above 0 or the
    threshold is NaN.

    Args:
        threshold: what to stay away from: a number, a 0-dim tensor, or a tensor that broadcasts to the input's shape.
        penalty_range: how far its influence reaches; likewise a number or a tensor.
        penalty_factor: the extra weight at the threshold itself; likewise.

    Equivalent to:
        ``1 + penalty_factor * (1 - (q - threshold).abs() / penalty_range).clamp(min=0)``

    Source:
        Decision-boundary regression; the hat function of finite elements.

    Examples:
        >>> from triton_thresh import threshold_loss
        >>> threshold_loss(torch.tensor([1.0, 3.0]), torch.zeros(2), ByProximity(2.5, 1.0, 2.0), base="mse", reduction="none")
        tensor([ 1., 18.])
    """

    threshold: Operand
    penalty_range: Operand = 0.2
    penalty_factor: Operand = 1.5

    def operands(self, base: str) -> tuple[Operand, ...]:
        """(threshold, range, factor). Where the range is not above 0 or the threshold is NaN no prediction is near: factor 0."""
        threshold, reach, factor = self.threshold, self.penalty_range, self.penalty_factor
        if isinstance(threshold, Tensor) or threshold != threshold:
            known = threshold == threshold
            threshold, factor = _where(known, threshold, 0.0), _where(known, factor, 0.0)
        if isinstance(reach, Tensor) or not reach > 0:
            reaches = reach > 0
            reach, factor = _where(reaches, reach, 1.0), _where(reaches, factor, 0.0)
        return threshold, reach, factor


@dataclass(frozen=True)
class ByLoss:
    """Weigh an element by its own loss: ``penalty_factor where loss > loss_threshold else 1``.

    The loss decides before any further weight. The weight has no slope.

    Args:
        loss_threshold: the element loss above which the factor applies: a number, a 0-dim tensor, or a tensor that broadcasts
            to the input's shape.
        penalty_factor: that factor; likewise a number or a tensor.

    Equivalent to:
        ``torch.where(loss > loss_threshold, penalty_factor, 1)``

    Source:
        Exceedance penalties in anomaly detection.

    Examples:
        >>> from triton_thresh import threshold_loss
        >>> threshold_loss(torch.tensor([1.0, 3.0]), torch.zeros(2), ByLoss(1.0, 3.0), base="mse", reduction="none")
        tensor([ 1., 27.])
    """

    loss_threshold: Operand = 1.0
    penalty_factor: Operand = 2.0

    def operands(self, base: str) -> tuple[Operand, ...]:
        """(bound, factor)."""
        return self.loss_threshold, self.penalty_factor


Rule = Union[ByPrediction, ByProximity, ByLoss]
