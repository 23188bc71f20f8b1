"""The element losses: each a class with its formula in plain torch, and the fields that the formula reads.

A device function of the same name, in snake case, is the formula in kernels/pointwise.py. Both are written so that they
differentiate rightly at their limits, and the plain one twice.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from .checks import Operand, check_positive

Kind = Literal["logits", "probabilities", "scores", "values"]
BaseName = Literal["bce", "bce_with_logits", "mse"]


class Settings:
    """A frozen dataclass of operands: what bases and rules have in common.

    A field is an operand, save those in `static_fields`, which belong to the kernel's key. Those in `optional_fields` may be
    None.
    """

    example: ClassVar[tuple[Any, ...]] = ()  # arguments with which tests and benchmarks make one
    static_fields: ClassVar[tuple[str, ...]] = ()
    optional_fields: ClassVar[tuple[str, ...]] = ()

    @classmethod
    @functools.cache
    def snake_name(cls) -> str:
        """The class's name in snake case, which is that of its device function."""
        return re.sub(r"(?<=[a-z])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", cls.__name__).lower()

    def operands(self) -> dict[str, Operand]:
        """The operands that were given, by the names of their fields."""
        found = {}
        for name in self.__dataclass_fields__:  # type: ignore[attr-defined]
            value = getattr(self, name)
            if name not in self.static_fields and not (value is None and name in self.optional_fields):
                found[name] = value
        return found

    def static(self) -> tuple[tuple[str, Any], ...]:
        """The static fields with their values."""
        return tuple([(name, getattr(self, name)) for name in self.static_fields])


class Base(Settings):
    """An element loss. `kind` says what its input is."""

    kind: ClassVar[Kind]

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

    def prediction(self, x: Tensor) -> Tensor:
        """The prediction that a rule sees: the probability for logits, else the input itself."""
        return x.sigmoid() if self.kind == "logits" else x

    def prediction_slope(self, x: Tensor) -> Tensor | float:
        """Its derivative."""
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
        cross = y * x.log().clamp(min=-100) + (1 - y) * (-x).log1p().clamp(min=-100)
        return _nan_outside(y * (1 - y)) - cross

    def slope(self, x: Tensor, y: Tensor) -> Tensor:
        variance = x * (1 - x)
        slope = (x - y) / variance.clamp(min=1e-12)
        return slope + _nan_outside(variance) + _nan_outside(y * (1 - y))


def _is_probability(x: Tensor) -> Tensor:
    return (x >= 0) & (x <= 1)


def _nan_outside(variance: Tensor) -> Tensor:
    """0 where p (1 - p) is not negative, which is just where p is in [0, 1]; else NaN. torch.where would take longer on a CPU."""
    return variance.sqrt() * 0


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
        d = (x - y).abs()
        near = _least(d, self.delta)  # with a selection instead, an infinite d would meet its gradient of 0
        return 0.5 * near * near + self.delta * (d - near)

    def slope(self, x: Tensor, y: Tensor) -> Tensor:
        d = x - y
        return _least(_least(d, self.delta).neg(), self.delta).neg()


def _least(x: Tensor, bound: Operand) -> Tensor:
    return torch.minimum(x, bound) if isinstance(bound, Tensor) else x.clamp(max=bound)


BASES: Sequence[type[Base]] = (BCE, BCEWithLogits, MSE, Huber)
