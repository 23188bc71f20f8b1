"""The public functions. Each is the registry's op of the same name, with its documentation."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Literal, overload

import torch
import torch.fx
from torch import Tensor

from . import gates, gradients, linear, losses, reference, thresholds, topk
from .bases import Asymmetric, Base, BaseName, Focal
from .cells import LossStats
from .checks import Operand, Reduction
from .compiled import fused_loss
from .registry import GATES, Gate, Op
from .rules import ByLoss, ByPrediction, ByProximity, Rule

__all__ = [
    "asymmetric_loss",
    "batch_topk",
    "binary_threshold",
    "exceedance_mse_loss",
    "firm",
    "fused_loss",
    "garrote",
    "hardshrink",
    "jumprelu",
    "jumprelu_l0",
    "linear_threshold_loss",
    "otsu_threshold",
    "proximity_mse_loss",
    "quantile_threshold",
    "sigmoid_focal_loss",
    "softshrink",
    "step",
    "threshold",
    "threshold_bce_loss",
    "threshold_bce_with_logits_loss",
    "threshold_grad",
    "threshold_gradients_",
    "threshold_loss",
    "threshold_mse_loss",
    "topk_threshold",
]


def threshold(input: Tensor, threshold: Operand, value: float = 0.0, inplace: bool = False) -> Tensor:
    """Replace what is not above a threshold: ``y = value where x <= threshold else x``.

    The gradient is 0 where ``x <= threshold``, else 1. NaN inputs pass, and so does their gradient.

    Args:
        input: float16, bfloat16, float32, float64, or an integer dtype (uint8, int8, int16, int32, int64).
        threshold: a number, a 0-dim tensor (never read by the host), or a tensor that broadcasts to the input's shape. Numbers
            and 0-dim tensors are rounded to the input's dtype; other tensors are compared in the promoted dtype.
        value: the number put in, rounded to the input's dtype; one beyond the dtype's range raises, as in torch.
        inplace: write the result to `input`.

    Shape:
        The output has the input's shape, dtype and memory format.

    Raises:
        TypeError: for other dtypes, and for thresholds that are neither number nor tensor.
        ValueError: for a threshold that does not broadcast to the input's shape, or that requires grad.
        RuntimeError: in place, for a leaf that requires grad or an input whose elements overlap.

    Equivalent to:
        ``torch.where(input <= threshold, value, input)``

    Source:
        `torch.nn.functional.threshold`, whose CUDA kernel sets the rules for NaN and rounding.

    Examples:
        >>> threshold(torch.tensor([-1.0, 0.1, 2.0]), 0.1, 20.0)
        tensor([20., 20.,  2.])
        >>> threshold(torch.tensor([[1.0, 1.0], [3.0, 3.0]]), torch.tensor([0.0, 2.0]))
        tensor([[1., 0.],
                [3., 3.]])
    """
    return gates.run(GATES["threshold"], input, (threshold, value), inplace=inplace)  # type: ignore[no-any-return]


def hardshrink(input: Tensor, lambd: Operand = 0.5, *, inplace: bool = False) -> Tensor:
    """Zero what lies near zero: ``y = 0 where -lambd <= x <= lambd else x``.

    The gradient is 0 where ``-lambd <= x <= lambd``, else 1. NaN inputs pass, and so does their gradient.

    Args:
        input: float16, bfloat16, float32 or float64.
        lambd: a number, a 0-dim tensor (never read by the host), or a tensor that broadcasts to the input's shape. Numbers and
            0-dim tensors are rounded to the input's dtype; other tensors are compared in the promoted dtype.
        inplace: write the result to `input`.

    Shape:
        The output has the input's shape, dtype and memory format.

    Raises:
        TypeError: for other dtypes, and for a `lambd` that is neither number nor tensor.
        ValueError: for a `lambd` that does not broadcast to the input's shape, or that requires grad.
        RuntimeError: in place, for a leaf that requires grad or an input whose elements overlap.

    Equivalent to:
        ``torch.where((input >= -lambd) & (input <= lambd), 0, input)``

    Source:
        `torch.nn.functional.hardshrink`, whose CUDA kernel sets the rules for NaN and rounding.

    Examples:
        >>> hardshrink(torch.tensor([-1.0, -0.5, 0.2, 0.6]))
        tensor([-1.0000,  0.0000,  0.0000,  0.6000])
    """
    return gates.run(GATES["hardshrink"], input, (lambd,), inplace=inplace)  # type: ignore[no-any-return]


def softshrink(input: Tensor, lambd: Operand = 0.5) -> Tensor:
    """Shrink towards zero: ``y = x - lambd where x > lambd, x + lambd where x < -lambd, else 0``; NaN inputs pass.

    The gradient to `input` is 0 where ``-lambd <= x <= lambd``, else 1. The gradient to `lambd`, if it requires grad, is the
    sum of -1 where ``x > lambd``, 1 where ``x < -lambd`` and 0 elsewhere over the dimensions along which it was broadcast.

    Args:
        input: float16, bfloat16, float32 or float64.
        lambd: a number of at least 0, a 0-dim tensor (never read by the host), or a tensor that broadcasts to the input's
            shape. Numbers and 0-dim tensors are rounded to the input's dtype; other tensors are compared in the promoted dtype.

    Shape:
        The output has the input's shape, dtype and memory format.

    Raises:
        TypeError: for other dtypes, and for a `lambd` that is neither number nor tensor.
        ValueError: for a `lambd` that does not broadcast to the input's shape.
        RuntimeError: for a negative number.

    Equivalent to:
        ``torch.nn.functional.softshrink(input, lambd)``

    Source:
        `torch.nn.functional.softshrink`.

    Examples:
        >>> softshrink(torch.tensor([-1.0, 0.5, 0.25, 1.5]))
        tensor([-0.5000,  0.0000,  0.0000,  1.0000])
    """
    return gates.run(GATES["softshrink"], input, (lambd,))  # type: ignore[no-any-return]


def garrote(input: Tensor, lambd: Operand = 0.5) -> Tensor:
    """Shrink towards zero, large values hardly at all: ``y = x - lambd**2 / x where |x| > lambd, else 0``; NaN inputs pass.

    The gradient is ``1 + lambd**2 / x**2`` where ``|x| > lambd``, else 0.

    Args:
        input: float16, bfloat16, float32 or float64.
        lambd: a number of at least 0, a 0-dim tensor (never read by the host), or a tensor that broadcasts to the input's
            shape. Numbers and 0-dim tensors are rounded to the input's dtype; other tensors are compared in the promoted dtype.

    Shape:
        The output has the input's shape, dtype and memory format.

    Raises:
        TypeError: for other dtypes, and for a `lambd` that is neither number nor tensor.
        ValueError: for a `lambd` that does not broadcast to the input's shape, that requires grad, or that is a negative number.

    Equivalent to:
        ``torch.where(input.abs() > lambd, input - lambd**2 / input, 0)``

    Source:
        Gao 1998, Wavelet Shrinkage Denoising Using the Non-Negative Garrote; `pywt.threshold(mode="garrote")`.

    Examples:
        >>> garrote(torch.tensor([-2.0, 0.5, 1.0, 4.0]), 1.0)
        tensor([-1.5000,  0.0000,  0.0000,  3.7500])
    """
    return gates.run(GATES["garrote"], input, (lambd,))  # type: ignore[no-any-return]


def firm(input: Tensor, low: Operand, high: Operand) -> Tensor:
    """Shrink what lies between two thresholds, and keep what lies beyond: between hard and soft thresholding.

    ``y = x where |x| > high, sign(x) * high * (|x| - low) / (high - low) where |x| > low, else 0``; NaN inputs pass. With
    ``low = high`` it is `hardshrink`, with ``high = inf`` `softshrink`. The gradient is 1, ``high / (high - low)`` and 0 there.

    Args:
        input: float16, bfloat16, float32 or float64.
        low: up to which x becomes 0: a number of at least 0, a 0-dim tensor (never read by the host), or a tensor that broadcasts
            to the input's shape. Numbers and 0-dim tensors are rounded to the input's dtype; other tensors are compared in the
            promoted dtype.
        high: from which x is kept; likewise, and as a number not below `low`.

    Shape:
        The output has the input's shape, dtype and memory format.

    Raises:
        TypeError: for other dtypes, and for thresholds that are neither number nor tensor.
        ValueError: for thresholds that do not broadcast to the input's shape, that require grad, or that are numbers out of
            order.

    Equivalent to:
        ``torch.where(x.abs() > high, x, x.sign() * torch.where(x.abs() > low, high * (x.abs() - low) / (high - low), 0))``

    Source:
        Gao and Bruce 1997, WaveShrink with Firm Shrinkage; `pywt.threshold_firm`.

    Examples:
        >>> firm(torch.tensor([-3.0, 0.5, 1.5, 2.0]), 1.0, 2.0)
        tensor([-3.,  0.,  1.,  2.])
    """
    return gates.run(GATES["firm"], input, (low, high))  # type: ignore[no-any-return]


def binary_threshold(
    input: Tensor,
    threshold: Operand,
    above_value: float = 1.0,
    below_value: float = 0.0,
    *,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """One of two values: ``y = above_value where x > threshold else below_value``; NaN counts as not above.

    The result does not require grad.

    Args:
        input: float16, bfloat16, float32, float64, or an integer dtype (uint8, int8, int16, int32, int64).
        threshold: a number, a 0-dim tensor (never read by the host), or a tensor that broadcasts to the input's shape. On
            floating inputs numbers and 0-dim tensors are rounded to the input's dtype; integer inputs compare by value.
        above_value: the number where x is above, cast to the output's dtype; one beyond its range raises, as in torch.
        below_value: the number elsewhere, likewise.
        dtype: of the output; the input's if None.

    Shape:
        The output has the input's shape and memory format.

    Raises:
        TypeError: for other dtypes, and for thresholds that are neither number nor tensor.
        ValueError: for a threshold that does not broadcast to the input's shape, or that requires grad.

    Equivalent to:
        ``torch.where(input > threshold, above_value, below_value)``

    Source:
        Binarisation by a Heaviside step that is 0 at 0.

    Examples:
        >>> binary_threshold(torch.tensor([0.2, 0.5, 0.9]), 0.5)
        tensor([0., 0., 1.])
        >>> binary_threshold(torch.tensor([0.2, 0.9]), 0.5, True, False, dtype=torch.bool)
        tensor([False,  True])
    """
    return gates.run(GATES["binary_threshold"], input, (threshold, above_value, below_value), dtype=dtype)  # type: ignore[no-any-return]


def jumprelu(input: Tensor, threshold: Operand, bandwidth: float = 1e-3, *, input_gradient: bool = False) -> Tensor:
    """Keep what is above a threshold that learns: ``y = x where x > threshold else 0``; NaN counts as not above.

    The gradient to `input` is the upstream gradient g where ``x > threshold``, else 0. The gradient to `threshold` is a
    straight-through estimate, ``-(threshold / bandwidth) * g`` where ``|x - threshold| < bandwidth / 2``, else 0, summed in
    float32 (float64 for float64) and in a fixed order over the dimensions along which the threshold was broadcast.

    Args:
        input: float16, bfloat16, float32 or float64; any number of dimensions.
        threshold: a number, a 0-dim tensor, or a tensor that broadcasts to the input's shape, such as one entry per feature.
            It is never rounded to the input's dtype; keep a parameter in float32.
        bandwidth: the width of the window around the threshold in which it gets a gradient; above 0.
        input_gradient: the window term also reaches `input`, with the opposite sign, so that both gradients add up to g where
            ``x > threshold``, else 0.

    Shape:
        The output has the input's shape, dtype and memory format; the threshold's gradient has its shape and dtype.

    Raises:
        TypeError: for other dtypes, and for thresholds that are neither number nor tensor.
        ValueError: for a threshold that does not broadcast to the input's shape, and a bandwidth that is not above 0.

    Equivalent to:
        ``torch.where(input > threshold, input, 0)``

    Source:
        Rajamanoharan et al. 2024, Jumping Ahead: Improving Reconstruction Fidelity with JumpReLU Sparse Autoencoders
        (arXiv:2407.14435).

    Examples:
        >>> theta = torch.tensor([0.5, 1.0], requires_grad=True)
        >>> y = jumprelu(torch.tensor([[0.6, 0.9], [0.4, 3.0]]), theta, bandwidth=0.5)
        >>> y.detach()
        tensor([[0.6000, 0.0000],
                [0.0000, 3.0000]])
        >>> y.sum().backward()
        >>> theta.grad
        tensor([-2., -2.])
    """
    return gates.run(GATES["jumprelu"], input, (threshold, bandwidth), input_gradient=bool(input_gradient))  # type: ignore[no-any-return]


def step(input: Tensor, threshold: Operand, bandwidth: float = 1e-3, *, input_gradient: bool = False) -> Tensor:
    """A step at a threshold that learns: ``y = 1 where x > threshold else 0``; NaN counts as not above.

    The gradient to `input` is 0. The gradient to `threshold` is a straight-through estimate, ``-g / bandwidth`` where
    ``|x - threshold| < bandwidth / 2``, else 0, summed in float32 (float64 for float64) and in a fixed order over the
    dimensions along which the threshold was broadcast.

    Args:
        input: float16, bfloat16, float32 or float64; any number of dimensions.
        threshold: a number, a 0-dim tensor, or a tensor that broadcasts to the input's shape. It is never rounded to the
            input's dtype; keep a parameter in float32.
        bandwidth: the width of the window around the threshold in which it gets a gradient; above 0.
        input_gradient: the window term also reaches `input`, with the opposite sign, so that both gradients add up to 0.

    Shape:
        The output has the input's shape, dtype and memory format; the threshold's gradient has its shape and dtype.

    Raises:
        TypeError: for other dtypes, and for thresholds that are neither number nor tensor.
        ValueError: for a threshold that does not broadcast to the input's shape, and a bandwidth that is not above 0.

    Equivalent to:
        ``(input > threshold).to(input.dtype)``

    Source:
        Rajamanoharan et al. 2024 (arXiv:2407.14435); summed over the features it is the L0 penalty.

    Examples:
        >>> theta = torch.tensor(0.5, requires_grad=True)
        >>> y = step(torch.tensor([0.4, 0.6, 2.0]), theta, bandwidth=0.5)
        >>> y.detach()
        tensor([0., 1., 1.])
        >>> y.sum().backward()
        >>> theta.grad
        tensor(-4.)
    """
    return gates.run(GATES["step"], input, (threshold, bandwidth), input_gradient=bool(input_gradient))  # type: ignore[no-any-return]


@overload
def jumprelu_l0(
    input: Tensor,
    threshold: Operand,
    bandwidth: float = 1e-3,
    *,
    input_gradient: bool = False,
    return_fired: Literal[False] = False,
) -> tuple[Tensor, Tensor]: ...


@overload
def jumprelu_l0(
    input: Tensor,
    threshold: Operand,
    bandwidth: float = 1e-3,
    *,
    input_gradient: bool = False,
    return_fired: Literal[True],
) -> tuple[Tensor, Tensor, Tensor]: ...


def jumprelu_l0(
    input: Tensor,
    threshold: Operand,
    bandwidth: float = 1e-3,
    *,
    input_gradient: bool = False,
    return_fired: bool = False,
) -> tuple[Tensor, ...]:
    """JumpReLU and the number of elements it keeps: ``(jumprelu(x), step(x).sum(-1))``, in one pass forward and backward.

    The gradients are those of `jumprelu` and of `step`, added up before they are stored or summed.

    Args:
        input: float16, bfloat16, float32 or float64; one dimension or more.
        threshold: a number, a 0-dim tensor, or a tensor that broadcasts to the input's shape. It is never rounded to the
            input's dtype; keep a parameter in float32.
        bandwidth: the width of the window around the threshold in which it gets a gradient; above 0.
        input_gradient: the window terms also reach `input`, with the opposite sign.
        return_fired: also return how many rows each feature is above its threshold in. On a GPU that reads the bits which
            forward saves, an eighth of a byte an element.

    Shape:
        The activations have the input's shape, dtype and memory format. The counts have the input's shape without its last
        dimension, in float32 (float64 for float64): bfloat16 cannot count past 256. The count that `return_fired` adds has the
        size of the last dimension, in int64, and no gradient.

    Raises:
        TypeError: for other dtypes, and for thresholds that are neither number nor tensor.
        ValueError: for a 0-dim input, a threshold that does not broadcast to the input's shape, a bandwidth that is not
            above 0, and on Triton for rows of more than 2**27 elements.

    Equivalent to:
        ``torch.where(input > threshold, input, 0), (input > threshold).sum(-1)``

    Source:
        The activation and the sparsity penalty of Rajamanoharan et al. 2024 (arXiv:2407.14435).

    Examples:
        >>> activations, l0 = jumprelu_l0(torch.tensor([[0.6, 0.9], [0.4, 0.3]]), torch.tensor([0.5, 0.7]))
        >>> activations
        tensor([[0.6000, 0.9000],
                [0.0000, 0.0000]])
        >>> l0
        tensor([2., 0.])
        >>> jumprelu_l0(torch.tensor([[0.6, 0.9], [0.4, 0.8]]), 0.5, return_fired=True)[-1]
        tensor([1, 2])
    """
    keywords: dict[str, Any] = {"input_gradient": bool(input_gradient), "return_fired": bool(return_fired)}
    return gates.run(GATES["jumprelu_l0"], input, (threshold, bandwidth), **keywords)  # type: ignore[no-any-return]


def threshold_bce_loss(
    input: Tensor,
    target: Tensor,
    threshold: Operand = 0.7,
    weight_above: Operand = 1.0,
    weight_below: Operand = 0.1,
    *,
    weight: Operand | None = None,
    mask: Tensor | None = None,
    ignore_index: float | None = None,
    label_smoothing: float = 0,
    reduction: Reduction = "mean",
    divisor: Operand | None = None,
    return_stats: bool = False,
) -> Tensor:
    """Binary cross entropy on probabilities, weighed by ``weight_above where p >= threshold else weight_below``.

    Logarithms are clamped at -100 and the gradient's denominator at 1e-12, as torch does. Probabilities outside [0, 1], or NaN,
    give NaN; no assertion stops the process.

    Args:
        input: probabilities, float16, bfloat16, float32 or float64.
        target: of the input's shape, in any real dtype.
        threshold: where the weight changes. Settings may be numbers, 0-dim, per-class or per-element tensors.
        weight_above: the weight from the threshold on.
        weight_below: the weight of all others.
        weight: a further factor of each element, a number or a tensor that broadcasts to the input's shape.
        mask: as in `threshold_loss`, and likewise all that follow.
        ignore_index: targets that do not count.
        label_smoothing: how far targets move to 1/2.
        reduction: "mean" (divides by the number of elements, never by a sum of weights), "sum" or "none".
        divisor: what the mean divides by.
        return_stats: also return a `LossStats`.

    Shape:
        0-dim, or the input's for reduction "none". The dtype is the input's, float32 under autocast.

    Raises:
        TypeError: for an input of another dtype, and for settings that are neither number nor tensor.
        ValueError: for shapes of input and target that differ, a setting that does not broadcast to them or (like a target)
            requires grad, and an unknown reduction. Only `input` gets a gradient.

    Equivalent to:
        ``(F.binary_cross_entropy(input, target, reduction="none") * torch.where(input >= threshold, above, below)).mean()``

    Source:
        `torch.nn.functional.binary_cross_entropy`, with masks for weights as in imbalanced classification.

    Examples:
        >>> p = torch.tensor([0.9, 0.2], requires_grad=True)
        >>> threshold_bce_loss(p, torch.tensor([1.0, 0.0]))
        tensor(0.0638, grad_fn=<LossBackward>)
    """
    rule = ByPrediction(threshold, weight_above, weight_below)
    return losses.run(  # type: ignore[no-any-return]
        "threshold_bce_loss",
        input,
        target,
        "bce",
        rule,
        weight=weight,
        mask=mask,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        reduction=reduction,
        divisor=divisor,
        return_stats=return_stats,
    )


def threshold_bce_with_logits_loss(
    input: Tensor,
    target: Tensor,
    threshold: Operand = 0.7,
    weight_above: Operand = 1.0,
    weight_below: Operand = 0.1,
    *,
    weight: Operand | None = None,
    pos_weight: Operand | None = None,
    mask: Tensor | None = None,
    ignore_index: float | None = None,
    label_smoothing: float = 0,
    reduction: Reduction = "mean",
    divisor: Operand | None = None,
    return_stats: bool = False,
) -> Tensor:
    """Binary cross entropy on logits, weighed by ``weight_above where sigmoid(x) >= threshold else weight_below``.

    The threshold is a probability, compared as ``x >= logit(threshold)``: 0 or less puts every prediction above, more than 1
    none.

    Args:
        input: logits, float16, bfloat16, float32 or float64.
        target: of the input's shape, in any real dtype.
        threshold: where the weight changes. Settings may be numbers, 0-dim, per-class or per-element tensors.
        weight_above: the weight from the threshold on.
        weight_below: the weight of all others.
        pos_weight: the factor of positive targets, as in torch.
        weight: a further factor of each element, a number or a tensor that broadcasts to the input's shape.
        mask: as in `threshold_loss`, and likewise all that follow.
        ignore_index: targets that do not count.
        label_smoothing: how far targets move to 1/2.
        reduction: "mean" (divides by the number of elements, never by a sum of weights), "sum" or "none".
        divisor: what the mean divides by.
        return_stats: also return a `LossStats`.

    Shape:
        0-dim, or the input's for reduction "none". The dtype is the input's, float32 under autocast.

    Raises:
        TypeError: for an input of another dtype, and for settings that are neither number nor tensor.
        ValueError: for shapes of input and target that differ, a setting that does not broadcast to them or (like a target)
            requires grad, and an unknown reduction. Only `input` gets a gradient.

    Equivalent to:
        ``(F.binary_cross_entropy_with_logits(input, target, reduction="none") * w).mean()`` with
        ``w = torch.where(input >= logit, above, below)``

    Source:
        `torch.nn.functional.binary_cross_entropy_with_logits`, with masks for weights as in imbalanced classification.

    Examples:
        >>> x = torch.tensor([2.0, -1.0], requires_grad=True)
        >>> threshold_bce_with_logits_loss(x, torch.tensor([1.0, 0.0]))
        tensor(0.0791, grad_fn=<LossBackward>)
    """
    rule = ByPrediction(threshold, weight_above, weight_below)
    return losses.run(  # type: ignore[no-any-return]
        "threshold_bce_with_logits_loss",
        input,
        target,
        "bce_with_logits",
        rule,
        weight=weight,
        pos_weight=pos_weight,
        mask=mask,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        reduction=reduction,
        divisor=divisor,
        return_stats=return_stats,
    )


def threshold_mse_loss(
    input: Tensor,
    target: Tensor,
    threshold: Operand,
    weight_above: Operand = 1.0,
    weight_below: Operand = 0.1,
    *,
    weight: Operand | None = None,
    mask: Tensor | None = None,
    ignore_index: float | None = None,
    label_smoothing: float = 0,
    reduction: Reduction = "mean",
    divisor: Operand | None = None,
    return_stats: bool = False,
) -> Tensor:
    """Squared error, weighed by ``weight_above where x >= threshold else weight_below``.

    The prediction decides, not the target.

    Args:
        input: predictions, float16, bfloat16, float32 or float64.
        target: of the input's shape, in any real dtype.
        threshold: where the weight changes. Settings may be numbers, 0-dim, per-class or per-element tensors.
        weight_above: the weight from the threshold on.
        weight_below: the weight of all others.
        weight: a further factor of each element, a number or a tensor that broadcasts to the input's shape.
        mask: as in `threshold_loss`, and likewise all that follow.
        ignore_index: targets that do not count.
        label_smoothing: not for values.
        reduction: "mean" (divides by the number of elements, never by a sum of weights), "sum" or "none".
        divisor: what the mean divides by.
        return_stats: also return a `LossStats`.

    Shape:
        0-dim, or the input's for reduction "none". The dtype is the input's, float32 under autocast.

    Raises:
        TypeError: for an input of another dtype, and for settings that are neither number nor tensor.
        ValueError: for shapes of input and target that differ, a setting that does not broadcast to them or (like a target)
            requires grad, and an unknown reduction. Only `input` gets a gradient.

    Equivalent to:
        ``((input - target) ** 2 * torch.where(input >= threshold, above, below)).mean()``

    Source:
        `torch.nn.functional.mse_loss`, with masks for weights.

    Examples:
        >>> threshold_mse_loss(torch.tensor([1.0, 3.0]), torch.tensor([0.0, 1.0]), 2.0)
        tensor(2.0500)
    """
    rule = ByPrediction(threshold, weight_above, weight_below)
    return losses.run(  # type: ignore[no-any-return]
        "threshold_mse_loss",
        input,
        target,
        "mse",
        rule,
        weight=weight,
        mask=mask,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        reduction=reduction,
        divisor=divisor,
        return_stats=return_stats,
    )


def proximity_mse_loss(
    input: Tensor,
    target: Tensor,
    threshold: Operand,
    penalty_range: Operand = 0.2,
    penalty_factor: Operand = 1.5,
    *,
    weight: Operand | None = None,
    mask: Tensor | None = None,
    ignore_index: float | None = None,
    label_smoothing: float = 0,
    reduction: Reduction = "mean",
    divisor: Operand | None = None,
    return_stats: bool = False,
) -> Tensor:
    """Squared error that weighs more near a threshold: ``(x - y)**2 * (1 + p)``.

    ``p = penalty_factor * (1 - d / penalty_range)`` where ``d = |x - threshold| < penalty_range``, else 0. The gradient flows
    through p: predictions are pushed away from the threshold (sign(0) = 0).

    Args:
        input: predictions, float16, bfloat16, float32 or float64.
        target: of the input's shape, in any real dtype.
        threshold: what to stay away from. Settings may be numbers, 0-dim, per-class or per-element tensors.
        penalty_range: how far its influence reaches.
        penalty_factor: the extra weight at the threshold itself.
        weight: a further factor of each element, a number or a tensor that broadcasts to the input's shape.
        mask: as in `threshold_loss`, and likewise all that follow.
        ignore_index: targets that do not count.
        label_smoothing: not for values.
        reduction: "mean" (divides by the number of elements, never by a sum of weights), "sum" or "none".
        divisor: what the mean divides by.
        return_stats: also return a `LossStats`.

    Shape:
        0-dim, or the input's for reduction "none". The dtype is the input's, float32 under autocast.

    Raises:
        TypeError: for an input of another dtype, and for settings that are neither number nor tensor.
        ValueError: for shapes of input and target that differ, a setting that does not broadcast to them or (like a target)
            requires grad, and an unknown reduction. Only `input` gets a gradient.

    Equivalent to:
        ``((input - target) ** 2 * (1 + factor * (1 - d / range).clamp(min=0))).mean()`` with ``d = (input - threshold).abs()``

    Source:
        Decision-boundary regression; the weight is the hat function of finite elements.

    Examples:
        >>> proximity_mse_loss(torch.tensor([0.5, 2.0]), torch.tensor([0.0, 1.0]), 0.5)
        tensor(0.8125)
    """
    rule = ByProximity(threshold, penalty_range, penalty_factor)
    return losses.run(  # type: ignore[no-any-return]
        "proximity_mse_loss",
        input,
        target,
        "mse",
        rule,
        weight=weight,
        mask=mask,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        reduction=reduction,
        divisor=divisor,
        return_stats=return_stats,
    )


def exceedance_mse_loss(
    input: Tensor,
    target: Tensor,
    loss_threshold: Operand = 1.0,
    penalty_factor: Operand = 2.0,
    *,
    weight: Operand | None = None,
    mask: Tensor | None = None,
    ignore_index: float | None = None,
    label_smoothing: float = 0,
    reduction: Reduction = "mean",
    divisor: Operand | None = None,
    return_stats: bool = False,
) -> Tensor:
    """Squared error that weighs large errors more: ``l * penalty_factor where l > loss_threshold else l``, l = (x - y)**2.

    The loss decides, before any further weight.

    Args:
        input: predictions, float16, bfloat16, float32 or float64.
        target: of the input's shape, in any real dtype.
        loss_threshold: the element loss above which the factor applies. Settings may be numbers, 0-dim, per-class or
            per-element tensors.
        penalty_factor: that factor.
        weight: a further factor of each element, a number or a tensor that broadcasts to the input's shape.
        mask: as in `threshold_loss`, and likewise all that follow.
        ignore_index: targets that do not count.
        label_smoothing: not for values.
        reduction: "mean" (divides by the number of elements, never by a sum of weights), "sum" or "none".
        divisor: what the mean divides by.
        return_stats: also return a `LossStats`.

    Shape:
        0-dim, or the input's for reduction "none". The dtype is the input's, float32 under autocast.

    Raises:
        TypeError: for an input of another dtype, and for settings that are neither number nor tensor.
        ValueError: for shapes of input and target that differ, a setting that does not broadcast to them or (like a target)
            requires grad, and an unknown reduction. Only `input` gets a gradient.

    Equivalent to:
        ``torch.where(l > loss_threshold, l * penalty_factor, l).mean()``

    Source:
        Exceedance penalties in anomaly detection.

    Examples:
        >>> exceedance_mse_loss(torch.tensor([0.5, 3.0]), torch.tensor([0.0, 1.0]))
        tensor(4.1250)
    """
    rule = ByLoss(loss_threshold, penalty_factor)
    return losses.run(  # type: ignore[no-any-return]
        "exceedance_mse_loss",
        input,
        target,
        "mse",
        rule,
        weight=weight,
        mask=mask,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        reduction=reduction,
        divisor=divisor,
        return_stats=return_stats,
    )


def sigmoid_focal_loss(
    input: Tensor,
    target: Tensor,
    alpha: Operand | None = 0.25,
    gamma: Operand = 2.0,
    reduction: Reduction = "none",
    *,
    weight: Operand | None = None,
    mask: Tensor | None = None,
    ignore_index: float | None = None,
    divisor: Operand | None = None,
    label_smoothing: float = 0,
    return_stats: bool = False,
) -> Tensor:
    """Focal loss of logits, a drop-in for torchvision's: ``a_t (1 - p_t)**gamma BCE(x, y)``.

    `Focal` says what the terms are.

    Args:
        input: logits, float16, bfloat16, float32 or float64.
        target: of the input's shape, in any real dtype; it may be soft.
        alpha: the weight of positives, from 0 to 1, against 1 - alpha of negatives; None or -1 for none. Settings may be
            numbers, 0-dim, per-class or per-element tensors.
        gamma: how much easy examples lose.
        reduction: "none", "mean" (divides by the number of elements, never by a sum of weights) or "sum".
        weight: a further factor of each element, a number or a tensor that broadcasts to the input's shape.
        mask: as in `threshold_loss`, and likewise all that follow.
        ignore_index: targets that do not count.
        divisor: what the mean divides by.
        label_smoothing: how far targets move to 1/2.
        return_stats: also return a `LossStats`.

    Shape:
        The input's, or 0-dim for a reduction. The dtype is the input's, float32 under autocast.

    Raises:
        TypeError: for an input of another dtype, and for settings that are neither number nor tensor.
        ValueError: for shapes of input and target that differ, a setting out of range, one that does not broadcast or requires
            grad, and an unknown reduction.

    Equivalent to:
        ``torchvision.ops.sigmoid_focal_loss(input, target, alpha, gamma, reduction)``

    Source:
        Lin et al. 2017, "Focal Loss for Dense Object Detection" (arXiv:1708.02002).

    Examples:
        >>> sigmoid_focal_loss(torch.tensor([0.0, 2.0]), torch.tensor([1.0, 0.0]), reduction="mean")
        tensor(0.6404)
    """
    return losses.run(  # type: ignore[no-any-return]
        "sigmoid_focal_loss",
        input,
        target,
        Focal(alpha, gamma),
        None,
        weight=weight,
        mask=mask,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        reduction=reduction,
        divisor=divisor,
        return_stats=return_stats,
    )


def asymmetric_loss(
    input: Tensor,
    target: Tensor,
    gamma_neg: Operand = 4.0,
    gamma_pos: Operand = 1.0,
    clip: Operand | None = 0.05,
    eps: Operand = 1e-8,
    *,
    detach_focal: bool = False,
    reduction: Reduction = "sum",
    weight: Operand | None = None,
    mask: Tensor | None = None,
    ignore_index: float | None = None,
    divisor: Operand | None = None,
    label_smoothing: float = 0,
    return_stats: bool = False,
) -> Tensor:
    """Asymmetric loss of logits for many labels, a drop-in for the source's: easy negatives hardly enter, the easiest not at all.

    `Asymmetric` has the formula.

    Args:
        input: logits, float16, bfloat16, float32 or float64.
        target: of the input's shape, in any real dtype; it may be soft.
        gamma_neg: the exponent of negatives. Settings may be numbers, 0-dim, per-class or per-element tensors.
        gamma_pos: that of positives.
        clip: negatives predicted below it cost nothing; None is 0.
        eps: the least argument of the logarithms.
        detach_focal: the factor has no gradient.
        reduction: "sum", "mean" (divides by the number of elements, never by a sum of weights) or "none".
        weight: a further factor of each element, a number or a tensor that broadcasts to the input's shape.
        mask: as in `threshold_loss`, and likewise all that follow.
        ignore_index: targets that do not count.
        divisor: what the mean divides by.
        label_smoothing: how far targets move to 1/2.
        return_stats: also return a `LossStats`.

    Shape:
        0-dim, or the input's for reduction "none". The dtype is the input's, float32 under autocast.

    Raises:
        TypeError: for an input of another dtype, and for settings that are neither number nor tensor.
        ValueError: for shapes of input and target that differ, a setting below 0, one that does not broadcast or requires grad,
            and an unknown reduction.

    Equivalent to:
        ``AsymmetricLossOptimized(gamma_neg, gamma_pos, clip, eps)(input, target)`` of the source

    Source:
        Ridnik et al. 2021, "Asymmetric Loss For Multi-Label Classification" (arXiv:2009.14119).

    Examples:
        >>> asymmetric_loss(torch.tensor([0.0, 2.0]), torch.tensor([1.0, 0.0]))
        tensor(1.1930)
    """
    return losses.run(  # type: ignore[no-any-return]
        "asymmetric_loss",
        input,
        target,
        Asymmetric(gamma_neg, gamma_pos, clip, eps, detach_focal),
        None,
        weight=weight,
        mask=mask,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        reduction=reduction,
        divisor=divisor,
        return_stats=return_stats,
    )


@overload
def threshold_loss(
    input: Tensor,
    target: Tensor,
    rule: Rule | None = None,
    *,
    base: Base | BaseName = "bce_with_logits",
    weight: Operand | None = None,
    pos_weight: Operand | None = None,
    mask: Tensor | None = None,
    ignore_index: float | None = None,
    label_smoothing: float = 0,
    reduction: Reduction = "mean",
    divisor: Operand | None = None,
    return_stats: Literal[False] = False,
) -> Tensor: ...


@overload
def threshold_loss(
    input: Tensor,
    target: Tensor,
    rule: Rule | None = None,
    *,
    base: Base | BaseName = "bce_with_logits",
    weight: Operand | None = None,
    pos_weight: Operand | None = None,
    mask: Tensor | None = None,
    ignore_index: float | None = None,
    label_smoothing: float = 0,
    reduction: Reduction = "mean",
    divisor: Operand | None = None,
    return_stats: Literal[True],
) -> tuple[Tensor, LossStats]: ...


def threshold_loss(
    input: Tensor,
    target: Tensor,
    rule: Rule | None = None,
    *,
    base: Base | BaseName = "bce_with_logits",
    weight: Operand | None = None,
    pos_weight: Operand | None = None,
    mask: Tensor | None = None,
    ignore_index: float | None = None,
    label_smoothing: float = 0,
    reduction: Reduction = "mean",
    divisor: Operand | None = None,
    return_stats: bool = False,
) -> Any:
    """Any pair of a base and a rule: the base's element loss times the rule's weight.

    The named losses are pairs that many need.

    Args:
        input: float16, bfloat16, float32 or float64: what the base takes, such as logits or predictions.
        target: of the input's shape, in any real dtype.
        rule: an instance of `ByPrediction`, `ByOutcome`, `ByConfidence`, `ByProximity`, `ByLoss` or `ByRank`; on logits,
            thresholds are probabilities. None for weight 1.
        base: an instance of `BCE`, `BCEWithLogits`, `MSE`, `Focal`, `Asymmetric`, `Huber`, `EpsilonInsensitive`, `Quantile` or
            `Hinge`; or "bce", "bce_with_logits" or "mse".
        pos_weight: the factor of positive targets, for base "bce_with_logits" alone.
        weight: a further factor of each element, a number or a tensor that broadcasts to the input's shape.
        mask: True for the elements that count: a bool tensor that broadcasts to the input's shape. An element that does not
            count adds 0 and gets gradient 0, whatever its input, target or weight holds.
        ignore_index: elements whose target equals this number do not count; NaN means targets that are NaN.
        label_smoothing: e from 0 to 1, for ``y (1 - e) + e / 2`` in the place of the target y; for labels, not for values.
        reduction: "mean" (divides by the number of elements, never by a sum of weights), "sum" or "none".
        divisor: what the mean divides by: a number above 0 or a 0-dim tensor, such as a count over processes. None is the
            number of elements that count. If none does, the loss is NaN (0 with a divisor given) and the gradient 0.
        return_stats: also return a `LossStats`, counted in the same pass.

    Shape:
        0-dim, or the input's for reduction "none". The dtype is the input's, float32 under autocast. With `return_stats` a
        pair of that and a `LossStats`.

    Raises:
        TypeError: for an input of another dtype, settings that are neither number nor tensor, and a mask that is not bool.
        ValueError: for shapes of input and target that differ, a setting that does not broadcast to them or requires grad, and
            an unknown reduction. Input and target get a gradient.

    Equivalent to:
        the base loss with reduction "none", times the rule's weight, reduced

    Source:
        This package.

    Examples:
        >>> from triton_thresh import ByLoss
        >>> threshold_loss(torch.tensor([0.0, 4.0]), torch.tensor([1.0, 0.0]), ByLoss(2.0, 3.0))
        tensor(6.3738)
    """
    return losses.run(
        "threshold_loss",
        input,
        target,
        base,
        rule,
        weight=weight,
        pos_weight=pos_weight,
        mask=mask,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        reduction=reduction,
        divisor=divisor,
        return_stats=return_stats,
    )


def linear_threshold_loss(
    input: Tensor,
    weight: Tensor,
    target: Tensor | None = None,
    rule: Rule | None = None,
    *,
    labels: Tensor | None = None,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
    base: Base | BaseName = "bce_with_logits",
    reduction: Literal["mean", "sum"] = "mean",
    divisor: Operand | None = None,
    label_smoothing: float = 0,
    chunk_size: int | None = None,
) -> Tensor:
    """`threshold_loss` of a linear layer's output, whose logits are never in memory as a whole.

    The logits are ``scale * input @ weight.T + bias``. They are made, and their slope is used, a chunk of labels at a time, so
    that memory beyond the inputs and their gradients is two chunks, however many labels there are. All gradients are computed
    in the forward pass. A second backward computes them again; one with ``create_graph=True`` takes the formula, with all logits.

    Args:
        input: features ``(*, D)``, float16, bfloat16, float32 or float64.
        weight: ``(L, D)``, a row for each label, in the input's dtype. Under autocast both are cast, as for `F.linear`.
        target: ``(*, L)``, dense in any real dtype, or sparse (COO or CSR), whose values are targets: what is absent is 0, and of
            an entry that is repeated one counts. Give this or `labels`.
        rule: as in `threshold_loss`, but for `ByRank`. Its operands, and those of the base, are numbers, or tensors of shape
            ``()``, ``(L,)``, ``(*, 1)`` or ``(*, L)``.
        labels: int64 ``(*, P)``: the numbers of each row's positive labels. -1, anywhere, is none; repeated ones count once; P
            may be 0. One out of range raises on a CPU; on a device, where looking would make the host wait, the loss is NaN.
        bias: ``(L,)`` or ``()``.
        scale: ``()``, a factor of the logits before the bias, such as ``logit_scale.exp()``.
        base: as in `threshold_loss`.
        reduction: "mean" (divides by the number of logits) or "sum".
        divisor: what the mean divides by, a number above 0 or a 0-dim tensor.
        label_smoothing: as in `threshold_loss`.
        chunk_size: labels in a chunk; None for as many as make 16 MiB of logits.

    Shape:
        0-dim. The dtype is the input's, float32 under autocast. Input, weight, bias and scale get a gradient.

    Raises:
        TypeError: for other dtypes and layouts, among them labels that are not int64.
        ValueError: for shapes that do not fit, both or neither of target and labels, a setting or a target that requires grad,
            reduction "none", rule `ByRank`, and on a CPU a label out of range.

    Equivalent to:
        ``threshold_loss(scale * F.linear(input, weight) + bias, target, rule, base=base)``

    Source:
        Fused linear cross entropy (Liger Kernel), here for labels of which each is on or off.

    Examples:
        >>> input, weight = torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 0.0], [0.0, -1.0], [1.0, 1.0]])
        >>> linear_threshold_loss(input, weight, labels=torch.tensor([[0, 2, -1]]))
        tensor(0.1629)
        >>> linear_threshold_loss(input, weight, torch.tensor([[1.0, 0.0, 1.0]]))
        tensor(0.1629)
    """
    return linear.run(
        input,
        weight,
        target,
        rule,
        labels=labels,
        bias=bias,
        scale=scale,
        base=base,
        reduction=reduction,
        divisor=divisor,
        label_smoothing=label_smoothing,
        chunk_size=chunk_size,
    )


def threshold_grad(input: Tensor, threshold: Operand) -> Tensor:
    """The identity, whose gradient is thresholded: backward passes ``g where |g| > threshold or g is NaN, else 0``.

    Args:
        input: float16, bfloat16, float32 or float64.
        threshold: a number, a 0-dim tensor (never read by the host), or a tensor that broadcasts to the input's shape. Numbers
            and 0-dim tensors are rounded to the gradient's dtype; other tensors are compared in the promoted dtype. NaN lets
            only NaN pass, a negative number everything.

    Shape:
        The output is a view of the input: no memory is read, written or saved in forward. torch refuses to change it in
        place; clone it first.

    Raises:
        TypeError: for other dtypes, and for thresholds that are neither number nor tensor.
        ValueError: for a threshold that does not broadcast to the input's shape, or that requires grad.

    Equivalent to:
        ``input.view_as(input)``, with the gradient ``torch.where((g.abs() > threshold) | g.isnan(), g, 0)``

    Source:
        Aji and Heafield 2017, "Sparse Communication for Distributed Gradient Descent" (arXiv:1704.05021), without residuals.

    Examples:
        >>> x = torch.tensor([1.0, 2.0, 3.0], requires_grad=True)
        >>> (threshold_grad(x, 0.5) * torch.tensor([0.5, -0.6, 2.0])).sum().backward()
        >>> x.grad
        tensor([ 0.0000, -0.6000,  2.0000])
    """
    return gradients.threshold_grad("threshold_grad", input, threshold)


@overload
def threshold_gradients_(
    parameters: Tensor | Iterable[Tensor],
    threshold: float | Sequence[float] | Tensor,
    *,
    return_kept: Literal[False] = False,
) -> None: ...


@overload
def threshold_gradients_(
    parameters: Tensor | Iterable[Tensor], threshold: float | Sequence[float] | Tensor, *, return_kept: Literal[True]
) -> Tensor: ...


@overload
def threshold_gradients_(
    parameters: Tensor | Iterable[Tensor], threshold: float | Sequence[float] | Tensor, *, return_kept: bool
) -> Tensor | None: ...


def threshold_gradients_(
    parameters: Tensor | Iterable[Tensor], threshold: float | Sequence[float] | Tensor, *, return_kept: bool = False
) -> Tensor | None:
    """Threshold the gradients of many parameters in place: ``p.grad = g where |g| > threshold or g is NaN, else 0``.

    On a GPU all gradients of one dtype and device take one kernel launch, and one copy of a table of their addresses; while a
    CUDA graph is captured, torch ops for each. Call it when gradients are whole: accumulated, reduced over processes,
    unscaled; `GradientThreshold` does so.

    Args:
        parameters: a tensor or an iterable of tensors; those whose `grad` is None are passed over.
        threshold: a number or a 0-dim tensor (never read by the host if on a GPU), or a list, tuple or 1-dim tensor with one
            for each of the parameters, also for those without grad. Each is rounded to the gradient's dtype. NaN lets only
            NaN pass, a negative number everything.
        return_kept: return the fraction of elements that were kept.

    Shape:
        None, or with `return_kept` a 0-dim float32 tensor on the device of the first gradient, NaN if there is no element.

    Raises:
        TypeError: for gradients that are sparse, or not float16, bfloat16, float32 or float64.
        ValueError: for a number of thresholds other than that of parameters, a threshold that requires grad, and thresholds per
            parameter for gradients that share memory.
        RuntimeError: for a gradient whose elements overlap. All errors come before anything is written.

    Equivalent to:
        ``for p in parameters: p.grad.copy_(torch.where((p.grad.abs() > threshold) | p.grad.isnan(), p.grad, 0))``

    Source:
        `torch.nn.utils.clip_grad_value_`, which bounds what this keeps.

    Examples:
        >>> weight = torch.zeros(4, requires_grad=True)
        >>> weight.grad = torch.tensor([0.1, -0.5, 0.5, -2.0])
        >>> threshold_gradients_([weight], 0.4, return_kept=True)
        tensor(0.7500)
        >>> weight.grad
        tensor([ 0.0000, -0.5000,  0.5000, -2.0000])
    """
    return gradients.threshold_gradients_("threshold_gradients_", parameters, threshold, return_kept)


def topk_threshold(
    input: Tensor, k: int | None = None, dim: int | None = None, *, fraction: float | None = None
) -> Tensor:
    """The k-th largest element, a threshold that the k largest reach: ``torch.topk(input.flatten(), k).values[-1]``.

    Exact, without a sort; NaN counts as largest. Elements equal to the threshold may make more than k reach it. The host reads
    nothing, and the result does not require grad. On a GPU a float32 tensor is read four times and a 16-bit one twice, or once
    where a row (or the whole tensor) has at most 128 KiB.

    Args:
        input: float16, bfloat16, float32, float64, uint8, int8, int16, int32 or int64.
        k: from 1 to the number of elements n. Exactly one of `k` and `fraction` is given.
        dim: None (of the whole tensor) or -1 (of each row).
        fraction: above 0 and at most 1, for ``k = max(1, ceil(fraction * n))``, the product rounded to float64.

    Shape:
        A 0-dim tensor; with ``dim=-1`` the input's shape with a last dimension of 1. The dtype is the input's.

    Raises:
        TypeError: for other dtypes, and for a `k` or `fraction` that is no such number.
        ValueError: for a number outside its range, both or neither of `k` and `fraction`, another `dim`, and an empty input.

    Equivalent to:
        ``torch.topk(input, k).values[..., -1:]`` for ``dim=-1``

    Source:
        `torch.topk`.

    Examples:
        >>> x = torch.tensor([[3.0, 1.0, 2.0], [0.0, 5.0, 4.0]])
        >>> topk_threshold(x, 2)
        tensor(4.)
        >>> topk_threshold(x, fraction=0.5, dim=-1)
        tensor([[2.],
                [4.]])
    """
    return thresholds.topk_threshold("topk_threshold", input, k, dim, fraction)


def quantile_threshold(input: Tensor, q: float, dim: int | None = None) -> Tensor:
    """A quantile that is an element, the ``max(1, ceil(q * n))``-th smallest; NaN if there is any.

    Exact, without a sort, of tensors of any size. The host reads nothing, and the result does not require grad. The passes over
    the input are those of `topk_threshold`.

    Args:
        input: float16, bfloat16, float32, float64, uint8, int8, int16, int32 or int64.
        q: from 0 (the smallest element) to 1 (the largest). ``q * n`` is rounded once, to float64.
        dim: None (of the whole tensor) or -1 (of each row).

    Shape:
        A 0-dim tensor; with ``dim=-1`` the input's shape with a last dimension of 1. The dtype is the input's.

    Raises:
        TypeError: for other dtypes, and for a `q` that is no number.
        ValueError: for a `q` outside [0, 1], another `dim`, and an empty input.

    Equivalent to:
        ``torch.kthvalue(input.flatten(), max(1, math.ceil(q * n))).values`` where nothing is NaN

    Source:
        `numpy.quantile` with ``method="inverted_cdf"``, on a float64 copy.

    Examples:
        >>> quantile_threshold(torch.tensor([4, 1, 3, 2]), 0.5)
        tensor(2)
        >>> quantile_threshold(torch.tensor([4.0, torch.nan]), 0.5)
        tensor(nan)
    """
    return thresholds.quantile_threshold("quantile_threshold", input, q, dim)


def otsu_threshold(input: Tensor, bins: int = 256) -> Tensor:
    """The threshold that parts a histogram best: the variance between the two classes is largest.

    The value is the centre of a bin, and the elements up to that bin are the lower class. If all elements are equal it is that
    element. On a GPU the input is read twice, for its range and for the histogram, and the host reads nothing.

    Args:
        input: float16, bfloat16, float32 or float64; NaN or an infinity inside gives NaN. Or uint8, int8 or int16: then each
            value is a bin.
        bins: how many equal bins, at least 2, lie between the smallest and the largest element; not used for integers.

    Shape:
        A 0-dim tensor of the input's dtype.

    Raises:
        TypeError: for other dtypes, and for `bins` that is no int.
        ValueError: for fewer than 2 bins, and an empty input.

    Equivalent to:
        ``skimage.filters.threshold_otsu(input.numpy(), nbins=bins)``: for integers; floats at the edge of a bin may fall into
        the next one

    Source:
        Otsu 1979 (doi:10.1109/TSMC.1979.4310076), as `skimage.filters.threshold_otsu` computes it.

    Examples:
        >>> otsu_threshold(torch.tensor([0, 1, 2, 100, 101, 102], dtype=torch.uint8))
        tensor(2, dtype=torch.uint8)
    """
    return thresholds.otsu_threshold("otsu_threshold", input, bins)


def batch_topk(input: Tensor, k: float) -> Tensor:
    """Keep the ``int(k * rows)`` largest positive elements of the whole batch: ``y = x where x is kept else 0``.

    Rows are all dimensions but the last, so that a row keeps k elements on average. Elements equal to the smallest that is kept
    are kept too. NaN is not kept and takes no place. The gradient is 1 where x is kept, else 0.

    Args:
        input: float16, bfloat16, float32 or float64.
        k: a number of at least 0, not necessarily an integer.

    Shape:
        The output has the input's shape, dtype and memory format.

    Raises:
        TypeError: for other dtypes, and for a `k` that is no number.
        ValueError: for a negative `k`.

    Equivalent to:
        ``torch.where(input >= torch.topk(input.relu().flatten(), int(k * rows)).values[-1], input.relu(), 0)``

    Source:
        Bussmann et al. 2024 (arXiv:2412.06410).

    Examples:
        >>> batch_topk(torch.tensor([[3.0, -1.0, 2.0], [0.5, 1.0, -4.0]]), 1.5)
        tensor([[3., 0., 2.],
                [0., 1., 0.]])
    """
    return topk.batch_topk("batch_topk", input, k)


def _batch_topk_tracked(input: Tensor, k: float, momentum: float, threshold: Tensor) -> Tensor:
    """`nn.BatchTopK` in training."""
    return topk.batch_topk_tracked("BatchTopK", input, k, momentum, threshold)


def _above_tracked(input: Tensor, threshold: Tensor) -> Tensor:
    """The gate in evaluation."""
    return topk.above_tracked("BatchTopK", input, threshold)


torch.fx.wrap("_batch_topk_tracked")
torch.fx.wrap("_above_tracked")
for _name in __all__:  # under torch.fx.symbolic_trace a call is one node, as that of a function of torch is
    torch.fx.wrap(_name)


def __dir__() -> list[str]:
    return __all__


_PUBLIC: Mapping[str, Callable[..., Any]] = MappingProxyType({name: globals()[name] for name in __all__})


def function_of(op: Op) -> Callable[..., Any]:
    """The public function of an op; for a gate that has none yet, its call with the signature of its formula."""
    if op.name in _PUBLIC:
        return _PUBLIC[op.name]
    assert isinstance(op, Gate)
    call: Any = functools.partial(gates.call, op)
    call.__signature__ = inspect.signature(getattr(reference, op.name))
    return call  # type: ignore[no-any-return]
