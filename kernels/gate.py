"""The shell of all gates: load, select, store, and one bit (or two) per element for backward.

A tile is 8 * COLS elements; bit j of mask byte b is element j * COLS + b of the tile, so each thread owns whole bytes and
packing needs no shuffle and no shared memory. A mask is a plane of tiles * COLS bytes; where the threshold learns there are
two, the low and the high bit of a code. A full tile runs unmasked (16-byte vectors for every n), the last one apart in a
loop that the compiler cannot unroll (unrolled it costs up to 146 registers and, with per-channel thresholds, spills).
"""

import triton
import triton.language as tl

from . import operand


@triton.jit
def _select(
    x,
    values,
    y_ptr,
    o,
    mask,
    j,
    low,
    high,
    FUNCTION: tl.constexpr,
    COMPUTE: tl.constexpr,
    PROMOTED: tl.constexpr,
    BITS: tl.constexpr,
):
    """Store y for elements o and add their code, as bit j, to the planes."""
    if PROMOTED is None:
        c = x.to(COMPUTE)
    else:
        c = x.to(PROMOTED).to(COMPUTE)
    y, code = FUNCTION(x, c, values)
    tl.store(y_ptr + o, y.to(y_ptr.dtype.element_ty), mask=mask)
    if BITS == 1:
        low |= code << j
    if BITS == 2:
        low |= (code & 1) << j
        high |= (code >> 1) << j
    return low, high


@triton.jit(do_not_specialize=["n"])
def forward(
    x_ptr,
    y_ptr,
    mask_ptr,
    n,
    operands,
    KINDS: tl.constexpr,
    FUNCTION: tl.constexpr,
    COMPUTE: tl.constexpr,
    BITS: tl.constexpr,
    COLS: tl.constexpr,
    PROMOTED: tl.constexpr = None,
):
    """y = FUNCTION(x); BITS of its code are packed into mask_ptr (0: no gradient is wanted).

    PROMOTED: the 16-bit type in which an integer x is compared, if it is.
    """
    pid = tl.program_id(0)
    base = pid.to(n.dtype) * (8 * COLS)
    lane = tl.arange(0, COLS)
    x_ptr += base
    y_ptr += base
    left = n - base
    low = tl.zeros([COLS], dtype=tl.int32)
    high = tl.zeros([COLS], dtype=tl.int32)
    if left >= 8 * COLS:
        xs = ()
        vs = ()
        for j in tl.static_range(8):  # all loads in flight before the first store
            xs = xs + (tl.load(x_ptr + (j * COLS + lane)),)
            vs = vs + (operand.load_all(operands, KINDS, base, j * COLS + lane, None),)
        for j in tl.static_range(8):
            low, high = _select(
                xs[j], vs[j], y_ptr, j * COLS + lane, None, j, low, high, FUNCTION, COMPUTE, PROMOTED, BITS
            )
    else:
        j = 0
        while j * COLS < left:
            o = j * COLS + lane
            valid = o < left
            x = operand.read(x_ptr + o, valid)
            values = operand.load_all(operands, KINDS, base, o, valid)
            low, high = _select(x, values, y_ptr, o, valid, j, low, high, FUNCTION, COMPUTE, PROMOTED, BITS)
            j += 1
    cell = pid.to(n.dtype) * COLS
    if BITS >= 1:
        tl.store(mask_ptr + cell + lane, low.to(tl.uint8))
    if BITS == 2:
        tl.store(mask_ptr + tl.num_programs(0).to(n.dtype) * COLS + cell + lane, high.to(tl.uint8))


@triton.jit
def _gradient(g, code, dx_ptr, dt_ptr, o, mask, FUNCTION: tl.constexpr, COMPUTE: tl.constexpr):
    """Store dx, and the elementwise dt of a threshold that learns."""
    if dt_ptr is None:
        tl.store(dx_ptr + o, tl.where(code != 0, g, 0.0), mask=mask)
    else:
        dx, dt = FUNCTION(g.to(COMPUTE), code)
        tl.store(dx_ptr + o, dx.to(dx_ptr.dtype.element_ty), mask=mask)
        tl.store(dt_ptr + o, dt.to(dt_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["n"])
def backward(
    g_ptr,
    mask_ptr,
    dx_ptr,
    dt_ptr,
    n,
    FUNCTION: tl.constexpr,
    COMPUTE: tl.constexpr,
    COLS: tl.constexpr,
):
    """dx = g where the element's bit is set, else 0; with dt_ptr, dx and dt = FUNCTION(g, two-bit code)."""
    pid = tl.program_id(0)
    base = pid.to(n.dtype) * (8 * COLS)
    lane = tl.arange(0, COLS)
    g_ptr += base
    dx_ptr += base
    if dt_ptr is not None:
        dt_ptr += base
    left = n - base
    cell = pid.to(n.dtype) * COLS
    low = tl.load(mask_ptr + cell + lane).to(tl.int32)
    high = tl.zeros([COLS], dtype=tl.int32)
    if dt_ptr is not None:
        high = tl.load(mask_ptr + tl.num_programs(0).to(n.dtype) * COLS + cell + lane).to(tl.int32)
    if left >= 8 * COLS:
        gs = ()
        for j in tl.static_range(8):
            gs = gs + (tl.load(g_ptr + (j * COLS + lane)),)
        for j in tl.static_range(8):
            code = ((low >> j) & 1) + 2 * ((high >> j) & 1)
            _gradient(gs[j], code, dx_ptr, dt_ptr, j * COLS + lane, None, FUNCTION, COMPUTE)
    else:
        j = 0
        while j * COLS < left:
            o = j * COLS + lane
            code = ((low >> j) & 1) + 2 * ((high >> j) & 1)
            _gradient(operand.read(g_ptr + o, o < left), code, dx_ptr, dt_ptr, o, o < left, FUNCTION, COMPUTE)
            j += 1
