"""Every op of the registry with each kind of operand, on a GPU, and one step of forward and backward."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest
import torch
from torch import Tensor

from ..calls import Case
from ..losses import CELLS, Cell
from ..rows import OPS, ForeachGate, Gate, GradientGate, LearnedGate, Loss

DEVICE = torch.device("cuda")
KINDS = ("number", "cpu", "mean", "channel", "element")


def _cases() -> Iterator[Case]:
    for op in OPS.values():
        if isinstance(op, Gate):
            more = (("learned", "learned-0dim") if op.learns else ()) + (("inplace",) if op.inplace else ())
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
        elif isinstance(op, GradientGate):
            yield from (Case(op, kind) for kind in KINDS)
            yield Case(op, dtype=torch.bfloat16)
        elif not isinstance(op, ForeachGate):  # tests/gpu/test_gradients.py
            raise NotImplementedError(f"no GPU cases of {op}")


CASES = list(_cases())
PLAIN = [
    case
    for case in CASES
    if case.kind == "number" and case.dtype == torch.float32 and not isinstance(case.op, GradientGate)
]
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


def three(device: torch.device = DEVICE) -> Tensor:
    """An upstream gradient that is not 1."""
    return torch.full((), 3.0, device=device)
