"""A call of every op of the registry, with each kind of operand: what tests of features run on any device."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import triton_thresh as tt

from .gates import same
from .losses import SETTINGS, Cell, inputs
from .rows import BASE_NAMES, ForeachGate, Gate, GradientGate, LearnedGate, Op, base_of

SHAPE = (37, 1003)  # several tiles and a tail, and nothing divisible by 16


def _spread(count: int, device: torch.device) -> Tensor:
    """0.8 to 1.25, over and over; of a size that compilers may leave open, as linspace's may not be."""
    return torch.arange(count, dtype=torch.float32, device=device) % 10 * 0.05 + 0.8


# Made outside of programs: Dynamo of torch 2.11 does not read the fields of a frozen dataclass.
FIELDS = {rule: tuple(rule.__dataclass_fields__) for rule in SETTINGS}
DEFAULTS = {name: dict(vars(kind())) for name, kind in BASE_NAMES.items()}


@dataclass(frozen=True)
class Case:
    """An op with a kind of operand. Operands are made on the input's device inside the call; what learns is a leaf."""

    op: Op
    kind: str = "number"
    dtype: torch.dtype = torch.float32
    cell: Cell | None = None
    reduction: str = "mean"

    def __str__(self) -> str:
        own = (f"{self.cell!r}-{self.reduction}",) if self.cell else ()
        return "-".join((self.op.name, *own, str(self.dtype).removeprefix("torch."), self.kind))

    @property
    def differentiable(self) -> bool:
        """Whether the output has a gradient."""
        return not isinstance(self.op, ForeachGate) and not (isinstance(self.op, Gate) and not self.op.differentiable)

    def leaves(self, device: torch.device, seed: int = 0, shape: tuple[int, ...] = SHAPE) -> list[Tensor]:
        """The input, and the threshold if it learns."""
        x = inputs(self.cell.base if self.cell else "mse", shape, self.dtype, seed).to(device).requires_grad_()
        if not self.kind.startswith("learned"):
            return [x]
        assert isinstance(self.op, (Gate, LearnedGate))
        return [x, self.operand(self.op.example[0], x).requires_grad_()]

    def operand(self, value: float, x: Tensor) -> Any:
        """A threshold, weight or factor near `value`."""
        if self.kind == "cpu":
            return torch.tensor(value, dtype=torch.float32)
        if self.kind == "mean":
            return x.detach().mean() + value
        if self.kind == "learned-0dim":
            return torch.full((), value, dtype=torch.float32, device=x.device)
        if self.kind in ("channel", "learned"):
            return value * _spread(x.shape[-1], x.device)
        if self.kind in ("element", "learned-element"):
            return value * _spread(x.numel(), x.device).view_as(x)
        return value

    def arguments(self, x: Tensor, *learned: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """What the public function is called with."""
        if isinstance(self.op, ForeachGate):
            parameter = torch.zeros_like(x)
            parameter.grad = x.detach().clone()
            return ([parameter], self.operand(self.op.gate.example[0], x)), {}
        if isinstance(self.op, GradientGate):
            return (x, self.operand(self.op.gate.example[0], x)), {}
        if isinstance(self.op, LearnedGate):
            threshold = learned[0] if learned else self.operand(self.op.example[0], x)
            return (x, threshold, *self.op.example[1:]), {}
        if isinstance(self.op, Gate):
            threshold = learned[0] if learned else self.operand(self.op.example[0], x)
            inplace = {"inplace": True} if self.kind == "inplace" else {}
            first, more = x * 1 if inplace else x, self.op.example[1 : self.op.operands]
            operands = [self.operand(value, x) for value in more]
            return (first, threshold, *operands, *self.op.example[self.op.operands :]), inplace
        assert self.cell
        y = (_spread(x.numel(), x.device).view_as(x) - 0.75).to(x.dtype)
        values = [self.operand(value, x) for value in SETTINGS[self.cell.rule]]
        rule = self.cell.rule(*values)
        keywords = {"weight": self.operand(0.75, x), "reduction": self.reduction}
        if self.cell.base == "bce_with_logits":
            keywords["pos_weight"] = self.operand(1.5, x)
        if self.op.rule is None:
            return (x, y, rule), {**keywords, "base": base_of(self.cell.base)}
        names = inspect.signature(getattr(tt, self.op.name)).parameters
        own = DEFAULTS[self.cell.base]
        made = {
            name: self.operand(v, x) if isinstance(v, (int, float)) and v is not False else v for name, v in own.items()
        }
        settings = {**made, **dict(zip(FIELDS[self.cell.rule], values))}
        return (x, y), {**{name: value for name, value in settings.items() if name in names}, **keywords}

    def __call__(self, *leaves: Tensor) -> Tensor:
        """The output; of several, one flat tensor of all; of `threshold_gradients_`, the gradient."""
        positional, keywords = self.arguments(*leaves)
        output = getattr(tt, self.op.name, self.op)(*positional, **keywords)
        if isinstance(self.op, ForeachGate):
            output = positional[0][0].grad
        if isinstance(output, tuple):
            output = torch.cat([output[0].flatten(), *(o.to(output[0].dtype).flatten() for o in output[1:])])
        assert isinstance(output, Tensor)
        return output


def all_same(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    """The same tensors, bit for bit."""
    for a, b in zip(actual, expected, strict=True):
        same(a, b)
