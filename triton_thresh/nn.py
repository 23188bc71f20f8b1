"""Modules over the functions: thin, with no state but their settings."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from . import functional
from .checks import check_number, check_positive
from .rules import Operand, Reduction

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
    """`functional.threshold` as a module, a drop-in for `torch.nn.Threshold`: ``y = value where x <= threshold else x``.

    Args:
        threshold: a number, or a tensor that broadcasts to the input's shape; a tensor becomes a buffer.
        value: the number put in.
        inplace: write the result to the input.

    Shape, dtypes, errors and source are those of `functional.threshold`, when the module is called.

    Equivalent to:
        ``functional.threshold(input, threshold, value, inplace=inplace)``

    Examples:
        >>> Threshold(0.1, 20.0)
        Threshold(threshold=0.1, value=20.0, inplace=False)
        >>> Threshold(0.1, 20.0)(torch.tensor([-1.0, 2.0]))
        tensor([20.,  2.])
    """

    threshold: Operand
    value: float
    inplace: bool

    def __init__(self, threshold: Operand, value: float = 0.0, inplace: bool = False) -> None:
        super().__init__(threshold=threshold, value=value, inplace=inplace)

    def forward(self, input: Tensor) -> Tensor:
        return functional.threshold(input, self.threshold, self.value, inplace=self.inplace)


class Hardshrink(_Settings):
    """`functional.hardshrink` as a module, a drop-in for `torch.nn.Hardshrink`: ``y = 0 where |x| <= lambd else x``.

    Args:
        lambd: a number, or a tensor that broadcasts to the input's shape; a tensor becomes a buffer.
        inplace: write the result to the input.

    Shape, dtypes, errors and source are those of `functional.hardshrink`, when the module is called.

    Equivalent to:
        ``functional.hardshrink(input, lambd, inplace=inplace)``

    Examples:
        >>> Hardshrink(0.5)(torch.tensor([-1.0, 0.2]))
        tensor([-1.,  0.])
    """

    lambd: Operand
    inplace: bool

    def __init__(self, lambd: Operand = 0.5, inplace: bool = False) -> None:
        super().__init__(lambd=lambd, inplace=inplace)

    def forward(self, input: Tensor) -> Tensor:
        return functional.hardshrink(input, self.lambd, inplace=self.inplace)


class Softshrink(_Settings):
    """`functional.softshrink` as a module, a drop-in for `torch.nn.Softshrink`, whose `lambd` may learn.

    ``y = x - lambd where x > lambd, x + lambd where x < -lambd, else 0``.

    Args:
        lambd: a number, or a tensor that broadcasts to the input's shape; a tensor becomes a buffer. An `nn.Parameter` learns.

    Shape, dtypes, errors and source are those of `functional.softshrink`, when the module is called.

    Equivalent to:
        ``functional.softshrink(input, lambd)``

    Examples:
        >>> Softshrink(0.5)(torch.tensor([-1.0, 0.2]))
        tensor([-0.5000,  0.0000])
    """

    lambd: Operand

    def __init__(self, lambd: Operand = 0.5) -> None:
        super().__init__(lambd=lambd)

    def forward(self, input: Tensor) -> Tensor:
        return functional.softshrink(input, self.lambd)


class JumpReLU(nn.Module):
    """`functional.jumprelu` with a threshold per feature that learns: ``y = x where x > threshold else 0``.

    `l0` gives the number of kept features too. The parameter is float32 and stays so when the module is cast to a 16-bit type,
    in which steps as small as those of thresholds are rounded away.

    Args:
        num_features: the size of the inputs' last dimension, or the shape of their last dimensions.
        threshold: the initial value.
        bandwidth: the width of the window in which a threshold gets a gradient.
        input_gradient: the window term also reaches the input, with the opposite sign.
        device: of the parameter.

    Shape:
        The output has the input's shape, dtype and memory format; dtypes are those of `functional.jumprelu`.

    Raises:
        TypeError: for settings that are no numbers; when called, as `functional.jumprelu`.
        ValueError: for sizes below 0 and a bandwidth that is not above 0; when called, for an input to
            whose shape the thresholds do not broadcast.

    Equivalent to:
        ``functional.jumprelu(input, threshold, bandwidth, input_gradient=input_gradient)``

    Source:
        Rajamanoharan et al. 2024 (arXiv:2407.14435).

    Examples:
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
        sizes = num_features if isinstance(num_features, (tuple, list)) else (num_features,)
        try:
            shape = tuple(map(operator.index, sizes))
        except TypeError:
            shape = (-1,)
        if min(shape, default=0) < 0:
            raise ValueError(f"JumpReLU: num_features must be a size or a tuple of sizes, got {num_features!r}")
        self.num_features = shape if isinstance(num_features, (tuple, list)) else shape[0]
        self.initial_threshold = check_number("JumpReLU", "threshold", threshold)
        self.bandwidth = check_positive("JumpReLU", "bandwidth", bandwidth)
        self.input_gradient = input_gradient
        self.threshold = nn.Parameter(torch.empty(shape, dtype=torch.float32, device=device))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set every threshold to the initial value."""
        nn.init.constant_(self.threshold, self.initial_threshold)

    def forward(self, input: Tensor) -> Tensor:
        return functional.jumprelu(input, self.threshold, self.bandwidth, input_gradient=self.input_gradient)

    def l0(self, input: Tensor) -> tuple[Tensor, Tensor]:
        """The activations, and how many of each row are kept, whose gradient reaches the thresholds."""
        return functional.jumprelu_l0(input, self.threshold, self.bandwidth, input_gradient=self.input_gradient)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        def keeping_width(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype.itemsize >= 4 else tensor.to(moved.device)

        return super()._apply(keeping_width, recurse)  # type: ignore[no-untyped-call]

    def extra_repr(self) -> str:
        return f"{self.num_features}, bandwidth={self.bandwidth}, input_gradient={self.input_gradient}"


class BinaryThreshold(_Settings):
    """`functional.binary_threshold` as a module: ``y = above_value where x > threshold else below_value``.

    Args:
        threshold: a number, or a tensor that broadcasts to the input's shape; a tensor becomes a buffer.
        above_value: the number where x is above.
        below_value: the number elsewhere.
        dtype: of the output; the input's if None.

    Shape, dtypes, errors and source are those of `functional.binary_threshold`, when the module is called.

    Equivalent to:
        ``functional.binary_threshold(input, threshold, above_value, below_value, dtype=dtype)``

    Examples:
        >>> BinaryThreshold(0.5, 1.0, -1.0)(torch.tensor([0.2, 0.9]))
        tensor([-1.,  1.])
    """

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
    reduction: Reduction


class ThresholdBCELoss(_ByPredictionLoss):
    """`functional.threshold_bce_loss` as a module: BCE times ``weight_above where p >= threshold else weight_below``.

    Args:
        threshold: where the weight changes: a number, or a tensor that broadcasts to the input's shape, which becomes a buffer.
        weight_above: the weight from the threshold on, a number or a tensor.
        weight_below: the weight of all others, a number or a tensor.
        weight: a further factor of each element, a number or a tensor.
        reduction: "mean" (divides by the number of elements, never by a sum of weights), "sum" or "none".

    Shape, dtypes, errors and source are those of `functional.threshold_bce_loss`, when the module is called.

    Equivalent to:
        ``functional.threshold_bce_loss(input, target, threshold, weight_above, weight_below, ...)``

    Examples:
        >>> ThresholdBCELoss(0.7)(torch.tensor([0.9, 0.2]), torch.tensor([1.0, 0.0]))
        tensor(0.0638)
    """

    def __init__(
        self,
        threshold: Operand = 0.7,
        weight_above: Operand = 1.0,
        weight_below: Operand = 0.1,
        *,
        weight: Operand | None = None,
        reduction: Reduction = "mean",
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
    """`functional.threshold_bce_with_logits_loss` as a module: BCE of logits, weighed by the prediction.

    ``weight_above where sigmoid(x) >= threshold else weight_below``; `threshold` is a probability.

    Args:
        threshold: where the weight changes: a number, or a tensor that broadcasts to the input's shape, which becomes a buffer.
        weight_above: the weight from the threshold on, a number or a tensor.
        weight_below: the weight of all others, a number or a tensor.
        weight: a further factor of each element, a number or a tensor.
        pos_weight: the factor of positive targets, a number or a tensor.
        reduction: "mean" (divides by the number of elements, never by a sum of weights), "sum" or "none".

    Shape, dtypes, errors and source are those of `functional.threshold_bce_with_logits_loss`, when the module is called.

    Equivalent to:
        ``functional.threshold_bce_with_logits_loss(input, target, threshold, weight_above, weight_below, ...)``

    Examples:
        >>> ThresholdBCEWithLogitsLoss(0.7)(torch.tensor([2.0, -1.0]), torch.tensor([1.0, 0.0]))
        tensor(0.0791)
    """

    pos_weight: Operand | None

    def __init__(
        self,
        threshold: Operand = 0.7,
        weight_above: Operand = 1.0,
        weight_below: Operand = 0.1,
        *,
        weight: Operand | None = None,
        pos_weight: Operand | None = None,
        reduction: Reduction = "mean",
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
    """`functional.threshold_mse_loss` as a module: squared error, weighed by the prediction.

    ``weight_above where x >= threshold else weight_below``.

    Args:
        threshold: where the weight changes: a number, or a tensor that broadcasts to the input's shape, which becomes a buffer.
        weight_above: the weight from the threshold on, a number or a tensor.
        weight_below: the weight of all others, a number or a tensor.
        weight: a further factor of each element, a number or a tensor.
        reduction: "mean" (divides by the number of elements, never by a sum of weights), "sum" or "none".

    Shape, dtypes, errors and source are those of `functional.threshold_mse_loss`, when the module is called.

    Equivalent to:
        ``functional.threshold_mse_loss(input, target, threshold, weight_above, weight_below, ...)``

    Examples:
        >>> ThresholdMSELoss(2.0)(torch.tensor([1.0, 3.0]), torch.tensor([0.0, 1.0]))
        tensor(2.0500)
    """

    def __init__(
        self,
        threshold: Operand,
        weight_above: Operand = 1.0,
        weight_below: Operand = 0.1,
        *,
        weight: Operand | None = None,
        reduction: Reduction = "mean",
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
    """`functional.proximity_mse_loss` as a module: squared error that weighs more near a threshold.

    ``1 + penalty_factor * (1 - d / penalty_range) where d = |x - threshold| < penalty_range else 1``.

    Args:
        threshold: what to stay away from: a number, or a tensor that broadcasts to the input's shape, which becomes a buffer.
        penalty_range: how far its influence reaches, a number or a tensor.
        penalty_factor: the extra weight at the threshold itself, a number or a tensor.
        weight: a further factor of each element, a number or a tensor.
        reduction: "mean" (divides by the number of elements, never by a sum of weights), "sum" or "none".

    Shape, dtypes, errors and source are those of `functional.proximity_mse_loss`, when the module is called.

    Equivalent to:
        ``functional.proximity_mse_loss(input, target, threshold, penalty_range, penalty_factor, ...)``

    Examples:
        >>> ProximityMSELoss(0.5)(torch.tensor([0.5, 2.0]), torch.tensor([0.0, 1.0]))
        tensor(0.8125)
    """

    threshold: Operand
    penalty_range: Operand
    penalty_factor: Operand
    weight: Operand | None
    reduction: Reduction

    def __init__(
        self,
        threshold: Operand,
        penalty_range: Operand = 0.2,
        penalty_factor: Operand = 1.5,
        *,
        weight: Operand | None = None,
        reduction: Reduction = "mean",
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
    """`functional.exceedance_mse_loss` as a module: squared error that weighs large errors more.

    ``penalty_factor where (x - y)**2 > loss_threshold else 1``.

    Args:
        loss_threshold: the element loss above which the factor applies, a number or a tensor.
        penalty_factor: that factor, a number or a tensor.
        weight: a further factor of each element, a number or a tensor.
        reduction: "mean" (divides by the number of elements, never by a sum of weights), "sum" or "none".

    Shape, dtypes, errors and source are those of `functional.exceedance_mse_loss`, when the module is called.

    Equivalent to:
        ``functional.exceedance_mse_loss(input, target, loss_threshold, penalty_factor, ...)``

    Examples:
        >>> ExceedanceMSELoss()(torch.tensor([0.5, 3.0]), torch.tensor([0.0, 1.0]))
        tensor(4.1250)
    """

    loss_threshold: Operand
    penalty_factor: Operand
    weight: Operand | None
    reduction: Reduction

    def __init__(
        self,
        loss_threshold: Operand = 1.0,
        penalty_factor: Operand = 2.0,
        *,
        weight: Operand | None = None,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__(
            loss_threshold=loss_threshold, penalty_factor=penalty_factor, weight=weight, reduction=reduction
        )

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return functional.exceedance_mse_loss(
            input, target, self.loss_threshold, self.penalty_factor, weight=self.weight, reduction=self.reduction
        )


def __dir__() -> list[str]:
    return __all__
