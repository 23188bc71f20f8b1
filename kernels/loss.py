"""The shell of all losses: base x rule, loss and gradient from one read; the final sum; the rescale; the recomputing backward.

`operands` are those of the base (BASE_COUNT), then of the rule (RULE_COUNT), then the weight if there is one. A full tile runs
without a mask (16-byte vectors for every n); the last tile has code of its own, since joining the two costs every tile 7
instructions an element in bf16.
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
    mask,
    operands,
    KINDS: tl.constexpr,
    BASE: tl.constexpr,
    BASE_COUNT: tl.constexpr,
    BASE_STATIC: tl.constexpr,
    RULE: tl.constexpr,
    RULE_COUNT: tl.constexpr,
    RULE_STATIC: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """Loss and slope of the elements base + lane, in the compute type."""
    x = operand.read(x_ptr + base + lane, mask).to(COMPUTE)
    y = operand.read(y_ptr + base + lane, mask).to(COMPUTE)
    values = operand.load_all(operands, KINDS, base, lane, mask)
    loss, slope, q, dq = BASE(x, y, _part(values, 0, BASE_COUNT), BASE_STATIC)
    loss, slope = RULE(loss, slope, x, y, q, dq, _part(values, BASE_COUNT, RULE_COUNT), RULE_STATIC)
    if len(KINDS) > BASE_COUNT + RULE_COUNT:
        weight = values[BASE_COUNT + RULE_COUNT].to(COMPUTE)
        loss *= weight
        slope *= weight
    return loss, slope


@triton.jit
def _reduced(total, n, REDUCTION: tl.constexpr):
    if REDUCTION == "mean":
        total = total / n.to(total.dtype)
    return total


@triton.jit
def _forward_tile(
    x_ptr,
    y_ptr,
    dx_ptr,
    out_ptr,
    n,
    base,
    lane,
    mask,
    operands,
    KINDS: tl.constexpr,
    BASE: tl.constexpr,
    BASE_COUNT: tl.constexpr,
    BASE_STATIC: tl.constexpr,
    RULE: tl.constexpr,
    RULE_COUNT: tl.constexpr,
    RULE_STATIC: tl.constexpr,
    COMPUTE: tl.constexpr,
    REDUCTION: tl.constexpr,
):
    """Store what is stored per element; return the tile's sum."""
    loss, slope = _evaluate(
        x_ptr,
        y_ptr,
        base,
        lane,
        mask,
        operands,
        KINDS,
        BASE,
        BASE_COUNT,
        BASE_STATIC,
        RULE,
        RULE_COUNT,
        RULE_STATIC,
        COMPUTE,
    )
    total = tl.zeros([], COMPUTE)
    if REDUCTION == "none":
        tl.store(out_ptr + base + lane, loss.to(out_ptr.dtype.element_ty), mask=mask)
    else:
        if dx_ptr is not None:
            scale = _reduced(tl.full([], 1.0, COMPUTE), n, REDUCTION)
            tl.store(dx_ptr + base + lane, (slope * scale).to(dx_ptr.dtype.element_ty), mask=mask)
        if mask is not None:
            loss = tl.where(mask, loss, 0.0)
        total = tl.sum(loss, axis=0)
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
    BASE_STATIC: tl.constexpr,
    RULE: tl.constexpr,
    RULE_COUNT: tl.constexpr,
    RULE_STATIC: tl.constexpr,
    COMPUTE: tl.constexpr,
    REDUCTION: tl.constexpr,
    SINGLE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """REDUCTION "none": out[element]. Else one partial sum a program (SINGLE: the result itself), and dx unless it is None."""
    base = tl.program_id(0).to(n.dtype) * BLOCK
    lane = tl.arange(0, BLOCK)
    left = n - base
    if left >= BLOCK:
        total = _forward_tile(
            x_ptr, y_ptr, dx_ptr, out_ptr, n, base, lane, None,
            operands, KINDS, BASE, BASE_COUNT, BASE_STATIC,
            RULE, RULE_COUNT, RULE_STATIC, COMPUTE, REDUCTION,
        )  # fmt: skip
    else:
        total = _forward_tile(
            x_ptr, y_ptr, dx_ptr, out_ptr, n, base, lane, lane < left,
            operands, KINDS, BASE, BASE_COUNT, BASE_STATIC,
            RULE, RULE_COUNT, RULE_STATIC, COMPUTE, REDUCTION,
        )  # fmt: skip
    if REDUCTION != "none":
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


@triton.jit
def _backward_tile(
    x_ptr,
    y_ptr,
    g_ptr,
    dx_ptr,
    n,
    base,
    lane,
    mask,
    operands,
    KINDS: tl.constexpr,
    BASE: tl.constexpr,
    BASE_COUNT: tl.constexpr,
    BASE_STATIC: tl.constexpr,
    RULE: tl.constexpr,
    RULE_COUNT: tl.constexpr,
    RULE_STATIC: tl.constexpr,
    COMPUTE: tl.constexpr,
    REDUCTION: tl.constexpr,
):
    loss, slope = _evaluate(
        x_ptr,
        y_ptr,
        base,
        lane,
        mask,
        operands,
        KINDS,
        BASE,
        BASE_COUNT,
        BASE_STATIC,
        RULE,
        RULE_COUNT,
        RULE_STATIC,
        COMPUTE,
    )
    if REDUCTION == "none":
        g = operand.read(g_ptr + base + lane, mask).to(COMPUTE)
    else:
        g = _reduced(tl.load(g_ptr).to(COMPUTE), n, REDUCTION)
    tl.store(dx_ptr + base + lane, (slope * g).to(dx_ptr.dtype.element_ty), mask=mask)


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
    BASE_STATIC: tl.constexpr,
    RULE: tl.constexpr,
    RULE_COUNT: tl.constexpr,
    RULE_STATIC: tl.constexpr,
    COMPUTE: tl.constexpr,
    REDUCTION: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """dx recomputed from the inputs; g has the loss's shape: one element, or one per element for REDUCTION "none"."""
    base = tl.program_id(0).to(n.dtype) * BLOCK
    lane = tl.arange(0, BLOCK)
    left = n - base
    if left >= BLOCK:
        _backward_tile(
            x_ptr, y_ptr, g_ptr, dx_ptr, n, base, lane, None,
            operands, KINDS, BASE, BASE_COUNT, BASE_STATIC,
            RULE, RULE_COUNT, RULE_STATIC, COMPUTE, REDUCTION,
        )  # fmt: skip
    else:
        _backward_tile(
            x_ptr, y_ptr, g_ptr, dx_ptr, n, base, lane, lane < left,
            operands, KINDS, BASE, BASE_COUNT, BASE_STATIC,
            RULE, RULE_COUNT, RULE_STATIC, COMPUTE, REDUCTION,
        )  # fmt: skip


@triton.jit
def _multiply(x_ptr, g, mask):
    x = operand.read(x_ptr, mask).to(g.dtype)
    tl.store(x_ptr, (x * g).to(x_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["n"])
def rescale(g_ptr, x_ptr, n, COMPUTE: tl.constexpr, BLOCK: tl.constexpr):
    """x *= g in place, g one element on the device; touches nothing but g when that is 1."""
    g = tl.load(g_ptr).to(COMPUTE)
    if g != 1.0:
        lane = tl.arange(0, BLOCK)
        start = tl.program_id(0).to(n.dtype) * BLOCK
        stride = tl.num_programs(0) * BLOCK
        left = n - start  # counts down: an offset that counts up would pass 2**31 on its last step
        x_ptr += start
        while left > 0:
            if left >= BLOCK:
                _multiply(x_ptr + lane, g, None)
            else:
                _multiply(x_ptr + lane, g, lane < left)
            x_ptr += stride
            left -= stride
