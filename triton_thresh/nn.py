"""Modules over the functions: thin, with no state but their settings."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from . import functional
from .rules import Operand

__all__ = [
    "BinaryThreshold",
    "ExceedanceMSELoss",
    "Hardshrink",
    "ProximityMSELoss",
    "Softshrink",
    "Threshold",
    "ThresholdBCELoss",
    "ThresholdBCEWithLogitsLoss",
    "ThresholdMSELoss",
]


class _Settings(nn.Module):
    """Keeps its settings as attributes (tensors as buffers, so that ``to`` moves them) and shows them all in ``repr``."""

    def __init__(self, **settings: object) -> None:
        super().__init__()
        self._settings = tuple(settings)
        for name, value in settings.items():
            if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
                self.register_buffer(name, value)
            else:
                setattr(self, name, value)

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={_shown(getattr(self, name))}" for name in self._settings)


def _shown(value: object) -> str:
    if isinstance(value, Tensor):
        return f"tensor({tuple(value.shape)}, {str(value.dtype).removeprefix('torch.')})"
    return repr(value)


class Threshold(_Settings):
    """`functional.threshold` as a module, a drop-in for `torch.nn.Threshold`.

    Example:
        >>> Threshold(0.1, 20.0)
        Threshold(threshold=0.1, value=20.0, inplace=False)
    """

    threshold: Operand
    value: float
    inplace: bool

    def __init__(self, threshold: Operand, value: float = 0.0, inplace: bool = False) -> None:
        super().__init__(threshold=threshold, value=value, inplace=inplace)

    def forward(self, input: Tensor) -> Tensor:
        return functional.threshold(input, self.threshold, self.value, inplace=self.inplace)


class Hardshrink(_Settings):
    """`functional.hardshrink` as a module, a drop-in for `torch.nn.Hardshrink`."""

    lambd: Operand
    inplace: bool

    def __init__(self, lambd: Operand = 0.5, inplace: bool = False) -> None:
        super().__init__(lambd=lambd, inplace=inplace)

    def forward(self, input: Tensor) -> Tensor:
        return functional.hardshrink(input, self.lambd, inplace=self.inplace)


class Softshrink(_Settings):
    """`functional.softshrink` as a module, a drop-in for `torch.nn.Softshrink`; `lambd` may be an `nn.Parameter`."""

    lambd: Operand

    def __init__(self, lambd: Operand = 0.5) -> None:
        super().__init__(lambd=lambd)

    def forward(self, input: Tensor) -> Tensor:
        return functional.softshrink(input, self.lambd)


class BinaryThreshold(_Settings):
    """`functional.binary_threshold` as a module."""

    threshold: Operand
    above_value: float
    below_value: float
    dtype: torch.dtype | None

    def __init__(
        self,
        threshold: Operand,
        above_value: float = 1.0,
        below_value: float = 0.0,
        *,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(threshold=threshold, above_value=above_value, below_value=below_value, dtype=dtype)

    def forward(self, input: Tensor) -> Tensor:
        return functional.binary_threshold(input, self.threshold, self.above_value, self.below_value, dtype=self.dtype)


class _ByPredictionLoss(_Settings):
    """Settings of the losses weighed by prediction."""

    threshold: Operand
    weight_above: Operand
    weight_below: Operand
    weight: Operand | None
    reduction: str


class ThresholdBCELoss(_ByPredictionLoss):
    """`functional.threshold_bce_loss` as a module."""

    def __init__(
        self,
        threshold: Operand = 0.7,
        weight_above: Operand = 1.0,
        weight_below: Operand = 0.1,
        *,
        weight: Operand | None = None,
        reduction: str = "mean",
    ) -> None:
        super().__init__(
            threshold=threshold,
            weight_above=weight_above,
            weight_below=weight_below,
            weight=weight,
            reduction=reduction,
        )

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return functional.threshold_bce_loss(
            input,
            target,
            self.threshold,
            self.weight_above,
            self.weight_below,
            weight=self.weight,
            reduction=self.reduction,
        )


class ThresholdBCEWithLogitsLoss(_ByPredictionLoss):
    """`functional.threshold_bce_with_logits_loss` as a module."""

    pos_weight: Operand | None

    def __init__(
        self,
        threshold: Operand = 0.7,
        weight_above: Operand = 1.0,
        weight_below: Operand = 0.1,
        *,
        weight: Operand | None = None,
        pos_weight: Operand | None = None,
        reduction: str = "mean",
    ) -> None:
        super().__init__(
            threshold=threshold,
            weight_above=weight_above,
            weight_below=weight_below,
            weight=weight,
            pos_weight=pos_weight,
            reduction=reduction,
        )

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return functional.threshold_bce_with_logits_loss(
            input,
            target,
            self.threshold,
            self.weight_above,
            self.weight_below,
            weight=self.weight,
            pos_weight=self.pos_weight,
            reduction=self.reduction,
        )


class ThresholdMSELoss(_ByPredictionLoss):
    """`functional.threshold_mse_loss` as a module."""

    def __init__(
        self,
        threshold: Operand,
        weight_above: Operand = 1.0,
        weight_below: Operand = 0.1,
        *,
        weight: Operand | None = None,
        reduction: str = "mean",
    ) -> None:
        super().__init__(
            threshold=threshold,
            weight_above=weight_above,
            weight_below=weight_below,
            weight=weight,
            reduction=reduction,
        )

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return functional.threshold_mse_loss(
            input,
            target,
            self.threshold,
            self.weight_above,
            self.weight_below,
            weight=self.weight,
            reduction=self.reduction,
        )


class ProximityMSELoss(_Settings):
    """`functional.proximity_mse_loss` as a module."""

    threshold: Operand
    penalty_range: Operand
    penalty_factor: Operand
    weight: Operand | None
    reduction: str

    def __init__(
        self,
        threshold: Operand,
        penalty_range: Operand = 0.2,
        penalty_factor: Operand = 1.5,
        *,
        weight: Operand | None = None,
        reduction: str = "mean",
    ) -> None:
        super().__init__(
            threshold=threshold,
            penalty_range=penalty_range,
            penalty_factor=penalty_factor,
            weight=weight,
            reduction=reduction,
        )

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return functional.proximity_mse_loss(
            input,
            target,
            self.threshold,
            self.penalty_range,
            self.penalty_factor,
            weight=self.weight,
            reduction=self.reduction,
        )


class ExceedanceMSELoss(_Settings):
    """`functional.exceedance_mse_loss` as a module."""

    loss_threshold: Operand
    penalty_factor: Operand
    weight: Operand | None
    reduction: str

    def __init__(
        self,
        loss_threshold: Operand = 1.0,
        penalty_factor: Operand = 2.0,
        *,
        weight: Operand | None = None,
        reduction: str = "mean",
    ) -> None:
        super().__init__(
            loss_threshold=loss_threshold, penalty_factor=penalty_factor, weight=weight, reduction=reduction
        )

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return functional.exceedance_mse_loss(
            input, target, self.loss_threshold, self.penalty_factor, weight=self.weight, reduction=self.reduction
        )
