"""The shell of all gates: load, select, store, and at most two bits per element for backward.

The input is seen as rows of `width` elements, and byte (r, c) of a plane of bits holds, as bit j, element (8 r + j, c). Each
thread owns whole bytes, so that packing needs no shuffle and no shared memory. A full tile runs unmasked (16-byte vectors for
every n), the last one apart in a loop that the compiler cannot unroll (unrolled it costs up to 146 registers and, with
per-channel thresholds, spills).

With width None a row is one block of COLS elements. Gates whose threshold learns have rows by column instead: width is a multiple
of the threshold's period and of 16, so an entry of the threshold meets the same columns in every row and is loaded once per
program, and every row starts where a 16-byte vector may. Sums run down the rows, each thread over columns of its own, and leave
one partial sum per column and program.
"""

import triton
import triton.language as tl

from . import operand


@triton.jit
def _select(x, values, y_ptr, mask, FUNCTION: tl.constexpr, COMPUTE: tl.constexpr, PROMOTED: tl.constexpr):
    """Store y and return its code."""
    if PROMOTED is None:
        c = x.to(COMPUTE)
    else:
        # By way of float32, as torch rounds an integer. Without the addition, which costs nothing, one cast is made of both.
        c = (x.to(tl.float32) + 0.0).to(PROMOTED).to(COMPUTE)
    y, code = FUNCTION(x, c, values)
    tl.store(y_ptr, y.to(y_ptr.dtype.element_ty), mask=mask)
    return code


@triton.jit
def _both(a, b):
    """a & b, where b may be None for true."""
    if b is None:
        both = a
    else:
        both = a & b
    return both


@triton.jit(do_not_specialize=["n", "groups"])
def forward(
    x_ptr,
    y_ptr,
    mask_ptr,
    n,
    groups,
    width,
    operands,
    KINDS: tl.constexpr,
    FUNCTION: tl.constexpr,
    COMPUTE: tl.constexpr,
    PROMOTED: tl.constexpr,
    BITS: tl.constexpr,
    BY_COLUMN: tl.constexpr,
    COLS: tl.constexpr,
):
    """y = FUNCTION(x), and BITS planes of its code (0: no gradient is wanted); `groups` of eight rows.

    PROMOTED: the 16-bit type in which an integer x is compared, if it is.
    """
    lane = tl.arange(0, COLS)
    if width is None:
        row = COLS
        block = tl.program_id(0).to(n.dtype)
        column = 0
        inside = None
    else:
        row = width
        tiles = tl.cdiv(width, COLS)
        block = (tl.program_id(0) // tiles).to(n.dtype)
        column = tl.program_id(0) % tiles * COLS
        inside = column + lane < width
    base = block * (8 * row) + column
    left = n - base
    x_ptr += base  # but not y_ptr: made this early, that address went to the stack in some kernels
    low = tl.zeros([COLS], dtype=tl.int32)
    high = tl.zeros([COLS], dtype=tl.int32)
    values = ()
    if BY_COLUMN:
        values = operand.load_all(operands, KINDS, column, lane, inside)
    if left + column >= 8 * row:
        xs = ()
        vs = ()
        for j in tl.static_range(8):  # all loads in flight before the first store
            xs = xs + (operand.read(x_ptr + (j * row + lane), inside),)
            if BY_COLUMN:
                vs = vs + (values,)
            else:
                vs = vs + (operand.load_all(operands, KINDS, base, j * row + lane, inside),)
        for j in tl.static_range(8):
            code = _select(xs[j], vs[j], y_ptr + base + (j * row + lane), inside, FUNCTION, COMPUTE, PROMOTED)
            if BITS >= 1:
                low |= (code & 1) << j
            if BITS == 2:
                high |= (code >> 1) << j
    else:
        j = 0
        while j * row < left:
            o = j * row + lane
            valid = _both(o < left, inside)
            x = operand.read(x_ptr + o, valid)
            if BY_COLUMN:
                vs = values
            else:
                vs = operand.load_all(operands, KINDS, base, o, valid)
            code = _select(x, vs, y_ptr + base + o, valid, FUNCTION, COMPUTE, PROMOTED)
            if BITS >= 1:
                low |= (code & 1) << j
            if BITS == 2:
                high |= (code >> 1) << j
            j += 1
    cell = block * row + column + lane
    if BITS >= 1:
        tl.store(mask_ptr + cell, low.to(tl.uint8), mask=inside)
    if BITS == 2:
        tl.store(mask_ptr + groups.to(n.dtype) * row + cell, high.to(tl.uint8), mask=inside)


@triton.jit(do_not_specialize=["n"])
def backward_bit(g_ptr, mask_ptr, dx_ptr, n, COLS: tl.constexpr):
    """dx = g where the element's bit is set, else 0."""
    pid = tl.program_id(0)
    base = pid.to(n.dtype) * (8 * COLS)
    lane = tl.arange(0, COLS)
    g_ptr += base
    dx_ptr += base
    left = n - base
    bits = tl.load(mask_ptr + pid.to(n.dtype) * COLS + lane).to(tl.int32)
    if left >= 8 * COLS:
        gs = ()
        for j in tl.static_range(8):
            gs = gs + (tl.load(g_ptr + (j * COLS + lane)),)
        for j in tl.static_range(8):
            tl.store(dx_ptr + (j * COLS + lane), tl.where(((bits >> j) & 1) != 0, gs[j], 0.0))
    else:
        j = 0
        while j * COLS < left:
            o = j * COLS + lane
            g = operand.read(g_ptr + o, o < left)
            tl.store(dx_ptr + o, tl.where(((bits >> j) & 1) != 0, g, 0.0), mask=o < left)
            j += 1


@triton.jit
def _slope(x, g, values, dx_ptr, mask, FUNCTION: tl.constexpr, COMPUTE: tl.constexpr):
    """Store g times dy/dx."""
    _, slope = FUNCTION(x, x.to(COMPUTE), values)
    dx = tl.where(slope == 0.0, 0.0, g.to(COMPUTE) * slope)  # an infinite g does not meet a slope of 0
    tl.store(dx_ptr, dx.to(dx_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["n"])
def backward_input(
    g_ptr,
    x_ptr,
    dx_ptr,
    n,
    operands,
    KINDS: tl.constexpr,
    FUNCTION: tl.constexpr,
    COMPUTE: tl.constexpr,
    COLS: tl.constexpr,
):
    """dx = g dy/dx, with dy/dx evaluated again from the input."""
    base = tl.program_id(0).to(n.dtype) * (8 * COLS)
    lane = tl.arange(0, COLS)
    g_ptr += base
    x_ptr += base
    dx_ptr += base
    left = n - base
    if left >= 8 * COLS:
        gs = ()
        xs = ()
        vs = ()
        for j in tl.static_range(8):  # all loads in flight before the first store
            gs = gs + (tl.load(g_ptr + (j * COLS + lane)),)
            xs = xs + (tl.load(x_ptr + (j * COLS + lane)),)
            vs = vs + (operand.load_all(operands, KINDS, base, j * COLS + lane, None),)
        for j in tl.static_range(8):
            _slope(xs[j], gs[j], vs[j], dx_ptr + (j * COLS + lane), None, FUNCTION, COMPUTE)
    else:
        j = 0
        while j * COLS < left:
            o = j * COLS + lane
            g = operand.read(g_ptr + o, o < left)
            x = operand.read(x_ptr + o, o < left)
            _slope(x, g, operand.load_all(operands, KINDS, base, o, o < left), dx_ptr + o, o < left, FUNCTION, COMPUTE)
            j += 1


@triton.jit
def _store_wide(ptr, value, column, limit, NARROW: tl.constexpr, COLS: tl.constexpr):
    """Store columns below `limit`; what is twice as wide as a 16-bit NARROW by halves, so that threads keep their columns."""
    if NARROW.primitive_bitwidth * 2 == value.dtype.primitive_bitwidth:
        first, second = tl.split(tl.permute(tl.reshape(value, [COLS // 8, 2, 4]), [0, 2, 1]))
        o = column + 8 * tl.arange(0, COLS // 8)[:, None] + tl.arange(0, 4)[None, :]
        tl.store(ptr + o, first, mask=o < limit)
        tl.store(ptr + o + 4, second, mask=o + 4 < limit)
    else:
        o = column + tl.arange(0, COLS)
        tl.store(ptr + o, value, mask=o < limit)


@triton.jit
def _gradient(
    g,
    count,
    low,
    high,
    j,
    values,
    dx_ptr,
    dt_ptr,
    start,
    column,
    limit,
    FUNCTION: tl.constexpr,
    COMPUTE: tl.constexpr,
    INPUT_GRADIENT: tl.constexpr,
    BY_COLUMN: tl.constexpr,
    COLS: tl.constexpr,
):
    """Store dx of the row that starts at `start`, and dt unless it is summed by column; return dt."""
    o = column + tl.arange(0, COLS)
    code = ((low >> j) & 1) | ((high >> j) & 1) << 1
    if len(count) == 0:
        upstream = (g.to(COMPUTE),)
    else:
        upstream = (g.to(COMPUTE), count[0].to(COMPUTE))
    dx, dt = FUNCTION(upstream, code, values)
    if INPUT_GRADIENT:
        dx -= dt
    tl.store(dx_ptr + start + o, dx.to(dx_ptr.dtype.element_ty), mask=o < limit)
    if not BY_COLUMN and dt_ptr is not None:
        _store_wide(dt_ptr + start, dt, column, limit, g.dtype, COLS)
    return dt


@triton.jit
def _count(count_ptr, row, column, width, features, mask):
    """A tuple of the gradient of the count of a row's stretch of `features` elements (None: the whole row), if there is one."""
    if count_ptr is None:
        count = ()
    elif features is None:
        count = (tl.load(count_ptr + row),)
    else:
        count = (operand.read(count_ptr + row * (width // features) + column // features, mask),)
    return count


@triton.jit(do_not_specialize=["n", "groups"])
def backward_code(
    g_ptr,
    count_ptr,
    mask_ptr,
    dx_ptr,
    dt_ptr,
    n,
    groups,
    width,
    features,
    operands,
    KINDS: tl.constexpr,
    FUNCTION: tl.constexpr,
    COMPUTE: tl.constexpr,
    BITS: tl.constexpr,
    INPUT_GRADIENT: tl.constexpr,
    BY_COLUMN: tl.constexpr,
    GROUPS: tl.constexpr,
    COLS: tl.constexpr,
):
    """dx, dt = FUNCTION(g, code); dt (None: not wanted) by column as partial sums over 8 * GROUPS rows, else elementwise.

    count_ptr: the upstream gradient of the count of every `features` elements, if the op counts.
    """
    tiles = tl.cdiv(width, COLS)
    block = (tl.program_id(0) // tiles).to(n.dtype)
    column = tl.program_id(0) % tiles * COLS
    o = column + tl.arange(0, COLS)
    inside = o < width
    plane = groups.to(n.dtype) * width
    total = tl.zeros([COLS], dtype=COMPUTE)
    values = ()
    if BY_COLUMN:
        values = operand.load_all(operands, KINDS, column, tl.arange(0, COLS), inside)
    i = 0
    while (i < GROUPS) & (block * GROUPS + i < groups):
        group = block * GROUPS + i
        base = group * (8 * width)
        left = n - base
        low = operand.read(mask_ptr + group * width + o, inside).to(tl.int32)
        high = tl.zeros([COLS], dtype=tl.int32)
        if BITS == 2:
            high = operand.read(mask_ptr + plane + group * width + o, inside).to(tl.int32)
        if left >= 8 * width:
            gs = ()
            cs = ()
            vs = ()
            for j in tl.static_range(8):  # all loads in flight before the first store
                if features is None:  # before g: up to 48 registers fewer
                    cs = cs + (_count(count_ptr, group * 8 + j, o, width, features, inside),)
                gs = gs + (operand.read(g_ptr + base + (j * width + o), inside),)
                if BY_COLUMN:
                    vs = vs + (values,)
                else:
                    vs = vs + (operand.load_all(operands, KINDS, base, j * width + o, inside),)
            for j in tl.static_range(8):
                if features is None:
                    count = cs[j]
                else:  # 64 registers if loaded above
                    count = _count(count_ptr, group * 8 + j, o, width, features, inside)
                total += _gradient(
                    gs[j],
                    count,
                    low,
                    high,
                    j,
                    vs[j],
                    dx_ptr,
                    dt_ptr,
                    base + j * width,
                    column,
                    width,
                    FUNCTION,
                    COMPUTE,
                    INPUT_GRADIENT,
                    BY_COLUMN,
                    COLS,
                )
        else:
            j = 0
            while (j < 8) & (j * width < left):
                limit = tl.minimum(left - j * width, width)
                valid = o < limit
                g = operand.read(g_ptr + base + j * width + o, valid)
                count = _count(count_ptr, group * 8 + j, o, width, features, valid)
                if BY_COLUMN:
                    vs = values
                else:
                    vs = operand.load_all(operands, KINDS, base, j * width + o, valid)
                dt = _gradient(
                    g,
                    count,
                    low,
                    high,
                    j,
                    vs,
                    dx_ptr,
                    dt_ptr,
                    base + j * width,
                    column,
                    limit,
                    FUNCTION,
                    COMPUTE,
                    INPUT_GRADIENT,
                    BY_COLUMN,
                    COLS,
                )
                total += tl.where(valid, dt, 0.0)
                j += 1
        i += 1
    if BY_COLUMN and dt_ptr is not None:
        _store_wide(dt_ptr + block * width, total, column, width, g_ptr.dtype.element_ty, COLS)


@triton.jit(do_not_specialize=["rows", "groups"])
def fired(mask_ptr, out_ptr, rows, groups, width, features, GROUPS: tl.constexpr, BLOCK: tl.constexpr):
    """Add to out how many bits of the first plane are set for each of `features`, GROUPS * width bytes a program.

    Bit j of a byte belongs to row (8 * group + j) * (width // features) + column // features of `rows`; later ones do not count.
    """
    tiles = tl.cdiv(width, BLOCK)
    column = tl.program_id(0) % tiles * BLOCK + tl.arange(0, BLOCK)
    first = tl.program_id(0) // tiles * GROUPS
    parts = width // features
    held = ((rows - column // features).to(tl.int64) + (parts - 1)) // parts  # of the column's rows
    total = tl.zeros([BLOCK], dtype=tl.int32)
    i = first
    while (i < first + GROUPS) & (i < groups):
        bits = operand.read(mask_ptr + i.to(tl.int64) * width + column, column < width).to(tl.int32)
        bits &= (1 << tl.minimum(tl.maximum(held - 8 * i, 0), 8).to(tl.int32)) - 1
        bits -= (bits >> 1) & 0x55
        bits = (bits & 0x33) + ((bits >> 2) & 0x33)
        total += (bits + (bits >> 4)) & 15
        i += 1
    tl.atomic_add(out_ptr + column % features, total.to(tl.int64), mask=total > 0, sem="relaxed")


@triton.jit(do_not_specialize=["rows"])
def count(mask_ptr, out_ptr, rows, width, features, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    """How many bits of the first plane are set in each of `rows` rows of `features` elements.

    A byte holds a bit of eight such rows; a program takes PARTS stretches of `features` bytes. Four bits of a byte are spread
    over the bytes of an int32, (b * 0x204081) & 0x01010101, and 255 of those may be added up.
    """
    parts = width // features
    stretch = tl.program_id(0).to(tl.int64) * PARTS + tl.arange(0, PARTS)
    group = stretch // parts
    part = stretch % parts
    start = group * width + part * features
    lane = tl.arange(0, BLOCK)[None, :]
    four = tl.arange(0, 4)[None, :]
    first = tl.zeros([PARTS, 4], dtype=tl.int32)
    last = tl.zeros([PARTS, 4], dtype=tl.int32)
    held = (8 * group * parts + part < rows)[:, None]
    i = 0
    while i < features:
        low = tl.zeros([PARTS, BLOCK], dtype=tl.int32)
        high = tl.zeros([PARTS, BLOCK], dtype=tl.int32)
        j = 0
        while (j < 128) & (i < features):
            loaded = ()
            for k in tl.static_range(4):  # in flight together: one after the other takes twice the time
                o = i + k * BLOCK + lane
                loaded = loaded + (operand.read(mask_ptr + start[:, None] + o, held & (o < features)).to(tl.int32),)
            for k in tl.static_range(4):
                low += ((loaded[k] & 15) * 0x204081) & 0x01010101
                high += ((loaded[k] >> 4) * 0x204081) & 0x01010101
            i += 4 * BLOCK
            j += 4
        for k in tl.static_range(4):
            first += tl.where(four == k, tl.sum((low >> (8 * k)) & 255, axis=1)[:, None], 0)
            last += tl.where(four == k, tl.sum((high >> (8 * k)) & 255, axis=1)[:, None], 0)
    row = (8 * group[:, None] + four) * parts + part[:, None]
    tl.store(out_ptr + row, first.to(out_ptr.dtype.element_ty), mask=row < rows)
    row += 4 * parts
    tl.store(out_ptr + row, last.to(out_ptr.dtype.element_ty), mask=row < rows)
