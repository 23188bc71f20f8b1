"""Gates: elementwise ops that compare their input with a threshold."""

from __future__ import annotations

import functools
import inspect
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from .. import library
from ..autograd import Gate as GateFunction
from ..autograd import LearnedGate as LearnedGateFunction
from ..autograd import plain_learned_gate
from ..backend import is_plain, is_traced, runs_eagerly
from ..checks import (
    FLOATING,
    check_dtype,
    check_held,
    check_inplace,
    check_input,
    check_integer,
    check_number,
    check_operand,
    within,
)
from ..dispatch import chosen, launcher
from ..eager import LearnedGate as EagerLearnedGate
from ..layout import total_bytes
from ..reference import Codes, Push, Surrogate, compute_dtype
from ..rounding import HALF, round_to
from ..rules import Operand

STEEP = (
    "its gradient is zero almost everywhere; pass {name}.detach() (from the data: x.detach().mean()), or take jumprelu, whose "
    "threshold learns"
)


@functools.lru_cache(maxsize=4096)
def _of_numbers(name: str, casts: bool, bits: bytes, dtype: torch.dtype, result: torch.dtype) -> Any:
    """A call with numbers alone, given by their bits, which tell -0 from 0."""
    threshold, *constants = struct.unpack(f"{len(bits) // 8}d", bits)
    return launcher("launch").gate_call(name, torch.empty(0, dtype=dtype), threshold, tuple(constants), result, casts)


@dataclass(frozen=True)
class Gate:
    """An elementwise op that compares its input with a threshold.

    The reference's signature is the op's: input, the threshold, then constants (numbers), then `dtype` if the output has one.
    """

    name: str
    formula: str
    gradient: str
    equivalent: str
    reference: Callable[..., Tensor]
    dtypes: tuple[torch.dtype, ...] = FLOATING
    differentiable: bool = True
    casts: bool = True
    nonnegative: bool = False
    eager: Callable[..., Tensor] | None = None
    eager_inplace: Callable[..., Tensor] | None = None
    push: Push | None = None
    codes: Codes | None = None
    inplace: bool = False
    example: tuple[float, ...] = (0.5,)
    _names: tuple[str, ...] = field(init=False, repr=False)
    _defaults: tuple[Any, ...] = field(init=False, repr=False)

    family = "gate"

    def __post_init__(self) -> None:
        parameters = list(inspect.signature(self.reference).parameters.values())[1:]
        positional = [p for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
        object.__setattr__(self, "_names", tuple(p.name for p in positional))
        object.__setattr__(self, "_defaults", tuple(p.default for p in positional))

    @property
    def constants(self) -> tuple[str, ...]:
        """The names of the numbers that follow the threshold."""
        return self._names[1:]

    @property
    def learned_name(self) -> str:
        """The name of its kernels and in its tables where the threshold learns."""
        return f"{self.name}_learned"

    def __call__(
        self, input: Tensor, *parameters: Any, inplace: bool = False, dtype: torch.dtype | None = None
    ) -> Tensor:
        """Check the arguments, choose the backend, run; what is left out has the reference's default."""
        return self.run(input, parameters + self._defaults[len(parameters) :], inplace, dtype)

    def run(
        self, input: Tensor, parameters: tuple[Any, ...], inplace: bool = False, dtype: torch.dtype | None = None
    ) -> Tensor:
        """The same, for all parameters."""
        numbers = dtype is None and type(input) is Tensor and not is_dynamo_compiling()
        numbers = numbers and within(input.dtype, parameters, self.nonnegative)
        if numbers and not inplace and self.eager is not None and runs_eagerly(input):
            if input.dtype in HALF:  # torch's kernels round numbers to all others
                parameters = tuple([round_to(value, input.dtype) for value in parameters])
            return self.eager(input, *parameters)
        name = self.name
        check_input(name, input, self.dtypes)
        threshold: Any
        threshold, *constants = parameters if numbers else self._checked(input, parameters, dtype)
        plain = is_plain(input, threshold)
        records = torch.is_grad_enabled() and input.requires_grad
        learns = not numbers and self._learns(threshold)
        key = self.learned_name if learns else name
        on_triton = plain and chosen(key, input, self.differentiable and (records or learns))[0] == "triton"
        if not numbers and isinstance(threshold, Tensor) and plain and threshold.dim() == 0 and threshold.is_cpu:
            readable = not on_triton or not input.is_cpu  # to the interpreter a CPU is the device
            if readable and not learns:
                threshold = self._number(input, threshold.item())
        if inplace:
            check_inplace(name, input, plain)
        number = numbers or not isinstance(threshold, Tensor)
        if learns:
            return self._learning(input, threshold, plain, on_triton)
        if on_triton:
            return self._triton(input, threshold, constants, inplace, dtype)
        run, source = self.reference, input
        if plain and self.eager and number and input.dtype in FLOATING:
            run = self.eager
            threshold = round_to(threshold, input.dtype)
            if dtype is None:
                constants = [round_to(value, input.dtype) for value in constants]
            if inplace and self.eager_inplace and not records:
                return self.eager_inplace(input, threshold, *constants)
            if inplace and records:
                source = input.clone()  # what it saves for backward must outlive the write
        output = run(source, threshold, *constants, **({} if dtype is None else {"dtype": dtype}))
        return input.copy_(output) if inplace else output

    def _learns(self, threshold: object) -> bool:
        """Whether the threshold is given a gradient."""
        learns = self.push is not None and isinstance(threshold, Tensor) and threshold.requires_grad
        return learns and torch.is_grad_enabled()

    def _checked(self, input: Tensor, parameters: tuple[Any, ...], dtype: torch.dtype | None) -> list[Any]:
        """The threshold, then the constants, as they are computed with; an error names what cannot be."""
        name, learns = self.name, self.push is not None
        threshold = check_operand(name, self._names[0], parameters[0], input, learns=learns, why=STEEP)
        result = input.dtype if dtype is None else check_dtype(name, dtype)
        check = check_held if result.is_floating_point else check_integer
        values = [check_number(name, n, v) for n, v in zip(self._names[1:], parameters[1:])]
        constants = [check(name, n, v, result) for n, v in zip(self._names[1:], values)]
        return [threshold if isinstance(threshold, Tensor) else self._number(input, threshold), *constants]

    def _number(self, input: Tensor, threshold: float) -> float:
        """A threshold that is a number, cast as the input's dtype demands."""
        if self.casts and input.dtype not in FLOATING:
            threshold = check_integer(self.name, self._names[0], threshold, input.dtype)
        if self.nonnegative and not threshold >= 0:
            raise RuntimeError(f"{self.name}: {self._names[0]} must be at least 0, got {threshold}")
        return threshold

    def _triton(
        self, input: Tensor, threshold: Operand, constants: Sequence[float], inplace: bool, dtype: torch.dtype | None
    ) -> Tensor:
        call = self.lowered(input, threshold, constants, dtype)
        if self.differentiable and input.requires_grad and torch.is_grad_enabled():
            return GateFunction.apply(input, call, inplace)  # type: ignore[no-any-return, no-untyped-call]
        output: Tensor
        output, _ = launcher("launch").gate_forward(call, input, input.detach() if inplace else None, want_mask=False)
        if inplace:
            torch.autograd.graph.increment_version(input)
            return input
        return output

    def _learning(self, input: Tensor, threshold: Tensor, plain: bool, on_triton: bool) -> Tensor:
        """With a threshold that has a gradient."""
        surrogate = self.surrogate((), False)
        if not plain:
            if is_traced(input, threshold):
                return library.learned_gate(self.name, surrogate, input, threshold)  # type: ignore[no-any-return]
            return plain_learned_gate(surrogate, input, threshold)  # type: ignore[no-any-return]
        if not on_triton:
            return EagerLearnedGate.apply(input, threshold, surrogate)  # type: ignore[no-any-return, no-untyped-call]
        lowered = self.learned_call(input, threshold, (), False)
        return LearnedGateFunction.apply(input, threshold, lowered, surrogate)  # type: ignore[no-any-return, no-untyped-call]

    def surrogate(self, constants: tuple[float, ...], input_gradient: bool) -> Surrogate:
        """A call with a threshold that learns, in plain torch."""
        assert self.push is not None
        assert self.codes is not None
        return Surrogate(self.reference, self.codes, (self.push,), constants, input_gradient)

    def learned_call(
        self, input: Tensor, threshold: Operand, constants: tuple[float, ...], input_gradient: bool
    ) -> tuple[Any, Operand]:
        """A call with a threshold that learns, as the kernels' launcher takes it, and the threshold as it is compared."""
        t, promoted = launcher("launch").compared(input, threshold, self.casts)
        name = self.learned_name
        return launcher("learned").learned_call(name, name, constants, compute_dtype(promoted)), t

    def bytes_moved(
        self, input: Tensor, operands: Sequence[Tensor], arguments: Mapping[str, Any], *, grad: bool
    ) -> tuple[int, int, int]:
        """Bytes forward, backward and saved: s in, s out, one bit an element (two where the threshold learns)."""
        n, size = input.numel(), input.element_size()
        result = arguments.get("dtype") or input.dtype
        forward = n * (size + result.itemsize) + total_bytes(operands)
        if not (grad and self.differentiable):
            return forward, 0, 0
        learning = [t for t in operands if t.requires_grad]
        mask = (2 if learning else 1) * -(-n // 8)
        return forward + mask, 2 * n * size + mask + total_bytes(learning), mask

    def shell(self, arguments: Mapping[str, Any]) -> str:
        """Which kernels run."""
        return "learned" if self._learns(arguments.get(self._names[0])) else "gate"

    def tuning_key(self, arguments: Mapping[str, Any]) -> str:
        """The op's name in the tables of block sizes."""
        return self.learned_name if self.shell(arguments) == "learned" else self.name

    def searches(self, arguments: Mapping[str, Any]) -> bool:
        """Whether block sizes may come from a search: where they fix no order of summation."""
        return self.shell(arguments) == "gate"

    def lowered(self, input: Tensor, threshold: Operand, constants: Sequence[float], dtype: torch.dtype | None) -> Any:
        """The call as the kernels' launcher takes it: operands rounded as the contract says."""
        result = dtype or input.dtype
        if isinstance(threshold, Tensor) or not (input.dtype in FLOATING and result in FLOATING):
            return launcher("launch").gate_call(self.name, input, threshold, constants, result, self.casts)
        bits = struct.pack(f"{1 + len(constants)}d", threshold, *constants)
        return _of_numbers(self.name, self.casts, bits, input.dtype, result)
