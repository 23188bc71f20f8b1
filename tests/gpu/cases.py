"""Every op of the registry with each kind of operand, on a GPU, and one step of forward and backward."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

import triton_thresh as tt
from triton_thresh.registry import OPS, Gate, LearnedGate, Loss

from ..gates import same
from ..losses import CELLS, SETTINGS, Cell, inputs

DEVICE = torch.device("cuda")
SHAPE = (37, 1003)  # several tiles and a tail, and nothing divisible by 16
KINDS = ("number", "cpu", "mean", "channel", "element")


@dataclass(frozen=True)
class Case:
    """An op with a kind of operand. Operands are made on the device inside the call; what learns is a leaf."""

    op: Gate | LearnedGate | Loss
    kind: str = "number"
    dtype: torch.dtype = torch.float32
    cell: Cell | None = None
    reduction: str = "mean"

    def __str__(self) -> str:
        own = (f"{self.cell!r}-{self.reduction}",) if self.cell else ()
        return "-".join((self.op.name, *own, str(self.dtype).removeprefix("torch."), self.kind))

    def leaves(self, seed: int = 0, shape: tuple[int, ...] = SHAPE, device: torch.device = DEVICE) -> list[Tensor]:
        """The input, and the threshold if it learns."""
        x = inputs(self.cell.base if self.cell else "mse", shape, self.dtype, seed).to(device).requires_grad_()
        if not self.kind.startswith("learned"):
            return [x]
        assert isinstance(self.op, (Gate, LearnedGate))
        return [x, self.operand(self.op.example[0], x).requires_grad_()]

    def operand(self, value: float, x: Tensor) -> Any:
        """A threshold, weight or factor near `value`."""
        span = (0.8 * value, 1.25 * value)
        if self.kind == "cpu":
            return torch.tensor(value)
        if self.kind == "mean":
            return x.detach().mean() + value
        if self.kind == "learned-0dim":
            return torch.full((), value, device=x.device)
        if self.kind in ("channel", "learned"):
            return torch.linspace(*span, x.shape[-1], device=x.device)
        if self.kind in ("element", "learned-element"):
            return torch.linspace(*span, x.numel(), device=x.device).view_as(x)
        return value

    def arguments(self, x: Tensor, *learned: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """What the public function is called with."""
        if isinstance(self.op, LearnedGate):
            threshold = learned[0] if learned else self.operand(self.op.example[0], x)
            return (x, threshold, *self.op.example[1:]), {}
        if isinstance(self.op, Gate):
            threshold = learned[0] if learned else self.operand(self.op.example[0], x)
            inplace = {"inplace": True} if self.kind == "inplace" else {}
            return (x * 1 if inplace else x, threshold, *self.op.example[1:]), inplace
        assert self.cell
        y = torch.linspace(0, 1, x.numel(), dtype=x.dtype, device=x.device).view_as(x)
        rule = self.cell.rule(*(self.operand(value, x) for value in SETTINGS[self.cell.rule]))
        keywords = {"weight": self.operand(0.75, x), "reduction": self.reduction}
        if self.cell.base == "bce_with_logits":
            keywords["pos_weight"] = self.operand(1.5, x)
        if self.op.rule is None:
            return (x, y, rule), {**keywords, "base": self.cell.base}
        return (x, y), {**keywords, **vars(rule)}

    def __call__(self, *leaves: Tensor) -> Tensor:
        """The output; of several, one flat tensor of all."""
        positional, keywords = self.arguments(*leaves)
        output = getattr(tt, self.op.name)(*positional, **keywords)
        if isinstance(output, tuple):
            output = torch.cat([output[0].flatten(), *(o.to(output[0].dtype).flatten() for o in output[1:])])
        assert isinstance(output, Tensor)
        return output


def _cases() -> Iterator[Case]:
    for op in OPS.values():
        if isinstance(op, Gate):
            more = (("learned", "learned-0dim") if op.push else ()) + (("inplace",) if op.inplace else ())
            yield from (Case(op, kind) for kind in KINDS + more)
            yield Case(op, dtype=torch.bfloat16)
        elif isinstance(op, LearnedGate):
            yield from (Case(op, kind) for kind in (*KINDS, "learned", "learned-0dim", "learned-element"))
            yield Case(op, "learned", dtype=torch.bfloat16)
        elif isinstance(op, Loss):
            for cell in (Cell(*cell) for cell in op.cells):
                if op.rule is not None:
                    yield Case(op, cell=cell)
                    continue
                yield from (Case(op, kind, cell=cell) for kind in KINDS)
                yield Case(op, cell=cell, dtype=torch.float16)
                yield Case(op, cell=cell, reduction="none")
        else:
            raise NotImplementedError(f"no GPU cases of {op}")


CASES = list(_cases())
PLAIN = [case for case in CASES if case.kind == "number" and case.dtype == torch.float32]
SUMMED = [case for case in CASES if case.kind.startswith("learned")] + [
    Case(OPS["threshold_loss"], cell=cell, reduction=reduction) for cell in CELLS for reduction in ("mean", "sum")
]
every_case = pytest.mark.parametrize("case", CASES, ids=str)
plain_cases = pytest.mark.parametrize("case", PLAIN, ids=str)


def step(case: Case, leaves: Sequence[Tensor], scale: Tensor) -> list[Tensor]:
    """Forward and backward: the output and the gradients, for the upstream gradient `scale`."""
    output = case(*leaves)
    if not output.requires_grad:
        return [output]
    upstream = scale.to(output.dtype).expand_as(output)
    return [output.detach(), *torch.autograd.grad(output, leaves, upstream)]


def all_same(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    """The same tensors, bit for bit."""
    for a, b in zip(actual, expected, strict=True):
        same(a, b)


def three(device: torch.device = DEVICE) -> Tensor:
    """An upstream gradient that is not 1."""
    return torch.full((), 3.0, device=device)
