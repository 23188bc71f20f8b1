"""What the compile report compiles: every kernel of every op in the registry, in the forms a launch gives it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import triton.language as tl

from benchmarks.aot import Unaligned
from triton_thresh import tuning
from triton_thresh.families import ForeachGate, Gate, GradientGate, LearnedGate, Loss
from triton_thresh.kernel_cache import NUMBER
from triton_thresh.kernels import foreach, gate, learned, loss, pointwise
from triton_thresh.launch import CHANNEL, ELEMENT, FINISH_BLOCK, SCALAR
from triton_thresh.learned import COUNT_BLOCK, ROWS
from triton_thresh.reference import RULES
from triton_thresh.registry import OPS
from triton_thresh.rules import ByPrediction, ByProximity

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

    def __str__(self) -> str:
        return f"{self.op}-{self.kernel}-{self.dtype}-{self.operands}"


def _compute(dtype: str) -> tl.dtype:
    return tl.float64 if dtype == "fp64" else tl.float32


def _wide(dtype: str) -> str:
    return "fp64" if dtype == "fp64" else "fp32"


def _number(dtype: str) -> str:
    """How a number travels: by value where float32 holds it, else on the device."""
    return "scalar" if dtype == "fp64" else "number"


def _gate_forward(op: Gate, dtype: str, lanes: int, operands: str, mask: bool, n: str = "i32") -> Case:
    kind, packed = PACKED[operands]
    constant_kind, constant = PACKED[_number(dtype)]
    constants = len(op.constants)
    block, warps = tuning.default("gate", ITEMSIZE[dtype], lanes)
    arguments: dict[str, object] = dict(
        x_ptr=f"*{dtype}",
        y_ptr=f"*{dtype}",
        mask_ptr="*u8" if mask else None,
        n=n,
        operands=(packed(dtype), *[constant(dtype)] * constants),
        KINDS=(kind, *[constant_kind] * constants),
        FUNCTION=getattr(pointwise, op.name),
        COMPUTE=_compute(dtype),
        COLS=block,
    )
    return Case(op.name, f"forward{int(mask)}", dtype, operands, gate.forward, arguments, warps, 8 * block)


def _gate_backward(op: Gate, dtype: str, lanes: int) -> Case:
    block, warps = tuning.default("gate", ITEMSIZE[dtype], lanes)
    arguments: dict[str, object] = dict(g_ptr=f"*{dtype}", mask_ptr="*u8", dx_ptr=f"*{dtype}", n="i32", COLS=block)
    return Case(op.name, "backward", dtype, "-", gate.backward, arguments, warps, 8 * block)


def gate_cases(op: Gate, dtype: str, lanes: int) -> Iterator[Case]:
    """A gate's kernels: forward for every kind of threshold, with and without a mask; backward; both again if it learns."""
    for operands in (_number(dtype), "channel", "channel-odd", "rows", "element"):
        yield _gate_forward(op, dtype, lanes, operands, op.differentiable)
    yield _gate_forward(op, dtype, lanes, _number(dtype), False, n="i64")
    if op.differentiable:
        yield _gate_backward(op, dtype, lanes)
    if op.push:
        function = f"{op.name}_learned"
        for operands in ("scalar", "channel", "element"):
            yield _learned_forward(op.name, function, 0, dtype, lanes, operands, 2)
            yield _learned_backward(op.name, function, 0, dtype, lanes, operands, False, False)


def _by_column(operands: str, dtype: str, constants: int) -> tuple[dict[str, object], bool]:
    """Threshold and constants of a learned gate, and whether the threshold keeps to its columns ("row": as wide as one)."""
    kind, packed = PACKED["element" if operands == "row" else operands]
    number, packed_number = PACKED[_number(dtype)]
    arguments: dict[str, object] = dict(
        operands=(packed(_wide(dtype)), *[packed_number(dtype)] * constants), KINDS=(kind, *[number] * constants)
    )
    return arguments, operands != "element"


def _learned_forward(
    name: str, function: str, constants: int, dtype: str, lanes: int, operands: str, bits: int
) -> Case:
    block, warps = tuning.default("learned", ITEMSIZE[dtype], lanes)
    arguments, by_column = _by_column(operands, dtype, constants)
    arguments |= dict(
        x_ptr=f"*{dtype}",
        y_ptr=f"*{dtype}",
        mask_ptr="*u8" if bits else None,
        n="i32",
        groups="i32",
        width="i32",
        FUNCTION=getattr(pointwise, function),
        COMPUTE=_compute(dtype),
        BITS=bits,
        BY_COLUMN=by_column,
        COLS=block,
    )
    return Case(name, f"learned-forward{bits}", dtype, operands, learned.forward, arguments, warps, 8 * block)


def _learned_backward(
    name: str, function: str, constants: int, dtype: str, lanes: int, operands: str, counts: bool, input_gradient: bool
) -> Case:
    block, warps = tuning.default("learned", ITEMSIZE[dtype], lanes)
    arguments, by_column = _by_column(operands, dtype, constants)
    arguments |= dict(
        g_ptr=f"*{dtype}",
        count_ptr=f"*{_wide(dtype)}" if counts else None,
        mask_ptr="*u8",
        dx_ptr=f"*{dtype}",
        dt_ptr=f"*{_wide(dtype)}",
        n="i32",
        groups="i32",
        width="i32",
        features="i32" if counts and operands == "channel" else None,
        FUNCTION=getattr(pointwise, f"{function}_backward"),
        COMPUTE=_compute(dtype),
        INPUT_GRADIENT=input_gradient,
        BY_COLUMN=by_column,
        GROUPS=ROWS // 8 if by_column else 1,
        COLS=block,
    )
    kernel = "learned-backward" + ("-input" if input_gradient else "")
    return Case(name, kernel, dtype, operands, learned.backward, arguments, warps, 8 * block)


def learned_cases(op: LearnedGate, dtype: str, lanes: int) -> Iterator[Case]:
    """A learned gate's kernels: a threshold for all, per feature (as wide as a row, or not divisible by 16), per element."""
    for operands in ("scalar", "row", "channel", "element"):
        yield _learned_forward(op.name, op.forward or op.name, 1, dtype, lanes, operands, 2)
        yield _learned_backward(op.name, op.name, 1, dtype, lanes, operands, op.counts, False)
    yield _learned_forward(op.name, op.forward or op.name, 1, dtype, lanes, "row", int(op.counts))
    yield _learned_backward(op.name, op.name, 1, dtype, lanes, "row", op.counts, True)
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
        yield Case(op.name, "count", dtype, "-", learned.count, arguments, 4, 8 * COUNT_BLOCK)


def foreach_cases(op: ForeachGate, dtype: str, lanes: int) -> Iterator[Case]:
    """A gate over many tensors, with thresholds in the table and on the device, and with the count of what was kept."""
    block, warps = tuning.default("gate", ITEMSIZE[dtype], lanes)
    for operands, thresholds, kept in (
        ("number", None, None),
        ("number-count", None, "*i32"),
        ("scalar", f"*{dtype}", None),
    ):
        arguments: dict[str, object] = dict(
            table_ptr="*i64",
            tensors="i32",
            thresholds_ptr=thresholds,
            kept_ptr=kept,
            FUNCTION=getattr(pointwise, op.gate.name),
            DTYPE=TYPES[dtype],
            COMPUTE=_compute(dtype),
            COLS=block,
        )
        yield Case(op.name, "inplace", dtype, operands, foreach.inplace, arguments, warps, 8 * block)


def _loss_arguments(
    base: str, rule: type, dtype: str, operands: str, reduction: str, pos_weight: bool
) -> dict[str, object]:
    settings = len((rule() if rule is not ByProximity else rule(0.5)).operands(base))
    base_count = int(pos_weight)
    kind, packed = PACKED[operands]
    return dict(
        x_ptr=f"*{dtype}",
        y_ptr=f"*{dtype}",
        dx_ptr=f"*{dtype}",
        n="i32",
        operands=(packed(_wide(dtype)),) * (base_count + settings),
        KINDS=(kind,) * (base_count + settings),
        BASE=getattr(pointwise, base),
        BASE_COUNT=base_count,
        RULE=getattr(pointwise, RULES[rule].weight.__name__),
        RULE_COUNT=settings,
        COMPUTE=_compute(dtype),
        REDUCTION=reduction,
    )


def cell_cases(base: str, rule: type, dtype: str, lanes: int) -> Iterator[Case]:
    """A cell's kernels: fused forward, forward without reduction, recomputing backward."""
    block, warps = tuning.default("loss", ITEMSIZE[dtype], lanes)
    name, number = f"{base}.{rule.__name__}", _number(dtype)
    for operands in (number, "channel") if rule is ByPrediction else (number,):
        arguments = _loss_arguments(base, rule, dtype, operands, "mean", False)
        arguments |= dict(out_ptr=f"*{_wide(dtype)}", SINGLE=False, BLOCK=block)
        yield Case(name, "forward", dtype, operands, loss.forward, arguments, warps, block)
    arguments = _loss_arguments(base, rule, dtype, number, "none", False)
    arguments |= dict(dx_ptr=None, out_ptr=f"*{dtype}", SINGLE=False, BLOCK=block)
    yield Case(name, "forward-none", dtype, number, loss.forward, arguments, warps, block)
    arguments = _loss_arguments(base, rule, dtype, number, "mean", base == "bce_with_logits")
    arguments |= dict(g_ptr=f"*{dtype}", BLOCK=block)
    yield Case(name, "backward", dtype, number, loss.backward, arguments, warps, block)


def shared_loss_cases(dtype: str, lanes: int) -> Iterator[Case]:
    """The final sum and the rescale, one for all losses."""
    block, warps = tuning.default("loss", ITEMSIZE[dtype], lanes)
    arguments: dict[str, object] = dict(
        partial_ptr=f"*{_wide(dtype)}",
        out_ptr=f"*{dtype}",
        n="i32",
        partials="i32",
        REDUCTION="mean",
        BLOCK=FINISH_BLOCK,
    )
    yield Case("loss", "finish", dtype, "-", loss.finish, arguments, 4, FINISH_BLOCK)
    arguments = dict(g_ptr=f"*{dtype}", x_ptr=f"*{dtype}", n="i32", COMPUTE=_compute(dtype), BLOCK=block)
    yield Case("loss", "rescale", dtype, "-", loss.rescale, arguments, warps, block)


def cases(dtypes: tuple[str, ...] = ("fp32", "bf16", "fp16"), lanes: int = 32) -> Iterator[Case]:
    """Everything the registry holds, for warps of so many lanes."""
    for dtype in dtypes:
        for op in OPS.values():
            if isinstance(op, (Gate, GradientGate)):
                yield from gate_cases(op if isinstance(op, Gate) else op.gate, dtype, lanes)
            elif isinstance(op, LearnedGate):
                yield from learned_cases(op, dtype, lanes)
            elif isinstance(op, ForeachGate):
                yield from foreach_cases(op, dtype, lanes)
        cells = dict.fromkeys(cell for op in OPS.values() if isinstance(op, Loss) for cell in op.cells)
        for base, rule in cells:
            yield from cell_cases(base, rule, dtype, lanes)
        yield from shared_loss_cases(dtype, lanes)
