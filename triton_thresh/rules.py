"""The rules of threshold-weighted losses: each a class with its weight in plain torch, and the fields that the weight reads.

A device function of the same name, in snake case, is the weight in kernels/pointwise.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from .bases import Base, Kind, Settings, power, power_slope
from .checks import HALF, Operand, are_few, cached_constant, check_range, constant, round_to


class Element:
    """The elements as a rule sees them: the input x, the target y, the element loss, and the prediction q.

    `fast` says that nothing is recorded or traced, so that a selection may take the quickest way of a CPU.
    """

    def __init__(self, base: Base, x: Tensor, y: Tensor, loss: Tensor, fast: bool = False) -> None:
        self.base, self.x, self.y, self.loss, self.fast = base, x, y, loss, fast

    @property
    def q(self) -> Tensor:
        """The probability for logits, else the input itself."""
        return self.base.prediction(self.x)

    def select(self, compare: Callable[..., Tensor], left: Tensor, right: Operand, a: Operand, b: Operand) -> Tensor:
        """a where compare(left, right), else b, in the dtype of x."""
        if self.fast:
            return select(compare, left, right, a, b)
        return torch.where(compare(left, right), _scalar(a, left), _scalar(b, left))


def _scalar(value: Operand, like: Tensor) -> Tensor:
    return value if isinstance(value, Tensor) else constant(value, like.dtype, like.device)


def select(compare: Callable[..., Tensor], left: Tensor, right: Operand, a: Operand, b: Operand) -> Tensor:
    """a where compare(left, right), else b, off the tape.

    For many elements and with numbers the comparison writes 0 and 1; times a; then b goes where that is 0. On a CPU this takes a
    fourteenth of the time of torch.where, which is not vectorised. For few it takes three times as long.
    """
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return torch.where(compare(left, right), _scalar(a, left), _scalar(b, left))
    if are_few(left):
        bound = right if isinstance(right, Tensor) else cached_constant(right, left.dtype)
        return torch.where(compare(left, bound), cached_constant(a, left.dtype), cached_constant(b, left.dtype))
    a, b = round_to(a, left.dtype), round_to(b, left.dtype)
    if not 0 < a < math.inf:
        return torch.where(compare(left, right), _scalar(a, left), _scalar(b, left))
    indicator: Tensor = compare(left, right, out=torch.empty_like(left))
    if a != 1:
        indicator *= a
    if b == 0 and math.copysign(1.0, b) > 0:
        return indicator
    return F.threshold(indicator, 0.0, b, inplace=True)


class Rule(Settings):
    """A weight of each element.

    `slopes` says that its derivative is not 0 everywhere, `reads_loss` that the loss decides. `decides` says that its first
    field parts positive predictions from negative ones, on the scale of the base's input. `kinds` are the kinds of bases that it
    goes with.
    """

    slopes: ClassVar[bool] = False
    reads_loss: ClassVar[bool] = False
    decides: ClassVar[bool] = False
    kinds: ClassVar[Sequence[Kind]] = get_args(Kind)

    def on(self, base: Base) -> Rule:
        """The rule with its operands on the scale of the base's input."""
        return self

    def least_positive(self, base: Base) -> Operand | None:
        """The least prediction that counts as positive if the rule does not decide; None on values, where nothing says it."""
        return {"logits": 0.0, "values": None}.get(base.kind, 0.5)

    def weight(self, element: Element) -> Tensor | None:
        """The weight in plain torch, differentiable; None for 1."""
        raise NotImplementedError

    def weight_slope(self, element: Element) -> Tensor | None:
        """Its derivative in x, where a closed form takes less time on a CPU than autograd; None where there is none."""
        return None


@dataclass(frozen=True)
class Unweighted(Rule):
    """Weight 1."""

    def weight(self, element: Element) -> None:
        return None


@dataclass(frozen=True)
class ByPrediction(Rule):
    """Weigh an element by its prediction: ``weight_above where prediction >= threshold else weight_below``.

    The prediction decides, whatever the target is. So a missed positive, predicted below the threshold, gets `weight_below`;
    to weigh mistakes by what they cost, use `ByOutcome`. On logits `threshold` is a probability, compared as
    ``x >= logit(threshold)``; 0 or less puts every prediction above, more than 1 none. The weight has no slope.

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

    decides = True
    example = (0.75, 1.0, 0.125)

    threshold: Operand = 0.7
    weight_above: Operand = 1.0
    weight_below: Operand = 0.1

    def on(self, base: Base) -> ByPrediction:
        return replace(self, threshold=logit(self.threshold)) if base.kind == "logits" else self

    def weight(self, element: Element) -> Tensor:
        return element.select(torch.ge, element.x, self.threshold, self.weight_above, self.weight_below)


@dataclass(frozen=True)
class ByOutcome(Rule):
    """Weigh an element by its cell of the confusion matrix: a cost for each kind of mistake, and for each kind of success.

    An element is predicted positive where ``prediction >= threshold``. It is positive where ``target > target_threshold``; on a
    base of values, where ``target >= threshold``, and `target_threshold` is not read. On logits `threshold` is a probability.
    The weight has no slope.

    Args:
        threshold: where a prediction becomes positive: a number, a 0-dim tensor, or a tensor that broadcasts to the input's
            shape.
        true_positive: the weight of positives that are predicted positive; likewise a number or a tensor.
        false_positive: the weight of negatives that are predicted positive (false alarms).
        false_negative: the weight of positives that are predicted negative (misses).
        true_negative: the weight of negatives that are predicted negative.
        target_threshold: above which a target is positive.

    Equivalent to:
        ``torch.where(prediction >= threshold, torch.where(positive, tp, fp), torch.where(positive, fn, tn))``

    Source:
        Cost-sensitive learning.

    Examples:
        >>> from triton_thresh import threshold_loss
        >>> x, y = torch.tensor([2.0, -2.0]), torch.tensor([0.0, 1.0])  # a false alarm and a miss
        >>> threshold_loss(x, y, ByOutcome(false_negative=10.0), reduction="none")
        tensor([ 2.1269, 21.2693])
    """

    decides = True
    example = (0.5, 1.5, 2.0, 8.0, 0.5)

    threshold: Operand = 0.5
    true_positive: Operand = 1.0
    false_positive: Operand = 1.0
    false_negative: Operand = 1.0
    true_negative: Operand = 1.0
    target_threshold: Operand = 0.5

    def on(self, base: Base) -> ByOutcome:
        return replace(self, threshold=logit(self.threshold)) if base.kind == "logits" else self

    def weight(self, element: Element) -> Tensor:
        x, y = element.x, element.y
        positive = y >= self.threshold if element.base.kind == "values" else y > self.target_threshold
        found = torch.where(positive, _scalar(self.true_positive, x), _scalar(self.false_positive, x))
        missed = torch.where(positive, _scalar(self.false_negative, x), _scalar(self.true_negative, x))
        return torch.where(x >= self.threshold, found, missed)


@dataclass(frozen=True)
class ByProximity(Rule):
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

    slopes = True
    example = (0.5, 0.25, 1.5)

    threshold: Operand
    penalty_range: Operand = 0.2
    penalty_factor: Operand = 1.5

    def on(self, base: Base) -> ByProximity:
        """No prediction is near where the range is not above 0 or the threshold is NaN: the factor is 0 there."""
        threshold, reach, factor = self.threshold, self.penalty_range, self.penalty_factor
        if isinstance(threshold, Tensor) or threshold != threshold:
            known = threshold == threshold
            threshold, factor = _where(known, threshold, 0.0), _where(known, factor, 0.0)
        if isinstance(reach, Tensor) or not reach > 0:
            reaches = reach > 0
            reach, factor = _where(reaches, reach, 1.0), _where(reaches, factor, 0.0)
        return ByProximity(threshold, reach, factor)

    def weight(self, element: Element) -> Tensor:
        d = (element.q - self.threshold).abs()
        if element.fast and self._far_from_overflow():
            return 1 + self.penalty_factor * (1 - d.clamp(max=self.penalty_range) / self.penalty_range)
        near = d < self.penalty_range
        return torch.where(near, 1 + self.penalty_factor * (1 - torch.where(near, d, 0) / self.penalty_range), 1)

    def weight_slope(self, element: Element) -> Tensor:
        u = element.q - self.threshold
        steep = -(self.penalty_factor / self.penalty_range) * element.base.prediction_slope(element.x)
        if element.fast and self._far_from_overflow():
            return u.sign() * element.select(torch.lt, u.abs(), self.penalty_range, 1.0, 0.0) * steep
        return torch.where(u.abs() < self.penalty_range, u.sign() * steep, 0)

    def _far_from_overflow(self) -> bool:
        """True for numbers so small that a product with 0 may stand for a selection, which takes twice the time on a CPU."""
        t, reach, factor = self.threshold, self.penalty_range, self.penalty_factor
        if not (type(t) is float and type(reach) is float and type(factor) is float):
            return False
        return abs(t) < 1e30 and 1e-15 < reach < 1e15 and abs(factor) < 1e15


@dataclass(frozen=True)
class ByConfidence(Rule):
    """Weigh an element less, the surer it is: 1 where ``p_t < threshold``, else ``((1 - p_t) / threshold)**gamma``.

    ``p_t = p y + (1 - p) (1 - y)`` is the probability of the target; the gradient flows through this weight. It goes with bases
    of logits and of probabilities.

    Args:
        threshold: above which p_t counts as sure: a number above 0 and at most 1, a 0-dim tensor, or a tensor that broadcasts
            to the input's shape.
        gamma: how much sure elements lose, 0 or more: a number or a tensor. The numbers 0, 1, 2, 3 and 4 are compiled as
            products.

    Raises:
        ValueError: for a threshold outside (0, 1], a gamma below 0, and a base of values or scores.

    Equivalent to:
        ``torch.where(p_t < threshold, 1, ((1 - p_t) / threshold) ** gamma)``

    Source:
        Reduced focal loss, Sergievskiy and Ponamarev 2019 (arXiv:1903.01347); `reduced_threshold` of segmentation_models_pytorch.

    Examples:
        >>> from triton_thresh import threshold_loss
        >>> threshold_loss(torch.tensor([-1.0, 3.0]), torch.ones(2), ByConfidence(0.5), reduction="none")
        tensor([1.3133e+00, 4.3713e-04])
    """

    slopes = True
    kinds = ("logits", "probabilities")
    exponents = ("gamma",)
    example = (0.5, 2.0)

    threshold: Operand = 0.5
    gamma: Operand = 2.0

    def __post_init__(self) -> None:
        check_range("ByConfidence", "threshold", self.threshold, 0, 1)
        if not isinstance(self.threshold, Tensor) and self.threshold == 0:
            raise ValueError("ByConfidence: threshold must be above 0 and at most 1, got 0")
        check_range("ByConfidence", "gamma", self.gamma, 0)

    def least_positive(self, base: Base) -> Operand:
        return logit(self.threshold) if base.kind == "logits" else self.threshold

    def weight(self, element: Element) -> Tensor:
        sure, miss = self._sure(element)
        return torch.where(sure, power(miss, self.gamma), 1)

    def weight_slope(self, element: Element) -> Tensor:
        sure, miss = self._sure(element)
        falling = (1 - 2 * element.y) * element.base.prediction_slope(element.x) / self.threshold
        return torch.where(sure, power_slope(miss, self.gamma) * falling, 0)

    def _sure(self, element: Element) -> tuple[Tensor, Tensor]:
        """True where p_t reaches the threshold; and (1 - p_t) / threshold."""
        (p, rest), y = element.base.chances(element.x), element.y
        return p * y + rest * (1 - y) >= self.threshold, (rest * y + p * (1 - y)) / self.threshold


@dataclass(frozen=True)
class ByLoss(Rule):
    """Weigh an element by its own loss: ``penalty_factor where loss > loss_threshold else factor_below``.

    The loss decides before any further weight. The weight has no slope. ``ByLoss(t, 1.0, 0.0)`` keeps hard examples alone.

    Args:
        loss_threshold: the element loss above which the factor applies: a number, a 0-dim tensor, or a tensor that broadcasts
            to the input's shape.
        penalty_factor: that factor; likewise a number or a tensor.
        factor_below: the factor of all others; likewise.

    Equivalent to:
        ``torch.where(loss > loss_threshold, penalty_factor, factor_below)``

    Source:
        Exceedance penalties in anomaly detection.

    Examples:
        >>> from triton_thresh import threshold_loss
        >>> threshold_loss(torch.tensor([1.0, 3.0]), torch.zeros(2), ByLoss(1.0, 3.0), base="mse", reduction="none")
        tensor([ 1., 27.])
    """

    reads_loss = True
    example = (1.0, 2.0)

    loss_threshold: Operand = 1.0
    penalty_factor: Operand = 2.0
    factor_below: Operand = 1.0

    def weight(self, element: Element) -> Tensor:
        return element.select(torch.gt, element.loss, self.loss_threshold, self.penalty_factor, self.factor_below)


@dataclass(frozen=True)
class ByRank(Rule):
    """Keep the elements with the largest losses, and drop all others: weight 1 or 0.

    k of them are kept, ``max(min_kept, keep)`` for an int and ``max(min_kept, ceil(keep * n))`` for a float, n the elements that
    count. The loss before `weight` decides. NaN counts as largest, and elements equal to the k-th are kept with it. The mean
    divides by the number kept.

    Args:
        keep: how many, an int above 0, or which share of them, a float above 0 and at most 1.
        min_kept: at least so many, 0 or more.

    Raises:
        TypeError: for numbers of other types.
        ValueError: for numbers out of range.

    Equivalent to:
        ``torch.where(loss >= loss.flatten().topk(k).values[-1], 1, 0)``

    Source:
        Shrivastava et al. 2016, online hard example mining (arXiv:1604.03540); bootstrapped cross entropy.

    Examples:
        >>> from triton_thresh import threshold_loss
        >>> threshold_loss(torch.tensor([1.0, 3.0, 2.0]), torch.zeros(3), ByRank(keep=2), base="mse", reduction="none")
        tensor([0., 9., 4.])
    """

    static_fields = ("keep", "min_kept")
    example = (0.5,)

    keep: float = 0.25
    min_kept: int = 1

    def __post_init__(self) -> None:
        whole = isinstance(self.keep, int) and not isinstance(self.keep, bool)
        if not whole and not isinstance(self.keep, float):
            raise TypeError(f"ByRank: keep must be an int or a float, got {self.keep!r}")
        if not (self.keep >= 1 if whole else 0 < self.keep <= 1):
            raise ValueError(
                f"ByRank: keep must be an int above 0, or a float above 0 and at most 1, got {self.keep!r}"
            )
        if not isinstance(self.min_kept, int) or isinstance(self.min_kept, bool):
            raise TypeError(f"ByRank: min_kept must be an int, got {self.min_kept!r}")
        if self.min_kept < 0:
            raise ValueError(f"ByRank: min_kept must be 0 or more, got {self.min_kept!r}")

    def count(self, n: Tensor) -> Tensor:
        """k of n elements, in int64."""
        k = torch.full_like(n, self.keep) if isinstance(self.keep, int) else (n.double() * self.keep).ceil().long()
        return torch.minimum(k.clamp(min=self.min_kept), n)


RULES: Sequence[type[Rule]] = (
    ByPrediction,
    ByOutcome,
    ByConfidence,
    ByProximity,
    ByLoss,
)


def logit(t: Operand) -> Operand:
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
