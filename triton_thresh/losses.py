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
from torch.compiler import is_compiling, is_dynamo_compiling

from . import backend, cells, checks, compiled, eager, layout, tuning
from .bases import BASES, Base, BCEWithLogits
from .cells import LossStats, Numbers, Spec, formula
from .checks import FLOATING, REAL, REDUCTIONS, Operand, compute_dtype, is_exporting, result_dtype, round_to
from .fused import Fused, define, parted, restored
from .launch import SHORT, Kernel, blocks, device_code, pack_all, triton_dtype
from .rules import RULES, ByRank, Rule, Unweighted
from .thresholds import kth_largest
from .tuning import Choice, Config

ONE_GRADIENT = (
    "only input and target get a gradient, and {name}.detach() would drop its own; take reduction='none' and multiply, in torch, "
    "by what depends on {name}"
)
PROGRAMS = 1024  # at most, of a launch whose programs stride over the elements
FINISH = Config(4096, 8)  # sums 16,384 partial sums in 6.7 µs on an H100, where (1024, 4) takes 11.7
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
    pos_weight: Operand | None = None,
    reduction: str = "mean",
    return_stats: bool = False,
    **options: Any,
) -> Any:
    """Check the arguments, choose the way, go. The options are weight, mask, ignore_index, divisor and label_smoothing."""
    given = _specified(op, input, target, base, rule, pos_weight, reduction, return_stats, options)
    loss, stats = _call(*given)
    return (loss, LossStats(*stats.unbind())) if return_stats else loss


def _call(
    spec: Spec, input: Tensor, target: Tensor, operands: Sequence[Operand], way: backend.Way
) -> tuple[Tensor, Tensor]:
    """The loss, and its statistics if the spec asks for them (else some tensor)."""
    target_learns = target.requires_grad and torch.is_grad_enabled()
    if way == "op" and not target_learns:
        return _traced(spec, input, target, operands)
    if way == "formula" or target_learns or not input.numel():
        loss = formula(spec, input, target, operands)
        return loss, cells.count_stats(spec, input, target, operands) if spec.stats else loss
    if input.requires_grad and torch.is_grad_enabled():
        found = LOSS.record(input, target, operands, spec, way)
        return found if spec.stats else (found, found)
    loss, stats, _ = _forward_on(way, spec, input, target, operands, False)
    return loss, loss if stats is None else stats


def _specified(
    op: str,
    input: Tensor,
    target: Tensor,
    base: Base | str,
    rule: Rule | None,
    pos_weight: Operand | None,
    reduction: str,
    stats: bool,
    options: dict[str, Any],
) -> tuple[Spec, Tensor, Tensor, Sequence[Operand], backend.Way]:
    """The loss to compute, its tensors and operands, and the way it goes; an error names what cannot be."""
    loss, weighing = checked_parts(op, base, rule, pos_weight)
    asked = given_options(options)
    operands: Sequence[Operand]
    plain = not asked and not stats and type(weighing) is not ByRank
    quick = plain and not is_dynamo_compiling() and _are_numbers(loss, weighing)
    if quick and _are_simple(input, target, reduction):
        way = backend.choose(input.device, compiles=True)[0]
        spec, operands = cells.specify_numbers(loss, weighing, reduction, input.dtype, result_dtype(input))
        return spec, input, target, operands, way
    checks.check_input(op, input, FLOATING, jagged=False)
    checks.check_target(op, input, target)
    checks.check_reduction(op, reduction)
    extra = checked_options(op, input, target, loss, reduction, asked)
    loss, weighing = checked_fields(op, loss, weighing, input, ONE_GRADIENT)
    if stats and not weighing.decides:
        extra["least_positive"] = _least_positive(op, loss, weighing)
    given = (*loss.operands().values(), *weighing.operands().values(), *extra.values())
    way = backend.way(input, target, *given, compiles=True)
    if isinstance(weighing, ByRank):
        extra["kept"] = _kept(way, input, target, loss, weighing, extra)
        weighing = Unweighted()
    if reduction == "mean" and "divisor" not in extra:
        if "kept" in extra:
            extra["divisor"] = extra["kept"].sum()  # type: ignore[union-attr]
        elif "mask" in extra or "ignore_index" in extra:
            extra["divisor"] = count_valid(way, input, target, extra)
    spec, operands = cells.specify(loss, weighing, extra, stats, reduction, result_dtype(input))
    return spec, input, target, cells.rounded(operands, input.dtype), way


def given_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options that change something. A number that a compiler leaves open may be any."""
    given = {name: value for name, value in options.items() if value is not None or name == "label_smoothing"}
    share = given.get("label_smoothing", 1)
    is_known = type(share) is int or not checks.is_open(share)
    if is_known and share == 0:
        del given["label_smoothing"]
    return given


def checked_options(
    op: str, input: Tensor, target: Tensor, base: Base, reduction: str, asked: dict[str, Any]
) -> dict[str, Operand]:
    """The options as operands."""
    extra: dict[str, Operand] = {}
    if "weight" in asked:
        extra["weight"] = _fixed_operand(
            checks.check_operand(op, "weight", asked["weight"], input, why=ONE_GRADIENT), input
        )
    if "mask" in asked:
        extra["mask"] = checks.check_mask(op, asked["mask"], input)
    if "ignore_index" in asked:
        extra["ignore_index"] = _ignored(op, asked["ignore_index"], target)
    if "divisor" in asked:
        extra["divisor"] = _fixed_operand(checks.check_divisor(op, asked["divisor"], input, reduction), input)
    if "label_smoothing" in asked:
        share = asked["label_smoothing"]
        if base.kind == "values":
            raise ValueError(f"{op}: label_smoothing goes with labels, but the targets of base {base!r} are values")
        share = checks.as_float(op, "label_smoothing", checks.check_number(op, "label_smoothing", share))
        if not checks.is_open(share) and not 0 <= share <= 1:
            raise ValueError(f"{op}: label_smoothing must be 0 to 1, got {share!r}")
        extra["label_smoothing"] = _fixed_operand(share, input)
    return extra


def _kept(
    way: backend.Way, input: Tensor, target: Tensor, base: Base, rule: ByRank, extra: Mapping[str, Operand]
) -> Tensor:
    """True where an element's loss is among the largest. Stored losses are compared, since one computed anew may differ."""
    options = {name: extra[name] for name in ("label_smoothing",) if name in extra}
    spec, operands = cells.specify(base, Unweighted(), options, False, "none", compute_dtype(input.dtype))
    x, y = input.detach(), target.detach()
    if way == "triton" and input.numel():
        losses = loss_forward(spec, x, y, cells.rounded(operands, input.dtype), False)[0]
    else:
        losses = cells.element_loss(spec, x, y, operands)
    valid = cells.valid_of(extra, y)
    count = torch.full((), input.numel(), dtype=torch.int64, device=input.device)
    if valid is not None:
        valid = valid.expand(input.shape)
        losses, count = torch.where(valid, losses, -math.inf), valid.sum()
    bound = kth_largest(losses, rule.count(count)) if input.numel() else losses.new_full((), math.nan)
    kept = (losses >= bound) | losses.isnan()
    return kept if valid is None else kept & valid


def _ignored(op: str, value: object, target: Tensor) -> Operand:
    """A target to ignore as the target's dtype holds it: a number that float32 holds, else a 0-dim tensor.

    A number that the dtype does not hold matches nothing. NaN stands for nothing, too, since no integer is NaN.
    """
    number = checks.check_number(op, "ignore_index", value)
    dtype = target.dtype
    if dtype.is_floating_point:
        number = round_to(checks.as_float(op, "ignore_index", number), dtype)
    elif number != number or number in (math.inf, -math.inf) or number != int(number) or not _holds(dtype, int(number)):
        number = math.nan
    if number != number or float(number) == number == round_to(float(number), torch.float32):
        return float(number)
    return torch.full((), number, dtype=dtype, device=target.device)


def _holds(dtype: torch.dtype, number: int) -> bool:
    if dtype is torch.bool:
        return number in (0, 1)
    return torch.iinfo(dtype).min <= number <= torch.iinfo(dtype).max


def _least_positive(op: str, base: Base, rule: Rule) -> Operand:
    least = rule.least_positive(base)
    if least is None:
        raise ValueError(
            f"{op}: return_stats on base {base!r} needs a rule that says which values are positive, ByPrediction or ByOutcome"
        )
    return least


def _fixed_operand(value: Operand, input: Tensor) -> Operand:
    """The operand, or a 0-dim tensor for a number that a compiler leaves open. It is as exact as the number."""
    return value if isinstance(value, Tensor) else checks.held(value, torch.float64, input.device)


def checked_fields(op: str, base: Base, rule: Rule, input: Tensor, why: str) -> tuple[Base, Rule]:
    """Base and rule after the checks of their operands, with no number that a compiler leaves open."""
    for name, value in (*base.operands().items(), *rule.operands().items()):
        checks.check_operand(op, name, value, input, why=why)
    return _fixed_fields(base, input), _fixed_fields(rule, input)


def _fixed_fields(part: Any, input: Tensor) -> Any:
    """A base or a rule with 0-dim tensors for the numbers that a compiler leaves open."""
    changed = {name: _fixed_operand(value, input) for name, value in part.operands().items()} if is_compiling() else {}
    return replace(part, **changed) if changed else part


def _are_simple(input: Tensor, target: Tensor, reduction: str) -> bool:
    """True if kernels may have these, and nothing is left to check."""
    return (
        backend.is_ordinary(input, target)
        and isinstance(input, Tensor)
        and isinstance(target, Tensor)
        and input.dtype in FLOATING
        and target.dtype in REAL
        and input.layout is target.layout is torch.strided
        and input.shape == target.shape
        and input.device == target.device
        and reduction in REDUCTIONS
    )


def _are_numbers(*parts: Base | Rule) -> bool:
    """True if every setting is a number that float64 holds; one that is optional may be missing."""
    for part in parts:
        for name, value in vars(part).items():
            if type(value) is float or (type(value) is int and value.bit_length() < 64) or name in part.static_fields:
                continue
            if value is not None or name not in part.optional_fields:
                return False
    return True


def checked_parts(op: str, base: Base | str, rule: Rule | None, pos_weight: Operand | None) -> tuple[Base, Rule]:
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
    elif type(rule) not in RULES and type(rule) not in (ByRank, Unweighted):
        accepted = ", ".join(kind.__name__ for kind in (*RULES, ByRank))
        raise TypeError(f"{op}: rule must be None or one of {accepted}, got {checks.describe(rule)}")
    if base.kind not in rule.kinds:
        raise ValueError(
            f"{op}: rule {type(rule).__name__} goes with bases of {' and '.join(rule.kinds)}, got base {base!r}"
        )
    return base, rule


def _accepted_bases() -> str:
    return f"one of {', '.join(map(repr, NAMED_BASES))}, or an instance of {', '.join(kind.__name__ for kind in BASES)}"


def is_fused(reduction: str, dtype: torch.dtype) -> bool:
    """True if forward computes the gradient, for an upstream gradient of 1. In float16 it might underflow."""
    return reduction != "none" and dtype != torch.float16


# --------------------------------------------------------------------------------------------------------------- Triton


@functools.cache
def _kernel(
    function: str,
    spec: Spec,
    target: torch.dtype,
    kinds: tuple[int, ...],
    compute: torch.dtype,
    config: Config,
    dtype: torch.dtype,
    device: torch.device,
    single: bool | None = None,
) -> Kernel:
    """The kernel "forward" (which also takes SINGLE) or "backward" for a cell of the grid."""
    return Kernel(
        getattr(device_code("loss"), function),
        num_warps=config.num_warps,
        KINDS=kinds,
        **constants(spec, target),
        **({} if single is None else counted_by(spec)),
        COMPUTE=triton_dtype(compute),
        REDUCTION=spec.reduction,
        **({} if single is None else {"SINGLE": single}),
        TILE=tuning.tile(config, dtype.itemsize, tuning.lanes(device)),
        BLOCK=config.block,
    )


def constants(spec: Spec, target: torch.dtype) -> dict[str, Any]:
    """The constants of kernels in kernels/loss.py, besides dtypes. Integer targets are 0 or 1 unless they are smoothed."""
    pointwise, (base_static, rule_static) = device_code("pointwise"), spec.static
    count, first = len(spec.base_fields), len(spec.base_fields) + len(spec.rule_fields)
    at = {name: first + i for i, name in enumerate(spec.options)}
    return dict(
        BASE=getattr(pointwise, spec.base.snake_name()),
        BASE_COUNT=count,
        BASE_STATIC=(not target.is_floating_point and "label_smoothing" not in spec.options, *base_static),
        RULE=getattr(pointwise, spec.rule.snake_name()),
        RULE_COUNT=len(spec.rule_fields),
        RULE_STATIC=rule_static,
        UNIT=spec.base.unit_targets,
        WEIGHT=at.get("weight"),
        SMOOTHING=at.get("label_smoothing"),
        DIVISOR=at.get("divisor"),
        MASK=at.get("mask"),
        KEPT=at.get("kept"),
        IGNORE=at.get("ignore_index"),
    )


def counted_by(spec: Spec) -> dict[str, int | None]:
    """The places of the thresholds by which the forward kernel counts predictions and targets."""
    count, fields = len(spec.base_fields), spec.rule_fields
    least = None
    if spec.stats:
        least = count if spec.rule.decides else count + len(fields) + spec.options.index("least_positive")
    return dict(LEAST=least, LABEL=count + fields.index("target_threshold") if "target_threshold" in fields else None)


@functools.cache
def _finish_kernel(reduction: str, kinds: tuple[int, ...]) -> Kernel:
    return Kernel(
        device_code("loss").finish, num_warps=FINISH.num_warps, KINDS=kinds, REDUCTION=reduction, BLOCK=FINISH.block
    )


@functools.cache
def _count_kernel(kinds: tuple[int, ...], mask: int | None, ignore: int | None, config: Config) -> Kernel:
    return Kernel(
        device_code("loss").count, num_warps=config.num_warps, KINDS=kinds, MASK=mask, IGNORE=ignore, BLOCK=config.block
    )


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


def count_valid(way: str, input: Tensor, target: Tensor, options: Mapping[str, Operand]) -> Tensor:
    """How many elements count, as a 0-dim int64 tensor on the device."""
    if way != "triton" or not input.numel():
        valid = cells.valid_of(options, target)
        assert valid is not None
        return valid.expand(input.shape).sum()
    names = [name for name in ("mask", "ignore_index") if name in options]
    x = layout.dense(input)
    y = layout.laid_out_as(target, x.shape, x.stride()) if "ignore_index" in options else x
    packed, kinds = pack_all([options[name] for name in names], x, (torch.float32,) * len(names))
    config = tuning.default("loss", y.dtype.itemsize, tuning.lanes(x.device))
    out = torch.empty((), dtype=torch.int64, device=x.device).zero_()
    at = [names.index(name) if name in names else None for name in ("mask", "ignore_index")]
    programs = min(blocks(x.numel(), config.block), PROGRAMS)
    _count_kernel(kinds, *at, config)(programs, y, out, x.numel(), packed)
    return out


def loss_forward(
    spec: Spec, input: Tensor, target: Tensor, operands: Sequence[Operand], want_gradient: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The loss, its counts, and for a reduction the gradient for an upstream gradient of 1, from one read of input and target."""
    x, y, packed, kinds, compute = _prepared(input, target, operands)
    n, device = x.numel(), x.device
    if spec.reduction == "none" and not spec.stats:
        out = torch.empty_like(x, dtype=spec.result)

        def launch(config: Config) -> None:
            kernel = _kernel("forward", spec, y.dtype, kinds, compute, config, x.dtype, x.device, False)
            kernel(blocks(n, config.block), x, y, None, out, None, n, packed)

        launch(choose(spec, x, launch).config)
        return out, None, None
    reduced = spec.reduction != "none"
    dx = torch.empty_like(x) if want_gradient and reduced else None
    config = choose(spec, x).config
    programs = blocks(n, config.block)
    counts = stats = None
    if spec.stats:
        stats = torch.empty(4, dtype=torch.int64, device=device)
        counts = stats if programs == 1 else torch.empty((4, programs), dtype=torch.int64, device=device)
    if not reduced:
        out = partials = torch.empty_like(x, dtype=spec.result)
    else:
        out = torch.empty_strided((), (), dtype=spec.result, device=device)  # takes 0.6 of the time of torch.empty(())
        partials = out if programs == 1 else torch.empty(programs, dtype=compute, device=device)
    forward = _kernel("forward", spec, y.dtype, kinds, compute, config, x.dtype, x.device, programs == 1)
    forward(programs, x, y, dx, partials, counts, n, packed)
    if programs > 1:
        at = len(packed)  # the slice is empty if there is no divisor
        if "divisor" in spec.options:
            at += spec.options.index("divisor") - len(spec.options)
        finish = _finish_kernel(spec.reduction, kinds[at : at + 1])
        finish(1, partials, out, counts, stats, n, programs, packed[at : at + 1])
    return out, stats, dx


def loss_backward(spec: Spec, input: Tensor, target: Tensor, operands: Sequence[Operand], gradient: Tensor) -> Tensor:
    """d loss / dx times the upstream gradient, recomputed from the inputs."""
    x, y, packed, kinds, compute = _prepared(input, target, operands)
    if spec.reduction == "none":
        gradient = layout.laid_out_as(gradient, x.shape, x.stride())
    dx = torch.empty_like(x)
    config = tuning.default("loss", x.dtype.itemsize, tuning.lanes(x.device))
    if backend.interpreting():
        config = choose(spec, x).config
    kernel = _kernel("backward", spec, y.dtype, kinds, compute, config, x.dtype, x.device)
    kernel(blocks(x.numel(), config.block), x, y, gradient, dx, x.numel(), packed)
    return dx


def rescaled(made: Tensor, gradient: Tensor, way: str) -> Tensor:
    """A gradient that forward made, times the upstream gradient, in place; moves nothing if that is 1."""
    if way != "triton" or not made.numel():
        return eager.rescaled(made, gradient)
    own = made.data  # eager.rescaled says why
    kernel, block = _rescale_kernel(own.dtype, own.device)
    kernel(min(blocks(own.numel(), block), PROGRAMS), gradient, own, own.numel())
    return own


# ---------------------------------------------------------------------------------------------- autograd, eager and traced


def _forward_on(
    way: str, spec: Spec, input: Tensor, target: Tensor, operands: Sequence[Operand], want_gradient: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The loss, its counts, and its gradient; None for what is not wanted."""
    if way == "triton":
        return loss_forward(spec, input, target, operands, want_gradient)
    found = None
    if way == "inductor":
        options, own = _inductor_options(spec, input, operands), engine(spec)
        found = own.value_and_gradient(input, (target, *operands), options, gradient=want_gradient)
        if found is None:
            own.warn()
    if found is None:
        found = eager.loss_forward(spec, input, target, operands, want_gradient)
    loss, gradient = found
    return loss, cells.count_stats(spec, input, target, operands) if spec.stats else None, gradient


@functools.cache
def engine(spec: Spec) -> compiled.Engine:
    """The element loss as a formula that Inductor compiles."""
    return compiled.Engine(
        spec.cell,
        lambda x, y, *operands: cells.element_loss(spec, x, y, operands),
        lambda x, scale, y, *operands: eager.closed_form(spec, x, y, operands, scale),
    )


def _inductor_options(spec: Spec, input: Tensor, operands: Sequence[Operand]) -> compiled.Options:
    divisor = cells.divisor_of(spec, operands, input.numel(), input.dtype) if spec.reduction == "mean" else None
    return compiled.Options(spec.reduction, spec.result, divisor=divisor)


def _forward(
    input: Tensor, target: Tensor, operands: Sequence[Operand], spec: Spec, way: str, records: bool = True
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    fused = records and is_fused(spec.reduction, input.dtype)
    if input.numel():
        return _forward_on(way, spec, input, target, operands, fused)
    stats = cells.count_stats(spec, input, target, operands) if spec.stats else None
    return formula(spec, input, target, operands), stats, torch.empty_like(input) if fused else None


def _setup(ctx: Any, arguments: tuple[Any, ...], outputs: tuple[Any, ...]) -> None:
    input, target, operands, ctx.spec, ctx.way, *records = arguments
    _, stats, gradient = outputs
    if ctx.traced:
        ctx.mark_non_differentiable(stats, gradient)
        if not (records[0] and is_fused(ctx.spec.reduction, input.dtype)):
            gradient = None
    elif stats is not None:
        ctx.mark_non_differentiable(stats)
    ctx.fused = gradient is not None
    ctx.numbers, tensors = parted(operands)
    ctx.save_for_backward(input, target, gradient, *tensors)


def _backward(ctx: Any, g: Tensor, _: Tensor | None = None) -> tuple[Tensor]:
    """The first backward takes the gradient that forward made; later ones recompute from the saved inputs.

    The buffer belongs to this node alone, so an eager backward scales it in place and hands it on. A traced one multiplies it
    into a new tensor, which compilers fuse into its consumer.
    """
    input, target, ahead, *tensors = ctx.saved_tensors
    operands = restored(ctx.numbers, tensors) if tensors else ctx.numbers
    spec: Spec = ctx.spec
    last = not (torch.is_grad_enabled() or (ctx.traced and is_exporting()))
    if not (last and (backend.is_ordinary(g) or backend.is_one_op(g))):
        return (cells.differentiable_gradient(spec, input, target, operands, g),)
    if ctx.traced:
        if ctx.fused:
            dtype = compute_dtype(input.dtype)
            return ((ahead.to(dtype) * g.to(dtype)).to(input.dtype),)
        return (_backward_op(g, input, target, *encoded(operands), spec.text),)
    if ctx.fused:
        ctx.fused = False
        return (rescaled(ahead, g, ctx.way),)
    if ctx.way == "triton":
        return (loss_backward(spec, input, target, operands, g),)
    if ctx.way == "inductor":
        found = engine(spec).backward(input, (target, *operands), _inductor_options(spec, input, operands), g)
        if found is not None:
            return (found,)
    return (eager.loss_backward(spec, input, target, operands, g),)


# An operand of a traced loss is an entry of `tensors`, or where that is None of `numbers`.
TRACED = "Tensor?[] tensors, float[] numbers, str spec"


def encoded(operands: Sequence[Operand]) -> tuple[list[Tensor | None], list[float]]:
    tensors = [v if isinstance(v, Tensor) else None for v in operands]
    return tensors, [math.nan if isinstance(v, Tensor) else torch.sym_float(v) for v in operands]


def decoded(input: Tensor, tensors: Sequence[Tensor | None], numbers: Sequence[float]) -> tuple[Operand, ...]:
    dtype = compute_dtype(input.dtype)
    if all(tensor is None for tensor in tensors):
        return Numbers([round_to(number, dtype) for number in numbers])
    return tuple([round_to(number, dtype) if tensor is None else tensor for tensor, number in zip(tensors, numbers)])


def _traced(spec: Spec, input: Tensor, target: Tensor, operands: Sequence[Operand]) -> tuple[Tensor, Tensor]:
    """The loss as one op, its gradient computed in the forward pass; and its counts."""
    records = input.requires_grad and torch.is_grad_enabled()
    loss, stats, _ = LOSS.op(input, target, *encoded(operands), spec.text, spec.result, records)
    return loss, stats


def _decode(
    input: Tensor, target: Tensor, tensors: Any, numbers: Any, text: str, result: torch.dtype, records: bool
) -> tuple[Any, ...]:
    return input, target, decoded(input, tensors, numbers), cells.from_text(text, result), "triton", records


def _fake(
    input: Tensor, target: Tensor, tensors: Any, numbers: Any, text: str, result: torch.dtype, records: bool
) -> tuple[Tensor, Tensor, Tensor]:
    spec = cells.from_text(text, result)
    reduction = spec.reduction
    output = torch.empty_like(input, dtype=result) if reduction == "none" else input.new_empty((), dtype=result)
    stats = input.new_empty(4, dtype=torch.int64) if spec.stats else input.new_empty(0)
    fused = records and is_fused(reduction, input.dtype)
    return output, stats, torch.empty_like(input) if fused else input.new_empty(0)


def _formula(
    input: Tensor, target: Tensor, tensors: Any, numbers: Any, text: str, result: torch.dtype, records: bool
) -> tuple[Tensor, Tensor, Tensor]:
    spec, operands = cells.from_text(text, result), decoded(input, tensors, numbers)
    _, stats, gradient = _fake(input, target, tensors, numbers, text, result, records)
    if spec.stats:
        stats = cells.count_stats(spec, input, target, operands)
    return formula(spec, input, target, operands), stats, gradient


LOSS = Fused(
    "loss",
    f"(Tensor input, Tensor target, {TRACED}, ScalarType dtype, bool records) -> "
    "(Tensor loss, Tensor stats, Tensor gradient)",
    forward=_forward,
    fake=_fake,
    setup=_setup,
    backward=_backward,
    decode=_decode,
    formula=_formula,
    outputs=3,
    public=2,
)


def _traced_backward(g: Tensor, input: Tensor, target: Tensor, tensors: Any, numbers: Any, text: str) -> Tensor:
    if not input.numel():
        return torch.empty_like(input)
    return loss_backward(cells.from_text(text, input.dtype), input, target, decoded(input, tensors, numbers), g)


def _backward_fake(g: Tensor, input: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(input)


_backward_op = define(
    "loss_backward",
    f"(Tensor gradient, Tensor input, Tensor target, {TRACED}) -> Tensor",
    _traced_backward,
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
    pos_weight: Operand | None = None,
    reduction: str = "mean",
    return_stats: bool = False,
    **options: Any,
) -> backend.Plan:
    """How `run` would make a call: its way, its block size, and the bytes that its kernels move. It is checked likewise."""
    spec, *_, operands, way = _specified(op, input, target, base, rule, pos_weight, reduction, return_stats, options)
    given = [target, *(value for value in operands if isinstance(value, Tensor))]
    if target.requires_grad and torch.is_grad_enabled() and input.requires_grad:
        reason = "a target that requires grad gets it through the formula in plain torch"
        return backend.Plan("eager", reason, None, None, None, None, None, None)
    choice = choose(spec, input) if way in ("triton", "op") else None
    grad = input.requires_grad and torch.is_grad_enabled()
    searches = reduction == "none" and tuning.may_search()
    return backend.planned(way, input.device, choice, searches, *_bytes(spec, input, given, grad))


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
