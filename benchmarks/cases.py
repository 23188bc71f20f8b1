"""The cases of the compile report: every kernel of every op in the registry, in the forms a launch gives it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton.language as tl

from benchmarks.aot import Unaligned
from triton_thresh import cells, losses, thresholds, tuning
from triton_thresh.bases import BASES, Base, BCEWithLogits
from triton_thresh.gates import COUNT_BLOCK, FIRED_BLOCK, ROWS
from triton_thresh.kernels import foreach, gate, loss, pointwise, select
from triton_thresh.launch import CHANNEL, ELEMENT, NUMBER, SCALAR
from triton_thresh.losses import FINISH
from triton_thresh.registry import OPS, Gate, GradientGate, Loss
from triton_thresh.rules import ByPrediction, Rule, Unweighted

TYPES = {"fp16": tl.float16, "bf16": tl.bfloat16, "fp32": tl.float32, "fp64": tl.float64}
ITEMSIZE = {"fp16": 2, "bf16": 2, "fp32": 4, "fp64": 8}
PACKED: dict[str, tuple[int, Callable[[str], tuple[object, ...]]]] = {
    "number": (NUMBER, lambda dtype: ("fp32",)),
    "scalar": (SCALAR, lambda dtype: (f"*{dtype}",)),
    "channel": (CHANNEL, lambda dtype: (f"*{dtype}", 1, "i32")),
    "channel-odd": (CHANNEL, lambda dtype: (f"*{dtype}", 1, Unaligned("i32"))),
    "rows": (CHANNEL, lambda dtype: (f"*{dtype}", "i32", "i32")),
    "element": (ELEMENT, lambda dtype: (f"*{dtype}",)),
}


@dataclass(frozen=True)
class Case:
    """One kernel with the types and constants of one kind of launch."""

    op: str
    kernel: str
    dtype: str
    operands: str
    jit: Any
    arguments: dict[str, object]
    num_warps: int
    elements: int
    tiles: int = 1  # that a program computes one after the other

    def __str__(self) -> str:
        return f"{self.op}-{self.kernel}-{self.dtype}-{self.operands}"


def _compute(dtype: str) -> tl.dtype:
    return tl.float64 if dtype == "fp64" else tl.float32


def _wide(dtype: str) -> str:
    return "fp64" if dtype == "fp64" else "fp32"


def _number(dtype: str) -> str:
    """How a number travels: by value where float32 holds it, else on the device."""
    return "scalar" if dtype == "fp64" else "number"


BITS = {"bit": 1, "two bits": 2}


def _operands(op: Gate, first: str, dtype: str, held: str) -> dict[str, object]:
    """A threshold of this kind, which lies in `held`, and the gate's other operands and numbers."""
    numbers = len(op.example) - op.operands
    kind, packed = PACKED[first]
    number, packed_number = PACKED[_number(dtype)]
    return dict(
        operands=(*[packed(held)] * op.operands, *[packed_number(dtype)] * numbers),
        KINDS=(*[kind] * op.operands, *[number] * numbers),
    )


def _forward(op: Gate, dtype: str, lanes: int, operands: str, bits: int, n: str = "i32") -> Case:
    """A row is one block."""
    block, warps = tuning.default("gate", ITEMSIZE[dtype], lanes)
    arguments: dict[str, object] = dict(
        x_ptr=f"*{dtype}",
        y_ptr=f"*{dtype}",
        mask_ptr="*u8" if bits else None,
        n=n,
        groups="i32",
        width=None,
        **_operands(op, operands, dtype, dtype),
        FUNCTION=getattr(pointwise, op.value or op.name),
        COMPUTE=_compute(dtype),
        PROMOTED=None,
        BITS=bits,
        BY_COLUMN=False,
        COLS=block,
    )
    return Case(op.name, f"forward{bits}", dtype, operands, gate.forward, arguments, warps, 8 * block)


def _backward(op: Gate, dtype: str, lanes: int, operands: str) -> Case:
    block, warps = tuning.default("gate", ITEMSIZE[dtype], lanes)
    arguments: dict[str, object] = dict(g_ptr=f"*{dtype}", dx_ptr=f"*{dtype}", n="i32", COLS=block)
    if op.saves == "bit":
        arguments |= dict(mask_ptr="*u8")
        return Case(op.name, "backward", dtype, "-", gate.backward_bit, arguments, warps, 8 * block)
    arguments |= dict(_operands(op, operands, dtype, dtype), COMPUTE=_compute(dtype))
    if op.saves == "input":
        arguments |= dict(x_ptr=f"*{dtype}", FUNCTION=getattr(pointwise, op.name))
        return Case(op.name, "backward", dtype, operands, gate.backward_input, arguments, warps, 8 * block)
    arguments |= _code_arguments(f"{op.name}_backward", 2, False, False)
    return Case(op.name, "backward", dtype, operands, gate.backward_code, arguments, warps, 8 * block)


def _code_arguments(function: str, bits: int, input_gradient: bool, by_column: bool) -> dict[str, object]:
    return dict(
        count_ptr=None,
        mask_ptr="*u8",
        dt_ptr=None,
        groups="i32",
        width="i32",
        features=None,
        FUNCTION=getattr(pointwise, function),
        BITS=bits,
        INPUT_GRADIENT=input_gradient,
        BY_COLUMN=by_column,
        GROUPS=ROWS // 8 if by_column else 1,
    )


def gate_cases(op: Gate, dtype: str, lanes: int) -> Iterator[Case]:
    """A gate's kernels: forward for every kind of threshold, and without a gradient; backward; both again if it learns."""
    if not op.straight_through:
        bits = BITS.get(op.saves, 0)
        for operands in (_number(dtype), "channel", "channel-odd", "rows", "element"):
            yield _forward(op, dtype, lanes, operands, bits)
        yield _forward(op, dtype, lanes, _number(dtype), 0, n="i64")
        if op.saves != "nothing":
            yield _backward(op, dtype, lanes, _number(dtype))
        if op.saves in ("input", "two bits"):
            yield _backward(op, dtype, lanes, "channel")
    if op.learns:
        yield from _learned_cases(op, dtype, lanes)


def _learned_forward(op: Gate, dtype: str, lanes: int, operands: str, bits: int) -> Case:
    """Rows by column. A threshold of a "row" is as wide as one."""
    block, warps = tuning.default("learned", ITEMSIZE[dtype], lanes)
    learned = op.name if op.straight_through else f"{op.name}_learned"
    arguments: dict[str, object] = dict(
        x_ptr=f"*{dtype}",
        y_ptr=f"*{dtype}",
        mask_ptr="*u8" if bits else None,
        n="i32",
        groups="i32",
        width="i32",
        **_operands(op, "element" if operands == "row" else operands, dtype, _wide(dtype)),
        FUNCTION=getattr(pointwise, op.value or learned),
        COMPUTE=_compute(dtype),
        PROMOTED=None,
        BITS=bits,
        BY_COLUMN=operands != "element",
        COLS=block,
    )
    return Case(op.name, f"learned-forward{bits}", dtype, operands, gate.forward, arguments, warps, 8 * block)


def _learned_backward(op: Gate, dtype: str, lanes: int, operands: str, input_gradient: bool) -> Case:
    block, warps = tuning.default("learned", ITEMSIZE[dtype], lanes)
    learned = op.name if op.straight_through else f"{op.name}_learned"
    arguments = _code_arguments(f"{learned}_backward", 2, input_gradient, operands != "element")
    arguments |= _operands(op, "element" if operands == "row" else operands, dtype, _wide(dtype))
    arguments |= dict(
        g_ptr=f"*{dtype}",
        count_ptr=f"*{_wide(dtype)}" if op.counts else None,
        dx_ptr=f"*{dtype}",
        dt_ptr=f"*{_wide(dtype)}",
        n="i32",
        features="i32" if op.counts and operands == "channel" else None,
        COMPUTE=_compute(dtype),
        COLS=block,
    )
    kernel = "learned-backward" + ("-input" if input_gradient else "")
    return Case(op.name, kernel, dtype, operands, gate.backward_code, arguments, warps, 8 * block)


def _learned_cases(op: Gate, dtype: str, lanes: int) -> Iterator[Case]:
    """With a threshold for all, per feature (as wide as a row, or not divisible by 16), per element."""
    for operands in (
        ("scalar", "row", "channel", "element") if op.straight_through else ("scalar", "channel", "element")
    ):
        yield _learned_forward(op, dtype, lanes, operands, 2)
        yield _learned_backward(op, dtype, lanes, operands, False)
    if op.straight_through:
        yield _learned_forward(op, dtype, lanes, "row", int(op.counts))
        yield _learned_backward(op, dtype, lanes, "row", True)
    if op.counts:
        arguments: dict[str, object] = dict(
            mask_ptr="*u8",
            out_ptr=f"*{_wide(dtype)}",
            rows="i32",
            width="i32",
            features="i32",
            PARTS=1,
            BLOCK=COUNT_BLOCK,
        )
        yield Case(op.name, "count", dtype, "-", gate.count, arguments, 4, 8 * COUNT_BLOCK)
        sizes = dict(rows="i32", groups="i32", width=Unaligned("i32"), features=Unaligned("i32"))
        arguments = dict(mask_ptr="*u8", out_ptr="*i64", **sizes, GROUPS=ROWS, BLOCK=FIRED_BLOCK)
        yield Case(op.name, "fired", dtype, "-", gate.fired, arguments, 4, FIRED_BLOCK)


def foreach_cases(op: GradientGate, dtype: str, lanes: int) -> Iterator[Case]:
    """A gate over many tensors, with thresholds in the table and on the device, and with the count of what was kept."""
    block, warps = tuning.default("gate", ITEMSIZE[dtype], lanes)
    for operands, held, kept in (
        ("number", None, None),
        ("number-count", None, "*i32"),
        ("scalar", f"*{dtype}", None),
    ):
        arguments: dict[str, object] = dict(
            table_ptr="*i64",
            tensors="i32",
            thresholds_ptr=held,
            kept_ptr=kept,
            FUNCTION=getattr(pointwise, op.gate.name),
            DTYPE=TYPES[dtype],
            COMPUTE=_compute(dtype),
            COLS=block,
        )
        yield Case(op.name, "inplace", dtype, operands, foreach.inplace, arguments, warps, 8 * block)


def _loss_arguments(
    base: Base,
    rule: Rule,
    dtype: str,
    operands: str,
    reduction: str,
    *,
    hard: bool = False,
    options: Sequence[str] = (),
    stats: bool = False,
) -> dict[str, object]:
    kind, packed = PACKED[operands]
    given = {name: torch.empty(0) if name in cells.SELECTING else 1.0 for name in options}
    spec, values = cells.specify(base, rule, given, stats, reduction, torch.float32)
    kinds = [ELEMENT if isinstance(value, torch.Tensor) else kind for value in values]
    return dict(
        x_ptr=f"*{dtype}",
        y_ptr="*i8" if hard else f"*{dtype}",
        dx_ptr=f"*{dtype}",
        counts_ptr="*i64" if stats else None,
        n="i32",
        operands=tuple(("*i1",) if kind == ELEMENT else packed(_wide(dtype)) for kind in kinds),
        KINDS=tuple(kinds),
        **losses.constants(spec, torch.int8 if hard else torch.float32),
        **losses.counted_by(spec),
        COMPUTE=_compute(dtype),
        REDUCTION=reduction,
    )


def _tiled(op: str, kernel: str, dtype: str, operands: str, jit: Any, arguments: dict[str, object], lanes: int) -> Case:
    """A kernel that goes through its block tile by tile."""
    config = tuning.default("loss", ITEMSIZE[dtype], lanes)
    block, tile = config.block, tuning.tile(config, ITEMSIZE[dtype], lanes)
    sizes = {"TILE": tile, "BLOCK": block}
    return Case(op, kernel, dtype, operands, jit, arguments | sizes, config.num_warps, block, block // tile)


def cell_cases(base: type[Base], rule: type[Rule], dtype: str, lanes: int) -> Iterator[Case]:
    """A pair's kernels: fused forward, forward without reduction, recomputing backward with the base's optional settings.

    A base with exponents is compiled for targets that are 0 or 1, too, and in backward for exponents that are operands.
    """
    name, number = f"{base.snake_name()}.{rule.__name__}", _number(dtype)
    made, weighing = base(*base.example), rule(*rule.example)

    def case(kernel: str, operands: str, arguments: dict[str, object], **others: object) -> Case:
        jit = loss.backward if kernel == "backward" else loss.forward
        return _tiled(name, kernel, dtype, operands, jit, arguments | others, lanes)

    out = dict(out_ptr=f"*{_wide(dtype)}", SINGLE=False)
    for operands in (number, "channel") if rule is ByPrediction else (number,):
        yield case("forward", operands, _loss_arguments(made, weighing, dtype, operands, "mean"), **out)
    if base.exponents:
        yield case("forward-hard", number, _loss_arguments(made, weighing, dtype, number, "mean", hard=True), **out)
    out |= dict(dx_ptr=None, out_ptr=f"*{dtype}")
    yield case("forward-none", number, _loss_arguments(made, weighing, dtype, number, "none"), **out)
    given = {name: value for name, value in vars(made).items() if name not in base.static_fields}
    whole = base(**given | dict.fromkeys(base.optional_fields, 0.5) | dict.fromkeys(base.exponents, 1.5))
    arguments = _loss_arguments(whole, weighing, dtype, number, "mean")
    for counted in ("counts_ptr", "LEAST", "LABEL"):
        arguments.pop(counted)
    yield case("backward", number, arguments, g_ptr=f"*{dtype}")


def shared_loss_cases(dtype: str, lanes: int) -> Iterator[Case]:
    """All options at once, the final sum, the count of valid elements and the rescale, one for all losses."""
    block, warps = tuning.default("loss", ITEMSIZE[dtype], lanes)
    made, number, wide = (BCEWithLogits(), ByPrediction()), _number(dtype), _wide(dtype)
    options = [name for name in cells.OPTIONS if name != "least_positive"]
    arguments = _loss_arguments(*made, dtype, number, "mean", hard=True, options=options, stats=True)
    arguments |= dict(out_ptr=f"*{wide}", SINGLE=False)
    yield _tiled("loss", "forward-options", dtype, number, loss.forward, arguments, lanes)
    arguments = dict(
        partial_ptr=f"*{wide}",
        out_ptr=f"*{dtype}",
        counts_ptr="*i64",
        stats_ptr="*i64",
        n="i32",
        partials="i32",
        operands=(),
        KINDS=(),
        REDUCTION="mean",
        BLOCK=FINISH.block,
    )
    yield Case("loss", "finish", dtype, "-", loss.finish, arguments, FINISH.num_warps, FINISH.block)
    kinds, packed = (ELEMENT, NUMBER), (("*i1",), ("fp32",))
    arguments = dict(
        y_ptr=f"*{dtype}", out_ptr="*i64", n="i32", operands=packed, KINDS=kinds, MASK=0, IGNORE=1, BLOCK=block
    )
    yield Case("loss", "count", dtype, "element", loss.count, arguments, warps, block)
    arguments = dict(g_ptr=f"*{dtype}", x_ptr=f"*{dtype}", n="i32", COMPUTE=_compute(dtype), BLOCK=block)
    yield Case("loss", "rescale", dtype, "-", loss.rescale, arguments, warps, block)


def linear_cases(dtype: str, lanes: int) -> Iterator[Case]:
    """The loss over a chunk of logits, with a scale, a bias for each label and a target of bits."""
    spec, values = cells.specify(BCEWithLogits(), ByPrediction(), {}, False, "mean", torch.float32)
    known, count, wide = losses.constants(spec, torch.bool), len(values), _wide(dtype)
    places = dict(SCALE=count, BIAS=count + 1, FACTOR=count + 2)
    number, packed_number = PACKED[_number(dtype)]
    kinds = [*[number] * count, PACKED["scalar"][0], PACKED["channel"][0], number]
    packed = [packed_number(wide)] * count
    packed += [PACKED["scalar"][1](wide), PACKED["channel"][1](wide), packed_number(wide)]
    arguments: dict[str, object] = dict(
        x_ptr=f"*{dtype}",
        y_ptr="*i1",
        partial_ptr=f"*{wide}",
        n="i32",
        width="i32",
        stride="i32",
        operands=tuple(packed),
        KINDS=tuple(kinds),
        **{name: value for name, value in known.items() if name in loss.descend.arg_names},
        **places,
        STRIDED=False,
        WRITES=True,
        COMPUTE=_compute(dtype),
    )
    yield _tiled("linear_threshold_loss", "descend", dtype, "channel", loss.descend, arguments, lanes)


def selection_cases(dtype: str) -> Iterator[Case]:
    """A row as long as registers hold, one digit of a longer one, its end, a histogram; for sizes that 16 divides, and not."""
    size, asked = ITEMSIZE[dtype], dict(POSITIVE=False, ANY_NAN=True)
    cols, block = thresholds.IN_REGISTERS // max(size, 4), thresholds.block_of(size)
    tensors: dict[str, object] = dict(x_ptr=f"*{dtype}", k="i32")
    for operands, whole in (("-", "i32"), ("odd", Unaligned("i32"))):
        row = dict(tensors, out_ptr=f"*{dtype}", height="i32", n=whole, stride=whole, **asked, HEIGHT=1, COLS=cols)
        yield Case("kth_largest", "rows", dtype, operands, select.rows, row, thresholds.warps_of(cols), cols)
        digit = dict(tensors, work_ptr="*i64", n=whole, stride=whole, parts="i32", DIGIT=1, DIGITS=size, **asked)
        yield Case("kth_largest", "digit", dtype, operands, select.count, digit | dict(BLOCK=block), 4, block)
        bins = dict(x_ptr=f"*{dtype}", line_ptr=f"*{_wide(dtype)}", out_ptr="*i64", n=whole, bins="i32", parts="i32")
        yield Case("histogram", "bins", dtype, operands, select.histogram, bins | dict(BINS=256, BLOCK=block), 4, block)
    end = dict(work_ptr="*i64", out_ptr=f"*{dtype}", k="i32", DIGITS=size, **asked)
    yield Case("kth_largest", "finish", dtype, "-", select.finish, end, 4, 256)


def cases(dtypes: tuple[str, ...] = ("fp32", "bf16", "fp16"), lanes: int = 32) -> Iterator[Case]:
    """Everything the registry holds, for warps of so many lanes; each base alone and with a rule, each rule once."""
    pairs = dict.fromkeys(pair for op in OPS.values() if isinstance(op, Loss) for pair in op.pairs)
    for dtype in dtypes:
        for op in OPS.values():
            if isinstance(op, Gate):
                yield from gate_cases(op, dtype, lanes)
            elif isinstance(op, GradientGate):
                yield from foreach_cases(op, dtype, lanes) if op.many else gate_cases(op.gate, dtype, lanes)
        for base, rule in [*((base, Unweighted) for base in BASES), *pairs]:
            yield from cell_cases(base, rule, dtype, lanes)
        yield from shared_loss_cases(dtype, lanes)
        yield from linear_cases(dtype, lanes)
        yield from selection_cases(dtype)
