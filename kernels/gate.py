"""The shell of all gates: load, select, store, and one bit per element for backward.

A tile is 8 * COLS elements; bit j of mask byte b is element j * COLS + b of the tile, so each thread owns whole bytes and
packing needs no shuffle and no shared memory. A full tile runs unmasked (16-byte vectors for every n), the last one apart in
a loop that the compiler cannot unroll (unrolled it costs up to 146 registers and, with per-channel thresholds, spills).
"""

import triton
import triton.language as tl

from . import operand


@triton.jit
def select(x, values, y_ptr, mask, FUNCTION: tl.constexpr, COMPUTE: tl.constexpr, PROMOTED: tl.constexpr):
    """Store y and return its code."""
    if PROMOTED is None:
        c = x.to(COMPUTE)
    else:
        c = x.to(PROMOTED).to(COMPUTE)
    y, code = FUNCTION(x, c, values)
    tl.store(y_ptr, y.to(y_ptr.dtype.element_ty), mask=mask)
    return code


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
    COLS: tl.constexpr,
    PROMOTED: tl.constexpr = None,
):
    """y = FUNCTION(x); where dy/dx is 1 is packed into mask_ptr (None: no gradient is wanted).

    PROMOTED: the 16-bit type in which an integer x is compared, if it is.
    """
    pid = tl.program_id(0)
    base = pid.to(n.dtype) * (8 * COLS)
    lane = tl.arange(0, COLS)
    x_ptr += base
    y_ptr += base
    left = n - base
    bits = tl.zeros([COLS], dtype=tl.int32)
    if left >= 8 * COLS:
        xs = ()
        vs = ()
        for j in tl.static_range(8):  # all loads in flight before the first store
            xs = xs + (tl.load(x_ptr + (j * COLS + lane)),)
            vs = vs + (operand.load_all(operands, KINDS, base, j * COLS + lane, None),)
        for j in tl.static_range(8):
            bits |= select(xs[j], vs[j], y_ptr + (j * COLS + lane), None, FUNCTION, COMPUTE, PROMOTED) << j
    else:
        j = 0
        while j * COLS < left:
            o = j * COLS + lane
            x = operand.read(x_ptr + o, o < left)
            values = operand.load_all(operands, KINDS, base, o, o < left)
            bits |= select(x, values, y_ptr + o, o < left, FUNCTION, COMPUTE, PROMOTED) << j
            j += 1
    if mask_ptr is not None:
        tl.store(mask_ptr + pid.to(n.dtype) * COLS + lane, bits.to(tl.uint8))


@triton.jit(do_not_specialize=["n"])
def backward(g_ptr, mask_ptr, dx_ptr, n, COLS: tl.constexpr):
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
