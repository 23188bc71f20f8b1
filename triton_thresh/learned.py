"""Runs the kernels of gates whose threshold learns: the matrix they see, two bits per element, sums over rows."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import layout, tuning
from .kernel_cache import Kernel
from .kernels import learned, pointwise
from .launch import CHANNEL, COMPUTE, ELEMENT, Mask, pack, pack_all
from .reference import compute_dtype
from .rules import Numbers, Operand

COUNT_BLOCK = 2048  # bytes of a mask's plane
ROWS = 32  # that a program of backward sums: partial sums and thresholds then cost 3/8 byte per element
WIDEST = 1 << 27  # eight rows are offset by less than 2**31


class LearnedCall(NamedTuple):
    """A gate whose threshold learns: its device functions, its constants, and the type all operands are compared in."""

    op: str
    forward: str
    backward: str
    constants: Numbers
    compute: torch.dtype
    reads_threshold: bool  # in backward
    counts: bool
    input_gradient: bool


@functools.lru_cache(maxsize=4096)
def learned_call(
    op: str,
    forward: str,
    constants: tuple[float, ...],
    compute: torch.dtype,
    reads_threshold: bool = False,
    counts: bool = False,
    input_gradient: bool = False,
) -> LearnedCall:
    """How the gate `op` is called; the device function of its backward has its name."""
    return LearnedCall(
        op, forward, f"{op}_backward", Numbers(constants), compute, reads_threshold, counts, input_gradient
    )


class Codes(NamedTuple):
    """What a learned gate saves: its packed codes (mask.block is the width of a row), and how its threshold meets them."""

    mask: Mask
    pattern: tuple[int, int]  # (inner, mid) of a threshold that keeps to its columns; (0, 0) of another


@functools.lru_cache(maxsize=4096)
def _wide(unit: int, n: int, block: int) -> int:
    """The multiple of `unit` that leaves the fewest lanes of its blocks idle, of those of which n holds eight rows."""
    fitting = [m * unit for m in range(1, max(8, block // unit) + 1) if n >= 8 * m * unit and m * unit <= WIDEST]
    return max(fitting, key=lambda width: width / (layout.blocks(width, block) * block), default=unit)


def rows(call: LearnedCall, threshold: Operand, x: Tensor, device: torch.device) -> tuple[int, tuple[int, int]]:
    """The width of the rows that the kernels see, and the threshold's (inner, mid), for a dense x on `device`."""
    block = tuning.choose("learned", call.op, x.dtype, x.numel(), device, False).config.block
    return _rows(x.shape, x.stride(), _own_shape(threshold), call.counts, block)


def _own_shape(threshold: Operand) -> tuple[int, ...] | None:
    """The shape of a threshold that is more than a number."""
    return threshold.shape if isinstance(threshold, Tensor) and threshold.numel() > 1 else None


@functools.lru_cache(maxsize=4096)
def _rows(
    shape: tuple[int, ...], stride: tuple[int, ...], own: tuple[int, ...] | None, counts: bool, block: int
) -> tuple[int, tuple[int, int]]:
    """The width of the rows that the kernels see, and the threshold's (inner, mid) if it keeps to its columns.

    A width is a multiple of 16, of the threshold's period and of the rows that are counted, and of about `block`
    elements or more; a count of few rows, or of very wide ones, takes them as they are.
    """
    n, features = math.prod(shape), shape[-1] if counts else 1
    pattern = (1, 1) if own is None else layout.broadcast_pattern(shape, stride, own)
    if pattern is not None:
        unit = math.lcm(math.prod(pattern), features, 16)
        if unit <= WIDEST and (n >= 8 * unit or (pattern == (1, 1) and not counts)):
            return _wide(unit, n, block), pattern
    unit = math.lcm(features, 16)
    if counts and (n < 8 * unit or unit > WIDEST):
        return features, pattern if pattern == (1, 1) else (0, 0)
    return _wide(unit, n, block), (0, 0)


def _column_operands(
    call: LearnedCall, threshold: Operand, x: Tensor, width: int, pattern: tuple[int, int]
) -> tuple[tuple[Any, ...], tuple[int, ...]]:
    """The threshold and the constants, packed; a threshold as wide as the rows is one that lies as they do."""
    constants, kinds = pack_all(call.constants, x, (call.compute,) * len(call.constants))
    whole = pattern == (1, width) and isinstance(threshold, Tensor)
    if whole and threshold.dim() == 1 and threshold.is_contiguous():  # type: ignore[union-attr]
        return ((threshold,), *constants), (ELEMENT, *kinds)
    packed, kind = pack(threshold, x, call.compute)
    if whole and kind == CHANNEL:
        packed, kind = packed[:1], ELEMENT
    return (packed, *constants), (kind, *kinds)


def _tiles(n: int, width: int, rows: int, block: int) -> tuple[int, int]:
    """Into how many blocks of so many rows, and of so many columns, a matrix falls."""
    return layout.blocks(n, rows * width), layout.blocks(width, block)


@functools.cache
def _forward_kernel(
    function: str, kinds: tuple[int, ...], compute: torch.dtype, bits: int, by_column: bool, block: int, warps: int
) -> Kernel:
    return Kernel(
        learned.forward,
        num_warps=warps,
        KINDS=kinds,
        FUNCTION=getattr(pointwise, function),
        COMPUTE=COMPUTE[compute],
        BITS=bits,
        BY_COLUMN=by_column,
        COLS=block,
    )


@functools.cache
def _count_kernel(parts: int, block: int) -> Kernel:
    return Kernel(learned.count, num_warps=4, PARTS=parts, BLOCK=block)


@functools.cache
def _backward_kernel(
    function: str,
    kinds: tuple[int, ...],
    compute: torch.dtype,
    input_gradient: bool,
    by_column: bool,
    groups: int,
    block: int,
    warps: int,
) -> Kernel:
    return Kernel(
        learned.backward,
        num_warps=warps,
        KINDS=kinds,
        FUNCTION=getattr(pointwise, function),
        COMPUTE=COMPUTE[compute],
        INPUT_GRADIENT=input_gradient,
        BY_COLUMN=by_column,
        GROUPS=groups,
        COLS=block,
    )


def forward(
    call: LearnedCall, threshold: Operand, input: Tensor, bits: int, memory: Tensor | None = None
) -> tuple[Tensor, Tensor | None, Codes | None]:
    """The gate's output, the count of each row if the op counts, and `bits` bits per element for backward (into `memory`)."""
    x = layout.dense(input)
    if call.counts:
        x = x.contiguous()
    n = x.numel()
    y = torch.empty_like(x)
    shape, stride = x.shape, x.stride()
    count = torch.empty(shape[:-1], dtype=compute_dtype(x.dtype), device=x.device) if call.counts else None
    if n == 0:
        count = count if count is None else count.zero_()
        empty = Mask(torch.empty(0, dtype=torch.uint8, device=x.device), 0, shape, stride)
        return torch.empty_like(input), count, Codes(empty, (0, 0))
    block, warps = tuning.choose("learned", call.op, x.dtype, n, x.device, False).config
    width, pattern = _rows(shape, stride, _own_shape(threshold), call.counts, block)
    if width > WIDEST:
        raise ValueError(f"{call.op}: input has rows of {shape[-1]} elements, expected at most {WIDEST}")
    operands, kinds = _column_operands(call, threshold, x, width, pattern)
    down, across = _tiles(n, width, 8, block)
    planes = max(bits, int(call.counts))
    mask = memory if bits else None
    if mask is None and planes:
        mask = torch.empty(planes * down * width, dtype=torch.uint8, device=x.device)
    kernel = _forward_kernel(call.forward, kinds, call.compute, planes, pattern != (0, 0), block, warps)
    kernel(down * across, x, y, mask, n, down, width, operands)
    if count is not None:
        lanes = min(COUNT_BLOCK, 1 << (shape[-1] - 1).bit_length())
        parts = COUNT_BLOCK // lanes
        kernel = _count_kernel(parts, lanes)
        kernel(layout.blocks(down * (width // shape[-1]), parts), mask, count, count.numel(), width, shape[-1])
    if call.counts and not input.is_contiguous():
        y = torch.empty_like(input).copy_(y)
    return y, count, Codes(Mask(mask, width, shape, stride), pattern) if mask is not None and bits else None


def backward(
    call: LearnedCall, threshold: Operand, codes: Codes, gradients: Sequence[Tensor], shape: torch.Size | None
) -> tuple[Tensor, Tensor | None]:
    """dx, and dt summed to the threshold's `shape` (None: not wanted) in the compute type."""
    mask, pattern = codes
    g = layout.laid_out_as(gradients[0], mask.shape, mask.stride)
    count = gradients[1].contiguous() if call.counts else None
    dx = torch.empty_strided(mask.shape, mask.stride, dtype=g.dtype, device=g.device)
    n, width, by_column = g.numel(), mask.block, pattern != (0, 0)
    if n == 0:
        return dx, None if shape is None else torch.zeros(shape, dtype=call.compute, device=g.device)
    block, warps = tuning.choose("learned", call.op, g.dtype, n, g.device, False).config
    rows = ROWS if by_column else 8
    down, across = _tiles(n, width, rows, block)
    dt = None
    if shape is not None and by_column:
        dt = torch.empty(down * width, dtype=call.compute, device=g.device)
    elif shape is not None:
        dt = torch.empty_like(dx, dtype=call.compute)
    operands, kinds = _column_operands(call, threshold if call.reads_threshold else 0.0, dx, width, pattern)
    features = mask.shape[-1] if call.counts else width
    kernel = _backward_kernel(
        call.backward, kinds, call.compute, call.input_gradient, by_column, rows // 8, block, warps
    )
    slices, counted = layout.blocks(n, 8 * width), None if features == width else features
    kernel(down * across, g, count, mask.bits, dx, dt, n, slices, width, counted, operands)
    if dt is None or shape is None:
        return dx, None
    if not by_column:
        return dx, layout.summed(dt, shape)
    inner, mid = pattern
    own = dt if dt.numel() == mid else dt.view(-1, mid).sum(0) if inner == 1 else dt.view(-1, mid, inner).sum((0, 2))
    return dx, layout.unblock(own, shape, mask.shape, mask.stride)
