"""The grid of losses: which base, rule and options a call asks for, and the loss as a formula in plain torch."""

from __future__ import annotations

import ast
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from .bases import BASES, Base
from .checks import Operand, compute_dtype, round_to
from .launch import Packed, pack_all
from .rules import RULES, Element, Rule, Unweighted

_KINDS: Mapping[str, type[Any]] = MappingProxyType({kind.__name__: kind for kind in (*BASES, *RULES, Unweighted)})

# ------------------------------------------------------------------------------------------------------ what is computed


@dataclass(frozen=True, eq=False)
class Spec:
    """Which loss is computed; made by `_spec`, once each. Operands travel beside it: the base's, the rule's, then the weight."""

    base: type[Base]
    base_fields: tuple[str, ...]
    base_static: tuple[tuple[str, Any], ...]
    rule: type[Rule]
    rule_fields: tuple[str, ...]
    rule_static: tuple[tuple[str, Any], ...]
    reduction: str
    result: torch.dtype

    @functools.cached_property
    def cell(self) -> str:
        """The name of base and rule."""
        return f"{self.base.snake_name()}.{self.rule.__name__}"

    @functools.cached_property
    def key(self) -> str:
        """The name in the tables of block sizes. A reduction never searches, so it has another than what is not reduced."""
        return self.cell + (".none" if self.reduction == "none" else "")

    @property
    def text(self) -> str:
        """The same for the schema of an op, less the result's dtype; made of what Dynamo can trace."""
        statics = [
            ",".join([f"{name}={value!r}" for name, value in pairs]) for pairs in (self.base_static, self.rule_static)
        ]
        base = f"{self.base.__name__}/{','.join(self.base_fields)}/{statics[0]}"
        return f"{base}/{self.rule.__name__}/{','.join(self.rule_fields)}/{statics[1]}/{self.reduction}"

    def parts(self, operands: Sequence[Operand]) -> tuple[Base, Rule, Operand | None]:
        """The base, the rule and the weight, made of these operands."""
        first, second = len(self.base_fields), len(self.base_fields) + len(self.rule_fields)
        base = self.base(**dict(zip(self.base_fields, operands)), **dict(self.base_static))
        rule = self.rule(**dict(zip(self.rule_fields, operands[first:second])), **dict(self.rule_static))
        return base, rule, operands[second] if len(operands) > second else None

    @functools.cached_property
    def static(self) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        """The constants that the device functions of base and rule are compiled for."""
        return tuple(v for _, v in self.base_static), (self.base.kind, *(v for _, v in self.rule_static))


@functools.cache
def _spec(*fields: Any) -> Spec:
    return Spec(*fields)


@functools.cache
def from_text(text: str, result: torch.dtype) -> Spec:
    base, base_fields, base_static, rule, rule_fields, rule_static, reduction = text.split("/")
    names = [tuple(part.split(",")) if part else () for part in (base_fields, rule_fields)]
    pairs = [[pair.partition("=") for pair in part.split(",") if pair] for part in (base_static, rule_static)]
    statics = [tuple((name, ast.literal_eval(value)) for name, _, value in part) for part in pairs]
    fields: Any = _KINDS[base], names[0], statics[0], _KINDS[rule], names[1], statics[1], reduction, result
    return _spec(*fields)


def specify(
    base: Base, rule: Rule, weight: Operand | None, reduction: str, result: torch.dtype
) -> tuple[Spec, tuple[Operand, ...]]:
    rule = rule.on(base)
    bases, rules = base.operands(), rule.operands()
    make: Any = Spec if is_dynamo_compiling() else _spec  # Dynamo looks through a cache, and warns
    spec = make(type(base), tuple(bases), base.static(), type(rule), tuple(rules), rule.static(), reduction, result)
    return spec, (*bases.values(), *rules.values(), *(() if weight is None else (weight,)))


class Numbers(tuple[float, ...]):
    """Operands that are numbers alone, with what kernels take for them: for all but float64, which they compute in float32."""

    @functools.cached_property
    def packed(self) -> Packed:
        return pack_all(self, None, (torch.float32,) * len(self))  # type: ignore[arg-type]


@functools.lru_cache(maxsize=4096)
def specify_numbers(
    base: Base, rule: Rule, reduction: str, dtype: torch.dtype, result: torch.dtype
) -> tuple[Spec, Numbers]:
    """Most calls have the same settings each time: this takes 7 of their 16 µs."""
    spec, operands = specify(base, rule, None, reduction, result)
    compute = compute_dtype(dtype)
    return spec, Numbers([round_to(float(value), compute) for value in operands])


# -------------------------------------------------------------------------------------------------------------- formula


def element_loss(spec: Spec, x: Tensor, y: Tensor, operands: Sequence[Operand], *, fast: bool = False) -> Tensor:
    """The weighted element loss in the compute type, in plain torch: differentiable."""
    dtype = compute_dtype(x.dtype)
    x, y = (tensor if tensor.dtype == dtype else tensor.to(dtype) for tensor in (x, y))
    base, rule, weight = spec.parts([wide(value, dtype) for value in operands])
    loss = base.value(x, y) if fast else base.loss(x, y)
    factor = rule.weight(Element(base, x, y, loss, fast))
    if factor is not None:
        loss = _product(loss, factor) if rule.slopes and not fast else loss * factor
    return loss if weight is None else loss * weight


def wide(value: Operand, dtype: torch.dtype) -> Operand:
    return value.to(dtype) if isinstance(value, Tensor) and value.dtype != dtype else value


def _product(loss: Tensor, factor: Tensor) -> Tensor:
    """loss * factor. An infinite loss does not meet the factor's slope, which is 0 there."""
    return loss * factor.detach() + loss.nan_to_num(0.0, 0.0, 0.0) * (factor - factor.detach())


def formula(spec: Spec, x: Tensor, y: Tensor, operands: Sequence[Operand]) -> Tensor:
    """The loss in plain torch, differentiable in x and y, reduced and rounded once to the result's dtype."""
    loss = element_loss(spec, x, y, operands)
    if spec.reduction == "mean":
        loss = loss.mean()
    elif spec.reduction == "sum":
        loss = loss.sum()
    return loss.to(spec.result)


def differentiable_gradient(spec: Spec, x: Tensor, y: Tensor, operands: Sequence[Operand], g: Tensor) -> Tensor:
    """d loss / dx times the upstream gradient: differentiable in x and in the gradient, and under any transform."""
    slope: Tensor = torch.func.grad(lambda x: element_loss(spec, x, y, operands).sum())(x)
    g = g.to(compute_dtype(x.dtype))
    return (slope * (g / x.numel() if spec.reduction == "mean" else g)).to(x.dtype)
