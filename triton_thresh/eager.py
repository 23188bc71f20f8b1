"""The eager backend: the formulas with few passes over memory.

Losses run in slices that stay in the cache, with closed-form slopes. Gates with a number for threshold use the torch kernels that
compute the same bits, and are given the number as the input's dtype holds it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import reference
from .backend import is_ordinary
from .bases import Base, holds
from .cells import Spec, chosen_of, divisor_of, element_loss, smoothed, valid_of, wide_parts
from .checks import Operand, are_few, cached_constant, cast, compute_dtype
from .layout import summed
from .rules import Element, Rule, select

SLICE = 1 << 18


# ---------------------------------------------------------------------------------------------------------------- losses


def slices(tensors: Sequence[Operand], like: Tensor) -> Iterator[list[Any]]:
    """Matching slices of about SLICE elements: flat if every tensor lies as `like` does, else rows of its first dimension.

    Numbers and tensors that broadcast along the first dimension are handed on whole.
    """
    if like.numel() <= SLICE or like.dim() == 0:
        yield list(tensors)
        return
    if all(_is_whole(t) or _lies_flat(t, like) for t in tensors):
        tensors, length, step = [_flat(t) for t in tensors], like.numel(), SLICE
        whole = [_is_whole(t) for t in tensors]
    else:
        whole = [_is_whole(t) or t.dim() < like.dim() or t.shape[0] == 1 for t in tensors]  # type: ignore[union-attr]
        length = like.shape[0]
        step = max(1, SLICE * length // like.numel())
    for start in range(0, length, step):
        size = min(step, length - start)
        yield [t if w else t.narrow(0, start, size) for w, t in zip(whole, tensors)]  # type: ignore[union-attr]


def _is_whole(operand: Operand) -> bool:
    """True for a number, or a tensor that holds one."""
    return not isinstance(operand, Tensor) or operand.numel() == 1


def _lies_flat(operand: Operand, like: Tensor) -> bool:
    return isinstance(operand, Tensor) and operand.shape == like.shape and operand.is_contiguous()


def _flat(operand: Operand) -> Operand:
    if not isinstance(operand, Tensor):
        return operand
    return operand.reshape(()) if operand.numel() == 1 else operand.view(-1)


def loss_and_slope(
    spec: Spec,
    x: Tensor,
    y: Tensor,
    operands: Sequence[Operand],
    *,
    want_loss: bool = True,
    want_slope: bool = True,
    scale: Operand | None = None,
    out: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """The weighted element loss and its derivative in x, in the compute type and off the tape; None for what is not wanted.

    With a scale the derivative times it is written to `out`.
    """
    if not want_slope:
        return element_loss(spec, x, y, operands, fast=True), None
    dtype = compute_dtype(x.dtype)
    base, rule, options = wide_parts(spec, operands, dtype)
    chosen = chosen_of(options, valid_of(options, y)) if options else None
    found = _closed_form(base, rule, options, cast(x, dtype), smoothed(options, base, cast(y, dtype)), want_loss)
    loss, slope = _differentiated(spec, x, y, operands) if found is None else found
    if scale is not None:
        slope = slope * scale if chosen is not None else torch.mul(slope, scale, out=out)
    if chosen is not None:  # a scale is infinite where nothing is valid
        slope = torch.where(chosen, slope, 0)
        slope = slope if out is None else out.copy_(slope)
        loss = torch.where(chosen, loss, 0) if want_loss else loss
    return loss if want_loss else None, slope


def closed_form(
    spec: Spec, x: Tensor, y: Tensor, operands: Sequence[Operand], scale: Operand | None
) -> tuple[Tensor, Tensor] | None:
    """The weighted element loss and its derivative times the scale; None where base or rule has no closed form."""
    dtype = compute_dtype(x.dtype)
    base, rule, options = wide_parts(spec, operands, dtype)
    found = _closed_form(base, rule, options, x.to(dtype), smoothed(options, base, y.to(dtype)), True)
    if found is None:
        return None
    loss, slope = found
    slope = slope if scale is None else slope * scale
    chosen = chosen_of(options, valid_of(options, y))
    if chosen is None:
        return loss, slope
    return torch.where(chosen, loss, 0), torch.where(chosen, slope, 0)


def _closed_form(
    base: Base, rule: Rule, options: Mapping[str, Operand], x: Tensor, y: Tensor, want_loss: bool
) -> tuple[Tensor, Tensor] | None:
    """Loss and slope of what counts, whatever they are elsewhere; None where the slope has no closed form.

    The loss is some tensor where it is not wanted and nothing reads it.
    """
    if want_loss or rule.reads_loss or rule.slopes:
        both = base.value_and_slope(x, y)
    else:
        only = base.slope(x, y)
        both = None if only is None else (x, only)
    if both is None:
        return None
    loss, slope = both
    element = Element(base, x, y, loss, fast=True)
    steep = rule.weight_slope(element) if rule.slopes else None
    if rule.slopes and steep is None:
        return None
    factor = rule.weight(element)
    if factor is not None:
        slope = slope * factor
        if steep is not None:
            slope = slope + loss.nan_to_num(0.0, 0.0, 0.0) * steep
        loss = loss * factor
    weight = options.get("weight")
    return (loss, slope) if weight is None else (loss * weight, slope * weight)


def _differentiated(spec: Spec, x: Tensor, y: Tensor, operands: Sequence[Operand]) -> tuple[Tensor, Tensor]:
    """Value and slope of a loss that has no closed form for its slope.

    The hooks on saved tensors of a caller do not see what autograd saves here, because it is gone when this returns.
    """
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor):
        leaf = x.detach().requires_grad_()
        loss = element_loss(spec, leaf, y, operands)
        (slope,) = torch.autograd.grad(loss.sum(), leaf)
    return loss.detach(), slope


def loss_forward(
    spec: Spec, input: Tensor, target: Tensor, operands: Sequence[Operand], want_gradient: bool
) -> tuple[Tensor, Tensor | None]:
    """The loss, and for a reduction the gradient for an upstream gradient of 1."""
    if spec.reduction == "none":
        out = torch.empty_like(input, dtype=spec.result)
        for x, y, part, *values in slices([input, target, out, *operands], input):
            part.copy_(element_loss(spec, x, y, values, fast=True))
        return out, None
    divisor = divisor_of(spec, operands, input.numel(), input.dtype)
    gradient = torch.empty_like(input) if want_gradient else input
    if input.numel() <= SLICE:
        value, _ = loss_and_slope(
            spec, input, target, operands, want_slope=want_gradient, scale=1 / divisor, out=gradient
        )
        assert value is not None
        plain_mean = spec.reduction == "mean" and "divisor" not in spec.options
        total = value.mean() if plain_mean else value.sum() / divisor
    else:
        total = torch.zeros((), dtype=compute_dtype(input.dtype), device=input.device)
        for x, y, part, *values in slices([input, target, gradient, *operands], input):
            value, _ = loss_and_slope(spec, x, y, values, want_slope=want_gradient, scale=1 / divisor, out=part)
            assert value is not None
            total += value.sum()
        total = total / divisor
    return cast(total, spec.result), gradient if want_gradient else None


def loss_backward(spec: Spec, input: Tensor, target: Tensor, operands: Sequence[Operand], gradient: Tensor) -> Tensor:
    """d loss / dx times the upstream gradient, recomputed from the inputs."""
    dx = torch.empty_like(input)
    each = 1 / divisor_of(spec, operands, input.numel(), input.dtype)
    for x, y, g, part, *values in slices([input, target, gradient, dx, *operands], input):
        scale = g.to(compute_dtype(input.dtype)) * each
        loss_and_slope(spec, x, y, values, want_loss=False, scale=scale, out=part)
    return dx


def rescaled(made: Tensor, gradient: Tensor) -> Tensor:
    """A gradient that forward made, times the upstream gradient, in place. A CPU reads that at no cost, and passes over 1.

    .data has a version counter of its own: neither this nor what callers do to .grad spoils saved_tensors.
    """
    own = made.data
    if not own.is_cpu or gradient.item() != 1:
        own *= gradient
    return own


# ----------------------------------------------------------------------------------------------------------------- gates


class _Shrink(torch.autograd.Function):
    """torch's own forward, and a backward that passes the gradient of NaN inputs on."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, lambd: float, soft: bool) -> Tensor:
        ctx.save_for_backward(input)
        ctx.lambd = lambd
        return F.softshrink(input, lambd) if soft else torch.hardshrink(input, lambd)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (input,) = ctx.saved_tensors
        return torch.ops.aten.threshold_backward(gradient, input.abs(), ctx.lambd), None, None


def _loses_gradients(input: Tensor) -> bool:
    """True if torch's own backward, vectorised on a CPU, would drop gradients: those of NaN inputs.

    A maximum or a sum that is not NaN shows, at a tenth of the cost of the repair, that there are none. A maximum of
    2**16 elements takes half as long, because a sum wakes a second thread; but it copies a tensor whose elements do not lie in
    order.
    """
    if not (torch.is_grad_enabled() and input.is_cpu):
        return False
    x = input.data
    found = x.max() if x.numel() and x.is_contiguous() else x.sum()
    return math.isnan(found.item())


def hardshrink_(input: Tensor, lambd: float) -> Tensor:
    """F.hardshrink in place, where autograd does not record."""
    output: Tensor = torch.ops.aten.hardshrink.out(input, lambd, out=input)
    return output


def hardshrink(input: Tensor, lambd: float) -> Tensor:
    """F.hardshrink, with the gradient of NaN inputs."""
    if input.requires_grad and _loses_gradients(input):
        return _Shrink.apply(input, lambd, False)  # type: ignore[no-any-return, no-untyped-call]
    return torch.hardshrink(input, lambd)


def keep_large(input: Tensor, threshold: float) -> Tensor:
    """F.hardshrink keeps the same, but for a threshold of NaN."""
    return reference.keep_large(input, threshold) if math.isnan(threshold) else hardshrink(input, threshold)


def softshrink(input: Tensor, lambd: float) -> Tensor:
    """F.softshrink, with the gradient of NaN inputs; torch's own refuses a lambd of infinity."""
    if lambd == math.inf:
        return reference.softshrink(input, lambd)
    if input.requires_grad and _loses_gradients(input):
        return _Shrink.apply(input, lambd, True)  # type: ignore[no-any-return, no-untyped-call]
    return F.softshrink(input, lambd)


def binary_threshold(
    input: Tensor, threshold: float, above_value: float, below_value: float, *, dtype: torch.dtype | None = None
) -> Tensor:
    """The reference, with a comparison that writes the output's own dtype; small inputs take the fewest calls instead."""
    result = dtype or input.dtype
    few = are_few(input)
    t = cached_constant(threshold, input.dtype) if few else threshold
    if dtype is torch.bool and above_value and not below_value:
        return torch.gt(input, t)
    if few:
        above, below = cached_constant(above_value, result), cached_constant(below_value, result)
        return torch.where(torch.gt(input, t), above, below)
    if result != input.dtype:
        return reference.binary_threshold(input, threshold, above_value, below_value, dtype=dtype)
    return select(torch.gt, input.detach(), threshold, above_value, below_value)


# ------------------------------------------------------------------ gates whose threshold learns by a straight-through estimate

STRAIGHT_THROUGH = frozenset({"jumprelu", "step", "jumprelu_l0"})


def straight_through_gate(
    name: str, input: Tensor, threshold: Operand, bandwidth: float, input_gradient: bool, records: bool
) -> Any:
    """jumprelu, step and jumprelu_l0 by selections that are vectorised on a CPU, where torch.where takes six times as long."""
    if records:
        return _StraightThrough.apply(input, threshold, name, bandwidth, input_gradient)  # type: ignore[no-untyped-call]
    return _gated(name, input, threshold, False)[0]


def _gated(name: str, input: Tensor, threshold: Operand, records: bool = True) -> tuple[Any, Tensor]:
    """The outputs, and what they are selected by.

    That is x - t, which is -inf where either is NaN, or both are the same infinity. For few elements without a gradient it is
    x > t, because a call takes more time than a pass over them.
    """
    x, t = reference.side_by_side(input, threshold)
    if not records and are_few(x):
        by = x > t
        y = cast(by if name == "step" else torch.where(by, x, cached_constant(0.0, x.dtype)), input.dtype)
    else:
        by = (x - t).nan_to_num_(-math.inf, math.inf, -math.inf)
        y = cast(holds(torch.gt, by, 0) if name == "step" else _selected(x, by, 0), input.dtype)
    if name != "jumprelu_l0":
        return y, by
    above = by if by.dtype is torch.bool else holds(torch.gt, by, 0)
    return (y, above.sum(-1, dtype=compute_dtype(input.dtype))), by


def _selected(value: Tensor, x: Tensor, bound: float) -> Tensor:
    """value where x > bound, else 0; x is not NaN."""
    selected: Tensor = torch.ops.aten.threshold_backward(value, x, bound)
    return selected


class _StraightThrough(torch.autograd.Function):
    """`_gated` with its gradients. A backward that is differentiated or transformed goes by the twins in reference.py."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, threshold: Operand, name: str, bandwidth: float, input_gradient: bool) -> Any:
        outputs, excess = _gated(name, input, threshold)
        ctx.name, ctx.bandwidth, ctx.input_gradient, ctx.dtype = name, bandwidth, input_gradient, input.dtype
        ctx.number = None if isinstance(threshold, Tensor) else threshold
        ctx.save_for_backward(excess, threshold if ctx.number is None else None)
        ctx.set_materialize_grads(False)
        return outputs

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        excess, tensor = ctx.saved_tensors
        threshold = ctx.number if tensor is None else tensor
        given, nothing = [g for g in gradients if g is not None], (None,) * 3
        if not given:
            return None, None, *nothing
        dt: Tensor | None
        if torch.is_grad_enabled() or not is_ordinary(*given):
            above, window = excess > 0, excess.abs() < ctx.bandwidth / 2
            values = threshold, ctx.bandwidth
            dx, dt = reference.from_bits(ctx.name, gradients, above, window, values, ctx.dtype, ctx.input_gradient)
        else:
            dx, dt = _pulled_back(ctx, excess, threshold, gradients)
        if dt is not None and ctx.needs_input_grad[1]:
            return cast(dx, ctx.dtype), cast(summed(dt, tensor.shape), tensor.dtype), *nothing
        return cast(dx, ctx.dtype), None, *nothing


def _pulled_back(
    ctx: Any, excess: Tensor, threshold: Operand, gradients: Sequence[Tensor | None]
) -> tuple[Tensor, Tensor | None]:
    """dx and the elementwise dt; None where nothing asks for it."""
    wide = [None if g is None else cast(g, excess.dtype) for g in gradients]
    of_value = None if ctx.name == "step" else wide[0]  # the gradient of x where x > t
    of_step = None if ctx.name == "jumprelu" else wide[-1]  # that of 1 where x > t
    if ctx.name == "jumprelu_l0" and of_step is not None:
        of_step = of_step.unsqueeze(-1)
    dx = torch.zeros_like(excess) if of_value is None else _selected(of_value, excess, 0)
    if not (ctx.needs_input_grad[1] or ctx.input_gradient):
        return dx, None
    slopes = [] if of_step is None else [of_step / -ctx.bandwidth]
    if of_value is not None:
        t = torch.as_tensor(threshold, dtype=excess.dtype, device=excess.device)
        # An infinite t has no x in its window. float32 holds the reciprocal of 0.001, and not 0.001.
        slopes.append(of_value * (t.nan_to_num(0.0, 0.0, 0.0) * (-1.0 / ctx.bandwidth)))
    dt = _selected(sum(slopes[1:], slopes[0]), excess.abs().neg_(), -ctx.bandwidth / 2)
    return (dx - dt if ctx.input_gradient else dx), dt


# ------------------------------------------------------------------------------------------------------------ by their name


GATES: Mapping[str, Callable[..., Tensor]] = {
    "threshold": torch.threshold,
    "hardshrink": hardshrink,
    "softshrink": softshrink,
    "keep_large": keep_large,
    "binary_threshold": binary_threshold,
}
SAME_KERNELS = frozenset({"threshold", "hardshrink", "softshrink", "keep_large"})  # on a GPU, forward and backward
IN_PLACE: Mapping[str, Callable[..., Tensor]] = {"threshold": torch.threshold_, "hardshrink": hardshrink_}
