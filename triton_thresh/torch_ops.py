"""torch.ops.triton_thresh.<name>: every op of the registry by its name, as a composite of whatever its call runs.

Each has the public function's signature, without `inplace` and what changes the results: overload `default` takes numbers for the
op's operands, overload `Tensor` tensors. `threshold_loss` takes its rule as the name of the class and a list of its settings.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch

from .checks import Operand
from .functional import function_of
from .fused import NAMESPACE
from .registry import OPS, GradientGate, Op
from .rules import RULES, Rule

_library = torch.library.Library(NAMESPACE, "FRAGMENT")

LEFT_OUT = ("inplace", "return_stats", "return_fired")
_TYPES = {
    "Tensor": "Tensor",
    "tuple[Tensor, ...]": "(Tensor, Tensor)",
    "Operand": "{}",
    "Operand | None": "Tensor?",
    "Rule | None": "str rule, {}[]",
    "Base | BaseName": "str",
    "Reduction": "str",
    "float": "Scalar",
    "float | None": "Scalar?",
    "Tensor | None": "Tensor?",
    "Any": "Tensor",  # a loss, which may come with statistics
    "bool": "bool",
    "BaseName": "str",
    "torch.dtype | None": "ScalarType?",
}
_RULES: dict[str, Callable[..., Rule]] = {rule.__name__: rule for rule in RULES}


def _parameter(parameter: inspect.Parameter, operand: str) -> str:
    kind, default = parameter.annotation, parameter.default
    name = "settings" if kind == "Rule | None" else parameter.name
    is_setting = kind == "Operand" or (kind == "Operand | None" and default is not None)
    declared = f"{'{}?' if is_setting and kind != 'Operand' else _TYPES[kind]} {name}".format(operand)
    if default is parameter.empty or name == "settings" or (is_setting and operand == "Tensor"):
        return declared
    return f"{declared}={default!r}".replace("'", '"')


def schema(op: Op, operand: str) -> str:
    """The declaration for operands of a type, Scalar or Tensor."""
    signature = inspect.signature(function_of(op))
    declared: list[str] = []
    for parameter in signature.parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY and "*" not in declared:
            declared.append("*")
        if parameter.name not in LEFT_OUT:
            declared.append(_parameter(parameter, operand))
    declared = declared[:-1] if declared[-1] == "*" else declared
    result = _TYPES[str(signature.return_annotation)]
    if isinstance(op, GradientGate):  # a view
        declared[0], result = "Tensor(a) input", "Tensor(a)"
    overload = ".Tensor" if operand == "Tensor" else ""
    return f"{op.name}{overload}({', '.join(declared)}) -> {result}"


def _by_rule(
    function: Callable[..., Any], input: Any, target: Any, rule: str, settings: Sequence[Operand], **rest: Any
) -> Any:
    if rule not in _RULES:
        raise ValueError(f"threshold_loss: rule must be one of {', '.join(map(repr, _RULES))}, got {rule!r}")
    return function(input, target, _RULES[rule](*settings), **rest)


def _define(op: Op) -> None:
    function = function_of(op)
    for operand in ("Scalar", "Tensor"):
        declaration = schema(op, operand)
        kernel = functools.partial(_by_rule, function) if "str rule" in declaration else function
        _library.define(declaration, tags=torch.Tag.pt2_compliant_tag)
        for key in ("CompositeImplicitAutograd", "FuncTorchDynamicLayerFrontMode"):
            _library.impl(declaration[: declaration.index("(")], kernel, key)


for _op in OPS.values():
    if not (isinstance(_op, GradientGate) and _op.many):  # whose op on gradients gradients.py has
        _define(_op)
