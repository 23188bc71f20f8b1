"""Losses: from the public call to the kernels of kernels/loss.py, and back for backward."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling, is_dynamo_compiling, is_exporting

from . import backend, cells, checks, eager, layout, tuning
from .bases import BASES, Base, BCEWithLogits
from .cells import Numbers, Spec, formula
from .checks import FLOATING, Operand, compute_dtype, round_to
from .fused import Fused, define, parted, restored
from .launch import SHORT, Kernel, blocks, device_code, pack_all, triton_dtype
from .rules import RULES, Rule, Unweighted
from .tuning import Choice, Config

ONE_GRADIENT = (
    "only input and target get a gradient, and {name}.detach() would drop its own; take reduction='none' and multiply, in torch, "
    "by what depends on {name}"
)
RESCALE_PROGRAMS = 1024
FINISH_BLOCK = 1024
NAMED_BASES: Mapping[str, type[Base]] = MappingProxyType(
    {name: base for base in BASES for name in [base.snake_name()] if name in ("bce", "bce_with_logits", "mse")}
)


# ------------------------------------------------------------------------------------------------------------- the call


def run(
    op: str,
    input: Tensor,
    target: Tensor,
    base: Base | str,
    rule: Rule | None,
    *,
    weight: Operand | None = None,
    pos_weight: Operand | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Check the arguments, choose the way, go."""
    spec, operands, way = _specified(op, input, target, base, rule, weight, pos_weight, reduction)
    target_learns = target.requires_grad and torch.is_grad_enabled()
    if way == "formula" or target_learns or (not input.numel() and way != "op"):
        return formula(spec, input, target, operands)
    if way == "op":
        return _traced(spec, input, target, operands)
    if input.requires_grad and torch.is_grad_enabled():
        return LOSS.record(input, target, operands, spec, way)  # type: ignore[no-any-return]
    return _engine_forward(way, spec, input, target, operands, False)[0]


def _specified(
    op: str,
    input: Tensor,
    target: Tensor,
    base: Base | str,
    rule: Rule | None,
    weight: Operand | None,
    pos_weight: Operand | None,
    reduction: str,
) -> tuple[Spec, Sequence[Operand], backend.Way]:
    """The loss to compute, its operands, and the way it goes; an error names what cannot be."""
    checks.check_input(op, input, FLOATING, jagged=False)
    checks.check_target(op, input, target)
    checks.check_reduction(op, reduction)
    loss, weighing = _parts(op, base, rule, pos_weight)
    result = result_dtype(input)
    operands: Sequence[Operand]
    if weight is None and not is_dynamo_compiling() and _are_numbers(loss, weighing):
        spec, operands = cells.specify_numbers(loss, weighing, reduction, input.dtype, result)
        return spec, operands, backend.way(input, target)
    _check(op, input, loss, weighing, weight)
    loss, weighing = _closed(loss, input), _closed(weighing, input)
    weight = None if weight is None else _wide(weight, input)
    spec, operands = cells.specify(loss, weighing, weight, reduction, result)
    compute = compute_dtype(input.dtype)
    operands = tuple([v if isinstance(v, Tensor) else round_to(float(v), compute) for v in operands])
    return spec, operands, backend.way(input, target, *operands)


def _wide(value: Operand, input: Tensor) -> Operand:
    """A number that a compiler leaves open as a 0-dim tensor, which is as exact as the number."""
    return value if isinstance(value, Tensor) else checks.held(value, torch.float64, input.device)


def _closed(part: Any, input: Tensor) -> Any:
    """A base or a rule of which a compiler leaves no number open."""
    changed = {name: _wide(value, input) for name, value in part.operands().items()} if is_compiling() else {}
    return replace(part, **changed) if changed else part


def _are_numbers(*parts: Base | Rule) -> bool:
    """True if every setting is a number that float64 holds; one that is optional may be missing."""
    given = [(part, name, value) for part in parts for name, value in vars(part).items()]
    values = [value for part, name, value in given if value is not None or name not in part.optional_fields]
    return all(type(value) is float or (type(value) is int and value.bit_length() < 64) for value in values)


def _parts(op: str, base: Base | str, rule: Rule | None, pos_weight: Operand | None) -> tuple[Base, Rule]:
    if isinstance(base, str):
        if base not in NAMED_BASES:
            raise ValueError(f"{op}: base must be {_accepted_bases()}, got {base!r}")
        if pos_weight is not None and base != "bce_with_logits":
            raise ValueError(f"{op}: pos_weight goes with base 'bce_with_logits', got base {base!r}")
        base = BCEWithLogits(pos_weight) if base == "bce_with_logits" else NAMED_BASES[base]()
    elif type(base) not in BASES:
        raise ValueError(f"{op}: base must be {_accepted_bases()}, got {base!r}")
    elif pos_weight is not None:
        raise ValueError(
            f"{op}: pos_weight goes with the string 'bce_with_logits'; with an instance, pass BCEWithLogits(pos_weight=...)"
        )
    if rule is None:
        rule = Unweighted()
    elif type(rule) not in RULES and type(rule) is not Unweighted:
        accepted = ", ".join(kind.__name__ for kind in RULES)
        raise TypeError(f"{op}: rule must be None or one of {accepted}, got {checks.describe(rule)}")
    return base, rule


def _accepted_bases() -> str:
    return f"one of {', '.join(map(repr, NAMED_BASES))}, or an instance of {', '.join(kind.__name__ for kind in BASES)}"


def _check(op: str, input: Tensor, base: Base, rule: Rule, weight: Operand | None) -> None:
    given = {} if weight is None else {"weight": weight}
    for name, value in (*base.operands().items(), *rule.operands().items(), *given.items()):
        checks.check_operand(op, name, value, input, why=ONE_GRADIENT)


# asked here, since torch.compile of torch 2.11 cannot ask
AUTOCAST = tuple(
    kind for kind in ("cpu", "cuda", "xpu", "mps", "mtia", "hpu", "xla") if torch.amp.is_autocast_available(kind)
)


def result_dtype(input: Tensor) -> torch.dtype:
    """A loss has the input's dtype; float32 under autocast."""
    if input.dtype.itemsize > 2:
        return input.dtype
    kind = input.device.type
    wide = kind in AUTOCAST and torch.is_autocast_enabled(kind)
    return torch.float32 if wide else input.dtype


def is_fused(reduction: str, dtype: torch.dtype) -> bool:
    """True if forward computes the gradient, for an upstream gradient of 1. In float16 it might underflow."""
    return reduction != "none" and dtype != torch.float16


# --------------------------------------------------------------------------------------------------------------- Triton


@functools.cache
def _kernel(
    function: str, spec: Spec, kinds: tuple[int, ...], compute: torch.dtype, config: Config, single: bool | None = None
) -> Kernel:
    """The kernel "forward" (which also takes SINGLE) or "backward" for a cell of the grid."""
    pointwise, (base_static, rule_static) = device_code("pointwise"), spec.static
    return Kernel(
        getattr(device_code("loss"), function),
        num_warps=config.num_warps,
        KINDS=kinds,
        BASE=getattr(pointwise, spec.base.snake_name()),
        BASE_COUNT=len(spec.base_fields),
        BASE_STATIC=base_static,
        RULE=getattr(pointwise, spec.rule.snake_name()),
        RULE_COUNT=len(spec.rule_fields),
        RULE_STATIC=rule_static,
        COMPUTE=triton_dtype(compute),
        REDUCTION=spec.reduction,
        **({} if single is None else {"SINGLE": single}),
        BLOCK=config.block,
    )


@functools.cache
def _finish_kernel(reduction: str) -> Kernel:
    return Kernel(device_code("loss").finish, num_warps=4, REDUCTION=reduction, BLOCK=FINISH_BLOCK)


@functools.cache
def _rescale_kernel(dtype: torch.dtype, device: torch.device) -> tuple[Kernel, int]:
    """The kernel, and how many elements a program takes."""
    config, compute = tuning.default("loss", dtype.itemsize, tuning.lanes(device)), triton_dtype(compute_dtype(dtype))
    kernel = Kernel(device_code("loss").rescale, num_warps=config.num_warps, COMPUTE=compute, BLOCK=config.block)
    return kernel, config.block


def _prepared(input: Tensor, target: Tensor, operands: Sequence[Operand]) -> tuple[Any, ...]:
    """Input and target as they lie alike, the operands with their kinds, and the type they are computed in."""
    if input.is_contiguous() and target.is_contiguous():
        x, y = input, target
    else:
        x = layout.dense(input)
        y = layout.laid_out_as(target, x.shape, x.stride())
    if type(operands) is Numbers and input.dtype in SHORT:
        return x, y, *operands.packed, torch.float32
    compute = compute_dtype(input.dtype)
    return x, y, *pack_all(operands, x, (compute,) * len(operands)), compute


def choose(spec: Spec, x: Tensor, launch: tuning.Launch | None = None) -> Choice:
    """The block size of a call."""
    return tuning.choose("loss", spec.key, x.dtype, x.numel(), x.device, launch, searches=spec.reduction == "none")


def loss_forward(
    spec: Spec, input: Tensor, target: Tensor, operands: Sequence[Operand], want_gradient: bool
) -> tuple[Tensor, Tensor | None]:
    """The loss, and for a reduction the gradient for an upstream gradient of 1, from one read of input and target."""
    x, y, packed, kinds, compute = _prepared(input, target, operands)
    n, device = x.numel(), x.device
    if spec.reduction == "none":
        out = torch.empty_like(x, dtype=spec.result)

        def launch(config: Config) -> None:
            kernel = _kernel("forward", spec, kinds, compute, config, False)
            kernel(blocks(n, config.block), x, y, None, out, n, packed)

        launch(choose(spec, x, launch).config)
        return out, None
    dx = torch.empty_like(x) if want_gradient else None
    config = choose(spec, x).config
    programs = blocks(n, config.block)
    out = torch.empty_strided((), (), dtype=spec.result, device=device)  # takes 0.6 of the time of torch.empty(())
    partials = out if programs == 1 else torch.empty(programs, dtype=compute, device=device)
    _kernel("forward", spec, kinds, compute, config, programs == 1)(programs, x, y, dx, partials, n, packed)
    if programs > 1:
        _finish_kernel(spec.reduction)(1, partials, out, n, programs)
    return out, dx


def loss_backward(spec: Spec, input: Tensor, target: Tensor, operands: Sequence[Operand], gradient: Tensor) -> Tensor:
    """d loss / dx times the upstream gradient, recomputed from the inputs."""
    x, y, packed, kinds, compute = _prepared(input, target, operands)
    if spec.reduction == "none":
        gradient = layout.laid_out_as(gradient, x.shape, x.stride())
    dx = torch.empty_like(x)
    config = tuning.default("loss", x.dtype.itemsize, tuning.lanes(x.device))
    if backend.interpreting():
        config = choose(spec, x).config
    _kernel("backward", spec, kinds, compute, config)(
        blocks(x.numel(), config.block), x, y, gradient, dx, x.numel(), packed
    )
    return dx


def loss_rescale(dx: Tensor, gradient: Tensor) -> None:
    """dx *= gradient, in place; moves nothing if the gradient is 1."""
    kernel, block = _rescale_kernel(dx.dtype, dx.device)
    kernel(min(blocks(dx.numel(), block), RESCALE_PROGRAMS), gradient, dx, dx.numel())


# ---------------------------------------------------------------------------------------------- autograd, eager and traced


def _engine_forward(
    way: str, spec: Spec, input: Tensor, target: Tensor, operands: Sequence[Operand], want_gradient: bool
) -> tuple[Tensor, Tensor | None]:
    if way == "triton":
        return loss_forward(spec, input, target, operands, want_gradient)
    return eager.loss_forward(spec, input, target, operands, want_gradient)


def _forward(
    input: Tensor, target: Tensor, operands: Sequence[Operand], spec: Spec, way: str, records: bool = True
) -> tuple[Tensor, Tensor | None]:
    fused = records and is_fused(spec.reduction, input.dtype)
    if input.numel():
        return _engine_forward(way, spec, input, target, operands, fused)
    empty = torch.empty_like(input) if fused else None
    return formula(spec, input, target, operands), empty


def _setup(ctx: Any, arguments: tuple[Any, ...], outputs: tuple[Any, ...]) -> None:
    input, target, operands, ctx.spec, ctx.way, *records = arguments
    gradient = outputs[1]
    if ctx.traced:
        ctx.mark_non_differentiable(gradient)
        if not (records[0] and is_fused(ctx.spec.reduction, input.dtype)):
            gradient = None
    ctx.fused = gradient is not None
    ctx.numbers, tensors = parted(operands)
    ctx.save_for_backward(input, target, gradient, *tensors)


def _backward(ctx: Any, g: Tensor) -> tuple[Tensor]:
    """The first backward takes the gradient that forward made; later ones recompute from the saved inputs.

    The buffer belongs to this node alone, so an eager backward scales it in place and hands it on. A traced one multiplies it
    into a new tensor, which compilers fuse into its consumer.
    """
    input, target, ahead, *tensors = ctx.saved_tensors
    operands = restored(ctx.numbers, tensors) if tensors else ctx.numbers
    spec: Spec = ctx.spec
    last = not (torch.is_grad_enabled() or is_exporting())
    if not (last and (backend.is_ordinary(g) or backend.is_one_op(g))):
        return (cells.differentiable_gradient(spec, input, target, operands, g),)
    if ctx.traced:
        if ctx.fused:
            dtype = compute_dtype(input.dtype)
            return ((ahead.to(dtype) * g.to(dtype)).to(input.dtype),)
        return (_backward_op(g, input, target, *_encoded(operands), spec.text),)
    if ctx.fused:
        ctx.fused = False
        # .data has a version counter of its own: neither the rescale nor what callers do to .grad spoils saved_tensors
        dx = ahead.data
        (loss_rescale if ctx.way == "triton" else eager.loss_rescale)(dx, g)
        return (dx,)
    if ctx.way == "triton":
        return (loss_backward(spec, input, target, operands, g),)
    return (eager.loss_backward(spec, input, target, operands, g),)


# An operand of a traced loss is an entry of `tensors`, or where that is None of `numbers`.
_TRACED = "Tensor?[] tensors, float[] numbers, str spec"


def _encoded(operands: Sequence[Operand]) -> tuple[list[Tensor | None], list[float]]:
    tensors = [v if isinstance(v, Tensor) else None for v in operands]
    return tensors, [math.nan if isinstance(v, Tensor) else torch.sym_float(v) for v in operands]


def _operands(input: Tensor, tensors: Sequence[Tensor | None], numbers: Sequence[float]) -> tuple[Operand, ...]:
    dtype = compute_dtype(input.dtype)
    if all(tensor is None for tensor in tensors):
        return Numbers([round_to(number, dtype) for number in numbers])
    return tuple([round_to(number, dtype) if tensor is None else tensor for tensor, number in zip(tensors, numbers)])


def _traced(spec: Spec, input: Tensor, target: Tensor, operands: Sequence[Operand]) -> Tensor:
    """The loss as one op, its gradient computed in the forward pass."""
    records = input.requires_grad and torch.is_grad_enabled()
    output: Tensor = LOSS.op(input, target, *_encoded(operands), spec.text, spec.result, records)[0]
    return output


def _decode(
    input: Tensor, target: Tensor, tensors: Any, numbers: Any, text: str, result: torch.dtype, records: bool
) -> tuple[Any, ...]:
    return input, target, _operands(input, tensors, numbers), cells.from_text(text, result), "triton", records


def _fake(
    input: Tensor, target: Tensor, tensors: Any, numbers: Any, text: str, result: torch.dtype, records: bool
) -> tuple[Tensor, Tensor]:
    reduction = cells.from_text(text, result).reduction
    output = torch.empty_like(input, dtype=result) if reduction == "none" else input.new_empty((), dtype=result)
    fused = records and is_fused(reduction, input.dtype)
    return output, torch.empty_like(input) if fused else input.new_empty(0)


def _formula(
    input: Tensor, target: Tensor, tensors: Any, numbers: Any, text: str, result: torch.dtype, records: bool
) -> tuple[Tensor, Tensor]:
    loss = formula(cells.from_text(text, result), input, target, _operands(input, tensors, numbers))
    return loss, _fake(input, target, tensors, numbers, text, result, records)[1]


LOSS = Fused(
    "loss",
    f"(Tensor input, Tensor target, {_TRACED}, ScalarType dtype, bool records) -> (Tensor loss, Tensor gradient)",
    forward=_forward,
    fake=_fake,
    setup=_setup,
    backward=_backward,
    decode=_decode,
    formula=_formula,
    outputs=2,
)


def _backward_kernel(g: Tensor, input: Tensor, target: Tensor, tensors: Any, numbers: Any, text: str) -> Tensor:
    if not input.numel():
        return torch.empty_like(input)
    return loss_backward(cells.from_text(text, input.dtype), input, target, _operands(input, tensors, numbers), g)


def _backward_fake(g: Tensor, input: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(input)


_backward_op = define(
    "loss_backward",
    f"(Tensor gradient, Tensor input, Tensor target, {_TRACED}) -> Tensor",
    _backward_kernel,
    _backward_fake,
    of_backward=True,
)


# ----------------------------------------------------------------------------------------------------------------- plan


def plan(
    op: str,
    input: Tensor,
    target: Tensor,
    base: Base | str,
    rule: Rule | None,
    *,
    weight: Operand | None = None,
    pos_weight: Operand | None = None,
    reduction: str = "mean",
) -> backend.Plan:
    """A call as `run` would make it: its checks, its way, its block size, and the bytes of its kernels."""
    spec, operands, way = _specified(op, input, target, base, rule, weight, pos_weight, reduction)
    given = [target, *(value for value in operands if isinstance(value, Tensor))]
    if target.requires_grad and torch.is_grad_enabled() and input.requires_grad:
        reason = "a target that requires grad gets it through the formula in plain torch"
        return backend.Plan("eager", reason, None, None, None, None, None, None)
    choice = choose(spec, input) if way in ("triton", "op") else None
    grad = input.requires_grad and torch.is_grad_enabled()
    return backend.planned(way, input.device, choice, reduction == "none", *_bytes(spec, input, given, grad))


def _bytes(spec: Spec, input: Tensor, others: Sequence[Tensor], grad: bool) -> tuple[int, int, int]:
    """Bytes that the kernels move forward, and backward for an upstream gradient of 1, and what is kept for backward."""
    once = input.numel() * input.element_size()
    inputs = once + layout.total_bytes(others)
    if spec.reduction == "none":
        forward, backward, saved = inputs + once, inputs + 2 * once, inputs
    elif is_fused(spec.reduction, input.dtype):
        forward, backward, saved = inputs + (once if grad else 0), 0, inputs + once
    else:
        forward, backward, saved = inputs, inputs + once, inputs
    return (forward, backward, saved) if grad else (forward, 0, 0)
