"""The element losses: each a class with its formula in plain torch, and the fields that the formula reads.

A device function of the same name, in snake case, is the formula in kernels/pointwise.py. Both are written so that they
differentiate rightly at their limits, and the plain one twice.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.compiler import is_compiling

from .checks import Operand, are_few, cached_constant, check_positive, check_range, is_open

Kind = Literal["logits", "probabilities", "scores", "values"]
BaseName = Literal["bce", "bce_with_logits", "mse"]
CONSTANT_EXPONENTS = (0, 1, 2, 3, 4)


class Settings:
    """A frozen dataclass of operands: what bases and rules have in common.

    A field is an operand, or a constant for which the kernel is compiled: those in `static_fields`; those in `optional_fields`
    where they are None; those in `exponents` where they are 0, 1, 2, 3 or 4, since a product needs no logarithm.
    """

    example: ClassVar[tuple[Any, ...]] = ()  # arguments with which tests and benchmarks make one
    static_fields: ClassVar[tuple[str, ...]] = ()
    optional_fields: ClassVar[tuple[str, ...]] = ()
    exponents: ClassVar[tuple[str, ...]] = ()

    @classmethod
    @functools.cache
    def snake_name(cls) -> str:
        """The class's name in snake case, which is that of its device function."""
        return re.sub(r"(?<=[a-z])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", cls.__name__).lower()

    def _is_constant(self, name: str) -> bool:
        if name in self.static_fields:
            return True
        value = getattr(self, name)
        if name in self.exponents:
            return is_constant_exponent(value)
        return value is None and name in self.optional_fields

    def operands(self) -> dict[str, Operand]:
        """The operands, by the names of their fields."""
        names = self.__dataclass_fields__  # type: ignore[attr-defined]
        return {name: getattr(self, name) for name in names if not self._is_constant(name)}

    def static(self) -> tuple[tuple[str, str], ...]:
        """The constants, by the names of their fields, as text; a number is whole."""
        names = self.__dataclass_fields__  # type: ignore[attr-defined]
        found = [(name, getattr(self, name)) for name in names if self._is_constant(name)]
        return tuple([(name, str(v) if v is None or isinstance(v, bool) else str(int(v))) for name, v in found])

    @classmethod
    @functools.cache
    def maybe_static(cls) -> tuple[str, ...]:
        """The fields that may be constants, in order."""
        known = {*cls.static_fields, *cls.optional_fields, *cls.exponents}
        return tuple(name for name in cls.__dataclass_fields__ if name in known)  # type: ignore[attr-defined]


class Base(Settings):
    """An element loss. `kind` says what its input is; `unit_targets` that targets outside [0, 1] give NaN."""

    kind: ClassVar[Kind]
    unit_targets: ClassVar[bool] = False

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        """The element loss in plain torch, differentiable."""
        raise NotImplementedError

    def value(self, x: Tensor, y: Tensor) -> Tensor:
        """The same off the tape, where fewer passes will do."""
        return self.loss(x, y)

    def slope(self, x: Tensor, y: Tensor) -> Tensor | None:
        """Its derivative in x, where a closed form takes less time on a CPU than autograd; None where there is none.

        With them the losses take 1 / 1.1 to 1 / 3.1 of the time.
        """
        return None

    def value_and_slope(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor] | None:
        """Both, which may share what they are made of; None where the slope has no closed form."""
        slope = self.slope(x, y)
        return None if slope is None else (self.value(x, y), slope)

    def prediction(self, x: Tensor) -> Tensor:
        """The prediction that a rule sees: the probability for logits, else the input itself."""
        return x.sigmoid() if self.kind == "logits" else x

    def chances(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The prediction as a probability, and 1 less that: exact where either is near 1."""
        return sigmoids(x) if self.kind == "logits" else (x, 1 - x)

    def prediction_slope(self, x: Tensor) -> Tensor | float:
        """The derivative of the prediction."""
        return x.sigmoid() * (-x).sigmoid() if self.kind == "logits" else 1.0


@dataclass(frozen=True)
class BCE(Base):
    """Binary cross entropy of probabilities: ``-(y log x + (1 - y) log(1 - x))``, logs clamped at -100.

    The derivative is ``(x - y) / max(x (1 - x), 1e-12)``. An input or a target outside [0, 1], or NaN, gives NaN.

    Equivalent to:
        ``torch.nn.functional.binary_cross_entropy(x, y, reduction="none")``

    Source:
        `torch.nn.functional.binary_cross_entropy`, which clamps the same way.

    Examples:
        >>> from triton_thresh import threshold_loss
        >>> threshold_loss(torch.tensor([0.5, 1.0]), torch.tensor([1.0, 0.0]), base=BCE(), reduction="none")
        tensor([  0.6931, 100.0000])
    """

    kind = "probabilities"
    unit_targets = True

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        """torch's loss, with the slope in x written out: autograd's ``y / x - (1 - y) / (1 - x)`` cancels where x is near y.

        A step d of x adds slope * d; less half the curvature times d * d, so that the second derivative is right, too.
        """
        inside, at = _is_probability(x) & _is_probability(y), x.detach()
        p = torch.where(inside, at, 0.5)
        cross = F.binary_cross_entropy(p, torch.where(inside, y, 0.5), reduction="none")
        slope = (x - y) / (x * (1 - x)).clamp(min=1e-12)
        variance = p * (1 - p)
        interior = (variance - (p - y.detach()) * (1 - 2 * p)) / (variance * variance)
        curvature = torch.where(variance >= 1e-12, interior, 1e12)
        d = x - at
        return (cross + slope * d - 0.5 * curvature * d * d) * torch.where(inside, 1.0, torch.nan)

    def value(self, x: Tensor, y: Tensor) -> Tensor:
        other = 1 - y
        return _nan_outside(y * other) - self._cross(x, y, other)

    def slope(self, x: Tensor, y: Tensor) -> Tensor:
        return self._slope(x, y, _nan_outside(y * (1 - y)))

    def value_and_slope(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        other = 1 - y
        nan_or_zero = _nan_outside(y * other)
        return nan_or_zero - self._cross(x, y, other), self._slope(x, y, nan_or_zero)

    @staticmethod
    def _cross(x: Tensor, y: Tensor, other: Tensor) -> Tensor:
        return y * x.log().clamp(min=-100) + other * (-x).log1p().clamp(min=-100)

    @staticmethod
    def _slope(x: Tensor, y: Tensor, nan_or_zero: Tensor) -> Tensor:
        variance = x * (1 - x)
        return (x - y) / variance.clamp(min=1e-12) + _nan_outside(variance) + nan_or_zero


def _is_probability(x: Tensor) -> Tensor:
    return (x >= 0) & (x <= 1)


def _nan_outside(variance: Tensor) -> Tensor:
    """0 where p (1 - p) is not negative, which is just where p is in [0, 1]; else NaN. Inductor takes x * 0 for 0."""
    if is_compiling():
        return torch.where(variance >= 0, torch.zeros_like(variance), math.nan)
    if are_few(variance):
        zero = cached_constant(0.0, variance.dtype)
        return torch.where(variance >= zero, zero, cached_constant(math.nan, variance.dtype))
    return holds(torch.ge, variance, 0).reciprocal_().mul_(0)


@dataclass(frozen=True)
class BCEWithLogits(Base):
    """Binary cross entropy of logits: ``(1 - y) x + w (max(-x, 0) + log1p(exp -|x|))`` with ``w = 1 + (pos_weight - 1) y``.

    Args:
        pos_weight: the factor of positive targets: a number, a 0-dim tensor, or a tensor that broadcasts to the input's shape.

    Equivalent to:
        ``torch.nn.functional.binary_cross_entropy_with_logits(x, y, pos_weight=pos_weight, reduction="none")``

    Source:
        `torch.nn.functional.binary_cross_entropy_with_logits`.

    Examples:
        >>> from triton_thresh import threshold_loss
        >>> x, y = torch.tensor([0.0, 2.0]), torch.tensor([1.0, 0.0])
        >>> threshold_loss(x, y, base=BCEWithLogits(pos_weight=9.0), reduction="none")
        tensor([6.2383, 2.1269])
    """

    kind = "logits"
    optional_fields = ("pos_weight",)

    pos_weight: Operand | None = None

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        softplus = -F.logsigmoid(x)
        if self.pos_weight is not None:
            softplus = softplus * (1 + (self.pos_weight - 1) * y)
        return (1 - y) * x + softplus

    def slope(self, x: Tensor, y: Tensor) -> Tensor:
        if self.pos_weight is None:
            return x.sigmoid() - y
        return (1 - y) - (1 + (self.pos_weight - 1) * y) * (-x).sigmoid()

    def value_and_slope(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Compiled they share an exponential; torch's own functions take fewer passes over memory."""
        if not is_compiling():
            return self.value(x, y), self.slope(x, y)
        p, rest, log1p_exp = _logistic(x)
        softplus = log1p_exp - x.clamp(max=0)
        if self.pos_weight is None:
            return (1 - y) * x + softplus, p - y
        factor = 1 + (self.pos_weight - 1) * y
        return (1 - y) * x + factor * softplus, (1 - y) - factor * rest


@dataclass(frozen=True)
class MSE(Base):
    """Squared error: ``(x - y)**2``.

    Equivalent to:
        ``torch.nn.functional.mse_loss(x, y, reduction="none")``

    Source:
        `torch.nn.functional.mse_loss`.

    Examples:
        >>> from triton_thresh import threshold_loss
        >>> threshold_loss(torch.tensor([1.0, 3.0]), torch.zeros(2), base=MSE(), reduction="none")
        tensor([1., 9.])
    """

    kind = "values"

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        d = x - y
        return d * d

    def slope(self, x: Tensor, y: Tensor) -> Tensor:
        return 2 * (x - y)


@dataclass(frozen=True)
class Huber(Base):
    """Squared error near the target, absolute error far from it: ``d**2 / 2 where |d| <= delta else delta (|d| - delta / 2)``.

    Args:
        delta: where one becomes the other: a number above 0, a 0-dim tensor, or a tensor that broadcasts to the input's shape.

    Raises:
        ValueError: for a number that is not finite and above 0.

    Equivalent to:
        ``torch.nn.functional.huber_loss(x, y, delta=delta, reduction="none")``

    Source:
        Huber 1964, Robust Estimation of a Location Parameter; `torch.nn.functional.huber_loss`.

    Examples:
        >>> from triton_thresh import ByPrediction, threshold_loss
        >>> x, y = torch.tensor([0.5, 3.0]), torch.zeros(2)
        >>> threshold_loss(x, y, base=Huber(1.0), reduction="none")
        tensor([0.1250, 2.5000])
        >>> threshold_loss(x, y, ByPrediction(2.0, 10.0, 1.0), base=Huber(1.0), reduction="none")
        tensor([ 0.1250, 25.0000])
    """

    kind = "values"
    example = (0.5,)

    delta: Operand = 1.0

    def __post_init__(self) -> None:
        if not isinstance(self.delta, Tensor):
            check_positive("Huber", "delta", self.delta)

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        d = x - y
        near = self._near(d)  # with a selection instead, an infinite d would meet its gradient of 0
        return 0.5 * near * near + near.detach() * (d - near)

    def slope(self, x: Tensor, y: Tensor) -> Tensor:
        return self._near(x - y)

    def _near(self, d: Tensor) -> Tensor:
        return d.clamp(-self.delta, self.delta)  # type: ignore[arg-type]


def _maximum(x: Tensor, bound: Operand) -> Tensor:
    return torch.maximum(x, bound) if isinstance(bound, Tensor) else x.clamp(min=bound)


@dataclass(frozen=True)
class EpsilonInsensitive(Base):
    """Absolute error beyond a tube: ``max(|x - y| - epsilon, 0)``.

    The derivative is 0 inside the tube and at its edge.

    Args:
        epsilon: the half width of the tube: a number of 0 or more, a 0-dim tensor, or a tensor that broadcasts to the input's
            shape.

    Raises:
        ValueError: for a number below 0.

    Equivalent to:
        ``((x - y).abs() - epsilon).clamp(min=0)``

    Source:
        The loss of support vector regression; `sklearn.svm.LinearSVR`.

    Examples:
        >>> from triton_thresh import threshold_loss
        >>> x, y = torch.tensor([0.25, 3.0]), torch.zeros(2)
        >>> threshold_loss(x, y, base=EpsilonInsensitive(0.5), reduction="none")
        tensor([0.0000, 2.5000])
    """

    kind = "values"
    example = (0.25,)

    epsilon: Operand = 0.1

    def __post_init__(self) -> None:
        check_range("EpsilonInsensitive", "epsilon", self.epsilon, 0)

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        d = x - y
        size = d * _sign(d)
        return torch.where(size <= self.epsilon, 0, size - self.epsilon)

    def value(self, x: Tensor, y: Tensor) -> Tensor:
        if isinstance(self.epsilon, Tensor) or is_compiling():  # Inductor's softshrink of NaN is 0
            return self.loss(x, y)
        return F.softshrink(x - y, self.epsilon).abs_()

    def slope(self, x: Tensor, y: Tensor) -> Tensor:
        d = x - y
        if isinstance(self.epsilon, Tensor) or is_compiling():
            return torch.where(d.abs() <= self.epsilon, 0, _sign(d))
        return _side(F.softshrink(d, self.epsilon))


@dataclass(frozen=True)
class Quantile(Base):
    """The pinball loss, least at the q-quantile: ``max(q (y - x), (q - 1) (y - x))``.

    The derivative is -q below the target, 1 - q above it, and 0 at it.

    Args:
        q: the quantile to predict: a number from 0 to 1, a 0-dim tensor, or a tensor that broadcasts to the input's shape.

    Raises:
        ValueError: for a number outside [0, 1].

    Equivalent to:
        ``torch.maximum(q * (y - x), (q - 1) * (y - x))``

    Source:
        `sklearn.metrics.mean_pinball_loss`.

    Examples:
        >>> from triton_thresh import threshold_loss
        >>> x, y = torch.tensor([1.0, 3.0]), torch.tensor([2.0, 2.0])
        >>> threshold_loss(x, y, base=Quantile(0.75), reduction="none")
        tensor([0.7500, 0.2500])
    """

    kind = "values"
    example = (0.75,)

    q: Operand = 0.5

    def __post_init__(self) -> None:
        check_range("Quantile", "q", self.q, 0, 1)

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        side = _sign(x - y)
        return torch.where(side < 0, self.q * side, (1 - self.q) * side) * (x - y)

    def value(self, x: Tensor, y: Tensor) -> Tensor:
        return self.slope(x, y).mul_(x - y)

    def slope(self, x: Tensor, y: Tensor) -> Tensor:
        return _side(x - y, self.q, 1 - self.q)


@dataclass(frozen=True)
class Hinge(Base):
    """The hinge loss of scores, for targets 0 and 1: ``max(margin - s x, 0)`` with ``s = 2 y - 1``.

    The derivative is -s where ``s x <= margin``, else 0.

    Args:
        margin: how far on the right side a score costs nothing: a number, a 0-dim tensor, or a tensor that broadcasts to the
            input's shape.

    Equivalent to:
        ``(margin - (2 * y - 1) * x).clamp(min=0)``

    Source:
        Support vector machines; `sklearn.metrics.hinge_loss`, whose targets are -1 and 1.

    Examples:
        >>> from triton_thresh import threshold_loss
        >>> x, y = torch.tensor([0.25, 3.0]), torch.tensor([1.0, 0.0])
        >>> threshold_loss(x, y, base=Hinge(), reduction="none")
        tensor([0.7500, 4.0000])
    """

    kind = "scores"
    example = (1.0,)

    margin: Operand = 1.0

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        reached = (2 * y - 1) * x
        return torch.where(reached > self.margin, 0, self.margin - reached)

    def value(self, x: Tensor, y: Tensor) -> Tensor:
        return (self.margin - (2 * y - 1).mul_(x)).clamp_(min=0)

    def slope(self, x: Tensor, y: Tensor) -> Tensor:
        turned = 1 - 2 * y
        reached = (-turned).mul_(x)
        return turned.mul_(holds(torch.gt, reached, self.margin).neg_().add_(1))


class _PowerLoss(Base):
    """A loss with a power for a factor: value and slope share most of what they are made of, if the exponent is a constant."""

    def value(self, x: Tensor, y: Tensor) -> Tensor:
        return self._closed_form(x, y, False)[0] if self._has_closed_form() else self.loss(x, y)

    def slope(self, x: Tensor, y: Tensor) -> Tensor | None:
        return self._closed_form(x, y, True)[1] if self._has_closed_form() else None

    def value_and_slope(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor] | None:
        return self._closed_form(x, y, True) if self._has_closed_form() else None

    def _has_closed_form(self) -> bool:
        raise NotImplementedError

    def _closed_form(self, x: Tensor, y: Tensor, want_slope: bool) -> tuple[Tensor, Tensor]:
        """Value and slope. A slope that is not wanted is some tensor."""
        raise NotImplementedError


@dataclass(frozen=True)
class Focal(_PowerLoss):
    """Focal loss of logits: ``a_t (1 - p_t)**gamma BCE(x, y)``, which easy examples hardly enter.

    ``p_t = p y + (1 - p) (1 - y)`` is the probability of the target, ``p = sigmoid(x)``; ``a_t = alpha y + (1 - alpha) (1 - y)``.
    Targets may be soft; one outside [0, 1] gives NaN.

    Args:
        alpha: the weight of positives, against 1 - alpha of negatives: a number from 0 to 1, a tensor that broadcasts to the
            input's shape, or None or -1 for a_t = 1.
        gamma: how much easy examples lose, 0 or more: a number or a tensor. The numbers 0, 1, 2, 3 and 4 are compiled as
            products.

    Raises:
        ValueError: for an alpha outside [0, 1] other than -1, and for a gamma below 0.

    Equivalent to:
        ``torchvision.ops.sigmoid_focal_loss(x, y, alpha, gamma)``

    Source:
        Lin et al. 2017, "Focal Loss for Dense Object Detection" (arXiv:1708.02002).

    Examples:
        >>> from triton_thresh import threshold_loss
        >>> x, y = torch.tensor([0.0, 4.0]), torch.tensor([1.0, 1.0])
        >>> threshold_loss(x, y, base=Focal(alpha=None), reduction="none")
        tensor([1.7329e-01, 5.8716e-06])
    """

    kind = "logits"
    unit_targets = True
    optional_fields = ("alpha",)
    exponents = ("gamma",)
    example = (0.75, 2.0)

    alpha: Operand | None = 0.25
    gamma: Operand = 2.0

    def __post_init__(self) -> None:
        if isinstance(self.alpha, (int, float)) and not is_open(self.alpha) and self.alpha == -1:
            object.__setattr__(self, "alpha", None)
        if self.alpha is not None:
            check_range("Focal", "alpha", self.alpha, 0, 1, "; None or -1 for none")
        check_range("Focal", "gamma", self.gamma, 0)

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        p, rest = x.sigmoid(), (-x).sigmoid()
        miss = y * rest + (1 - y) * p
        cross = _mixed(y, -F.logsigmoid(x), -F.logsigmoid(-x))
        loss = times(cross, power(miss, self.gamma)) * torch.where(_is_probability(y), 1.0, torch.nan)
        return loss if self.alpha is None else loss * (self.alpha * y + (1 - self.alpha) * (1 - y))

    def _has_closed_form(self) -> bool:
        return is_constant_exponent(self.gamma)

    def _closed_form(self, x: Tensor, y: Tensor, want_slope: bool) -> tuple[Tensor, Tensor]:
        """``a_t m**gamma BCE`` and ``a_t (m**gamma (p - y) + gamma m**(gamma - 1) (1 - 2 y) p (1 - p) BCE)``, m = 1 - p_t."""
        gamma = self.gamma
        assert not isinstance(gamma, Tensor)
        p, rest, log1p_exp = _logistic(x)
        false, missed, share = (1 - y).mul_(p), y * rest, self._share(y)
        cross, miss = _cross_entropy(x, y, log1p_exp), false + missed
        factor = power(miss, gamma).mul_(share)
        if not want_slope:
            return cross.mul_(factor), x
        slope = false.sub_(missed).mul_(factor)
        if gamma:
            steep = p.mul_(rest).mul_(1 - 2 * y).mul_(cross.nan_to_num(0.0, 0.0, 0.0)).mul_(share)
            slope += steep.mul_(power(miss, gamma - 1)).mul_(gamma)
        return cross.mul_(factor), slope

    def _share(self, y: Tensor) -> Tensor:
        """a_t, or NaN for a target outside [0, 1]."""
        share = 1.0 if self.alpha is None else self.alpha * y + (1 - self.alpha) * (1 - y)
        return share + _nan_outside(y * (1 - y))


@dataclass(frozen=True)
class Asymmetric(_PowerLoss):
    """Asymmetric loss of logits for many labels: easy negatives lose more than easy positives, the easiest lose all.

    ``-(1 - p_t)**g (y log max(p, eps) + (1 - y) log max(q, eps))`` with ``p = sigmoid(x)``, ``q = min(1 - p + clip, 1)``,
    ``p_t = p y + q (1 - y)`` and ``g = gamma_pos y + gamma_neg (1 - y)``. Targets may be soft; one outside [0, 1] gives NaN.

    Args:
        gamma_neg: the exponent of negatives, 0 or more: a number, a 0-dim tensor, or a tensor that broadcasts to the input's
            shape. The numbers 0, 1, 2, 3 and 4 are compiled as products.
        gamma_pos: that of positives; likewise.
        clip: negatives predicted below it cost nothing; None is 0.
        eps: the least argument of the logarithms.
        detach_focal: the factor ``(1 - p_t)**g`` has no gradient.

    Raises:
        ValueError: for a number below 0.

    Equivalent to:
        ``AsymmetricLossOptimized(gamma_neg, gamma_pos, clip, eps, detach_focal)(x, y)`` of the source, summed

    Source:
        Ridnik et al. 2021, "Asymmetric Loss For Multi-Label Classification" (arXiv:2009.14119).

    Examples:
        >>> from triton_thresh import threshold_loss
        >>> x, y = torch.tensor([0.0, 0.0, -4.0]), torch.tensor([1.0, 0.0, 0.0])
        >>> threshold_loss(x, y, base=Asymmetric(), reduction="none")
        tensor([0.3466, 0.0245, 0.0000])
    """

    kind = "logits"
    unit_targets = True
    static_fields = ("detach_focal",)
    exponents = ("gamma_neg", "gamma_pos")
    example = (4.0, 1.0, 0.0625)

    gamma_neg: Operand = 4.0
    gamma_pos: Operand = 1.0
    clip: Operand | None = 0.05
    eps: Operand = 1e-8
    detach_focal: bool = False

    def __post_init__(self) -> None:
        if self.clip is None:
            object.__setattr__(self, "clip", 0.0)
        for name in ("gamma_neg", "gamma_pos", "clip", "eps"):
            check_range("Asymmetric", name, getattr(self, name), 0)
        if not isinstance(self.detach_focal, bool):
            raise TypeError(f"Asymmetric: detach_focal must be a bool, got {self.detach_focal!r}")

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        assert self.clip is not None
        whole = torch.where(_is_probability(y), 1.0, torch.nan)  # times x, too: a gradient of 0 times NaN is NaN
        p, rest = sigmoids(x * whole)
        miss = (p - self.clip).clamp(min=0)  # 1 - q
        hit = (rest + self.clip).clamp(max=1)
        low = self._floor()
        log_p = torch.where(p < self.eps, low, F.logsigmoid(x))
        known = ~((hit < self.eps) | (hit <= 0))  # true of NaN, which is kept
        near, far = torch.where(miss < 0.5, miss, 0), torch.where(known, hit, 1)
        log_q = torch.where(known, torch.where(miss < 0.5, torch.log1p(-near), far.log()), low)
        factor = power(y * rest + (1 - y) * miss, self._exponent(y))
        if self.detach_focal:
            factor = factor.detach()
        return times(_mixed(y, -log_p, -log_q), factor) * whole

    def _has_closed_form(self) -> bool:
        return is_constant_exponent(self.gamma_neg) and is_constant_exponent(self.gamma_pos)

    def _closed_form(self, x: Tensor, y: Tensor, want_slope: bool) -> tuple[Tensor, Tensor]:
        """``F C`` and ``F dC/dx + C dF/dx`` for the factor F and the cross entropy C; dF/dx is 0 where 1 - p_t is."""
        assert self.clip is not None
        (p, rest, log1p_exp), other = _logistic(x), 1 - y
        missed, hit = (p - self.clip).clamp_(min=0), (rest + self.clip).clamp_(max=1)  # 1 - q and q
        share = y * other  # 0 for hard targets, below 0 for a target outside [0, 1]
        hard = x.is_cpu and not is_compiling() and not share.any()
        miss = None if hard else (missed * other).addcmul_(y, rest)
        factor = self._factor(y, other, rest, missed, miss)
        log_p = _maximum(x.clamp(max=0).sub_(log1p_exp), self._floor())
        far = self._is_far_from_floor()
        if far:
            cross = torch.log1p(-missed).mul_(other).addcmul_(y, log_p).neg_()
        else:
            near = torch.log1p(-missed.clamp(max=0.5))
            cross = _mixed(y, log_p, _maximum(torch.where(missed < 0.5, near, hit.log()), self._floor())).neg_()
        nan_or_zero = None if hard else _nan_outside(share)
        value = cross * factor if nan_or_zero is None else (cross * factor).add_(nan_or_zero)
        if not want_slope:
            return value, x
        gained, lost = y * rest, p * rest
        lost.mul_(other).mul_(holds(torch.ge, p, self.clip))
        slope = lost / hit.clamp(min=torch.finfo(hit.dtype).tiny)
        if not far:
            slope.mul_(holds(torch.ge, hit, self.eps))
        slope.addcmul_(gained, holds(torch.ge, p, self.eps), value=-1).mul_(factor)
        if not self.detach_focal:
            steep = self._steepness(y, other, rest, missed, miss, factor)
            slope += lost.addcmul_(gained, p, value=-1).mul_(steep).mul_(cross.nan_to_num_(0.0, 0.0, 0.0))
        return value, slope if nan_or_zero is None else slope.add_(nan_or_zero)

    def _factor(self, y: Tensor, other: Tensor, rest: Tensor, missed: Tensor, miss: Tensor | None) -> Tensor:
        """``(1 - p_t)**g``; `miss` is 1 - p_t, None for targets of 0 and 1. Products serve those, and equal exponents."""
        negative, positive = self.gamma_neg, self.gamma_pos
        if miss is None:
            return power(missed, negative).mul_(other).addcmul_(y, power(rest, positive))
        return power(miss, positive) if positive == negative else torch.xlogy(self._exponent(y), miss).exp_()

    def _steepness(
        self, y: Tensor, other: Tensor, rest: Tensor, missed: Tensor, miss: Tensor | None, factor: Tensor
    ) -> Tensor:
        """The derivative of the factor in 1 - p_t."""
        negative, positive = self.gamma_neg, self.gamma_pos
        if miss is None:
            return power_slope(missed, negative).mul_(other).addcmul_(y, power_slope(rest, positive))
        if positive == negative:
            return power_slope(miss, positive)
        return (factor * self._exponent(y)).div_(miss).nan_to_num_(0.0, 0.0, 0.0)

    def _floor(self) -> Operand:
        """log eps"""
        return torch.log(self.eps) if isinstance(self.eps, Tensor) else math.log(self.eps) if self.eps else -math.inf

    def _is_far_from_floor(self) -> bool:
        """True for numbers with which q stays above eps, log1p(q - 1) keeps its digits, and no logarithm is infinite."""
        if isinstance(self.clip, Tensor) or isinstance(self.eps, Tensor) or self.clip is None:
            return False
        return 1e-30 < self.eps < 1 / 64 <= self.clip

    def _exponent(self, y: Tensor) -> Operand:
        positive, negative = self.gamma_pos, self.gamma_neg
        if not isinstance(positive, Tensor) and not isinstance(negative, Tensor) and positive == negative:
            return positive
        return positive * y + negative * (1 - y)


def is_constant_exponent(exponent: Operand) -> bool:
    """True for a number that products serve, and that no compiler leaves open."""
    return not isinstance(exponent, Tensor) and not is_open(exponent) and exponent in CONSTANT_EXPONENTS


def _logistic(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """sigmoid(x), sigmoid(-x) and ``log1p(exp(-|x|))``, off the tape; compiled, of one exponential."""
    if not is_compiling():
        return x.sigmoid(), (-x).sigmoid(), x.abs().neg_().exp_().log1p_()
    small = x.abs().neg_().exp_()
    larger = (1 + small).reciprocal_()
    smaller, right = small * larger, x > 0
    return torch.where(right, larger, smaller), torch.where(right, smaller, larger), small.log1p_()


def _cross_entropy(x: Tensor, y: Tensor, log1p_exp: Tensor) -> Tensor:
    """The cross entropy of logits, off the tape. A term without a share may be infinite; a NaN comes by the last term."""
    negative = (1 - y).mul_(x.clamp(min=0)).nan_to_num_(0.0, math.inf, -math.inf)
    positive = x.clamp(max=0).neg_().mul_(y).nan_to_num_(0.0, math.inf, -math.inf)
    return negative.add_(positive).add_(log1p_exp)


def sigmoids(x: Tensor) -> tuple[Tensor, Tensor]:
    """sigmoid(x) and sigmoid(-x). That near 1 is 1 less the other, since autograd's slope s (1 - s) would be 0."""
    p, rest = x.sigmoid(), (-x).sigmoid()
    return torch.where(x > 0, 1 - rest, p), torch.where(x > 0, rest, 1 - p)


def _sign(x: Tensor) -> Tensor:
    """The sign, off the tape; NaN of NaN."""
    x = x.detach()
    return torch.where(x > 0, 1, torch.where(x < 0, -1, x))


def holds(compare: Callable[..., Tensor], x: Tensor, bound: Operand) -> Tensor:
    """1 where compare(x, bound) else 0, off the tape. A comparison that writes numbers is vectorised on a CPU; where is not."""
    return compare(x, bound).to(x.dtype) if is_compiling() else compare(x, bound, out=torch.empty_like(x))


def _side(d: Tensor, low: Operand = 1.0, high: Operand = 1.0) -> Tensor:
    """-low where d < 0, high where d > 0, else 0, and NaN of NaN; off the tape. Inductor takes x * 0 for 0."""
    if is_compiling():
        return torch.where(d > 0, high, torch.where(d < 0, -low, d))
    above, below = holds(torch.gt, d, 0), holds(torch.lt, d, 0)
    return above.mul_(high).sub_(below.mul_(low)).add_(d.clamp(-1, 1).mul_(0))


def power(base: Tensor, exponent: Operand) -> Tensor:
    """base ** exponent for 0 <= base and an exponent of 0 or more; at 0 its slope is 0.

    A slope ``exponent * base ** (exponent - 1)`` of float32 overflows for small bases, and its own slope does sooner.
    """
    if is_constant_exponent(exponent):
        product = torch.ones_like(base)
        for _ in range(int(exponent)):
            product = product * base
        return product
    wide = base.double()
    live = ~(wide <= 1e-150)  # true of NaN, which is kept
    at_zero = exponent == 0 if isinstance(exponent, Tensor) else float(exponent == 0)
    return torch.where(live, torch.where(live, wide, 1) ** exponent, at_zero).to(base.dtype)


def power_slope(base: Tensor, exponent: Operand) -> Tensor:
    """The derivative of `power` in its base, off the tape."""
    if is_constant_exponent(exponent):
        assert not isinstance(exponent, Tensor)
        return exponent * power(base, exponent - 1) if exponent else torch.zeros_like(base)
    wide = base.double()
    live = wide > 1e-150
    return torch.where(live, exponent * torch.where(live, wide, 1) ** (exponent - 1), 0.0).to(base.dtype)


def times(loss: Tensor, factor: Tensor) -> Tensor:
    """loss * factor. An infinite loss does not meet the factor's slope, which is 0 there."""
    return loss * factor.detach() + loss.nan_to_num(0.0, 0.0, 0.0) * (factor - factor.detach())


def _mixed(y: Tensor, positive: Tensor, negative: Tensor) -> Tensor:
    """y * positive + (1 - y) * negative. A term without a share may be infinite."""
    return torch.where(y == 0, 0, y * positive) + torch.where(y == 1, 0, (1 - y) * negative)


BASES: Sequence[type[Base]] = (
    BCE,
    BCEWithLogits,
    MSE,
    Focal,
    Asymmetric,
    Huber,
    EpsilonInsensitive,
    Quantile,
    Hinge,
)
