"""The eager backend: the reference formulas with few passes over memory.

Losses and gates whose threshold learns run in slices that stay in the cache. Other gates with a number for threshold use
the torch kernels that compute the same bits, and are given it as the input's dtype holds it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import layout, reference
from .backend import is_plain
from .reference import LossSpec, Surrogate
from .rounding import round_to
from .rules import Operand

SLICE = 1 << 18
FEW = 1 << 13  # elements of which a pass costs less than a call


def _parts(tensors: Sequence[Operand], like: Tensor) -> Iterator[list[Any]]:
    """Matching slices of about SLICE elements: flat if every tensor lies as `like` does, else rows of its first dimension.

    Numbers and tensors that broadcast along the first dimension are handed on whole.
    """
    if like.numel() <= SLICE or like.dim() == 0:
        yield list(tensors)
        return
    whole = [not isinstance(t, Tensor) or t.numel() == 1 for t in tensors]
    if all(w or (t.shape == like.shape and t.is_contiguous()) for w, t in zip(whole, tensors)):  # type: ignore[union-attr]
        tensors = [(t.reshape(()) if isinstance(t, Tensor) else t) if w else t.view(-1) for w, t in zip(whole, tensors)]  # type: ignore[union-attr]
        length, step = like.numel(), SLICE
    else:
        whole = [w or t.dim() < like.dim() or t.shape[0] == 1 for w, t in zip(whole, tensors)]  # type: ignore[union-attr]
        length = like.shape[0]
        step = max(1, SLICE * length // like.numel())
    for start in range(0, length, step):
        size = min(step, length - start)
        yield [t if w else t.narrow(0, start, size) for w, t in zip(whole, tensors)]  # type: ignore[union-attr]


def _are_few(input: Tensor) -> bool:
    """Whether numbers go in as kept tensors: of a GPU they would belong to one stream, or to a graph being captured."""
    return input.is_cpu and input.numel() <= FEW


@functools.lru_cache(maxsize=1024)
def _kept(value: float, sign: float, dtype: torch.dtype) -> Tensor:
    held = round_to(value, dtype) if dtype.is_floating_point else value
    return torch.full((), held, dtype=dtype, device="cpu")


def _scalar(value: float, dtype: torch.dtype) -> Tensor:
    """A number as a 0-dim CPU tensor, kept and not to be written to; its sign tells -0 from 0."""
    return _kept(value, math.copysign(1.0, value), dtype)


def _pick(compare: Callable[..., Tensor], left: Tensor, right: Operand, a: Operand, b: Operand) -> Tensor:
    """reference.pick in less time.

    For few elements numbers become kept tensors, which torch would make of them anyway. For many, if a is a finite number
    above 0 and b a number, the comparison writes 0 and 1 in the input's dtype; times a; then b replaces what is not above 0.
    """
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return reference.pick(compare, left, right, a, b)
    if _are_few(left):
        t = right if isinstance(right, Tensor) else _scalar(right, left.dtype)
        return torch.where(compare(left, t), _scalar(a, left.dtype), _scalar(b, left.dtype))
    a, b = round_to(a, left.dtype), round_to(b, left.dtype)
    if not 0 < a < math.inf:
        return reference.pick(compare, left, right, a, b)
    indicator: Tensor = compare(left, right, out=torch.empty_like(left))
    if a != 1:
        indicator *= a
    plain = b == 0 and math.copysign(1.0, b) > 0
    return indicator if plain else F.threshold(indicator, 0.0, b, inplace=True)


# ---------------------------------------------------------------------------------------------------------------- losses


def _in_unit(y: Tensor) -> Tensor:
    """reference.in_unit; on a CPU the least and the greatest tell in a tenth of the time that all lie inside."""
    if y.is_cpu:
        least, greatest = y.aminmax()
        if least.item() >= 0 and greatest.item() <= 1:
            return y
    return reference.in_unit(y)


def loss_forward(
    spec: LossSpec, input: Tensor, target: Tensor, operands: Sequence[Operand], *, want_gradient: bool
) -> tuple[Tensor, Tensor | None]:
    """The loss, and for a reduction the gradient for an upstream gradient of 1."""
    if spec.reduction == "none":
        out = torch.empty_like(input, dtype=spec.result)
        for x, y, part, *values in _parts([input, target, out, *operands], input):
            value, _ = reference.loss_and_slope(spec, x, y, values, want_slope=False, pick=_pick, in_unit=_in_unit)
            part.copy_(value)
        return out, None
    scale = 1 / input.numel() if spec.reduction == "mean" else 1.0
    if input.numel() <= SLICE:
        value, slope = reference.loss_and_slope(
            spec, input, target, operands, want_slope=want_gradient, pick=_pick, in_unit=_in_unit
        )
        total = value.mean() if spec.reduction == "mean" else value.sum()
        if slope is not None:
            slope = torch.mul(slope, scale, out=torch.empty_like(input))
        return total.to(spec.result), slope
    gradient = torch.empty_like(input) if want_gradient else input
    total = torch.zeros((), dtype=reference.compute_dtype(input.dtype), device=input.device)
    for x, y, part, *values in _parts([input, target, gradient, *operands], input):
        value, slope = reference.loss_and_slope(
            spec, x, y, values, want_slope=want_gradient, pick=_pick, in_unit=_in_unit
        )
        total += value.sum()
        if slope is not None:
            torch.mul(slope, scale, out=part)
    if spec.reduction == "mean":
        total /= input.numel()
    return total.to(spec.result), gradient if want_gradient else None


def loss_backward(
    spec: LossSpec, input: Tensor, target: Tensor, operands: Sequence[Operand], gradient: Tensor
) -> Tensor:
    """d loss / dx times the upstream gradient, recomputed from the inputs."""
    dx = torch.empty_like(input)
    scale = 1 / input.numel() if spec.reduction == "mean" else 1.0
    for x, y, g, part, *values in _parts([input, target, gradient, dx, *operands], input):
        _, slope = reference.loss_and_slope(spec, x, y, values, want_loss=False, pick=_pick, in_unit=_in_unit)
        torch.mul(slope, g.to(slope.dtype) * scale, out=part)
    return dx


def loss_rescale(spec: LossSpec, dx: Tensor, gradient: Tensor) -> None:
    """dx *= gradient, in place; on a CPU, where reading it costs nothing, a gradient of 1 is passed over."""
    if dx.device.type != "cpu" or gradient.item() != 1:
        dx *= gradient


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
    """Whether torch's own backward, vectorised on a CPU, would drop gradients: those of NaN inputs.

    A sum that is not NaN shows, at a tenth of the cost of the repair, that there are none.
    """
    return torch.is_grad_enabled() and input.is_cpu and math.isnan(input.detach().sum().item())


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
    few = _are_few(input)
    t = _scalar(threshold, input.dtype) if few else threshold
    if dtype is torch.bool and above_value and not below_value:
        return torch.gt(input, t)
    if few:
        return torch.where(torch.gt(input, t), _scalar(above_value, result), _scalar(below_value, result))
    if result != input.dtype:
        return reference.binary_threshold(input, threshold, above_value, below_value, dtype=dtype)
    return _pick(torch.gt, input.detach(), threshold, above_value, below_value)


# -------------------------------------------------------------------------------------------- gates whose threshold learns


def _is_one_slice(input: Tensor, threshold: Operand) -> bool:
    """Whether torch lays the results of these out as the input lies, and one pass holds them."""
    contiguous = not isinstance(threshold, Tensor) or threshold.is_contiguous()
    return input.numel() <= SLICE and input.is_contiguous() and contiguous


class LearnedGate(torch.autograd.Function):
    """A gate whose threshold learns: saves its codes, a byte each, and not the input."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, threshold: Operand, surrogate: Surrogate) -> Any:
        if _is_one_slice(input, threshold):
            output = surrogate.value(input, threshold, *surrogate.constants)
            above, window = surrogate.codes(input, threshold, *surrogate.constants)
        else:
            output, above, window = LearnedGate._sliced(input, threshold, surrogate)
        ctx.save_for_backward(above, window, *([threshold] if isinstance(threshold, Tensor) else []))
        ctx.surrogate, ctx.number = surrogate, None if isinstance(threshold, Tensor) else threshold
        ctx.dtype = input.dtype
        ctx.set_materialize_grads(False)
        return (output, reference.counted(above, input.dtype)) if surrogate.counts else output

    @staticmethod
    def _sliced(input: Tensor, threshold: Operand, surrogate: Surrogate) -> tuple[Tensor, Tensor, Tensor]:
        output, above, window = (
            torch.empty_like(input, dtype=dtype) for dtype in (input.dtype, torch.bool, torch.bool)
        )
        for x, y, a, w, t in _parts([input, output, above, window, threshold], input):
            y.copy_(surrogate.value(x, t, *surrogate.constants))
            for mark, found in zip((a, w), surrogate.codes(x, t, *surrogate.constants)):
                mark.copy_(found)
        return output, above, window

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        if all(g is None for g in gradients):
            return None, None, None
        above, window, *tensors = ctx.saved_tensors
        threshold, learns, dtype = tensors[0] if tensors else ctx.number, ctx.needs_input_grad[1], ctx.dtype
        traced = torch.is_grad_enabled() or not is_plain(*gradients)
        if traced or (_is_one_slice(above, threshold) and all(g is None or g.is_contiguous() for g in gradients)):
            dx, each = reference.pull(ctx.surrogate, gradients, (above, window), threshold, dtype)
            return dx, layout.summed(each, threshold.shape).to(threshold.dtype) if learns else None, None
        dx = torch.empty_like(above, dtype=dtype)
        wide = reference.compared_dtype(dtype, threshold)
        dt = torch.zeros(threshold.shape if learns else (), dtype=wide, device=above.device)
        present = [i for i, g in enumerate(gradients) if g is not None]
        columns = [g if i == 0 else g.unsqueeze(-1) for i, g in enumerate(gradients) if g is not None]
        for a, w, t, part, total, *upstream in _parts([above, window, threshold, dx, dt, *columns], above):
            used: list[Tensor | None] = [None] * len(gradients)
            for i, g in zip(present, upstream):
                used[i] = g if i == 0 else g.squeeze(-1)
            along_x, along_t = reference.pull(ctx.surrogate, used, (a, w), t, dtype)
            part.copy_(along_x)
            if learns:
                total += layout.summed(along_t, total.shape)
        return dx, dt.to(threshold.dtype) if learns else None, None
