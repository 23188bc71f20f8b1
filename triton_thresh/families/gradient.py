"""Gates on gradients: of one tensor in backward, or of many parameters in place."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.jit._trace import is_tracing

from .. import foreach
from ..autograd import GradientGate as GradientGateFunction
from ..autograd import TransformedGradientGate
from ..backend import is_plain
from ..checks import check_input, check_operand
from ..dispatch import chosen
from ..layout import total_bytes
from ..rounding import held
from ..rules import Operand
from .gate import Gate


@dataclass(frozen=True)
class GradientGate:
    """The identity, whose gradient passes through a gate."""

    name: str
    subject: str
    passes: str
    equivalent: str
    gate: Gate

    family = "gradient"

    def __call__(self, input: Tensor, threshold: Operand) -> Tensor:
        """Check the arguments; a view of the input, whose backward calls the gate."""
        check_input(self.name, input, self.gate.dtypes)
        threshold = check_operand(self.name, "threshold", threshold, input)
        backend = chosen(self.gate.name, input, False)[0] if is_plain(input, threshold) else None
        if backend is not None and not (input.requires_grad and torch.is_grad_enabled()):
            return input.view_as(input)
        if is_tracing() or torch.compiler.is_exporting():  # whose programs hold no gradient of one's own
            return input.view_as(input)
        if backend is None and not isinstance(threshold, Tensor):
            threshold = held(threshold, input.dtype, input.device)
        compiling = torch.compiler.is_compiling()
        if compiling:  # of a Function on the very argument of torch.func.grad, not on a view, Dynamo drops the backward
            input = input.view_as(input)
        function = GradientGateFunction if compiling or backend is not None else TransformedGradientGate
        return function.apply(input, threshold, self.gate, backend)  # type: ignore[no-any-return, no-untyped-call]

    def bytes_moved(
        self, input: Tensor, operands: Sequence[Tensor], arguments: Mapping[str, Any], *, grad: bool
    ) -> tuple[int, int, int]:
        """Bytes forward, backward and saved: s in and s out in backward; a tensor threshold is saved."""
        if not grad:
            return 0, 0, 0
        return 0, self.gate.bytes_moved(input, operands, {}, grad=False)[0], total_bytes(operands)

    def shell(self, arguments: Mapping[str, Any]) -> str:
        """Which kernels run."""
        return "gate"

    def tuning_key(self, arguments: Mapping[str, Any]) -> str:
        """The gate's name in the tables of block sizes."""
        return self.gate.name

    def searches(self, arguments: Mapping[str, Any]) -> bool:
        """Whether block sizes may come from a search."""
        return True


@dataclass(frozen=True)
class ForeachGate:
    """A gate over the gradients of many parameters, in place."""

    name: str
    subject: str
    passes: str
    equivalent: str
    gate: Gate

    family = "foreach"

    def __call__(
        self, parameters: Tensor | Iterable[Tensor], threshold: Any, *, return_kept: bool = False
    ) -> Tensor | None:
        """Check the arguments, choose the backend for each device, run."""
        return foreach.keep_large_(self.name, parameters, threshold, return_kept)

    def bytes_moved(
        self, input: Sequence[Tensor], operands: Sequence[Tensor], arguments: Mapping[str, Any], *, grad: bool
    ) -> tuple[int, int, int]:
        """Bytes of the call: s in and s out for each gradient; not its table, of 32 bytes a tensor and 8 a program."""
        return 2 * total_bytes(input) + total_bytes(operands), 0, 0

    def shell(self, arguments: Mapping[str, Any]) -> str:
        """Which kernels run."""
        return "gate"

    def tuning_key(self, arguments: Mapping[str, Any]) -> str:
        """The op's name in the tables of block sizes."""
        return self.name

    def searches(self, arguments: Mapping[str, Any]) -> bool:
        """Block sizes do not come from a search, which would write to the gradients."""
        return False
