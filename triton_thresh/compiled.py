"""Formulas through Inductor: an elementwise loss whose value and gradient come from one compiled pass.

Inductor writes Triton on a GPU and C++ on a CPU. It fuses an elementwise formula, its derivative and its sum into one loop.
"""

from __future__ import annotations

import functools
import inspect
import os
import types
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import backend, checks, eager, layout
from .checks import FLOATING, HALF, Operand, cached_constant, compute_dtype, describe, round_to

COMPILES = os.environ.get("TRITON_THRESH_COMPILE") != "0"
KEYWORDS = ("weight", "mask", "divisor", "reduction")

Element = Callable[..., Tensor]
"""The element losses of a tensor and its operands, in plain torch."""

ClosedForm = Callable[..., tuple[Tensor, Tensor] | None]
"""The element losses, and their slopes times a factor, of x, the factor and the operands; None where they are not written out."""


class Options(NamedTuple):
    """The reduction of the element losses. `weight`, `mask` and `divisor` may be missing; `result` is the dtype of the value."""

    reduction: str
    result: torch.dtype
    weight: Operand | None = None
    mask: Tensor | None = None
    divisor: Operand | None = None


# ------------------------------------------------------------------------------------------------------------ plain torch


def element_losses(
    element: Element, x: Tensor, values: Sequence[Any], weight: Operand | None, mask: Tensor | None
) -> Tensor:
    """The weighted element losses in the compute type: differentiable, 0 with gradient 0 where `mask` is False.

    The mask selects twice. The formula's result for a masked element is dropped with its gradient, and so is the gradient that
    a slope of NaN or infinity would make of that 0.
    """
    compute = compute_dtype(x.dtype)
    x = x.to(compute)
    if mask is not None:
        x = torch.where(mask, x, 0.0)
    losses = element(x, *[_seen(value, x) for value in values])
    if not isinstance(losses, Tensor) or losses.shape != x.shape or losses.is_complex():
        raise ValueError(
            f"the formula returned {describe(losses)}, expected a real tensor of the shape {tuple(x.shape)} of its first "
            "argument: it computes the loss of each element, and `reduction` says what becomes of them"
        )
    if not losses.is_floating_point():
        losses = losses.to(compute)
    if weight is not None:
        losses = losses * _seen(weight, x)
    return losses if mask is None else torch.where(mask, losses, 0.0)


def _seen(value: Any, x: Tensor) -> Any:
    """An argument as the formula sees it: never in 16 bits, and with the shape of x if it has dimensions."""
    if not isinstance(value, Tensor):
        return value
    value = value.float() if value.dtype in HALF else value
    return value.expand(x.shape) if value.dim() else value


def plain(element: Element, x: Tensor, values: Sequence[Any], options: Options) -> Tensor:
    """The loss in plain torch, differentiable in x, and rounded once."""
    reduction, result, weight, mask, divisor = options
    with no_autocast(x):
        losses = element_losses(element, x, values, weight, mask)
        if reduction == "none":
            return losses.to(result)
        total = losses.sum()
        return (total / _divisor(x, mask, divisor) if reduction == "mean" else total).to(result)


def _divisor(x: Tensor, mask: Tensor | None, divisor: Operand | None) -> Any:
    if divisor is not None:
        return divisor
    return x.numel() if mask is None else mask.expand(x.shape).sum()


def plain_gradient(element: Element, x: Tensor, values: Sequence[Any], options: Options, g: Tensor) -> Tensor:
    """d loss / dx times the upstream gradient: differentiable in x and in the gradient, and under any transform."""
    gradient: Tensor = torch.func.grad(lambda x: (plain(element, x, values, options) * g).sum())(x)
    return gradient


def no_autocast(x: Tensor) -> AbstractContextManager[Any]:
    """The formula sees float32, which autocast would narrow."""
    kind = x.device.type
    return torch.autocast(kind, enabled=False) if checks.is_autocast(kind) else nullcontext()


# --------------------------------------------------------------------------------------------------------------- programs


def _value(element: Element, reduction: str, result: torch.dtype, _: ClosedForm | None) -> Callable[..., Any]:
    """The program of a call that wants no gradient."""

    def program(x: Tensor, weight: Any, mask: Any, divisor: Any, g: Any, *values: Any) -> Tensor:
        losses = element_losses(element, x, values, weight, mask)
        if reduction == "none":
            return _own(losses, result)
        total = _sum(losses)
        return (total / _divisor(x, mask, divisor) if reduction == "mean" else total).to(result)

    return program


def _value_and_gradient(
    element: Element, reduction: str, result: torch.dtype, closed_form: ClosedForm | None
) -> Callable[..., Any]:
    """The program of a call that wants a gradient; with "none" that is the slope, not yet rounded. The value comes second.

    With the value first Inductor would write two loops, one that sums and one for the gradient, which take 1.7 times as long.
    With an upstream gradient g it is the program of a backward, which wants no value. Elements that are counted are divided by
    their number before they are summed: else Inductor would sum them in the loop that counts, and read them again for the
    gradient.
    """

    def program(x: Tensor, weight: Any, mask: Any, divisor: Any, g: Any, *values: Any) -> tuple[Tensor, Tensor | None]:
        wide = x.to(compute_dtype(x.dtype))
        counts = reduction == "mean" and divisor is None
        factor = None if g is None else g.to(wide.dtype)
        if reduction == "mean":
            each = 1.0 / _divisor(x, mask, divisor).to(wide.dtype)
            factor = each if factor is None else factor * each

        def total(x: Tensor) -> tuple[Tensor, Tensor]:
            losses = element_losses(element, x, values, weight, mask)
            scaled = losses if factor is None else losses * factor
            return scaled.sum(), scaled if counts else losses

        found = None if closed_form is None else closed_form(wide, factor, *values)
        if found is None:
            slope, (_, losses) = torch.func.grad_and_value(total, has_aux=True)(wide)
        else:
            losses, slope = found
        if g is not None:
            return _own(slope, x.dtype), None
        if reduction == "none":
            return _own(slope, slope.dtype), _own(losses, result)
        value = _sum(losses) / divisor if reduction == "mean" and not counts else _sum(losses)
        return _own(slope, x.dtype), value.to(result)

    return program


def _own(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor in a dtype and in memory of its own: it may be one number, expanded, or an argument of the formula."""
    return tensor.to(dtype, copy=True, memory_format=torch.contiguous_format)


def _sum(losses: Tensor) -> Tensor:
    """On a CPU in float64: there Inductor adds to a running sum, which in float32 is 3e-5 off for 2**24 elements."""
    return losses.sum(dtype=torch.float64 if losses.device.type == "cpu" else None)


def _compiled(program: Callable[..., Any], name: str) -> Callable[..., Any]:
    """The program, compiled for every size. Dynamo keeps what it compiled by code object, eight for each: it gets its own."""
    code = program.__code__.replace(co_name=f"fused_{name}" if name.isidentifier() else "fused_loss")
    own = types.FunctionType(code, program.__globals__, code.co_name, None, program.__closure__)
    return torch.compile(own, fullgraph=True, dynamic=True)


class Engine:
    """An elementwise formula, and its programs: one for each kind of call, None where the compiler refused.

    A call is normalised, so that the compiler sees few kinds: tensors are detached, dense and in the memory order of the first,
    with as few dimensions as show how they broadcast; numbers are 0-dim tensors; no gradient is recorded, and no autocast is on.
    """

    def __init__(self, name: str, element: Element, closed_form: ClosedForm | None = None) -> None:
        self.name, self.element, self.closed_form = name, element, closed_form
        self._programs: dict[Any, Callable[..., Any] | None] = {}
        self._reason = "TRITON_THRESH_COMPILE=0 switches the compiler off"
        self._warned = False

    def value_and_gradient(
        self, x: Tensor, values: Sequence[Any], options: Options, *, gradient: bool
    ) -> tuple[Tensor, Tensor | None] | None:
        """The loss, and if wanted its gradient for an upstream gradient of 1, or with reduction "none" the slope.

        None where it cannot be compiled.
        """
        x = layout.dense(x)
        found = self._run(_value_and_gradient if gradient else _value, x, values, options, None)
        if found is None:
            return None
        slope, value = found if gradient else (None, found)
        if options.reduction == "none":
            value = value.as_strided(x.shape, x.stride())
        return value, None if slope is None else slope.as_strided(x.shape, x.stride())

    def backward(self, x: Tensor, values: Sequence[Any], options: Options, g: Tensor) -> Tensor | None:
        """The gradient for an upstream gradient g, recomputed; None where it cannot be compiled."""
        x = layout.dense(x)
        found = self._run(_value_and_gradient, x, values, options, g)
        return None if found is None else found[0].as_strided(x.shape, x.stride())

    def warn(self) -> None:
        """Say once that the formula runs as it is."""
        if not self._warned:
            self._warned = True
            text = f"{self.name}: the formula runs as it is, in more passes over memory, because {self._reason}"
            warnings.warn(text, stacklevel=5)

    def _run(
        self, make: Callable[..., Callable[..., Any]], x: Tensor, values: Sequence[Any], options: Options, g: Any
    ) -> Any:
        if not COMPILES:
            return None
        reduction, result, weight, mask, divisor = options
        if reduction == "mean" and divisor is None and mask is None:
            divisor = x.numel()
        arguments, kinds = _normalised(x, (weight, mask, divisor, g, *values))
        key = (make, reduction, result, x.device, *kinds)
        try:
            if key not in self._programs:
                made = make(self.element, reduction, result, self.closed_form)
                self._programs[key] = _compiled(made, self.name)
            program = self._programs[key]
            if program is None:
                return None
            with torch.no_grad(), no_autocast(x), _no_hooks():
                return program(*arguments)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            # The compiler's are of many kinds, and the formula's own come again where it runs as it is.
            self._programs[key] = None
            self._reason = f"torch.compile refused it ({_told(error)})"
            return None


@contextmanager
def _no_hooks() -> Iterator[None]:
    """Without hooks on saved tensors, such as those of a checkpoint: nothing is saved here, and torch.func refuses to run."""
    hooks = []
    while (top := torch._C._autograd._top_saved_tensors_default_hooks(False)) is not None:
        hooks.append(top)
        torch._C._autograd._pop_saved_tensors_default_hooks()
    try:
        yield
    finally:
        for pack, unpack in reversed(hooks):
            torch._C._autograd._push_saved_tensors_default_hooks(pack, unpack)


def _told(error: Exception) -> str:
    """The first lines of what a compiler says."""
    return " ".join([f"{type(error).__name__}:", *str(error).split()])[:400]


def _normalised(x: Tensor, values: Sequence[Any]) -> tuple[list[Any], list[Any]]:
    """The arguments of a program, and what the compiler would compile anew for.

    Tensors go as .data, which is no view, because Dynamo compiles for the shape of a view's base too. It would also compile for
    two arguments that are one object, so each number is a tensor of its own.
    """
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    wide = [value for value in values if isinstance(value, Tensor) and value.dim()]
    if x.is_contiguous() and all(each.shape == x.shape and each.is_contiguous() for each in wide):
        supply = iter([each.view(-1) for each in (x, *wide)])
    else:
        supply = iter(_merged(x, wide))
    first = next(supply).data
    arguments: list[Any] = [first]
    kinds: list[Any] = [x.dtype, first.dim()]
    for value in values:
        if value is None or isinstance(value, (bool, str)):
            kinds.append((type(value), value))
        elif not isinstance(value, Tensor):
            value = cached_constant(round_to(float(value), dtype), dtype).data
            kinds.append((dtype, "cpu"))
        elif value.dim():
            value = next(supply).data
            kinds.append((value.dtype, *[n != 1 for n in value.shape]))
        else:
            value = value.data
            kinds.append((value.dtype, value.device.type))
        arguments.append(value)
    return arguments, kinds


def _merged(x: Tensor, others: Sequence[Tensor]) -> Iterator[Tensor]:
    """Tensors in the memory order of the first, with as few dimensions as show how they broadcast."""
    order, shape, own = layout.merged(tuple(x.shape), x.stride(), tuple([tuple(each.shape) for each in others]))
    yield x.permute(order).reshape(shape)
    for each, sizes in zip(others, own):
        each = each.reshape((1,) * (x.dim() - each.dim()) + tuple(each.shape))
        yield each.permute(order).reshape(sizes).contiguous()


# --------------------------------------------------------------------------------------------------------------- autograd


class _Recorded(torch.autograd.Function):
    """A loss that was computed, with its gradient or slope if that was computed too."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        engine: Engine,
        values: Sequence[Any],
        options: Options,
        outcome: tuple[Tensor, Tensor | None],
    ) -> Tensor:
        value, ahead = outcome
        ctx.engine, ctx.reduction, ctx.result = engine, options.reduction, options.result
        given = (options.weight, options.mask, options.divisor, *values)
        ctx.given = [None if isinstance(each, Tensor) else each for each in given]
        ctx.places = [i for i, each in enumerate(given) if isinstance(each, Tensor)]
        ctx.spent = ahead is None
        ctx.save_for_backward(x, ahead, *[given[i] for i in ctx.places])
        return value

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
        """The first backward takes the gradient that forward made; a later one, or one that is recorded, runs the formula."""
        x, ahead, *tensors = ctx.saved_tensors
        given = list(ctx.given)
        for i, tensor in zip(ctx.places, tensors):
            given[i] = tensor
        weight, mask, divisor, *values = given
        options = Options(ctx.reduction, ctx.result, weight, mask, divisor)
        return _gradient(ctx, x, ahead, values, options, g), None, None, None, None


def _gradient(ctx: Any, x: Tensor, ahead: Tensor | None, values: Sequence[Any], options: Options, g: Tensor) -> Tensor:
    engine: Engine = ctx.engine
    if not torch.is_grad_enabled() and backend.is_ordinary(g):
        if options.reduction == "none":
            assert ahead is not None
            gradient = (ahead * g).to(x.dtype)
            return gradient if options.mask is None else gradient.where(options.mask, 0.0)
        if ahead is None:
            found = engine.backward(x, values, options, g)
            if found is not None:
                return found
        elif not ctx.spent:
            ctx.spent = True
            return eager.rescaled(ahead, g)
    return plain_gradient(engine.element, x, values, options, g)


def run(engine: Engine, x: Tensor, values: Sequence[Any], options: Options) -> Tensor:
    """The loss: from one compiled pass where tensors are ordinary and the compiler takes the formula, else in plain torch."""
    ordinary = backend.is_ordinary(x, options.weight, options.mask, options.divisor, *values)
    if not ordinary or not x.numel() or x.device.type == "meta":
        return plain(engine.element, x, values, options)
    records = x.requires_grad and torch.is_grad_enabled()
    ahead = records and (options.reduction == "none" or x.dtype != torch.float16)  # in float16 it might underflow
    outcome = engine.value_and_gradient(x, values, options, gradient=ahead)
    if outcome is None:
        loss = plain(engine.element, x, values, options)
        engine.warn()
        return loss
    if not records:
        return outcome[0]
    return _Recorded.apply(x, engine, values, options, outcome)  # type: ignore[no-any-return, no-untyped-call]


# ------------------------------------------------------------------------------------------------------------- fused_loss


class _Formula:
    """A decorated formula: its parameters, and its engine."""

    def __init__(self, formula: Callable[..., Tensor]) -> None:
        if not callable(formula):
            raise TypeError(f"fused_loss: formula must be a function, got {describe(formula)}")
        self.name = getattr(formula, "__name__", type(formula).__name__)
        parameters = inspect.signature(formula).parameters
        for name, parameter in parameters.items():
            if name in KEYWORDS:
                raise TypeError(
                    f"fused_loss: {self.name} has a parameter {name!r}, which every fused loss has: rename it "
                    f"({', '.join(KEYWORDS)} are taken)"
                )
            if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
                raise TypeError(f"fused_loss: {self.name} has a parameter {parameter}, expected parameters with names")
        self.positional = [name for name, each in parameters.items() if each.kind != each.KEYWORD_ONLY]
        self.by_keyword = [name for name, each in parameters.items() if each.kind == each.KEYWORD_ONLY]
        self.names = [*self.positional, *self.by_keyword]
        if not self.positional:
            raise TypeError(f"fused_loss: {self.name} has no positional parameter, expected at least the input")
        self.defaults = {name: each.default for name, each in parameters.items() if each.default is not each.empty}
        self.why = (
            f"only {self.positional[0]} gets a gradient, and {{name}}.detach() would drop its own; "
            f"{self.name}.__wrapped__ is the formula without fused_loss, which autograd differentiates"
        )
        count = len(self.positional) - 1

        def element(x: Tensor, *values: Any) -> Tensor:
            return formula(x, *values[:count], **dict(zip(self.by_keyword, values[count:])))

        self.engine = Engine(self.name, element)

    def bound(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
        """The arguments in the order of the parameters. Dynamo traces this."""
        if len(args) > len(self.positional):
            raise TypeError(f"{self.name}() takes {len(self.positional)} positional arguments, got {len(args)}")
        given = dict(zip(self.positional, args))
        for name, value in kwargs.items():
            if name not in self.names:
                raise TypeError(f"{self.name}() got an unexpected keyword argument {name!r}")
            if name in given:
                raise TypeError(f"{self.name}() got several values for argument {name!r}")
            given[name] = value
        for name in self.names:
            if name not in given and name not in self.defaults:
                raise TypeError(f"{self.name}() is missing the argument {name!r}")
        return [given[name] if name in given else self.defaults[name] for name in self.names]

    def __call__(
        self, args: Sequence[Any], kwargs: Mapping[str, Any], weight: Any, mask: Any, divisor: Any, reduction: str
    ) -> Tensor:
        x, *values = self.bound(args, kwargs)
        checks.check_input(self.name, x, FLOATING, jagged=False, name=self.positional[0])
        for name, value in zip(self.names[1:], values):
            if not (value is None or isinstance(value, (bool, str))):
                checks.check_operand(self.name, name, value, x, why=self.why)
        checks.check_reduction(self.name, reduction)
        if weight is not None:
            checks.check_operand(self.name, "weight", weight, x, why=self.why)
        if mask is not None:
            checks.check_mask(self.name, mask, x)
        if divisor is not None:
            checks.check_divisor(self.name, divisor, x, reduction)
        options = Options(reduction, checks.result_dtype(x), weight, mask, divisor)
        return run(self.engine, x, values, options)


def fused_loss(formula: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Make a loss of an elementwise formula: its value and its gradient come from one compiled pass.

    The formula takes the input first and gives the loss of each element, in plain torch. The loss is called like the formula,
    with four keywords more: ``loss(input, *others, weight=None, mask=None, divisor=None, reduction="mean")``. It is
    ``(weight * formula(input, *others)).sum() / divisor``, over the elements where `mask` is True. The first call of a kind
    compiles, which takes seconds; new numbers and new sizes do not compile again.

    Args:
        formula: a function whose result has the shape of its first argument. 16-bit tensors reach it as float32, tensors with
            dimensions in the shape of the first argument, numbers as 0-dim tensors; bool, str and None stay what they are. Its
            parameters have names, but not weight, mask, divisor or reduction.

    Shape:
        The loss is 0-dim, or with reduction "none" has the shape of its first argument; its dtype is that of the first argument,
        float32 under autocast. The other arguments, `weight` and `mask` are numbers or tensors that broadcast to that shape.

    Raises:
        TypeError: for a formula whose parameters cannot be those of a loss. The loss raises it for a first argument that is not a
            tensor of float16, bfloat16, float32 or float64, other arguments that are neither numbers nor tensors nor bool, str
            or None, and a mask that is not bool.
        ValueError: from the loss, for an argument that does not broadcast, an argument but the first that requires grad, a
            divisor that is not above 0 or goes with another reduction than "mean", and a formula that changes the shape.

    Equivalent to:
        ``torch.where(mask, formula(input, *others) * weight, 0).sum() / mask.sum()``

    Source:
        `torch.compile` of `torch.func.grad_and_value`, which Inductor writes as one loop.

    Examples:
        >>> @fused_loss
        ... def icepop(ratio, advantage, low=0.5, high=5.0):
        ...     return torch.where((ratio > low) & (ratio < high), -ratio * advantage, 0)
        >>> ratio = torch.tensor([1.0, 2.0, 9.0, 1.0], requires_grad=True)
        >>> loss = icepop(ratio, torch.tensor([2.0, 3.0, 4.0, torch.nan]), mask=torch.tensor([True, True, True, False]))
        >>> loss.detach()
        tensor(-2.6667)
        >>> loss.backward()
        >>> ratio.grad[:2]
        tensor([-0.6667, -1.0000])
    """
    made = _Formula(formula)

    @functools.wraps(formula)
    def loss(
        *args: Any,
        weight: Operand | None = None,
        mask: Tensor | None = None,
        divisor: Operand | None = None,
        reduction: checks.Reduction = "mean",
        **kwargs: Any,
    ) -> Tensor:
        return made(args, kwargs, weight, mask, divisor, reduction)

    own = [each for each in inspect.signature(loss, follow_wrapped=False).parameters.values() if each.name in KEYWORDS]
    signature = inspect.signature(formula)
    loss.__signature__ = signature.replace(parameters=[*signature.parameters.values(), *own])  # type: ignore[attr-defined]
    return loss
