"""The one list of ops, as data: dispatch, tests, benchmarks, the compile report, tables and docs follow from its rows.

A gate is a row here, a function of its name in reference.py and a device function of its name in kernels/pointwise.py. A loss is
a base of bases.py times a rule of rules.py; a row here gives a pair of them a name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal, Union

import torch

from .bases import BASES, BCE, MSE, Asymmetric, Base, BCEWithLogits, Focal
from .checks import FLOATING, INTEGER
from .rules import RULES, ByLoss, ByPrediction, ByProximity, Rule, Unweighted


@dataclass(frozen=True)
class Gate:
    """An elementwise op that compares its input with a threshold.

    Its signature is that of its function in reference.py: input, operands, numbers, then keywords.

    Attributes:
        formula: y, in words that a table can hold.
        gradient: dy/dx, likewise.
        saves: what forward keeps for backward. A "bit" says that dy/dx is 1. "two bits" are a code, which the device function
            ``<name>_backward`` turns into gradients. The "input" is for a gate whose device function gives dy/dx itself.
        operands: how many of the arguments after the input may be tensors; the others are numbers.
        learns: the gate has a gradient for its threshold. With saves="bit" it then saves two bits, and its device functions are
            ``<name>_learned`` and ``<name>_learned_backward``.
        straight_through: the threshold learns by a straight-through estimate, whatever it is, and is compared as it is given.
            Other gates round numbers and 0-dim thresholds to a floating input's dtype.
        casts: on integer inputs numbers are cast to the input's dtype, and not compared by value.
        nonnegative: a number below 0 raises.
        counts: a second output gives how many elements of each row are above the threshold.
        value: whose device function gives y, if not the gate's own.
        reads_threshold: backward reads the threshold.
        inplace: it can write its result to the input.
        example: operands and numbers with which tests and benchmarks call it.
    """

    name: str
    formula: str
    gradient: str
    saves: Literal["nothing", "bit", "two bits", "input"] = "bit"
    operands: int = 1
    learns: bool = False
    straight_through: bool = False
    casts: bool = True
    nonnegative: bool = False
    counts: bool = False
    value: str = ""
    reads_threshold: bool = True
    inplace: bool = False
    dtypes: tuple[torch.dtype, ...] = FLOATING
    example: tuple[float, ...] = (0.5,)


@dataclass(frozen=True)
class Loss:
    """A named pair of base and rule; with rule None the whole grid."""

    name: str
    formula: str
    weighing: str
    base: type[Base] = BCEWithLogits
    rule: type[Rule] | None = None

    @property
    def cells(self) -> list[tuple[type[Base], type[Rule]]]:
        """The pairs of base and rule that it reaches."""
        if self.rule:
            return [(self.base, self.rule)]
        return [(base, rule) for base in BASES for rule in RULES if base.kind in rule.kinds]

    @property
    def pairs(self) -> list[tuple[type[Base], type[Rule]]]:
        """Those with the first rule or the default base: what is measured, since a pair costs what its parts cost."""
        return self.cells if self.rule else [pair for pair in self.cells if pair[0] is self.base or pair[1] is RULES[0]]


@dataclass(frozen=True)
class GradientGate:
    """A gate over gradients: of the input in backward, or of many parameters in place."""

    name: str
    subject: str
    passes: str
    gate: Gate
    many: bool = False


Op = Union[Gate, Loss, GradientGate]

KEEP_LARGE = Gate(
    "keep_large",
    formula="x where |x| > t or x is NaN, else 0",
    gradient="1 where |x| > t or x is NaN, else 0",
)

_OPS: tuple[Op, ...] = (
    Gate(
        "threshold",
        formula="value where x <= t, else x",
        gradient="0 where x <= t, else 1",
        dtypes=FLOATING + INTEGER,
        inplace=True,
        example=(0.1, -2.0),
    ),
    Gate(
        "hardshrink",
        formula="0 where -λ <= x <= λ, else x",
        gradient="0 where -λ <= x <= λ, else 1",
        inplace=True,
    ),
    Gate(
        "softshrink",
        formula="x - λ where x > λ, x + λ where x < -λ, x where x is NaN, else 0",
        gradient="0 where -λ <= x <= λ, else 1; to λ: -1 where x > λ, 1 where x < -λ, else 0",
        learns=True,
        nonnegative=True,
        reads_threshold=False,
    ),
    Gate(
        "garrote",
        formula="(|x| - λ)(|x| + λ)/x where |x| > λ, x where x is NaN, else 0",
        gradient="1 + λ²/x² where |x| > λ, 1 where x is NaN, else 0",
        saves="input",
        nonnegative=True,
    ),
    Gate(
        "firm",
        formula="x where |x| > high, sign(x)·high·(|x| - low)/(high - low) where |x| > low, x where x is NaN, else 0",
        gradient="1 where |x| > high, high/(high - low) where |x| > low, 1 where x is NaN, else 0",
        saves="two bits",
        operands=2,
        nonnegative=True,
        example=(0.5, 1.0),
    ),
    Gate(
        "binary_threshold",
        formula="above_value where x > t, else below_value",
        gradient="none",
        saves="nothing",
        casts=False,
        dtypes=FLOATING + INTEGER,
        example=(0.1, 3.0, -1.0),
    ),
    Gate(
        "jumprelu",
        formula="x where x > θ, else 0",
        gradient="1 where x > θ, else 0; to θ: -θ/ε where |x - θ| < ε/2, else 0",
        saves="two bits",
        learns=True,
        straight_through=True,
        example=(0.5, 0.25),
    ),
    Gate(
        "step",
        formula="1 where x > θ, else 0",
        gradient="0; to θ: -1/ε where |x - θ| < ε/2, else 0",
        saves="two bits",
        learns=True,
        straight_through=True,
        reads_threshold=False,
        example=(0.5, 0.25),
    ),
    Gate(
        "jumprelu_l0",
        formula="(jumprelu(x), step(x).sum(-1)), in one pass",
        gradient="both, in one pass",
        saves="two bits",
        learns=True,
        straight_through=True,
        counts=True,
        value="jumprelu",
        example=(0.5, 0.25),
    ),
    Loss(
        "threshold_bce_loss",
        formula="binary cross entropy of a probability",
        weighing="weight_above where p >= t, else weight_below",
        base=BCE,
        rule=ByPrediction,
    ),
    Loss(
        "threshold_bce_with_logits_loss",
        formula="binary cross entropy of a logit",
        weighing="weight_above where x >= logit(t), else weight_below",
        base=BCEWithLogits,
        rule=ByPrediction,
    ),
    Loss(
        "threshold_mse_loss",
        formula="(x - y)²",
        weighing="weight_above where x >= t, else weight_below",
        base=MSE,
        rule=ByPrediction,
    ),
    Loss(
        "proximity_mse_loss",
        formula="(x - y)²",
        weighing="1 + factor·(1 - d/range) where d = |x - t| < range, else 1",
        base=MSE,
        rule=ByProximity,
    ),
    Loss(
        "exceedance_mse_loss",
        formula="(x - y)²",
        weighing="factor where (x - y)² > bound, else 1",
        base=MSE,
        rule=ByLoss,
    ),
    Loss(
        "sigmoid_focal_loss",
        formula="α_t (1 - p_t)^γ · binary cross entropy of a logit",
        weighing="1",
        base=Focal,
        rule=Unweighted,
    ),
    Loss(
        "asymmetric_loss",
        formula="-(1 - p_t)^γ (y log p + (1 - y) log q), q = min(1 - p + clip, 1)",
        weighing="1",
        base=Asymmetric,
        rule=Unweighted,
    ),
    Loss(
        "threshold_loss",
        formula=f"any base: {', '.join(base.__name__ for base in BASES)}",
        weighing=f"any rule: {', '.join(rule.__name__ for rule in RULES)}, or none",
    ),
    GradientGate(
        "threshold_grad",
        subject="of the input, in backward",
        passes="g where |g| > t or g is NaN, else 0",
        gate=KEEP_LARGE,
    ),
    GradientGate(
        "threshold_gradients_",
        subject="of many parameters: their grad, in place",
        passes="g where |g| > t or g is NaN, else 0",
        gate=KEEP_LARGE,
        many=True,
    ),
)

OPS: Mapping[str, Op] = MappingProxyType({op.name: op for op in _OPS})
GATES: Mapping[str, Gate] = {op.name: op for op in _OPS if isinstance(op, Gate)}


def ops() -> Mapping[str, Op]:
    """The ops by name, in the order of the documentation.

    Examples:
        >>> list(ops())[:3]
        ['threshold', 'hardshrink', 'softshrink']
        >>> ops()["hardshrink"].formula
        '0 where -λ <= x <= λ, else x'
    """
    return OPS
