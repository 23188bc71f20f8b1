"""Gates: elementwise ops that compare their input with a threshold."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .. import library
from ..autograd import Gate as GateFunction
from ..autograd import LearnedGate as LearnedGateFunction
from ..autograd import TracedLearnedGate, TransformedLearnedGate
from ..backend import choose, is_plain, is_traced
from ..checks import (
    FLOATING,
    check_dtype,
    check_held,
    check_inplace,
    check_input,
    check_integer,
    check_number,
    check_operand,
)
from ..eager import LearnedGate as EagerLearnedGate
from ..layout import total_bytes
from ..reference import Codes, Push, Surrogate, compute_dtype
from ..rules import Operand

LEARN_HINT = " (its gradient is zero almost everywhere; jumprelu has a threshold that learns)"


def _kernels() -> ModuleType:
    from .. import launch

    return launch


def _learned_kernels() -> ModuleType:
    from .. import learned

    return learned


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

    def __call__(
        self, input: Tensor, *parameters: Any, inplace: bool = False, dtype: torch.dtype | None = None
    ) -> Tensor:
        """Check the arguments, choose the backend, run."""
        name, threshold_name = self.name, self._names[0]
        check_input(name, input, self.dtypes)
        parameters += self._defaults[len(parameters) :]
        learns = self.push is not None
        threshold = check_operand(name, threshold_name, parameters[0], input, learns=learns, hint=LEARN_HINT)
        plain = is_plain(input, threshold)
        on_triton = plain and choose(input.device)[0] == "triton"
        if plain and isinstance(threshold, Tensor) and threshold.dim() == 0 and threshold.device.type == "cpu":
            readable = not on_triton or input.device.type != "cpu"  # to the interpreter a CPU is the device
            learning = threshold.requires_grad and torch.is_grad_enabled()
            threshold = threshold.item() if readable and not learning else threshold
        constants = tuple(check_number(name, n, v) for n, v in zip(self._names[1:], parameters[1:]))
        result = input.dtype if dtype is None else check_dtype(name, dtype)
        if constants:
            check = check_held if result.is_floating_point else check_integer
            constants = tuple(check(name, n, v, result) for n, v in zip(self._names[1:], constants))
        if not isinstance(threshold, Tensor):
            if self.casts and not input.is_floating_point():
                threshold = check_integer(name, threshold_name, threshold, input.dtype)
            if self.nonnegative and not threshold >= 0:
                raise RuntimeError(f"{name}: {threshold_name} must be at least 0, got {threshold}")
        if inplace:
            check_inplace(name, input, plain)
        if learns and isinstance(threshold, Tensor) and threshold.requires_grad and torch.is_grad_enabled():
            return self._learning(input, threshold, plain, on_triton)
        if on_triton:
            return self._triton(input, threshold, constants, inplace, dtype)
        run, source = self.reference, input
        if plain and self.eager and input.is_floating_point() and not isinstance(threshold, Tensor):
            run = self.eager
            records = input.requires_grad and torch.is_grad_enabled()
            if inplace and self.eager_inplace and not records:
                return self.eager_inplace(input, threshold, *constants)
            if inplace and records:
                source = input.clone()  # what it saves for backward must outlive the write
        output = run(source, threshold, *constants, **({} if dtype is None else {"dtype": dtype}))
        return input.copy_(output) if inplace else output

    def _triton(
        self, input: Tensor, threshold: Operand, constants: tuple[float, ...], inplace: bool, dtype: torch.dtype | None
    ) -> Tensor:
        call = self.lowered(input, threshold, constants, dtype)
        if self.differentiable and input.requires_grad and torch.is_grad_enabled():
            return GateFunction.apply(input, call, inplace)  # type: ignore[no-any-return, no-untyped-call]
        output: Tensor
        output, _ = _kernels().gate_forward(call, input.detach(), input.detach() if inplace else None, want_mask=False)
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
            function = TracedLearnedGate if torch.compiler.is_compiling() else TransformedLearnedGate
            return function.apply(input, threshold, surrogate)  # type: ignore[no-any-return, no-untyped-call]
        if not on_triton:
            return EagerLearnedGate.apply(input, threshold, surrogate)  # type: ignore[no-any-return, no-untyped-call]
        call = self.learned_call(input, threshold, (), False)
        return LearnedGateFunction.apply(input, threshold, call, surrogate)  # type: ignore[no-any-return, no-untyped-call]

    def surrogate(self, constants: tuple[float, ...], input_gradient: bool) -> Surrogate:
        """A call with a threshold that learns, in plain torch."""
        assert self.push is not None
        assert self.codes is not None
        return Surrogate(self.reference, self.codes, (self.push,), constants, input_gradient)

    def learned_call(
        self, input: Tensor, threshold: Operand, constants: tuple[float, ...], input_gradient: bool
    ) -> Any:
        """A call with a threshold that learns, as the kernels' launcher takes it."""
        call = self.lowered(input, threshold, constants, None)
        name, compute = f"{self.name}_learned", compute_dtype(call.promoted)
        return _learned_kernels().LearnedCall(name, name, f"{name}_backward", call.threshold, constants, compute)

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
        threshold = arguments.get(self._names[0])
        learns = isinstance(threshold, Tensor) and threshold.requires_grad and torch.is_grad_enabled()
        return "learned" if learns else "gate"

    def tuning_key(self, arguments: Mapping[str, Any]) -> str:
        """The op's name in the tables of block sizes."""
        return f"{self.name}_learned" if self.shell(arguments) == "learned" else self.name

    def searches(self, arguments: Mapping[str, Any]) -> bool:
        """Whether block sizes may come from a search: where they fix no order of summation."""
        return self.shell(arguments) == "gate"

    def lowered(
        self, input: Tensor, threshold: Operand, constants: tuple[float, ...], dtype: torch.dtype | None
    ) -> Any:
        """The call as the kernels' launcher takes it: operands rounded as the contract says."""
        launch = _kernels()
        result = dtype or input.dtype
        t, promoted = launch.compared(input, threshold, self.casts)
        held = tuple(launch.held(value, result) for value in constants)
        return launch.GateCall(self.name, self.name, t, held, promoted, result)
