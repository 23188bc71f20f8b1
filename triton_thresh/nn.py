"""Modules over the functions: thin, with no state but their settings."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from . import functional
from .rules import Operand

__all__ = [
    "BinaryThreshold",
    "ExceedanceMSELoss",
    "Hardshrink",
    "JumpReLU",
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


class JumpReLU(nn.Module):
    """`functional.jumprelu` with a threshold per feature that learns; calling `l0` gives the number of kept features too.

    Args:
        num_features: the size of the inputs' last dimension, or the shape of their last dimensions.
        threshold: the initial value.
        bandwidth: the width of the window in which a threshold gets a gradient.
        input_gradient: the window term also reaches the input, with the opposite sign.
        device: of the parameter.

    The parameter is float32 and stays so when the module is cast to a 16-bit type, in which steps as small as those of
    thresholds are rounded away; float64 is kept.

    Source:
        Rajamanoharan et al. 2024 (arXiv:2407.14435).

    Example:
        >>> activation = JumpReLU(4, threshold=0.5, bandwidth=0.25).bfloat16()
        >>> activation
        JumpReLU(4, bandwidth=0.25, input_gradient=False)
        >>> activation.threshold
        Parameter containing:
        tensor([0.5000, 0.5000, 0.5000, 0.5000], requires_grad=True)
        >>> activations, l0 = activation.l0(torch.tensor([[0.0, 0.5, 0.6, 2.0]]))
        >>> l0
        tensor([2.], grad_fn=<LearnedGateBackward>)
    """

    threshold: nn.Parameter

    def __init__(
        self,
        num_features: int | tuple[int, ...],
        threshold: float = 1e-3,
        bandwidth: float = 1e-3,
        *,
        input_gradient: bool = False,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.num_features, self.bandwidth, self.input_gradient = num_features, bandwidth, input_gradient
        shape = (num_features,) if isinstance(num_features, int) else tuple(num_features)
        self.threshold = nn.Parameter(torch.full(shape, threshold, dtype=torch.float32, device=device))

    def forward(self, input: Tensor) -> Tensor:
        return functional.jumprelu(input, self.threshold, self.bandwidth, input_gradient=self.input_gradient)

    def l0(self, input: Tensor) -> tuple[Tensor, Tensor]:
        """The activations, and how many of each row are kept, whose gradient reaches the thresholds."""
        return functional.jumprelu_l0(input, self.threshold, self.bandwidth, input_gradient=self.input_gradient)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        def keeping_width(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype.itemsize >= tensor.dtype.itemsize else tensor.to(moved.device)

        return super()._apply(keeping_width, recurse)  # type: ignore[no-untyped-call]

    def extra_repr(self) -> str:
        return f"{self.num_features}, bandwidth={self.bandwidth}, input_gradient={self.input_gradient}"


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
