"""Every op in plain torch: the specification, the CPU backend, the tests' oracle and the benchmark's baseline.

Gates are one selection each. Losses are a grid of base x rule; a base and a rule each give a value and, beside it, its
derivative in the prediction, so that loss and gradient need no tape.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.jit._trace import is_tracing

from .rounding import HALF, held, narrowed
from .rules import ByLoss, ByPrediction, ByProximity, Operand, Rule


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """float32 for 16-bit inputs, else the input's own."""
    return torch.float32 if dtype in HALF else dtype


def in_compute_type(tensor: Operand, dtype: torch.dtype) -> Operand:
    """A tensor operand in the compute type; numbers as they are."""
    return tensor.to(dtype) if isinstance(tensor, Tensor) and tensor.dtype != dtype else tensor


# ---------------------------------------------------------------------------------------------------------------- gates


def by_value(input: Tensor, threshold: Operand) -> Operand:
    """An integer beyond those an integer input can hold, as an infinity: torch would wrap it around."""
    if isinstance(threshold, int) and not input.is_floating_point():
        info = torch.iinfo(input.dtype)
        if not info.min <= threshold <= info.max:
            return math.copysign(math.inf, threshold)
    return threshold


def _filled(number: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A number as a 0-dim tensor."""
    value = held(number, dtype, device) if dtype.is_floating_point else number
    return value if isinstance(value, Tensor) else torch.full((), value, dtype=dtype, device=device)


def compared(input: Tensor, threshold: Operand) -> Operand:
    """The threshold as it is compared: numbers, 0-dim and integer tensors in a floating input's dtype, others as they are."""
    if not input.is_floating_point():
        return by_value(input, threshold)
    if isinstance(threshold, Tensor):
        rounds = threshold.dim() == 0 or not threshold.is_floating_point()
        return narrowed(threshold, input.dtype) if rounds else threshold
    return held(threshold, input.dtype, input.device)


def threshold(input: Tensor, threshold: Operand, value: float = 0.0) -> Tensor:
    """value where x <= t, else x. On integer inputs numbers are truncated to the input's dtype, as ATen does."""
    filling: Operand = value
    if input.is_floating_point():
        filling = held(value, input.dtype, input.device)
    else:
        filling = int(value)
        if not isinstance(threshold, Tensor):
            threshold = int(threshold)
        elif threshold.dim() == 0:
            threshold = threshold.to(input.dtype)
    return torch.where(input <= compared(input, threshold), filling, input)


def hardshrink(input: Tensor, lambd: Operand = 0.5) -> Tensor:
    """0 where -t <= x <= t, else x."""
    t = compared(input, lambd)
    return torch.where((input >= -t) & (input <= t), 0, input)


def softshrink(input: Tensor, lambd: Operand = 0.5) -> Tensor:
    """x - t where x > t, x + t where x < -t, x where x is NaN, else 0."""
    t = compared(input, lambd)
    kept = torch.where(input.isnan(), input, 0)
    return torch.where(input > t, input - t, torch.where(input < -t, input + t, kept)).to(input.dtype)


def is_large(input: Tensor, threshold: Operand) -> Tensor:
    """Where |x| > t or x is NaN."""
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
    a, b = (_filled(value, dtype, input.device) for value in (above_value, below_value))
    return torch.where(above, a, b)


# -------------------------------------------------------------------------------------------- gates whose threshold learns


def compared_dtype(dtype: torch.dtype, threshold: Operand) -> torch.dtype:
    """Where an input of this dtype and a threshold are compared unrounded: float32 or wider."""
    dtype = compute_dtype(dtype)
    if isinstance(threshold, Tensor) and threshold.dtype is not dtype and threshold.is_floating_point():
        return torch.promote_types(dtype, threshold.dtype)
    return dtype


def _side_by_side(input: Tensor, threshold: Operand) -> tuple[Tensor, Operand]:
    dtype = compared_dtype(input.dtype, threshold)
    x = input if input.dtype == dtype else input.to(dtype)
    if not isinstance(threshold, Tensor) or threshold.dtype == dtype:
        return x, threshold
    return x, threshold.to(dtype)


def is_above(input: Tensor, threshold: Operand) -> Tensor:
    """x > t."""
    x, t = _side_by_side(input, threshold)
    return x > t


def codes(input: Tensor, threshold: Operand, bandwidth: float) -> tuple[Tensor, Tensor]:
    """x > t; and |x - t| < bandwidth / 2, the window in which t gets a gradient."""
    x, t = _side_by_side(input.detach(), threshold.detach() if isinstance(threshold, Tensor) else threshold)
    return x > t, (x - t).abs() < bandwidth / 2


def jumprelu(input: Tensor, threshold: Operand, bandwidth: float = 1e-3) -> Tensor:
    """x where x > t, else 0."""
    return torch.where(is_above(input, threshold), input, 0)


def jumprelu_push(g: Tensor, above: Tensor, window: Tensor, t: Operand, bandwidth: float) -> tuple[Tensor, Tensor]:
    """g where x > t; -(t / bandwidth) g inside the window, in which no infinite t has an x."""
    finite = torch.nan_to_num(t, 0.0, 0.0, 0.0) if isinstance(t, Tensor) else (t if math.isfinite(t) else 0.0)
    return torch.where(above, g, 0), torch.where(window, g * (finite / -bandwidth), 0)


def step(input: Tensor, threshold: Operand, bandwidth: float = 1e-3) -> Tensor:
    """1 where x > t, else 0."""
    return is_above(input, threshold).to(input.dtype)


def step_push(g: Tensor, above: Tensor, window: Tensor, t: Operand, bandwidth: float) -> tuple[Tensor, Tensor]:
    """0; -g / bandwidth inside the window."""
    dt = torch.where(window, g / -bandwidth, 0)
    return torch.zeros_like(dt), dt


def jumprelu_l0(input: Tensor, threshold: Operand, bandwidth: float = 1e-3) -> tuple[Tensor, Tensor]:
    """jumprelu, and how many elements of each row are above t, in float32 or wider."""
    above = is_above(input, threshold)
    return torch.where(above, input, 0), counted(above, input.dtype)


def counted(above: Tensor, dtype: torch.dtype) -> Tensor:
    """How many of each row are above, in float32 or wider: a 16-bit input's type cannot count."""
    return above.sum(-1, dtype=compute_dtype(dtype))


def softshrink_codes(input: Tensor, threshold: Operand) -> tuple[Tensor, Tensor]:
    """Two bits: 0 where x is dropped, 2 above t, 3 below -t, 1 where x is NaN."""
    x = input.detach()
    t = compared(x, threshold.detach() if isinstance(threshold, Tensor) else threshold)
    above = x > t
    below = (x < -t) & ~above  # a negative t in a tensor puts some x on both sides
    return below | x.isnan(), below | above


def softshrink_push(g: Tensor, low: Tensor, high: Tensor, t: Operand) -> tuple[Tensor, Tensor]:
    """g where kept; -g above t (high), +g below -t (both bits), 0 elsewhere."""
    return torch.where(low | high, g, 0), torch.where(high, torch.where(low, g, -g), 0)


def straight_through(surrogate: Surrogate, input: Tensor, threshold: Operand) -> Any:
    """A call whose own ops have its gradients: for programs that hold plain torch alone, traced or exported.

    To each output of jumprelu and its kind is added 0, as a product of the slope inside the window and t - t.
    """
    outputs = [surrogate.value(input, threshold, *surrogate.constants)]
    if surrogate.counts:
        outputs.append(counted(is_above(input, threshold), input.dtype))
    learns = surrogate.input_gradient or (isinstance(threshold, Tensor) and threshold.requires_grad)
    recorded = torch.is_grad_enabled() or is_tracing()  # which checks a trace by another, without gradients
    if surrogate.codes is codes and learns and recorded and not torch.onnx.is_in_onnx_export():
        x, t = _side_by_side(input, threshold)
        above, window = codes(input, threshold, *surrogate.constants)
        zero = t.detach() - t if isinstance(t, Tensor) else torch.zeros_like(x)
        if surrogate.input_gradient:
            zero = zero - (x.detach() - x)
        for place, push in enumerate(surrogate.pushes):
            slope = push(torch.ones_like(x), above, window, t, *surrogate.constants)[1].detach()
            nothing = torch.where(window, slope * zero, 0)
            output = outputs[place]
            outputs[place] = output - (nothing.sum(-1) if place else nothing).to(output.dtype)
    return tuple(outputs) if surrogate.counts else outputs[0]


Codes = Callable[..., tuple[Tensor, Tensor]]
Push = Callable[..., tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Surrogate:
    """A call of an op whose threshold learns: value, code, and of each output the map from a gradient to those of x and t.

    An output after the first is the count of each row. With `input_gradient` what reaches t reaches x, negated.
    """

    value: Callable[..., Tensor]
    codes: Codes
    pushes: tuple[Push, ...]
    constants: tuple[float, ...]
    input_gradient: bool

    @property
    def counts(self) -> bool:
        """Whether there is a second output."""
        return len(self.pushes) > 1


def pull(
    surrogate: Surrogate,
    gradients: Sequence[Tensor | None],
    codes: tuple[Tensor, Tensor],
    threshold: Operand,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """The elementwise gradients of x, in its dtype, and of t, in the type of comparison; None for an output nobody used.

    Differentiable in the gradients and in t.
    """
    shape = codes[0].shape
    wide = compared_dtype(dtype, threshold)
    t = in_compute_type(threshold, wide)
    upstream = [g if g is None else g.to(wide) for g in gradients]
    upstream[1:] = [g if g is None else g.unsqueeze(-1).expand(shape) for g in upstream[1:]]
    pairs = [push(g, *codes, t, *surrogate.constants) for push, g in zip(surrogate.pushes, upstream) if g is not None]
    dx, dt = pairs[0]
    for more_x, more_t in pairs[1:]:
        dx, dt = dx + more_x, dt + more_t
    return (dx - dt if surrogate.input_gradient else dx).to(dtype), dt


def tangents(
    surrogate: Surrogate, input: Tensor, threshold: Operand, dx: Tensor | None, dt: Tensor | None
) -> tuple[Tensor, ...]:
    """The outputs' tangents, in the type of comparison, for those of x and t (None: 0)."""
    dtype = compared_dtype(input.dtype, threshold)
    t, both = in_compute_type(threshold, dtype), surrogate.codes(input, threshold, *surrogate.constants)
    outputs: list[Tensor] = []
    for push in surrogate.pushes:
        output = torch.zeros_like(input, dtype=dtype)
        if dx is not None:
            along_x, along_t = push(dx.to(dtype), *both, t, *surrogate.constants)
            output = output + (along_x - along_t if surrogate.input_gradient else along_x)
        if dt is not None:
            output = output + push(dt.to(dtype).expand(input.shape), *both, t, *surrogate.constants)[1]
        outputs.append(output.sum(-1) if outputs else output)
    return tuple(outputs)


# --------------------------------------------------------------------------------------------------------------- losses


class Base(NamedTuple):
    """An element loss in x and y: value and slope; what a rule takes for the prediction, and its slope; the domain of x."""

    value: Callable[..., Tensor]
    slope: Callable[..., Tensor]
    prediction: Callable[[Tensor], Tensor]
    prediction_slope: Callable[[Tensor], Tensor | float]
    domain: str


def _identity(x: Tensor) -> Tensor:
    return x


def _one(x: Tensor) -> float:
    return 1.0


def mse(x: Tensor, y: Tensor) -> Tensor:
    """(x - y)**2."""
    d = x - y
    return d * d


def mse_slope(x: Tensor, y: Tensor) -> Tensor:
    """2 (x - y)."""
    return 2 * (x - y)


def in_unit(y: Tensor) -> Tensor:
    """A target of bce: NaN outside [0, 1]."""
    return torch.where(y.clamp(0, 1) == y, y, torch.nan)


def bce(x: Tensor, y: Tensor) -> Tensor:
    """-(y log x + (1 - y) log(1 - x)), logs clamped at -100; NaN for x outside [0, 1], and for y (loss_and_slope)."""
    return -(y * x.log().clamp(min=-100) + (1 - y) * (-x).log1p().clamp(min=-100))


def bce_slope(x: Tensor, y: Tensor) -> Tensor:
    """(x - y) / max(x (1 - x), 1e-12); NaN for x outside [0, 1]."""
    outside = (x < 0) | (x > 1)
    return ((x - y) / (x * (1 - x)).clamp(min=1e-12)).masked_fill(outside, torch.nan)


def bce_with_logits(x: Tensor, y: Tensor, pos_weight: Operand | None = None) -> Tensor:
    """(1 - y) x + w (max(-x, 0) + log1p(exp -|x|)) with w = 1 + (pos_weight - 1) y."""
    softplus = -F.logsigmoid(x)
    if pos_weight is not None:
        softplus = softplus * (1 + (pos_weight - 1) * y)
    return (1 - y) * x + softplus


def bce_with_logits_slope(x: Tensor, y: Tensor, pos_weight: Operand | None = None) -> Tensor:
    """(1 - y) - w (1 - s) with s the sigmoid of x."""
    if pos_weight is None:
        return x.sigmoid() - y
    return (1 - y) - (1 + (pos_weight - 1) * y) * (-x).sigmoid()


def _sigmoid_slope(x: Tensor) -> Tensor:
    return x.sigmoid() * (-x).sigmoid()


BASES: Mapping[str, Base] = {
    "bce": Base(bce, bce_slope, _identity, _one, "probability"),
    "bce_with_logits": Base(bce_with_logits, bce_with_logits_slope, torch.sigmoid, _sigmoid_slope, "logit"),
    "mse": Base(mse, mse_slope, _identity, _one, "real"),
}


Compare = Callable[..., Tensor]
Pick = Callable[[Compare, Tensor, Operand, Operand, Operand], Tensor]


def pick(compare: Compare, left: Tensor, right: Operand, a: Operand, b: Operand) -> Tensor:
    """a where compare(left, right), else b, in the dtype of `left`."""
    a, b = (v if isinstance(v, Tensor) else _filled(v, left.dtype, left.device) for v in (a, b))
    return torch.where(compare(left, right), a, b)


def by_prediction(
    base: Base, pick: Pick, x: Tensor, loss: Tensor, threshold: Operand, above: Operand, below: Operand
) -> Tensor:
    """above where x >= t, else below."""
    return pick(torch.ge, x, threshold, above, below)


def by_loss(base: Base, pick: Pick, x: Tensor, loss: Tensor, bound: Operand, factor: Operand) -> Tensor:
    """factor where l > bound, else 1."""
    return pick(torch.gt, loss, bound, factor, 1.0)


def by_proximity(
    base: Base, pick: Pick, x: Tensor, loss: Tensor, threshold: Operand, reach: Operand, factor: Operand
) -> Tensor:
    """1 + factor (1 - d / range) where d = |q - t| < range, else 1."""
    d = (base.prediction(x) - threshold).abs()
    if _tame(threshold, reach, factor):
        return 1 + factor * (1 - d.clamp(max=reach) / reach)  # the bracket is exactly 0 where d >= range
    return pick(torch.lt, d, reach, 1 + factor * (1 - d / reach), 1.0)


def by_proximity_slope(
    base: Base, pick: Pick, x: Tensor, threshold: Operand, reach: Operand, factor: Operand
) -> Tensor:
    """-(factor / range) sign(q - t) dq/dx where d < range, else 0; sign(0) = 0."""
    u = base.prediction(x) - threshold
    if _tame(threshold, reach, factor):
        return u.sign() * pick(torch.lt, u.abs(), reach, 1.0, 0.0) * -(factor / reach) * base.prediction_slope(x)
    return pick(torch.lt, u.abs(), reach, u.sign() * -(factor / reach) * base.prediction_slope(x), 0.0)


def _tame(threshold: Operand, reach: Operand, factor: Operand) -> bool:
    """Numbers so far from overflow that a product with 0 may stand for a selection, which takes twice the time on a CPU."""
    if not (type(threshold) is float and type(reach) is float and type(factor) is float):
        return False
    return abs(threshold) < 1e30 and 1e-15 < reach < 1e15 and abs(factor) < 1e15


class Weighing(NamedTuple):
    """A rule's weight w, and dw/dx where it is not 0 everywhere."""

    weight: Callable[..., Tensor]
    weight_slope: Callable[..., Tensor] | None = None


RULES: Mapping[type[Rule], Weighing] = {
    ByPrediction: Weighing(by_prediction),
    ByProximity: Weighing(by_proximity, by_proximity_slope),
    ByLoss: Weighing(by_loss),
}


def cell_key(base: str, rule: type[Rule], reduction: str = "mean") -> str:
    """The name of a cell of the grid in the tables; what is not reduced has its own."""
    return f"{base}.{rule.__name__}" + (".none" if reduction == "none" else "")


@dataclass(frozen=True)
class LossSpec:
    """Which loss is computed. Its operands travel beside it: the base's, the rule's, then the weight if there is one."""

    base: str
    rule: type[Rule]
    base_count: int
    rule_count: int
    reduction: str
    result: torch.dtype

    def __hash__(self) -> int:
        return hash(self.key)

    @functools.cached_property
    def name(self) -> str:
        """The cell's name in the tables, where it is reduced."""
        return cell_key(self.base, self.rule)

    @functools.cached_property
    def key(self) -> str:
        """The name of what runs in the tables."""
        return cell_key(self.base, self.rule, self.reduction)


def is_fused(reduction: str, dtype: torch.dtype) -> bool:
    """Whether forward computes the gradient, for an upstream gradient of 1: by float16 it might underflow."""
    return reduction != "none" and dtype != torch.float16


def loss_and_slope(
    spec: LossSpec,
    x: Tensor,
    y: Tensor,
    operands: Sequence[Operand],
    *,
    want_loss: bool = True,
    want_slope: bool = True,
    pick: Pick = pick,
    in_unit: Callable[[Tensor], Tensor] = in_unit,
) -> tuple[Any, Any]:
    """The weighted element loss and its derivative in x, in the compute type; None for what is not wanted."""
    dtype = compute_dtype(x.dtype)
    x, y = (tensor if tensor.dtype == dtype else tensor.to(dtype) for tensor in (x, y))
    if spec.base == "bce":
        y = in_unit(y)
    values = [in_compute_type(v, dtype) for v in operands]
    parameters, values = values[: spec.base_count], values[spec.base_count :]
    settings, weights = values[: spec.rule_count], values[spec.rule_count :]
    base, rule = BASES[spec.base], RULES[spec.rule]
    needs_loss = want_loss or rule.weight_slope is not None or spec.rule is ByLoss
    loss = base.value(x, y, *parameters) if needs_loss else x
    factor = rule.weight(base, pick, x, loss, *settings)
    slope = None
    if want_slope:
        slope = base.slope(x, y, *parameters) * factor
        if rule.weight_slope is not None:
            # a loss that is not finite lies where dw is 0: held to a finite number so that it does not meet it as inf * 0
            finite = loss.nan_to_num(0.0)
            slope = slope + finite * rule.weight_slope(base, pick, x, *settings)
        for w in weights:
            slope = slope * w
    if not want_loss:
        return None, slope
    loss = loss * factor
    for w in weights:
        loss = loss * w
    return loss, slope


def element_loss(spec: LossSpec, x: Tensor, y: Tensor, operands: Sequence[Operand]) -> Tensor:
    """The weighted element loss in the compute type."""
    loss: Tensor = loss_and_slope(spec, x, y, operands, want_slope=False)[0]
    return loss


def element_slope(spec: LossSpec, x: Tensor, y: Tensor, operands: Sequence[Operand]) -> Tensor:
    """Its derivative in x."""
    slope: Tensor = loss_and_slope(spec, x, y, operands, want_loss=False)[1]
    return slope


def reduced(loss: Tensor, spec: LossSpec) -> Tensor:
    """The element loss reduced and rounded once to the result's dtype."""
    if spec.reduction == "mean":
        loss = loss.mean()
    elif spec.reduction == "sum":
        loss = loss.sum()
    return loss.to(spec.result)


def loss(spec: LossSpec, x: Tensor, y: Tensor, operands: Sequence[Operand]) -> Tensor:
    """The loss itself."""
    return reduced(element_loss(spec, x, y, operands), spec)


def bce_in_ops(x: Tensor, y: Tensor) -> Tensor:
    """bce of ops that torch differentiates as bce_slope does, in both arguments: NaN, with NaN gradients, outside [0, 1]."""
    inside = ((x >= 0) & (x <= 1) & (y >= 0) & (y <= 1)).to(x.dtype)
    # products, which hand a NaN gradient on, put both inside for torch's function, which raises for others
    x, y = (v.nan_to_num(0.0, 0.0, 0.0) * inside for v in (x, y))
    return F.binary_cross_entropy(x, y, reduction="none") * torch.where(inside > 0, 1.0, torch.nan)


def loss_in_ops(spec: LossSpec, x: Tensor, y: Tensor, operands: Sequence[Operand]) -> Tensor:
    """The loss of ops that torch differentiates, in x and y, as often as asked and in every mode."""
    dtype = compute_dtype(x.dtype)
    x, y = x.to(dtype), y.to(dtype)
    values = [in_compute_type(v, dtype) for v in operands]
    parameters, values = values[: spec.base_count], values[spec.base_count :]
    base = BASES[spec.base]
    element = bce_in_ops(x, y) if spec.base == "bce" else base.value(x, y, *parameters)
    if spec.rule is ByProximity:
        t, reach, factor = values[:3]
        d = (base.prediction(x) - t).abs()
        weight = torch.where(d < reach, 1 + factor * (1 - d / reach), torch.ones_like(d))
    else:
        weight = RULES[spec.rule].weight(base, pick, x, element, *values[: spec.rule_count])
    for w in (weight, *values[spec.rule_count :]):
        element = element * w
    return reduced(element, spec)


def loss_gradient(spec: LossSpec, x: Tensor, y: Tensor, operands: Sequence[Operand], gradient: Tensor) -> Tensor:
    """d loss / dx times the upstream gradient; differentiable in x and in the gradient."""
    slope = element_slope(spec, x, y, operands)
    gradient = gradient.to(slope.dtype)
    if spec.reduction == "mean":
        gradient = gradient / x.numel()
    return (slope * gradient).to(x.dtype)


# asked here, since torch.compile of torch 2.11 cannot ask
AUTOCAST = tuple(
    kind for kind in ("cpu", "cuda", "xpu", "mps", "mtia", "hpu", "xla") if torch.amp.is_autocast_available(kind)
)


def result_dtype(input: Tensor) -> torch.dtype:
    """A loss has the input's dtype; float32 under autocast."""
    if input.dtype.itemsize > 2:
        return input.dtype
    kind = input.device.type
    wide = kind in AUTOCAST and torch.is_autocast_enabled(kind)
    return torch.float32 if wide else input.dtype


def specify(
    input: Tensor,
    rule: Rule,
    base: str,
    weight: Operand | None = None,
    pos_weight: Operand | None = None,
    reduction: str = "mean",
) -> tuple[LossSpec, tuple[Operand, ...]]:
    """Which loss is meant, and its operands."""
    parameters = () if pos_weight is None else (pos_weight,)
    weights = () if weight is None else (weight,)
    settings = rule.operands(base)
    spec = LossSpec(base, type(rule), len(parameters), len(settings), reduction, result_dtype(input))
    return spec, parameters + settings + weights


def threshold_loss(
    input: Tensor,
    target: Tensor,
    rule: Rule,
    *,
    base: str = "bce_with_logits",
    weight: Operand | None = None,
    pos_weight: Operand | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Any cell of the grid: the base's loss times the rule's weight."""
    spec, operands = specify(input, rule, base, weight, pos_weight, reduction)
    return loss(spec, input, target, operands)
