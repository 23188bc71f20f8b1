"""The one list of ops: dispatch, tests, benchmarks, the compile report and the README's table follow from it.

An op is an entry here, a device function in kernels/pointwise.py and a reference in reference.py, under one name.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import torch

from . import eager, reference
from .checks import FLOATING, INTEGER
from .families import ForeachGate, Gate, GradientGate, LearnedGate, Loss, Op
from .rules import ByLoss, ByPrediction, ByProximity

_GATES = (
    Gate(
        "threshold",
        formula="value where x <= t, else x",
        gradient="0 where x <= t, else 1",
        equivalent="torch.where(input <= threshold, value, input)",
        reference=reference.threshold,
        dtypes=FLOATING + INTEGER,
        eager=torch.threshold,
        eager_inplace=torch.threshold_,
        inplace=True,
        example=(0.1, -2.0),
    ),
    Gate(
        "hardshrink",
        formula="0 where -λ <= x <= λ, else x",
        gradient="0 where -λ <= x <= λ, else 1",
        equivalent="torch.where((input >= -lambd) & (input <= lambd), 0, input)",
        reference=reference.hardshrink,
        eager=eager.hardshrink,
        eager_inplace=eager.hardshrink_,
        inplace=True,
    ),
    Gate(
        "softshrink",
        formula="x - λ where x > λ, x + λ where x < -λ, x where x is NaN, else 0",
        gradient="0 where -λ <= x <= λ, else 1; to λ: -1 where x > λ, 1 where x < -λ, else 0",
        equivalent="torch.nn.functional.softshrink(input, lambd)",
        reference=reference.softshrink,
        eager=eager.softshrink,
        nonnegative=True,
        push=reference.softshrink_push,
        codes=reference.softshrink_codes,
    ),
    Gate(
        "binary_threshold",
        formula="above_value where x > t, else below_value",
        gradient="none",
        equivalent="torch.where(input > threshold, above_value, below_value)",
        reference=reference.binary_threshold,
        dtypes=FLOATING + INTEGER,
        eager=eager.binary_threshold,
        differentiable=False,
        casts=False,
        example=(0.1, 3.0, -1.0),
    ),
)

_LEARNED_GATES = (
    LearnedGate(
        "jumprelu",
        formula="x where x > θ, else 0",
        gradient="1 where x > θ, else 0; to θ: -θ/ε where |x - θ| < ε/2, else 0",
        equivalent="torch.where(input > threshold, input, 0)",
        reference=reference.jumprelu,
        pushes=(reference.jumprelu_push,),
    ),
    LearnedGate(
        "step",
        formula="1 where x > θ, else 0",
        gradient="0; to θ: -1/ε where |x - θ| < ε/2, else 0",
        equivalent="(input > threshold).to(input.dtype)",
        reference=reference.step,
        pushes=(reference.step_push,),
        reads_threshold=False,
    ),
    LearnedGate(
        "jumprelu_l0",
        formula="(jumprelu(x), step(x).sum(-1)), in one pass",
        gradient="both, in one pass",
        equivalent="torch.where(input > threshold, input, 0), (input > threshold).sum(-1)",
        reference=reference.jumprelu_l0,
        pushes=(reference.jumprelu_push, reference.step_push),
        forward="jumprelu",
    ),
)

_LOSSES = (
    Loss(
        "threshold_bce_loss",
        formula="binary cross entropy of a probability",
        weighing="weight_above where p >= t, else weight_below",
        equivalent="(F.binary_cross_entropy(input, target, reduction='none') * torch.where(input >= t, above, below)).mean()",
        base="bce",
        rule=ByPrediction,
    ),
    Loss(
        "threshold_bce_with_logits_loss",
        formula="binary cross entropy of a logit",
        weighing="weight_above where x >= logit(t), else weight_below",
        equivalent="threshold_bce_loss's, of F.binary_cross_entropy_with_logits and input >= logit(t)",
        base="bce_with_logits",
        rule=ByPrediction,
    ),
    Loss(
        "threshold_mse_loss",
        formula="(x - y)²",
        weighing="weight_above where x >= t, else weight_below",
        equivalent="((input - target) ** 2 * torch.where(input >= t, above, below)).mean()",
        base="mse",
        rule=ByPrediction,
    ),
    Loss(
        "proximity_mse_loss",
        formula="(x - y)²",
        weighing="1 + factor·(1 - d/range) where d = |x - t| < range, else 1",
        equivalent="((input - target) ** 2 * (1 + factor * (1 - (input - t).abs() / range).clamp(min=0))).mean()",
        base="mse",
        rule=ByProximity,
    ),
    Loss(
        "exceedance_mse_loss",
        formula="(x - y)²",
        weighing="factor where (x - y)² > bound, else 1",
        equivalent="(l * torch.where(l > bound, factor, 1.0)).mean() with l = (input - target) ** 2",
        base="mse",
        rule=ByLoss,
    ),
    Loss(
        "threshold_loss",
        formula="any base: bce, bce_with_logits, mse",
        weighing="any rule: ByPrediction, ByProximity, ByLoss",
        equivalent="the base loss with reduction='none', times the rule's weight, reduced",
    ),
)

KEEP_LARGE = Gate(
    "keep_large",
    formula="x where |x| > t or x is NaN, else 0",
    gradient="1 where |x| > t or x is NaN, else 0",
    equivalent="torch.where((input.abs() > threshold) | input.isnan(), input, 0)",
    reference=reference.keep_large,
    eager=eager.keep_large,
)

THRESHOLD_GRAD = GradientGate(
    "threshold_grad",
    subject="of the input, in backward",
    passes="g where |g| > t or g is NaN, else 0",
    equivalent="input.view_as(input), with the gradient torch.where((g.abs() > threshold) | g.isnan(), g, 0)",
    gate=KEEP_LARGE,
)

THRESHOLD_GRADIENTS = ForeachGate(
    "threshold_gradients_",
    subject="of many parameters: their grad, in place",
    passes="g where |g| > t or g is NaN, else 0",
    equivalent="for p in parameters: p.grad.copy_(torch.where((p.grad.abs() > threshold) | p.grad.isnan(), p.grad, 0))",
    gate=KEEP_LARGE,
)

GATES: Mapping[str, Gate] = MappingProxyType({op.name: op for op in _GATES})
LEARNED_GATES: Mapping[str, LearnedGate] = MappingProxyType({op.name: op for op in _LEARNED_GATES})
LOSSES: Mapping[str, Loss] = MappingProxyType({op.name: op for op in _LOSSES})
OPS: Mapping[str, Op] = MappingProxyType(
    {
        **GATES,
        **LEARNED_GATES,
        **LOSSES,
        THRESHOLD_GRAD.name: THRESHOLD_GRAD,
        THRESHOLD_GRADIENTS.name: THRESHOLD_GRADIENTS,
    }
)


def ops() -> Mapping[str, Op]:
    """The ops by name, in the order of the documentation. Each can be called as the function of its name.

    Examples:
        >>> list(ops())[:3]
        ['threshold', 'hardshrink', 'softshrink']
        >>> ops()["hardshrink"].formula
        '0 where -λ <= x <= λ, else x'
    """
    return OPS
