"""Losses: points of the grid base x rule."""

from __future__ import annotations

import functools
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from .. import eager, library, reference
from ..autograd import Loss as LossFunction
from ..autograd import plain_loss
from ..backend import is_plain, is_traced
from ..checks import FLOATING, check_input, check_operand, check_reduction, check_target
from ..dispatch import chosen, launcher
from ..layout import total_bytes
from ..reference import LossSpec
from ..rounding import held, round_to
from ..rules import BaseName, Numbers, Operand, Rule

ONE_GRADIENT = (
    "only input and target get a gradient, and {name}.detach() would drop its own; take reduction='none' and multiply, in torch, "
    "by what depends on {name}"
)
_NUMBERS = frozenset({float, int})
_PACK = {count: struct.Struct(f"{count}d").pack for count in range(1, 9)}


@functools.lru_cache(maxsize=4096)
def _of_numbers(
    name: str, rule: type[Any], bits: bytes, base: str, reduction: str, dtype: torch.dtype, result: torch.dtype
) -> tuple[LossSpec, tuple[Operand, ...]]:
    """A loss whose rule has numbers alone, given by their bits, which tell -0 from 0: what is computed, and its operands."""
    _check_cell(name, base, rule, reduction)
    settings = rule(*struct.unpack(f"{len(bits) // 8}d", bits)).operands(base)
    compute = reference.compute_dtype(dtype)
    spec = reference.LossSpec(base, rule, 0, len(settings), reduction, result)
    return spec, Numbers([round_to(value, compute) for value in settings])


def _bits(settings: tuple[Operand, ...]) -> bytes | None:
    """Their bits, if they are numbers that a float holds and no compiler looks on."""
    if is_dynamo_compiling() or not settings or not _NUMBERS.issuperset(map(type, settings)):
        return None
    try:
        return _PACK[len(settings)](*settings)
    except struct.error:
        return None


def _wide(value: Operand, input: Tensor) -> Operand:
    """A number that a compiler leaves open as a 0-dim tensor, which is as exact as the number."""
    return value if isinstance(value, Tensor) else held(value, torch.float64, input.device)


def _check_cell(name: str, base: object, rule: object, reduction: object) -> None:
    """The base, the class of the rule and the reduction are known."""
    check_reduction(name, reduction)
    if not isinstance(base, str) or base not in reference.BASES:
        raise ValueError(f"{name}: base must be one of {', '.join(map(repr, reference.BASES))}, got {base!r}")
    if rule not in reference.RULES:
        accepted = ", ".join(accepted.__name__ for accepted in reference.RULES)
        raise TypeError(f"{name}: rule must be one of {accepted}, got {getattr(rule, '__name__', rule)}")


@dataclass(frozen=True)
class Loss:
    """A point of the grid base x rule, or (rule None) the whole grid."""

    name: str
    formula: str
    weighing: str
    equivalent: str
    base: BaseName = "bce_with_logits"
    rule: type[Rule] | None = None

    family = "loss"

    @property
    def cells(self) -> tuple[tuple[str, type[Rule]], ...]:
        """The cells of the grid this op reaches."""
        if self.rule is not None:
            return ((self.base, self.rule),)
        return tuple((base, rule) for base in reference.BASES for rule in reference.RULES)

    def __call__(
        self,
        input: Tensor,
        target: Tensor,
        rule: Rule,
        *,
        base: str | None = None,
        weight: Operand | None = None,
        pos_weight: Operand | None = None,
        reduction: str = "mean",
    ) -> Tensor:
        """Check the arguments, choose the backend, run."""
        kind = type(rule)
        fields = kind.__dataclass_fields__ if kind in reference.RULES else ()
        settings = tuple([getattr(rule, name) for name in fields])
        return self.run(input, target, settings, weight, pos_weight, reduction, base, kind)

    def run(
        self,
        input: Tensor,
        target: Tensor,
        settings: tuple[Operand, ...],
        weight: Operand | None,
        pos_weight: Operand | None,
        reduction: str,
        base: str | None = None,
        rule: Any = None,
    ) -> Tensor:
        """The same, with the rule taken apart: its settings, and its class if it is not this op's own."""
        base = self.base if base is None else base
        rule = self.rule if rule is None else rule
        check_input(self.name, input, FLOATING, jagged=False)
        check_target(self.name, input, target)
        bits = _bits(settings) if weight is None and pos_weight is None else None
        if bits is not None and type(base) is type(reduction) is str:
            result = reference.result_dtype(input)
            spec, operands = _of_numbers(self.name, rule, bits, base, reduction, input.dtype, result)
            plain = is_plain(input, target)
        else:
            self._check(input, rule, settings, base, weight, pos_weight, reduction)
            settings = tuple([_wide(value, input) for value in settings])
            weight, pos_weight = (value if value is None else _wide(value, input) for value in (weight, pos_weight))
            spec, operands = reference.specify(input, rule(*settings), base, weight, pos_weight, reduction)
            dtype = reference.compute_dtype(input.dtype)
            operands = tuple([v if isinstance(v, Tensor) else round_to(float(v), dtype) for v in operands])
            plain = is_plain(input, target, *operands)
        if target.requires_grad and torch.is_grad_enabled():
            return reference.loss_in_ops(spec, input, target, operands)
        if not plain and is_traced(input, target, *operands):
            return library.loss(spec, input, target, operands)
        if not plain or input.numel() == 0:
            return plain_loss(spec, input, target, operands)
        records = input.requires_grad and torch.is_grad_enabled()
        shell = launcher("launch") if chosen(spec.key, input, records)[0] == "triton" else eager
        if records:
            return LossFunction.apply(input, target, spec, operands, shell)  # type: ignore[no-any-return, no-untyped-call]
        output, _ = shell.loss_forward(spec, input, target, operands, want_gradient=False)
        return output  # type: ignore[no-any-return]

    def read(self, arguments: Mapping[str, Any]) -> list[Tensor]:
        """The tensors that kernels read beside the input: the target, and what becomes of the settings."""
        rule = arguments.get("rule")
        if rule is None:
            assert self.rule is not None
            rule = self.rule(**{name: arguments[name] for name in self.rule.__dataclass_fields__})
        weights = arguments["weight"], arguments.get("pos_weight")
        _, operands = reference.specify(arguments["input"], rule, arguments.get("base", self.base), *weights)
        return [v for v in (arguments["target"], *operands) if isinstance(v, Tensor)]

    def bytes_moved(
        self, input: Tensor, operands: Sequence[Tensor], arguments: Mapping[str, Any], *, grad: bool
    ) -> tuple[int, int, int]:
        """Bytes forward, backward for an upstream gradient of 1, and saved; `operands` starts with the target."""
        once = input.numel() * input.element_size()
        inputs = once + total_bytes(operands)
        if arguments["reduction"] == "none":
            forward, backward, saved = inputs + once, inputs + 2 * once, inputs
        elif input.dtype == torch.float16:
            forward, backward, saved = inputs, inputs + once, inputs
        else:
            forward, backward, saved = inputs + (once if grad else 0), 0, inputs + once
        return (forward, backward, saved) if grad else (forward, 0, 0)

    def shell(self, arguments: Mapping[str, Any]) -> str:
        """Which kernels run."""
        return "loss"

    def tuning_key(self, arguments: Mapping[str, Any]) -> str:
        """The cell's name in the tables of block sizes."""
        rule = self.rule or type(arguments["rule"])
        return reference.cell_key(arguments.get("base", self.base), rule, arguments["reduction"])

    def searches(self, arguments: Mapping[str, Any]) -> bool:
        """Whether block sizes may come from a search: where nothing is summed."""
        return bool(arguments["reduction"] == "none")

    def _check(
        self,
        input: Tensor,
        rule: type[Any],
        settings: tuple[Operand, ...],
        base: str,
        weight: Operand | None,
        pos_weight: Operand | None,
        reduction: str,
    ) -> None:
        _check_cell(self.name, base, rule, reduction)
        for setting, value in zip(rule.__dataclass_fields__, settings):
            check_operand(self.name, setting, value, input, why=ONE_GRADIENT)
        if weight is not None:
            check_operand(self.name, "weight", weight, input, why=ONE_GRADIENT)
        if pos_weight is not None:
            if base != "bce_with_logits":
                raise ValueError(f"{self.name}: pos_weight goes with base 'bce_with_logits', got base {base!r}")
            check_operand(self.name, "pos_weight", pos_weight, input, why=ONE_GRADIENT)
