"""The one list of ops: dispatch, tests, benchmarks, the compile report and the README's table follow from it.

An op is an entry here, a device function in kernels/pointwise.py and a reference in reference.py, under one name.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType, ModuleType
from typing import Any, Union

import torch
from torch import Tensor

from . import eager, reference
from .autograd import Gate as GateFunction
from .autograd import LearnedGate as LearnedGateFunction
from .autograd import Loss as LossFunction
from .autograd import TracedLearnedGate, TracedLoss, TransformedLearnedGate, TransformedLoss
from .backend import choose, is_plain
from .checks import (
    FLOATING,
    INTEGER,
    check_dtype,
    check_held,
    check_inplace,
    check_input,
    check_integer,
    check_number,
    check_operand,
    check_positive,
    check_reduction,
    check_target,
)
from .reference import Push
from .rounding import round_to
from .rules import ByLoss, ByPrediction, ByProximity, Operand, Rule

LEARN_HINT = " (its gradient is zero almost everywhere; jumprelu has a threshold that learns)"


def _triton() -> ModuleType:
    from . import launch

    return launch


def _learned() -> ModuleType:
    from . import learned

    return learned


def _bytes(tensors: Sequence[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


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
        if self.differentiable and torch.is_grad_enabled():
            if isinstance(threshold, Tensor) and threshold.requires_grad:
                return self._learning(input, threshold, call)
            if input.requires_grad:
                return GateFunction.apply(input, call, inplace)  # type: ignore[no-any-return, no-untyped-call]
        output: Tensor
        output, _ = _triton().gate_forward(call, input.detach(), input.detach() if inplace else None, want_mask=False)
        if inplace:
            torch.autograd.graph.increment_version(input)
            return input
        return output

    def _learning(self, input: Tensor, threshold: Tensor, call: Any) -> Tensor:
        assert self.push is not None
        function, compute = f"{self.name}_learned", reference.compute_dtype(call.promoted)
        learned = _learned().LearnedCall(self.name, function, f"{function}_backward", call.threshold, (), compute)
        surrogate = reference.Surrogate(self.reference, (self.push,), 0.0, False)
        return LearnedGateFunction.apply(input, threshold, learned, surrogate)  # type: ignore[no-any-return, no-untyped-call]

    def bytes_moved(
        self, input: Tensor, operands: Sequence[Tensor], arguments: Mapping[str, Any], *, grad: bool
    ) -> tuple[int, int, int]:
        """Bytes forward, backward and saved: s in, s out, one bit an element (two where the threshold learns)."""
        n, size = input.numel(), input.element_size()
        result = arguments.get("dtype") or input.dtype
        forward = n * (size + result.itemsize) + _bytes(operands)
        if not (grad and self.differentiable):
            return forward, 0, 0
        learning = [t for t in operands if t.requires_grad]
        mask = (2 if learning else 1) * -(-n // 8)
        return forward + mask, 2 * n * size + mask + _bytes(learning), mask

    def tuning_key(self, arguments: Mapping[str, Any]) -> str:
        """The op's name in the tables of block sizes."""
        return self.name

    def searches(self, arguments: Mapping[str, Any]) -> bool:
        """Whether block sizes may come from a search: where they fix no order of summation."""
        threshold = arguments.get(self._names[0])
        return not (isinstance(threshold, Tensor) and threshold.requires_grad)

    def lowered(
        self, input: Tensor, threshold: Operand, constants: tuple[float, ...], dtype: torch.dtype | None
    ) -> Any:
        """The call as the kernels' launcher takes it: operands rounded as the contract says."""
        launch = _triton()
        result = dtype or input.dtype
        t, promoted = launch.compared(input, threshold, self.casts)
        held = tuple(launch.held(value, result) for value in constants)
        return launch.GateCall(self.name, self.name, t, held, promoted, result)


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
    counts: bool = False
    dtypes: tuple[torch.dtype, ...] = FLOATING
    example: tuple[float, ...] = (0.5, 0.25)

    family = "learned"

    def __call__(
        self, input: Tensor, threshold: Operand, bandwidth: float = 1e-3, *, input_gradient: bool = False
    ) -> Any:
        """Check the arguments, choose the backend, run."""
        check_input(self.name, input, self.dtypes)
        if self.counts and input.dim() == 0:
            raise ValueError(f"{self.name}: input has shape (), expected at least one dimension to count along")
        threshold = check_operand(self.name, "threshold", threshold, input, learns=True)
        bandwidth = check_positive(self.name, "bandwidth", bandwidth)
        tensors = [t for t in (input, threshold) if isinstance(t, Tensor)]
        records = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
        surrogate = reference.Surrogate(self.reference, self.pushes, bandwidth, bool(input_gradient))
        if not is_plain(*tensors):
            function = TracedLearnedGate if torch.compiler.is_compiling() else TransformedLearnedGate
            return function.apply(input, threshold, surrogate)  # type: ignore[no-untyped-call]
        if choose(input.device)[0] == "triton":
            call = self.lowered(input, threshold, bandwidth, bool(input_gradient))
            if records:
                return LearnedGateFunction.apply(input, threshold, call, surrogate)  # type: ignore[no-untyped-call]
            output, count, _ = _learned().forward(call, input.detach(), 0)
            return output if count is None else (output, count)
        if records:
            return TracedLearnedGate.apply(input, threshold, surrogate)  # type: ignore[no-untyped-call]
        return self.reference(input, threshold, bandwidth)

    def lowered(self, input: Tensor, threshold: Operand, bandwidth: float, input_gradient: bool) -> Any:
        """The call as the kernels' launcher takes it: nothing is rounded to a 16-bit type."""
        return _learned().LearnedCall(
            self.name,
            self.forward or self.name,
            f"{self.name}_backward",
            threshold.detach() if isinstance(threshold, Tensor) else threshold,
            (bandwidth,),
            reference.compared_dtype(input, threshold),
            self.reads_threshold,
            self.counts,
            input_gradient,
        )

    def bytes_moved(
        self, input: Tensor, operands: Sequence[Tensor], arguments: Mapping[str, Any], *, grad: bool
    ) -> tuple[int, int, int]:
        """Bytes forward, backward and saved: s in, s out, two bits an element; a count adds a bit twice, and itself."""
        n, bits = input.numel(), -(-input.numel() // 8)
        count = 0
        if self.counts and n:
            count = n // input.shape[-1] * reference.compute_dtype(input.dtype).itemsize
        once = 2 * n * input.element_size() + _bytes(operands)
        if not grad:
            return once + (2 * bits + count if self.counts else 0), 0, 0
        learning = [t for t in operands if t.requires_grad]
        saved = 2 * bits if learning or arguments.get("input_gradient") else bits
        forward = once + saved + (bits + count if self.counts else 0)
        read = _bytes(operands) if self.reads_threshold else 0
        return forward, 2 * n * input.element_size() + saved + count + read + _bytes(learning), saved

    def tuning_key(self, arguments: Mapping[str, Any]) -> str:
        """The op's name in the tables of block sizes."""
        return self.name

    def searches(self, arguments: Mapping[str, Any]) -> bool:
        """Block sizes may not come from a search, which would change the order of summation."""
        return False


@dataclass(frozen=True)
class Loss:
    """A point of the grid base x rule, or (rule None) the whole grid."""

    name: str
    formula: str
    weighing: str
    equivalent: str
    base: str = "bce_with_logits"
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
        base = self._check(input, target, rule, self.base if base is None else base, weight, pos_weight, reduction)
        spec, operands = reference.specify(input, rule, base, weight, pos_weight, reduction)
        if not torch.compiler.is_compiling():
            dtype = reference.compute_dtype(input.dtype)
            operands = tuple(v if isinstance(v, Tensor) else round_to(float(v), dtype) for v in operands)
        if not is_plain(input, target, *operands) or input.numel() == 0:
            function = TracedLoss if torch.compiler.is_compiling() else TransformedLoss
            return reference.reduced(function.apply(input, target, spec, operands), spec)  # type: ignore[no-untyped-call]
        shell = _triton() if choose(input.device)[0] == "triton" else eager
        if input.requires_grad and torch.is_grad_enabled():
            return LossFunction.apply(input, target, spec, operands, shell)  # type: ignore[no-any-return, no-untyped-call]
        output, _ = shell.loss_forward(spec, input.detach(), target.detach(), operands, want_gradient=False)
        return output  # type: ignore[no-any-return]

    def bytes_moved(
        self, input: Tensor, operands: Sequence[Tensor], arguments: Mapping[str, Any], *, grad: bool
    ) -> tuple[int, int, int]:
        """Bytes forward, backward for an upstream gradient of 1, and saved; `operands` starts with the target."""
        once = input.numel() * input.element_size()
        inputs = once + _bytes(operands)
        if arguments["reduction"] == "none":
            forward, backward, saved = inputs + once, inputs + 2 * once, inputs
        elif input.dtype == torch.float16:
            forward, backward, saved = inputs, inputs + once, inputs
        else:
            forward, backward, saved = inputs + (once if grad else 0), 0, inputs + once
        return (forward, backward, saved) if grad else (forward, 0, 0)

    def tuning_key(self, arguments: Mapping[str, Any]) -> str:
        """The cell's name in the tables of block sizes."""
        rule = self.rule or type(arguments["rule"])
        suffix = ".none" if arguments["reduction"] == "none" else ""
        return f"{arguments.get('base', self.base)}.{rule.__name__}{suffix}"

    def searches(self, arguments: Mapping[str, Any]) -> bool:
        """Whether block sizes may come from a search: where nothing is summed."""
        return bool(arguments["reduction"] == "none")

    def _check(
        self,
        input: Tensor,
        target: Tensor,
        rule: Rule,
        base: str,
        weight: Operand | None,
        pos_weight: Operand | None,
        reduction: str,
    ) -> str:
        name = self.name
        check_input(name, input, FLOATING)
        check_target(name, input, target)
        check_reduction(name, reduction)
        if not isinstance(base, str) or base not in reference.BASES:
            raise ValueError(f"{name}: base must be one of {', '.join(map(repr, reference.BASES))}, got {base!r}")
        if type(rule) not in reference.RULES:
            accepted = ", ".join(accepted.__name__ for accepted in reference.RULES)
            raise TypeError(f"{name}: rule must be one of {accepted}, got {type(rule).__name__}")
        for setting in type(rule).__dataclass_fields__:
            check_operand(name, setting, getattr(rule, setting), input)
        if weight is not None:
            check_operand(name, "weight", weight, input)
        if pos_weight is not None:
            if base != "bce_with_logits":
                raise ValueError(f"{name}: pos_weight goes with base 'bce_with_logits', got base {base!r}")
            check_operand(name, "pos_weight", pos_weight, input)
        return base


Op = Union[Gate, LearnedGate, Loss]

_GATES = (
    Gate(
        "threshold",
        formula="value where x <= t, else x",
        gradient="0 where x <= t, else 1",
        equivalent="torch.where(input <= threshold, value, input)",
        reference=reference.threshold,
        dtypes=FLOATING + INTEGER,
        eager=eager.threshold,
        eager_inplace=eager.threshold_,
        inplace=True,
        example=(0.1, -2.0),
    ),
    Gate(
        "hardshrink",
        formula="0 where -λ <= x <= λ, else x",
        gradient="0 where -λ <= x <= λ, else 1",
        equivalent="torch.where((input >= -lambd) & (input <= lambd), 0, input)",
        reference=reference.hardshrink,
        eager=eager.hardshrink,
        eager_inplace=eager.hardshrink_,
        inplace=True,
    ),
    Gate(
        "softshrink",
        formula="x - λ where x > λ, x + λ where x < -λ, x where x is NaN, else 0",
        gradient="0 where -λ <= x <= λ, else 1; to λ: -1 where x > λ, 1 where x < -λ, else 0",
        equivalent="torch.nn.functional.softshrink(input, lambd)",
        reference=reference.softshrink,
        eager=eager.softshrink,
        nonnegative=True,
        push=reference.softshrink_push,
    ),
    Gate(
        "binary_threshold",
        formula="above_value where x > t, else below_value",
        gradient="none",
        equivalent="torch.where(input > threshold, above_value, below_value)",
        reference=reference.binary_threshold,
        dtypes=FLOATING + INTEGER,
        eager=eager.binary_threshold,
        differentiable=False,
        casts=False,
        example=(0.1, 3.0, -1.0),
    ),
)

_LEARNED_GATES = (
    LearnedGate(
        "jumprelu",
        formula="x where x > θ, else 0",
        gradient="1 where x > θ, else 0; to θ: -θ/ε where |x - θ| < ε/2, else 0",
        equivalent="torch.where(input > threshold, input, 0)",
        reference=reference.jumprelu,
        pushes=(reference.jumprelu_push,),
    ),
    LearnedGate(
        "step",
        formula="1 where x > θ, else 0",
        gradient="0; to θ: -1/ε where |x - θ| < ε/2, else 0",
        equivalent="(input > threshold).to(input.dtype)",
        reference=reference.step,
        pushes=(reference.step_push,),
        reads_threshold=False,
    ),
    LearnedGate(
        "jumprelu_l0",
        formula="(jumprelu(x), step(x).sum(-1)), in one pass",
        gradient="both, in one pass",
        equivalent="torch.where(input > threshold, input, 0), (input > threshold).sum(-1)",
        reference=reference.jumprelu_l0,
        pushes=(reference.jumprelu_push, reference.step_push),
        forward="jumprelu",
        counts=True,
    ),
)

_LOSSES = (
    Loss(
        "threshold_bce_loss",
        formula="binary cross entropy of a probability",
        weighing="weight_above where p >= t, else weight_below",
        equivalent="(F.binary_cross_entropy(input, target, reduction='none') * torch.where(input >= t, above, below)).mean()",
        base="bce",
        rule=ByPrediction,
    ),
    Loss(
        "threshold_bce_with_logits_loss",
        formula="binary cross entropy of a logit",
        weighing="weight_above where x >= logit(t), else weight_below",
        equivalent="threshold_bce_loss's, of F.binary_cross_entropy_with_logits and input >= logit(t)",
        base="bce_with_logits",
        rule=ByPrediction,
    ),
    Loss(
        "threshold_mse_loss",
        formula="(x - y)²",
        weighing="weight_above where x >= t, else weight_below",
        equivalent="((input - target) ** 2 * torch.where(input >= t, above, below)).mean()",
        base="mse",
        rule=ByPrediction,
    ),
    Loss(
        "proximity_mse_loss",
        formula="(x - y)²",
        weighing="1 + factor·(1 - d/range) where d = |x - t| < range, else 1",
        equivalent="((input - target) ** 2 * (1 + factor * (1 - (input - t).abs() / range).clamp(min=0))).mean()",
        base="mse",
        rule=ByProximity,
    ),
    Loss(
        "exceedance_mse_loss",
        formula="(x - y)²",
        weighing="factor where (x - y)² > bound, else 1",
        equivalent="(l * torch.where(l > bound, factor, 1.0)).mean() with l = (input - target) ** 2",
        base="mse",
        rule=ByLoss,
    ),
    Loss(
        "threshold_loss",
        formula="any base: bce, bce_with_logits, mse",
        weighing="any rule: ByPrediction, ByProximity, ByLoss",
        equivalent="the base loss with reduction='none', times the rule's weight, reduced",
    ),
)

GATES: Mapping[str, Gate] = MappingProxyType({op.name: op for op in _GATES})
LEARNED_GATES: Mapping[str, LearnedGate] = MappingProxyType({op.name: op for op in _LEARNED_GATES})
LOSSES: Mapping[str, Loss] = MappingProxyType({op.name: op for op in _LOSSES})
OPS: Mapping[str, Op] = MappingProxyType({**GATES, **LEARNED_GATES, **LOSSES})


def ops() -> Mapping[str, Op]:
    """The ops by name, in the order of the documentation."""
    return OPS
