"""Every gate in plain torch: the specification, the tests' oracle, and what compilers and transforms see.

A formula is differentiable as often as it is needed: where a threshold learns, by an estimate whose value is 0. A gate that saves
two bits also has `<name>_backward`, the twin of its device function, for a backward that is differentiated again.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .checks import HALF, Operand, cast, compute_dtype, constant, held, narrowed

Gradients = Sequence[Tensor]  # the upstream gradients, one for each output

# ------------------------------------------------------------------------------------------- thresholds, as they compare


def by_value(input: Tensor, threshold: Operand) -> Operand:
    """An integer beyond those an integer input can hold, as an infinity: torch would wrap it around."""
    if isinstance(threshold, int) and not input.is_floating_point():
        info = torch.iinfo(input.dtype)
        if not info.min <= threshold <= info.max:
            return math.copysign(math.inf, threshold)
    return threshold


def compared(input: Tensor, threshold: Operand) -> Operand:
    """The threshold as it is compared: numbers, 0-dim and integer tensors in a floating input's dtype, others as they are."""
    if not input.is_floating_point():
        return by_value(input, threshold)
    if isinstance(threshold, Tensor):
        rounds = threshold.dim() == 0 or not threshold.is_floating_point()
        return narrowed(threshold, input.dtype) if rounds else threshold
    return held(threshold, input.dtype, input.device)


def side_by_side(input: Tensor, threshold: Operand) -> tuple[Tensor, Operand]:
    """Input and threshold in the type in which they are compared unrounded: float32 or wider."""
    if isinstance(threshold, Tensor) and threshold.dtype == input.dtype and input.dtype not in HALF:
        return input, threshold
    x = cast(input, compute_dtype(input.dtype))
    if not isinstance(threshold, Tensor):
        return x, threshold
    dtype = torch.promote_types(x.dtype, threshold.dtype) if threshold.is_floating_point() else x.dtype
    return cast(x, dtype), cast(threshold, dtype)


# ---------------------------------------------------------------------------------------------------------------- gates


def threshold(input: Tensor, threshold: Operand, value: float = 0.0) -> Tensor:
    """value where x <= t, else x. On integer inputs numbers are truncated to the input's dtype, as ATen does."""
    if not input.is_floating_point():
        value = int(value)
        if not isinstance(threshold, Tensor):
            threshold = int(threshold)
        elif threshold.dim() == 0:
            threshold = threshold.to(input.dtype)
    return torch.where(input <= compared(input, threshold), constant(value, input.dtype, input.device), input)


def hardshrink(input: Tensor, lambd: Operand = 0.5) -> Tensor:
    """0 where -t <= x <= t, else x."""
    t = compared(input, lambd)
    return torch.where((input >= -t) & (input <= t), 0, input)


def softshrink(input: Tensor, lambd: Operand = 0.5) -> Tensor:
    """x - t where x > t, x + t where x < -t, x where x is NaN, else 0."""
    t = compared(input, lambd)
    x = input
    if isinstance(lambd, Tensor) and lambd.requires_grad and isinstance(t, Tensor) and t.dtype in HALF:
        # The gradient to a threshold sums in float32, and passes by the rounding.
        wide = lambd.float()
        x, t = input.float(), t.detach().float() + (wide - wide.detach()).nan_to_num(0.0)
    if not isinstance(t, Tensor):
        t = constant(t, x.dtype, x.device)
    above, below = x > t, x < -t
    kept = torch.where(above | below | x.isnan(), x, 0)
    return (kept - torch.where(above, t, torch.where(below, -t, 0))).to(input.dtype)


def softshrink_backward(g: Gradients, low: Tensor, high: Tensor, t: Operand) -> tuple[Tensor, Tensor]:
    """g where kept; -g above t (high), +g below -t (both bits), 0 elsewhere."""
    return torch.where(low | high, g[0], 0), torch.where(high, torch.where(low, g[0], -g[0]), 0)


def garrote(input: Tensor, lambd: Operand = 0.5) -> Tensor:
    """(|x| - t)(|x| + t) / x where |x| > t, x where x is NaN, else 0."""
    x = input.to(compute_dtype(input.dtype))
    t = _beside(x, compared(input, lambd))
    if not isinstance(t, Tensor):
        t = constant(t, x.dtype, x.device)  # a number over a tensor would be rounded twice
    t = t.clamp(min=0)  # a tensor may hold less
    above = x.abs() > t
    inner = above & ~x.isinf()  # no gradient of 0 meets the slope of t / x at 0 or at infinity
    large, one = (constant(value, x.dtype, x.device) for value in (2.0**64, 1.0))
    scale = torch.where(x.abs() < 1e-30, large, one)  # beside denormals t / x is no float32
    safe, t = torch.where(inner, x * scale, 1), torch.where(inner, t * scale, 0)
    near = safe.abs() < 2 * t  # where x - t²/x would cancel; elsewhere the other form's gradient might overflow
    close = torch.where(near, safe, 1)
    size = close.abs()
    exact = (size - t) * (1 + t / size) * close.sign()
    shrunk = torch.where(near, exact, safe - t * (t / safe))
    return torch.where(inner, shrunk / scale, torch.where(above | x.isnan(), x, 0)).to(input.dtype)


def firm(input: Tensor, low: Operand, high: Operand) -> Tensor:
    """x where |x| > high, sign(x) high (|x| - low) / (high - low) where |x| > low, x where x is NaN, else 0."""
    x = input.to(compute_dtype(input.dtype))
    low, high = _beside(x, compared(input, low)), _beside(x, compared(input, high))
    size = x.abs()
    shrunk = torch.where(size > low, size - low, 0) * firm_steepness(low, high)
    shrunk = torch.where(x < 0, -shrunk, shrunk)
    kept = (size > high) | x.isnan()
    return torch.where(kept, x, torch.where(size > low, shrunk, 0)).to(input.dtype)


def _beside(x: Tensor, threshold: Operand) -> Operand:
    """A threshold in x's dtype, or its own if that is wider."""
    return threshold.to(torch.promote_types(threshold.dtype, x.dtype)) if isinstance(threshold, Tensor) else threshold


def firm_steepness(low: Operand, high: Operand) -> Operand:
    """high / (high - low): 1 for an infinite high. Between equal thresholds lies nothing, and any number serves."""
    if not isinstance(low, Tensor) and not isinstance(high, Tensor):
        return high / (high - low) if low < high < math.inf else 1.0
    device = low.device if isinstance(low, Tensor) else high.device  # type: ignore[union-attr]
    low, high = torch.as_tensor(low, device=device), torch.as_tensor(high, device=device)
    usable = (low < high) & (high < math.inf)
    return torch.where(usable, high, 1) / torch.where(usable, high - low, 1)


def firm_backward(g: Gradients, kept: Tensor, shrunk: Tensor, low: Operand, high: Operand) -> tuple[Tensor, None]:
    """g where kept (the first bit), high / (high - low) g where shrunk (the second), 0 elsewhere."""
    return torch.where(kept, g[0], torch.where(shrunk, g[0] * firm_steepness(low, high), 0)), None


def is_large(input: Tensor, threshold: Operand) -> Tensor:
    """True where |x| > t or x is NaN."""
    return (input.abs() > compared(input, threshold)) | input.isnan()


def keep_large(input: Tensor, threshold: Operand) -> Tensor:
    """x where |x| > t or x is NaN, else 0."""
    return torch.where(is_large(input, threshold), input, 0)


def binary_threshold(
    input: Tensor,
    threshold: Operand,
    above_value: float = 1.0,
    below_value: float = 0.0,
    *,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """above_value where x > t, else below_value."""
    dtype = dtype or input.dtype
    above = input.detach() > compared(input, threshold)
    if dtype is torch.bool and above_value and not below_value:
        return above
    high, low = (constant(value, dtype, input.device) for value in (above_value, below_value))
    return torch.where(above, high, low)


# -------------------------------------------------------------------------------------------- gates whose threshold learns


def widest(values: Sequence[Operand], dtype: torch.dtype) -> torch.dtype:
    """A dtype, promoted by those of the floating tensors among the operands."""
    given = [v.dtype for v in values if isinstance(v, Tensor) and v.is_floating_point()]
    return functools.reduce(torch.promote_types, given, dtype)


def from_bits(
    name: str,
    gradients: Sequence[Tensor | None],
    low: Tensor,
    high: Tensor,
    values: Sequence[Operand],
    dtype: torch.dtype,
    input_gradient: bool = False,
) -> tuple[Tensor, Tensor]:
    """dx and the elementwise dt of a gate from its two bits: differentiable in the gradients and in the threshold."""
    wide = widest(values, compute_dtype(dtype))
    values = tuple(v.to(wide) if isinstance(v, Tensor) else v for v in values)
    upstream = [torch.zeros_like(low, dtype=wide) if g is None else g.to(wide) for g in gradients]
    upstream[1:] = [g.unsqueeze(-1).expand(low.shape) if g.dim() < low.dim() else g for g in upstream[1:]]
    dx, dt = globals()[f"{name}_backward"](upstream, low, high, *values)
    return (dx - dt if input_gradient else dx).to(dtype), dt


def straight_through(value: Tensor, estimate: Tensor) -> Tensor:
    """`value` bit for bit, with the gradient of `estimate` added to its own."""
    return value - (estimate.detach() - estimate).to(value.dtype)


def _window(x: Tensor, t: Tensor, bandwidth: float) -> Tensor:
    """|x - t| < bandwidth / 2, where t gets a gradient."""
    return (x.detach() - t.detach()).abs() < bandwidth / 2


def _jump(window: Tensor, x: Tensor, t: Tensor, bandwidth: float, input_gradient: bool) -> Tensor:
    """An estimate with the derivative -(t / bandwidth) in t inside the window; with `input_gradient` the opposite in x."""
    inside = torch.where(window, t, 0)  # an infinite t has no x inside its window
    estimate = inside * inside * (-0.5 / bandwidth)
    if input_gradient:
        estimate = estimate + torch.where(window, x, 0) * (inside.detach() / bandwidth)
    return estimate


def _step(window: Tensor, x: Tensor, t: Tensor, bandwidth: float, input_gradient: bool) -> Tensor:
    """An estimate with the derivative -1 / bandwidth in t inside the window; the opposite in x if `input_gradient`."""
    inside = torch.where(window, x if input_gradient else x.detach(), 0)
    return (inside - torch.where(window, t, 0)) / bandwidth


def _apart(input: Tensor, threshold: Operand) -> tuple[Tensor, Tensor]:
    x, t = side_by_side(input, threshold)
    return x, t if isinstance(t, Tensor) else constant(t, x.dtype, x.device)


def jumprelu(input: Tensor, threshold: Operand, bandwidth: float = 1e-3, *, input_gradient: bool = False) -> Tensor:
    """x where x > t, else 0."""
    x, t = _apart(input, threshold)
    value = cast(torch.where(x > t, x, 0), input.dtype)  # gradients meet in x's dtype, and are rounded once
    return straight_through(value, _jump(_window(x, t, bandwidth), x, t, bandwidth, input_gradient))


def jumprelu_backward(
    g: Gradients, above: Tensor, window: Tensor, t: Operand, bandwidth: float
) -> tuple[Tensor, Tensor]:
    """g where x > t; -(t / bandwidth) g inside the window, in which no infinite t has an x."""
    finite = torch.nan_to_num(t, 0.0, 0.0, 0.0) if isinstance(t, Tensor) else (t if math.isfinite(t) else 0.0)
    return torch.where(above, g[0], 0), torch.where(window, g[0] * (finite / -bandwidth), 0)


def step(input: Tensor, threshold: Operand, bandwidth: float = 1e-3, *, input_gradient: bool = False) -> Tensor:
    """1 where x > t, else 0."""
    x, t = _apart(input, threshold)
    above = x > t
    value = above.to(input.dtype)
    if isinstance(threshold, Tensor) or input_gradient:
        value = straight_through(value, _step(_window(x, t, bandwidth), x, t, bandwidth, input_gradient))
    return value if input_gradient else _in_graph(input, value)


def _in_graph(x: Tensor, value: Tensor) -> Tensor:
    """`value`, with x in its graph and a gradient of 0 to it, whatever comes."""
    return torch.where(torch.zeros_like(x, dtype=torch.bool), x, value)


def step_backward(g: Gradients, above: Tensor, window: Tensor, t: Operand, bandwidth: float) -> tuple[Tensor, Tensor]:
    """0; -g / bandwidth inside the window."""
    dt = torch.where(window, g[0] / -bandwidth, 0)
    return torch.zeros_like(dt), dt


def jumprelu_l0(
    input: Tensor, threshold: Operand, bandwidth: float = 1e-3, *, input_gradient: bool = False
) -> tuple[Tensor, Tensor]:
    """jumprelu, and how many elements of each row are above t, in float32 or wider."""
    x, t = _apart(input, threshold)
    above = x > t
    value = cast(torch.where(above, x, 0), input.dtype)
    count = above.sum(-1, dtype=compute_dtype(input.dtype))  # a 16-bit type cannot count past 256
    window = _window(x, t, bandwidth)
    steps = _step(window, x, t, bandwidth, input_gradient)
    if not input_gradient:
        steps = _in_graph(x, steps)
    estimate = _summed_jagged(steps) if steps.is_nested else steps.sum(-1)
    return straight_through(value, _jump(window, x, t, bandwidth, input_gradient)), straight_through(count, estimate)


def fired(input: Tensor, threshold: Operand) -> Tensor:
    """How many elements of each feature, a place of the last dimension, are above t: int64."""
    x, t = _apart(input.detach(), threshold.detach() if isinstance(threshold, Tensor) else threshold)
    above = x > t
    if above.is_nested:
        above = above.values()
    return above.unsqueeze(0).flatten(0, -2).sum(0)


def _summed_jagged(x: Tensor) -> Tensor:
    """x.sum(-1), which has no gradient for jagged tensors (torch 2.13)."""
    ones = torch.ones(x.size(-1), 1, dtype=x.dtype, device=x.device)
    return torch.matmul(x, ones).squeeze(-1)


def jumprelu_l0_backward(
    g: Gradients, above: Tensor, window: Tensor, t: Operand, bandwidth: float
) -> tuple[Tensor, Tensor]:
    """The gradients through jumprelu, and through the step that the count sums, whose upstream gradient is g[1]."""
    dx, dt = jumprelu_backward(g, above, window, t, bandwidth)
    return dx, dt + step_backward(g[1:], above, window, t, bandwidth)[1]
