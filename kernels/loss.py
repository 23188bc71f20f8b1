"""The shell of all losses: base x rule x options, loss and gradient from one read; the final sum; the rescale; the recomputing
backward; the count of valid elements; and `descend`, which writes the slope over the logits of a linear layer.

`operands` are those of the base (BASE_COUNT), then of the rule (RULE_COUNT), then those of the options, whose places WEIGHT,
SMOOTHING, DIVISOR (that of the mean, else n), MASK, KEPT and IGNORE say (None: there is none). LEAST and LABEL are the places of
the thresholds by which predictions and targets are counted; UNIT says that the base takes targets in [0, 1] alone.

A full tile runs without a mask (16-byte vectors for every n); the last tile has code of its own, since joining the two costs
every tile 7 instructions an element in bf16.
"""

import triton
import triton.language as tl

from . import operand


@triton.jit
def _part(values, START: tl.constexpr, COUNT: tl.constexpr):
    """COUNT of the values, from START on."""
    part = ()
    for i in tl.static_range(COUNT):
        part = part + (values[START + i],)
    return part


@triton.jit
def _differs(target, ignored):
    """True where a target as stored is not the one to ignore. NaN ignores NaN; among integers it ignores nothing."""
    if target.dtype.is_int():
        differs = tl.where(ignored == ignored, target != ignored.to(target.dtype), True)
    elif target.dtype == tl.float64:
        differs = tl.where(ignored == ignored, target != ignored.to(tl.float64), target == target)
    else:
        target, ignored = target.to(tl.float32), ignored.to(tl.float32)
        differs = tl.where(ignored == ignored, target != ignored, target == target)
    return differs


@triton.jit
def _valid(target, values, MASK: tl.constexpr, IGNORE: tl.constexpr):
    """True where an element counts."""
    if IGNORE is not None:
        valid = _differs(target, values[IGNORE])
    else:
        valid = tl.full(target.shape, True, tl.int1)
    if MASK is not None:
        valid = valid & (values[MASK] != 0)
    return valid


@triton.jit
def _smoothed(target, values, UNIT: tl.constexpr, SMOOTHING: tl.constexpr, COMPUTE: tl.constexpr):
    """The target that base and rule see."""
    y = operand.widen(target, COMPUTE)
    if SMOOTHING is not None:
        share = values[SMOOTHING].to(COMPUTE)
        smooth = tl.fma(y, 1.0 - share, 0.5 * share)
        if UNIT:
            smooth = tl.where((y >= 0.0) & (y <= 1.0), smooth, float("nan"))
        y = smooth
    return y


@triton.jit
def _weighed(
    x,
    y,
    values,
    BASE: tl.constexpr,
    BASE_COUNT: tl.constexpr,
    BASE_STATIC: tl.constexpr,
    RULE: tl.constexpr,
    RULE_COUNT: tl.constexpr,
    RULE_STATIC: tl.constexpr,
    WEIGHT: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """Loss and slope of elements in the compute type."""
    loss, slope, q, rest, dq = BASE(x, y, _part(values, 0, BASE_COUNT), BASE_STATIC)
    loss, slope = RULE(loss, slope, x, y, q, rest, dq, _part(values, BASE_COUNT, RULE_COUNT), RULE_STATIC)
    if WEIGHT is not None:
        weight = values[WEIGHT].to(COMPUTE)
        loss *= weight
        slope *= weight
    return loss, slope


@triton.jit
def _load(
    x_ptr,
    y_ptr,
    base,
    lane,
    mask,
    operands,
    KINDS: tl.constexpr,
    UNIT: tl.constexpr,
    SMOOTHING: tl.constexpr,
    MASK: tl.constexpr,
    IGNORE: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """Input and smoothed target of the elements base + lane in the compute type, True where they count, and the operands."""
    x = operand.widen(operand.read(x_ptr + base + lane, mask), COMPUTE)
    target = operand.read(y_ptr + base + lane, mask)
    values = operand.load_all(operands, KINDS, base, lane, mask)
    valid = _valid(target, values, MASK, IGNORE)
    return x, _smoothed(target, values, UNIT, SMOOTHING, COMPUTE), valid, values


@triton.jit
def _chosen(value, valid, values, MASK: tl.constexpr, KEPT: tl.constexpr, IGNORE: tl.constexpr):
    """A loss or a slope where an element counts and a rule kept it, else 0."""
    if KEPT is not None:
        value = tl.where(values[KEPT] != 0, value, 0.0)
    if MASK is not None or IGNORE is not None:
        value = tl.where(valid, value, 0.0)
    return value


@triton.jit
def _divisor(n, operands, KINDS: tl.constexpr, DIVISOR: tl.constexpr, REDUCTION: tl.constexpr, COMPUTE: tl.constexpr):
    """The number by which the sum is divided."""
    if REDUCTION != "mean":
        divisor = tl.full([], 1.0, COMPUTE)
    elif DIVISOR is None:
        divisor = n.to(COMPUTE)
    else:
        divisor = operand.load(operands[DIVISOR], KINDS[DIVISOR], 0, 0, None).to(COMPUTE)
    return divisor


@triton.jit
def _counted(x, y, valid, values, mask, RULE_STATIC: tl.constexpr, LEAST: tl.constexpr, LABEL: tl.constexpr):
    """1 for a valid element, 2**8 for a positive one, 2**16 for one predicted positive, 2**24 for both, added up.

    A program adds at most 64 of these in a lane, one for each tile of its block, so that no byte overflows.
    """
    least = values[LEAST].to(x.dtype)
    if RULE_STATIC[0] == "values":
        positive = y >= least
    elif LABEL is not None:
        positive = y > values[LABEL].to(x.dtype)
    else:
        positive = y > 0.5
    if mask is not None:
        valid = valid & mask
    found = tl.where(positive, 0x101, 1)
    found = tl.where(x >= least, found * 0x10001, found)
    return tl.where(valid, found, 0)


@triton.jit
def _forward_tile(
    x_ptr,
    y_ptr,
    dx_ptr,
    out_ptr,
    divisor,
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
    UNIT: tl.constexpr,
    WEIGHT: tl.constexpr,
    SMOOTHING: tl.constexpr,
    MASK: tl.constexpr,
    KEPT: tl.constexpr,
    IGNORE: tl.constexpr,
    LEAST: tl.constexpr,
    LABEL: tl.constexpr,
    COMPUTE: tl.constexpr,
    REDUCTION: tl.constexpr,
):
    """Store what is stored per element; return the losses to add up, and the counts."""
    x, y, valid, values = _load(
        x_ptr, y_ptr, base, lane, mask, operands, KINDS, UNIT, SMOOTHING, MASK, IGNORE, COMPUTE
    )  # fmt: skip
    counted = tl.zeros(lane.shape, tl.int32)
    if LEAST is not None:  # first, since what it reads would take registers from the loss
        counted = _counted(x, y, valid, values, mask, RULE_STATIC, LEAST, LABEL)
    loss, slope = _weighed(
        x, y, values, BASE, BASE_COUNT, BASE_STATIC, RULE, RULE_COUNT, RULE_STATIC, WEIGHT, COMPUTE
    )  # fmt: skip
    loss = _chosen(loss, valid, values, MASK, KEPT, IGNORE)
    if REDUCTION == "none":
        tl.store(out_ptr + base + lane, loss.to(out_ptr.dtype.element_ty), mask=mask)
    elif dx_ptr is not None:
        # Divided first, because the divisor is 0 where nothing is valid: the selection drops that infinity.
        slope = _chosen(slope * (1.0 / divisor), valid, values, MASK, KEPT, IGNORE)
        tl.store(dx_ptr + base + lane, slope.to(dx_ptr.dtype.element_ty), mask=mask)
    if mask is not None:
        loss = tl.where(mask, loss, 0.0)
    return loss, counted


@triton.jit(do_not_specialize=["n"])
def forward(
    x_ptr,
    y_ptr,
    dx_ptr,
    out_ptr,
    counts_ptr,
    n,
    operands,
    KINDS: tl.constexpr,
    BASE: tl.constexpr,
    BASE_COUNT: tl.constexpr,
    BASE_STATIC: tl.constexpr,
    RULE: tl.constexpr,
    RULE_COUNT: tl.constexpr,
    RULE_STATIC: tl.constexpr,
    UNIT: tl.constexpr,
    WEIGHT: tl.constexpr,
    SMOOTHING: tl.constexpr,
    DIVISOR: tl.constexpr,
    MASK: tl.constexpr,
    KEPT: tl.constexpr,
    IGNORE: tl.constexpr,
    LEAST: tl.constexpr,
    LABEL: tl.constexpr,
    COMPUTE: tl.constexpr,
    REDUCTION: tl.constexpr,
    SINGLE: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """REDUCTION "none": out[element]. Else one partial sum a program (SINGLE: the result itself), and dx unless it is None.

    counts, unless it is None, gets four numbers a program.
    """
    base = tl.program_id(0).to(n.dtype) * BLOCK
    lane = tl.arange(0, TILE)
    left = tl.minimum(n - base, BLOCK)
    divisor = _divisor(n, operands, KINDS, DIVISOR, REDUCTION, COMPUTE)
    total = tl.zeros([TILE], COMPUTE)
    counts = tl.zeros([TILE], tl.int32)
    while left >= TILE:
        loss, counted = _forward_tile(
            x_ptr, y_ptr, dx_ptr, out_ptr, divisor, base, lane, None,
            operands, KINDS, BASE, BASE_COUNT, BASE_STATIC, RULE, RULE_COUNT, RULE_STATIC,
            UNIT, WEIGHT, SMOOTHING, MASK, KEPT, IGNORE, LEAST, LABEL, COMPUTE, REDUCTION,
        )  # fmt: skip
        total += loss
        counts += counted
        base += TILE
        left -= TILE
    if left > 0:
        loss, counted = _forward_tile(
            x_ptr, y_ptr, dx_ptr, out_ptr, divisor, base, lane, lane < left,
            operands, KINDS, BASE, BASE_COUNT, BASE_STATIC, RULE, RULE_COUNT, RULE_STATIC,
            UNIT, WEIGHT, SMOOTHING, MASK, KEPT, IGNORE, LEAST, LABEL, COMPUTE, REDUCTION,
        )  # fmt: skip
        total += loss
        counts += counted
    if counts_ptr is not None:
        counts_ptr += tl.program_id(0)
        for i in tl.static_range(4):
            tl.store(counts_ptr + i * tl.num_programs(0), tl.sum(counts >> (8 * i) & 255, axis=0).to(tl.int64))
    if REDUCTION != "none":
        loss = tl.sum(total, axis=0)
        if SINGLE:
            loss = loss / divisor
        tl.store(out_ptr + tl.program_id(0), loss.to(out_ptr.dtype.element_ty))


@triton.jit
def _sum_of(partial_ptr, partials, BLOCK: tl.constexpr):
    """The partial sums added in index order."""
    total = tl.zeros([BLOCK], dtype=partial_ptr.dtype.element_ty)
    start = 0
    while start < partials:
        o = start + tl.arange(0, BLOCK)
        total += tl.load(partial_ptr + o, mask=o < partials, other=0)
        start += BLOCK
    return tl.sum(total, axis=0)


@triton.jit(do_not_specialize=["n", "partials"])
def finish(
    partial_ptr,
    out_ptr,
    counts_ptr,
    stats_ptr,
    n,
    partials,
    operands,
    KINDS: tl.constexpr,
    REDUCTION: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The partial sums added by one program, divided for the mean, rounded once; and the four counts, unless they are None.

    `operands` is empty, or the divisor.
    """
    if REDUCTION != "none":
        DIVISOR: tl.constexpr = 0 if len(KINDS) > 0 else None
        divisor = _divisor(n, operands, KINDS, DIVISOR, REDUCTION, partial_ptr.dtype.element_ty)
        tl.store(out_ptr, (_sum_of(partial_ptr, partials, BLOCK) / divisor).to(out_ptr.dtype.element_ty))
    if counts_ptr is not None:
        for i in tl.static_range(4):
            tl.store(stats_ptr + i, _sum_of(counts_ptr + i * partials, partials, BLOCK))


@triton.jit(do_not_specialize=["n"])
def count(
    y_ptr, out_ptr, n, operands, KINDS: tl.constexpr, MASK: tl.constexpr, IGNORE: tl.constexpr, BLOCK: tl.constexpr
):
    """Add to out how many elements are valid. The target is read where it may say that one is to be ignored."""
    lane = tl.arange(0, BLOCK)
    base = tl.program_id(0).to(n.dtype) * BLOCK
    stride = tl.num_programs(0) * BLOCK
    total = tl.zeros([BLOCK], tl.int32)
    left = n - base  # counts down: an offset that counts up would pass 2**31 on its last step
    while left > 0:
        inside = lane < left
        values = operand.load_all(operands, KINDS, base, lane, inside)
        target = lane
        if IGNORE is not None:
            target = operand.read(y_ptr + base + lane, inside)
        total += (_valid(target, values, MASK, IGNORE) & inside).to(tl.int32)
        left -= stride
        if left > 0:
            base += stride
    tl.atomic_add(out_ptr, tl.sum(total.to(tl.int64), axis=0), sem="relaxed")


@triton.jit
def _backward_tile(
    x_ptr,
    y_ptr,
    g_ptr,
    dx_ptr,
    g,
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
    UNIT: tl.constexpr,
    WEIGHT: tl.constexpr,
    SMOOTHING: tl.constexpr,
    MASK: tl.constexpr,
    KEPT: tl.constexpr,
    IGNORE: tl.constexpr,
    COMPUTE: tl.constexpr,
    REDUCTION: tl.constexpr,
):
    """Store dx, which is the slope times g; for REDUCTION "none" each element loads its own g."""
    x, y, valid, values = _load(
        x_ptr, y_ptr, base, lane, mask, operands, KINDS, UNIT, SMOOTHING, MASK, IGNORE, COMPUTE
    )  # fmt: skip
    _, slope = _weighed(
        x, y, values, BASE, BASE_COUNT, BASE_STATIC, RULE, RULE_COUNT, RULE_STATIC, WEIGHT, COMPUTE
    )  # fmt: skip
    if REDUCTION == "none":
        g = operand.read(g_ptr + base + lane, mask).to(COMPUTE)
    slope = _chosen(slope * g, valid, values, MASK, KEPT, IGNORE)
    tl.store(dx_ptr + base + lane, slope.to(dx_ptr.dtype.element_ty), mask=mask)


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
    UNIT: tl.constexpr,
    WEIGHT: tl.constexpr,
    SMOOTHING: tl.constexpr,
    DIVISOR: tl.constexpr,
    MASK: tl.constexpr,
    KEPT: tl.constexpr,
    IGNORE: tl.constexpr,
    COMPUTE: tl.constexpr,
    REDUCTION: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """dx recomputed from the inputs; g has the loss's shape: one element, or one per element for REDUCTION "none"."""
    base = tl.program_id(0).to(n.dtype) * BLOCK
    lane = tl.arange(0, TILE)
    left = tl.minimum(n - base, BLOCK)
    if REDUCTION == "none":  # the elements read their own
        g = None
    else:
        g = tl.load(g_ptr).to(COMPUTE) / _divisor(n, operands, KINDS, DIVISOR, REDUCTION, COMPUTE)
    while left >= TILE:
        _backward_tile(
            x_ptr, y_ptr, g_ptr, dx_ptr, g, base, lane, None,
            operands, KINDS, BASE, BASE_COUNT, BASE_STATIC, RULE, RULE_COUNT, RULE_STATIC,
            UNIT, WEIGHT, SMOOTHING, MASK, KEPT, IGNORE, COMPUTE, REDUCTION,
        )  # fmt: skip
        base += TILE
        left -= TILE
    if left > 0:
        _backward_tile(
            x_ptr, y_ptr, g_ptr, dx_ptr, g, base, lane, lane < left,
            operands, KINDS, BASE, BASE_COUNT, BASE_STATIC, RULE, RULE_COUNT, RULE_STATIC,
            UNIT, WEIGHT, SMOOTHING, MASK, KEPT, IGNORE, COMPUTE, REDUCTION,
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


@triton.jit
def _descend_tile(
    x_ptr,
    y_ptr,
    width,
    stride,
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
    UNIT: tl.constexpr,
    SMOOTHING: tl.constexpr,
    SCALE: tl.constexpr,
    BIAS: tl.constexpr,
    FACTOR: tl.constexpr,
    STRIDED: tl.constexpr,
    WRITES: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    x = operand.widen(operand.read(x_ptr + base + lane, mask), COMPUTE)
    values = operand.load_all(operands, KINDS, base, lane, mask)
    if SCALE is not None:
        x *= values[SCALE].to(COMPUTE)
    if BIAS is not None:
        x += values[BIAS].to(COMPUTE)
    offset = base + lane
    if STRIDED:
        row = offset // width
        offset = row.to(tl.int64) * stride + (offset - row * width)
    y = _smoothed(operand.read(y_ptr + offset, mask), values, UNIT, SMOOTHING, COMPUTE)
    loss, slope = _weighed(
        x, y, values, BASE, BASE_COUNT, BASE_STATIC, RULE, RULE_COUNT, RULE_STATIC, None, COMPUTE
    )  # fmt: skip
    if WRITES:
        if FACTOR is not None:
            slope *= values[FACTOR].to(COMPUTE)
        tl.store(x_ptr + base + lane, slope.to(x_ptr.dtype.element_ty), mask=mask)
    if mask is not None:
        loss = tl.where(mask, loss, 0.0)
    return loss


@triton.jit(do_not_specialize=["n", "width", "stride"])
def descend(
    x_ptr,
    y_ptr,
    partial_ptr,
    n,
    width,
    stride,
    operands,
    KINDS: tl.constexpr,
    BASE: tl.constexpr,
    BASE_COUNT: tl.constexpr,
    BASE_STATIC: tl.constexpr,
    RULE: tl.constexpr,
    RULE_COUNT: tl.constexpr,
    RULE_STATIC: tl.constexpr,
    UNIT: tl.constexpr,
    SMOOTHING: tl.constexpr,
    SCALE: tl.constexpr,
    BIAS: tl.constexpr,
    FACTOR: tl.constexpr,
    STRIDED: tl.constexpr,
    WRITES: tl.constexpr,
    COMPUTE: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One partial sum a program; the slope times FACTOR is written over x if it WRITES.

    The loss is that of x SCALE + BIAS, places in the operands. x has rows of `width`; those of the target are `stride` apart if
    it is STRIDED.
    """
    base = tl.program_id(0).to(n.dtype) * BLOCK
    lane = tl.arange(0, TILE)
    left = tl.minimum(n - base, BLOCK)
    total = tl.zeros([TILE], COMPUTE)
    while left >= TILE:
        total += _descend_tile(
            x_ptr, y_ptr, width, stride, base, lane, None,
            operands, KINDS, BASE, BASE_COUNT, BASE_STATIC, RULE, RULE_COUNT, RULE_STATIC,
            UNIT, SMOOTHING, SCALE, BIAS, FACTOR, STRIDED, WRITES, COMPUTE,
        )  # fmt: skip
        base += TILE
        left -= TILE
    if left > 0:
        total += _descend_tile(
            x_ptr, y_ptr, width, stride, base, lane, lane < left,
            operands, KINDS, BASE, BASE_COUNT, BASE_STATIC, RULE, RULE_COUNT, RULE_STATIC,
            UNIT, SMOOTHING, SCALE, BIAS, FACTOR, STRIDED, WRITES, COMPUTE,
        )  # fmt: skip
    tl.store(partial_ptr + tl.program_id(0), tl.sum(total, axis=0))
