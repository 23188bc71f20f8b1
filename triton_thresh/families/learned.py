"""Gates whose threshold learns by a straight-through estimate."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import eager, library, reference
from ..autograd import LearnedGate as LearnedGateFunction
from ..autograd import plain_learned_gate
from ..backend import is_plain, is_traced
from ..checks import FLOATING, check_input, check_operand, check_positive
from ..dispatch import chosen, launcher
from ..layout import total_bytes
from ..reference import Push, Surrogate
from ..rounding import held
from ..rules import Operand


@dataclass(frozen=True)
class LearnedGate:
    """A gate that is a step at a threshold, which learns by a straight-through estimate: jumprelu and its kind.

    The reference's signature is input, threshold, bandwidth. Device functions bear the op's name (`forward`: another's).
    """

    name: str
    formula: str
    gradient: str
    equivalent: str
    reference: Callable[..., Any]
    pushes: tuple[Push, ...]
    forward: str | None = None
    reads_threshold: bool = True
    dtypes: tuple[torch.dtype, ...] = FLOATING
    example: tuple[float, ...] = (0.5, 0.25)

    family = "learned"

    @property
    def _value(self) -> Callable[..., Tensor]:
        function: Callable[..., Tensor] = getattr(reference, self.forward or self.name)
        return function

    @property
    def learned_name(self) -> str:
        """Its name in the tables."""
        return self.name

    def __call__(
        self, input: Tensor, threshold: Operand, bandwidth: float = 1e-3, *, input_gradient: bool = False
    ) -> Any:
        """Check the arguments, choose the backend, run."""
        check_input(self.name, input, self.dtypes)
        if self.counts and input.dim() == 0:
            raise ValueError(f"{self.name}: input has shape (), expected at least one dimension to count along")
        threshold = check_operand(self.name, "threshold", threshold, input, learns=True)
        bandwidth = check_positive(self.name, "bandwidth", bandwidth)
        learns = isinstance(threshold, Tensor) and threshold.requires_grad
        records = (learns or input.requires_grad) and torch.is_grad_enabled()
        plain = is_plain(input, threshold)
        if records or not plain:
            surrogate = self.surrogate((bandwidth,), bool(input_gradient))
        if not plain:
            if not isinstance(threshold, Tensor):
                threshold = held(threshold, reference.compute_dtype(input.dtype), input.device)
            if is_traced(input, threshold):
                return library.learned_gate(self.name, surrogate, input, threshold)
            return plain_learned_gate(surrogate, input, threshold)
        if chosen(self.name, input, records)[0] == "triton":
            lowered = self.learned_call(input, threshold, (bandwidth,), bool(input_gradient))
            if records:
                return LearnedGateFunction.apply(input, threshold, lowered, surrogate)  # type: ignore[no-untyped-call]
            output, count, _ = launcher("learned").forward(*lowered, input, 0)
            return output if count is None else (output, count)
        if records:
            return eager.LearnedGate.apply(input, threshold, surrogate)  # type: ignore[no-untyped-call]
        result = self.reference(input, threshold, bandwidth)
        if input.is_contiguous() or not (isinstance(threshold, Tensor) and threshold.dim()):
            return result
        output = result[0] if self.counts else result  # which torch.where may lay out as the threshold lies
        output = torch.empty_like(input).copy_(output)
        return (output, result[1]) if self.counts else output

    def surrogate(self, constants: tuple[float, ...], input_gradient: bool) -> Surrogate:
        """A call in plain torch."""
        return Surrogate(self._value, reference.codes, self.pushes, constants, input_gradient)

    @property
    def counts(self) -> bool:
        """Whether the op also returns how many elements of each row it kept."""
        return len(self.pushes) > 1

    def learned_call(
        self, input: Tensor, threshold: Operand, constants: tuple[float, ...], input_gradient: bool
    ) -> tuple[Any, Operand]:
        """The call as the kernels' launcher takes it, and the threshold: nothing is rounded to a 16-bit type."""
        compute = reference.compared_dtype(input.dtype, threshold)
        forward, reads = self.forward or self.name, self.reads_threshold
        call = launcher("learned").learned_call(
            self.name, forward, constants, compute, reads, self.counts, input_gradient
        )
        return call, threshold

    def bytes_moved(
        self, input: Tensor, operands: Sequence[Tensor], arguments: Mapping[str, Any], *, grad: bool
    ) -> tuple[int, int, int]:
        """Bytes forward, backward and saved: s in, s out, two bits an element; a count adds a bit twice, and itself.

        A threshold that backward reads is saved too.
        """
        n, bits = input.numel(), -(-input.numel() // 8)
        count = 0
        if self.counts and n:
            count = n // input.shape[-1] * reference.compute_dtype(input.dtype).itemsize
        once = 2 * n * input.element_size() + total_bytes(operands)
        if not grad:
            return once + (2 * bits + count if self.counts else 0), 0, 0
        learning = [t for t in operands if t.requires_grad]
        saved = 2 * bits if learning or arguments.get("input_gradient") else bits
        forward = once + saved + (bits + count if self.counts else 0)
        read = total_bytes(operands) if self.reads_threshold else 0
        return forward, 2 * n * input.element_size() + saved + count + read + total_bytes(learning), saved + read

    def shell(self, arguments: Mapping[str, Any]) -> str:
        """Which kernels run."""
        return "learned"

    def tuning_key(self, arguments: Mapping[str, Any]) -> str:
        """The op's name in the tables of block sizes."""
        return self.name

    def searches(self, arguments: Mapping[str, Any]) -> bool:
        """Block sizes may not come from a search, which would change the order of summation."""
        return False
