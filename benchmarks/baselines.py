"""The eager baselines: each op as one writes it in torch with the fewest calls; torch.compile compiles these too.

Gates that learn are the two `autograd.Function`s of JumpReLU autoencoders, which the page on porting starts from. Constants
are 0-dim tensors made once, outside what is timed, so that 16-bit inputs stay in their dtype.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from triton_thresh import cells, gates, reference
from triton_thresh.backend import use_backend
from triton_thresh.bases import BCE, MSE, Asymmetric, Base, BCEWithLogits, Focal
from triton_thresh.registry import Gate
from triton_thresh.rules import ByLoss, ByPrediction, ByProximity, Rule, Unweighted

Formula = Callable[..., Tensor]


def gate(op: Gate, arguments: tuple[float, ...], like: Tensor) -> Formula:
    """torch's own function of that name, else the entry below, else the reference."""
    if op.name in GATES:
        return GATES[op.name](arguments, like)
    function: Formula = getattr(F, op.name, None) or getattr(reference, op.name)
    return lambda x: function(x, *arguments)


def _binary_threshold(arguments: tuple[float, ...], like: Tensor) -> Formula:
    t, *values = arguments
    above, below = (like.new_tensor(v) for v in values)
    return lambda x: torch.where(x > t, above, below)


GATES: Mapping[str, Callable[[tuple[float, ...], Tensor], Formula]] = {"binary_threshold": _binary_threshold}


def _window(x: Tensor, t: Tensor, bandwidth: float) -> Tensor:
    u = (x - t) / bandwidth
    return ((u > -0.5) & (u < 0.5)).to(u)


class _JumpReLU(torch.autograd.Function):
    """As sparse autoencoders write it: masks that multiply, a window, a sum over the rows."""

    @staticmethod
    def forward(x: Tensor, t: Tensor, bandwidth: float) -> Tensor:
        return x * (x > t)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, float], output: Tensor) -> None:
        x, t, ctx.bandwidth = inputs
        ctx.save_for_backward(x, t)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor, None]:
        x, t = ctx.saved_tensors
        push = -(t / ctx.bandwidth) * _window(x, t, ctx.bandwidth) * g
        return (x > t) * g, push.sum(0), None


class _Step(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, t: Tensor, bandwidth: float) -> Tensor:
        return (x > t).to(x)

    setup_context = _JumpReLU.setup_context

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[None, Tensor, None]:
        x, t = ctx.saved_tensors
        push = -(1.0 / ctx.bandwidth) * _window(x, t, ctx.bandwidth) * g
        return None, push.sum(0), None


def _jumprelu(x: Tensor, t: Tensor, bandwidth: float) -> Tensor:
    return _JumpReLU.apply(x, t, bandwidth)  # type: ignore[no-any-return, no-untyped-call]


def _step(x: Tensor, t: Tensor, bandwidth: float) -> Tensor:
    return _Step.apply(x, t, bandwidth)  # type: ignore[no-any-return, no-untyped-call]


def _jumprelu_l0(x: Tensor, t: Tensor, bandwidth: float) -> tuple[Tensor, Tensor]:
    return _jumprelu(x, t, bandwidth), _step(x, t, bandwidth).sum(-1, dtype=torch.float32)


LEARNED: Mapping[str, Callable[..., Any]] = {"jumprelu": _jumprelu, "step": _step, "jumprelu_l0": _jumprelu_l0}


def learned(op: Gate, bandwidth: float) -> Formula:
    """The entry by name, else the op's eager backend."""
    if op.name in LEARNED:
        return functools.partial(LEARNED[op.name], bandwidth=bandwidth)

    def formula(x: Tensor, t: Tensor) -> Any:
        with use_backend("eager"):
            return gates.call(op, x, t, bandwidth)

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


def loss(base: Base, rule: Rule, like: Tensor) -> Formula:
    """The mean of the weighted loss; the pack's formula for a base or a rule that has no entry below."""
    if type(base) in ALONE and type(rule) is Unweighted:
        return ALONE[type(base)](base)
    if type(base) in LOSSES and type(rule) in RULES:
        return RULES[type(rule)](base, rule.on(base), like)
    spec, operands = cells.specify(base, rule, {}, False, "mean", like.dtype)
    return lambda x, y: cells.formula(spec, x, y, operands)


def _weighted_mse(x: Tensor, y: Tensor, weight: Tensor) -> Tensor:
    return (F.mse_loss(x, y, reduction="none") * weight).mean()  # torch's weighted mean divides by the sum of weights


def _by_prediction(base: Base, rule: ByPrediction, like: Tensor) -> Formula:
    t, *values = rule.operands().values()
    above, below = (like.new_tensor(v) for v in values)
    weighted = _weighted_mse if type(base) is MSE else LOSSES[type(base)]
    return lambda x, y: weighted(x, y, torch.where(x >= t, above, below))


def _by_proximity(base: Base, rule: ByProximity, like: Tensor) -> Formula:
    t, reach, factor = (float(value) for value in rule.operands().values())

    def formula(x: Tensor, y: Tensor) -> Tensor:
        penalty = torch.rsub((base.prediction(x) - t).abs(), factor, alpha=factor / reach).relu()
        value = LOSSES[type(base)](x, y, reduction="none")
        return torch.addcmul(value, value, penalty).mean()

    return formula


def _by_loss(base: Base, rule: ByLoss, like: Tensor) -> Formula:
    def formula(x: Tensor, y: Tensor) -> Tensor:
        value = LOSSES[type(base)](x, y, reduction="none")
        below = value if rule.factor_below == 1 else value * rule.factor_below
        return torch.where(value > rule.loss_threshold, value * rule.penalty_factor, below).mean()

    return formula


def _focal(base: Focal) -> Formula:
    """The form of torchvision.ops.sigmoid_focal_loss."""
    alpha, gamma = base.alpha, base.gamma

    def formula(x: Tensor, y: Tensor) -> Tensor:
        p = torch.sigmoid(x)
        value = F.binary_cross_entropy_with_logits(x, y, reduction="none")
        value = value * (1 - (p * y + (1 - p) * (1 - y))) ** gamma
        return (value if alpha is None else (alpha * y + (1 - alpha) * (1 - y)) * value).mean()

    return formula


def _asymmetric(base: Asymmetric) -> Formula:
    """The form of ASL's AsymmetricLoss, with a mean for its sum."""

    def formula(x: Tensor, y: Tensor) -> Tensor:
        assert base.clip is not None
        p = torch.sigmoid(x)
        q = (1 - p + base.clip).clamp(max=1)
        value = y * p.clamp(min=base.eps).log() + (1 - y) * q.clamp(min=base.eps).log()
        factor = (1 - p * y - q * (1 - y)) ** (base.gamma_pos * y + base.gamma_neg * (1 - y))
        return -(value * factor).mean()

    return formula


ALONE: Mapping[type[Base], Callable[[Any], Formula]] = {Focal: _focal, Asymmetric: _asymmetric}
LOSSES: Mapping[type[Base], Formula] = {
    MSE: F.mse_loss,
    BCE: F.binary_cross_entropy,
    BCEWithLogits: F.binary_cross_entropy_with_logits,
}
RULES: Mapping[type[Rule], Callable[[Base, Any, Tensor], Formula]] = {
    ByPrediction: _by_prediction,
    ByProximity: _by_proximity,
    ByLoss: _by_loss,
}
