"""The shell of all losses: base x rule, loss and gradient from one read; the final sum; the rescale; the recomputing backward.

`operands` are those of the base (BASE_COUNT), then of the rule (RULE_COUNT), then the weight if there is one. Full tiles
load and store without a mask (16-byte vectors for every n), the arithmetic between is compiled once for both.
"""

import triton
import triton.language as tl

from . import operand


@triton.jit
def _part(values, START: tl.constexpr, COUNT: tl.constexpr):
    part = ()
    for i in tl.static_range(COUNT):
        part = part + (values[START + i],)
    return part


@triton.jit
def _evaluate(
    x_ptr,
    y_ptr,
    base,
    lane,
    left,
    operands,
    KINDS: tl.constexpr,
    BASE: tl.constexpr,
    BASE_COUNT: tl.constexpr,
    RULE: tl.constexpr,
    RULE_COUNT: tl.constexpr,
    COMPUTE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Loss and slope of the elements base + lane, in the compute type."""
    if left >= BLOCK:
        x = tl.load(x_ptr + base + lane)
        y = tl.load(y_ptr + base + lane)
        values = operand.load_all(operands, KINDS, base, lane, None)
    else:
        x = operand.read(x_ptr + base + lane, lane < left)
        y = operand.read(y_ptr + base + lane, lane < left)
        values = operand.load_all(operands, KINDS, base, lane, lane < left)
    x = x.to(COMPUTE)
    loss, slope, q, dq = BASE(x, y.to(COMPUTE), _part(values, 0, BASE_COUNT))
    loss, slope = RULE(loss, slope, x, q, dq, _part(values, BASE_COUNT, RULE_COUNT))
    if len(KINDS) > BASE_COUNT + RULE_COUNT:
        weight = values[BASE_COUNT + RULE_COUNT].to(COMPUTE)
        loss *= weight
        slope *= weight
    return loss, slope


@triton.jit
def _write(pointer, value, lane, left, BLOCK: tl.constexpr):
    value = value.to(pointer.dtype.element_ty)
    if left >= BLOCK:
        tl.store(pointer + lane, value)
    else:
        tl.store(pointer + lane, value, mask=lane < left)


@triton.jit
def _reduced(total, n, REDUCTION: tl.constexpr):
    if REDUCTION == "mean":
        total = total / n.to(total.dtype)
    return total


@triton.jit(do_not_specialize=["n"])
def forward(
    x_ptr,
    y_ptr,
    dx_ptr,
    out_ptr,
    n,
    operands,
    KINDS: tl.constexpr,
    BASE: tl.constexpr,
    BASE_COUNT: tl.constexpr,
    RULE: tl.constexpr,
    RULE_COUNT: tl.constexpr,
    COMPUTE: tl.constexpr,
    REDUCTION: tl.constexpr,
    SINGLE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """REDUCTION "none": out[element]. Else one partial sum a program (SINGLE: the result itself), and dx unless it is None."""
    base = tl.program_id(0).to(n.dtype) * BLOCK
    lane = tl.arange(0, BLOCK)
    left = n - base
    loss, slope = _evaluate(
        x_ptr, y_ptr, base, lane, left, operands, KINDS, BASE, BASE_COUNT, RULE, RULE_COUNT, COMPUTE, BLOCK
    )
    if REDUCTION == "none":
        _write(out_ptr + base, loss, lane, left, BLOCK)
    else:
        if dx_ptr is not None:
            scale = _reduced(tl.full([], 1.0, COMPUTE), n, REDUCTION)
            _write(dx_ptr + base, slope * scale, lane, left, BLOCK)
        if left < BLOCK:
            loss = tl.where(lane < left, loss, 0.0)
        total = tl.sum(loss, axis=0)
        if SINGLE:
            total = _reduced(total, n, REDUCTION)
        tl.store(out_ptr + tl.program_id(0), total.to(out_ptr.dtype.element_ty))


@triton.jit(do_not_specialize=["n", "partials"])
def finish(partial_ptr, out_ptr, n, partials, REDUCTION: tl.constexpr, BLOCK: tl.constexpr):
    """The partial sums added in index order by one program, divided by n for the mean, rounded once."""
    total = tl.zeros([BLOCK], dtype=partial_ptr.dtype.element_ty)
    start = 0
    while start < partials:
        o = start + tl.arange(0, BLOCK)
        total += tl.load(partial_ptr + o, mask=o < partials, other=0.0)
        start += BLOCK
    tl.store(out_ptr, _reduced(tl.sum(total, axis=0), n, REDUCTION).to(out_ptr.dtype.element_ty))


@triton.jit(do_not_specialize=["n"])
def backward(
    x_ptr,
    y_ptr,
    g_ptr,
    dx_ptr,
    n,
    operands,
    KINDS: tl.constexpr,
    BASE: tl.constexpr,
    BASE_COUNT: tl.constexpr,
    RULE: tl.constexpr,
    RULE_COUNT: tl.constexpr,
    COMPUTE: tl.constexpr,
    REDUCTION: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """dx recomputed from the inputs; g has the loss's shape: one element, or one per element for REDUCTION "none"."""
    base = tl.program_id(0).to(n.dtype) * BLOCK
    lane = tl.arange(0, BLOCK)
    left = n - base
    loss, slope = _evaluate(
        x_ptr, y_ptr, base, lane, left, operands, KINDS, BASE, BASE_COUNT, RULE, RULE_COUNT, COMPUTE, BLOCK
    )
    if REDUCTION == "none":
        if left >= BLOCK:
            g = tl.load(g_ptr + base + lane)
        else:
            g = operand.read(g_ptr + base + lane, lane < left)
        slope *= g.to(COMPUTE)
    else:
        slope *= _reduced(tl.load(g_ptr).to(COMPUTE), n, REDUCTION)
    _write(dx_ptr + base, slope, lane, left, BLOCK)


@triton.jit(do_not_specialize=["n"])
def rescale(g_ptr, x_ptr, n, COMPUTE: tl.constexpr, BLOCK: tl.constexpr):
    """x *= g in place, g one element on the device; touches nothing but g when that is 1."""
    g = tl.load(g_ptr).to(COMPUTE)
    if g != 1.0:
        lane = tl.arange(0, BLOCK)
        base = tl.program_id(0).to(n.dtype) * BLOCK
        while base < n:
            left = n - base
            if left >= BLOCK:
                x = tl.load(x_ptr + base + lane)
            else:
                x = operand.read(x_ptr + base + lane, lane < left)
            _write(x_ptr + base, x.to(COMPUTE) * g, lane, left, BLOCK)
            base += tl.num_programs(0).to(n.dtype) * BLOCK
