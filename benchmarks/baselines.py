"""The eager baselines: each op as one writes it in torch with the fewest calls; torch.compile compiles these too.

Constants are 0-dim tensors made once, outside what is timed, so that 16-bit inputs stay in their dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from triton_thresh import reference
from triton_thresh.backend import use_backend
from triton_thresh.families import Gate, LearnedGate
from triton_thresh.rules import ByLoss, ByPrediction, ByProximity, Rule

Formula = Callable[..., Tensor]


def gate(op: Gate, arguments: tuple[float, ...], like: Tensor) -> Formula:
    """torch's own function of that name, else the entry below, else the reference."""
    if op.name in GATES:
        return GATES[op.name](arguments, like)
    function: Formula = getattr(F, op.name, op.reference)
    return lambda x: function(x, *arguments)


def _binary_threshold(arguments: tuple[float, ...], like: Tensor) -> Formula:
    t, *values = arguments
    above, below = (like.new_tensor(v) for v in values)
    return lambda x: torch.where(x > t, above, below)


GATES: Mapping[str, Callable[[tuple[float, ...], Tensor], Formula]] = {"binary_threshold": _binary_threshold}


class _StraightThrough(torch.autograd.Function):
    """jumprelu, step and both with the count, as one writes them out: comparisons as masks, sums over rows."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, t: Tensor, bandwidth: float, name: str) -> Any:
        ctx.save_for_backward(x, t)
        ctx.bandwidth, ctx.name = bandwidth, name
        above = x > t
        if name == "step":
            return above.to(x.dtype)
        y = torch.where(above, x, 0)
        return y if name == "jumprelu" else (y, above.sum(-1, dtype=torch.float32))

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor | None, ...]:
        x, t = ctx.saved_tensors
        g, near = gradients[0], (x - t).abs() < ctx.bandwidth / 2
        if ctx.name == "step":
            return torch.zeros_like(x), (near * g).sum(0, dtype=t.dtype) / -ctx.bandwidth, None, None
        push = t * g if ctx.name == "jumprelu" else torch.addcmul(gradients[1][:, None], t, g)
        return torch.where(x > t, g, 0), (near * push).sum(0, dtype=t.dtype) / -ctx.bandwidth, None, None


def learned(op: LearnedGate, bandwidth: float) -> Formula:
    """The entry by name, else the op's eager backend."""
    if op.name in ("jumprelu", "step", "jumprelu_l0"):
        return lambda x, t: _StraightThrough.apply(x, t, bandwidth, op.name)  # type: ignore[no-untyped-call]

    def formula(x: Tensor, t: Tensor) -> Any:
        with use_backend("eager"):
            return op(x, t, bandwidth)

    return formula


class _HardshrinkGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, t: float) -> Tensor:
        ctx.t = t
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        return F.hardshrink(g, ctx.t), None


def hardshrink_gradient(x: Tensor, t: float) -> Tensor:
    """The identity, whose gradient passes through F.hardshrink: for t >= 0 what keeps |g| > t and NaN."""
    return _HardshrinkGradient.apply(x, t)  # type: ignore[no-any-return, no-untyped-call]


def hardshrink_gradients_(parameters: Sequence[Tensor], t: float) -> None:
    """One call a gradient, in place."""
    for parameter in parameters:
        assert parameter.grad is not None
        torch.ops.aten.hardshrink.out(parameter.grad, t, out=parameter.grad)


def loss(base: str, rule: Rule, like: Tensor) -> Formula:
    """The mean of a cell of the grid; the reference's formula for a base or a rule that has no entry below."""
    if base in LOSSES and type(rule) in RULES:
        return RULES[type(rule)](base, rule, like)
    spec, operands = reference.specify(like, rule, base)
    return lambda x, y: reference.loss(spec, x, y, operands)


def _elementwise(x: Tensor, y: Tensor, base: str) -> Tensor:
    return LOSSES[base](x, y, reduction="none")


def _weighted_mse(x: Tensor, y: Tensor, weight: Tensor) -> Tensor:
    return (F.mse_loss(x, y, reduction="none") * weight).mean()  # torch's weighted mean divides by the sum of weights


def _by_prediction(base: str, rule: ByPrediction, like: Tensor) -> Formula:
    t, *values = rule.operands(base)
    above, below = (like.new_tensor(v) for v in values)
    weighted = _weighted_mse if base == "mse" else LOSSES[base]
    return lambda x, y: weighted(x, y, torch.where(x >= t, above, below))


def _by_proximity(base: str, rule: ByProximity, like: Tensor) -> Formula:
    t, reach, factor = map(float, rule.operands(base))
    predict = torch.sigmoid if base == "bce_with_logits" else lambda x: x

    def formula(x: Tensor, y: Tensor) -> Tensor:
        penalty = torch.rsub((predict(x) - t).abs(), factor, alpha=factor / reach).clamp(min=0)
        value = _elementwise(x, y, base)
        return torch.addcmul(value, value, penalty).mean()

    return formula


def _by_loss(base: str, rule: ByLoss, like: Tensor) -> Formula:
    bound, factor = rule.operands(base)

    def formula(x: Tensor, y: Tensor) -> Tensor:
        value = _elementwise(x, y, base)
        return torch.where(value > bound, value * factor, value).mean()

    return formula


LOSSES: Mapping[str, Formula] = {
    "mse": F.mse_loss,
    "bce": F.binary_cross_entropy,
    "bce_with_logits": F.binary_cross_entropy_with_logits,
}
RULES: Mapping[type[Rule], Callable[[str, Any, Tensor], Formula]] = {
    ByPrediction: _by_prediction,
    ByProximity: _by_proximity,
    ByLoss: _by_loss,
}
