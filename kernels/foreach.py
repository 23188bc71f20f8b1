"""A gate over many tensors of one dtype, in place, by one launch.

table_ptr points to int64: for each tensor a row of its address, its length, its first program and its threshold; then for
each program the number of its tensor. The threshold is the bits of a float64, or an index into thresholds_ptr.

A program covers 8 * COLS elements from an address that 16 divides: where a tensor starts between two such addresses, its
first program masks what lies before it, and every other but the last runs unmasked, with vectors of 16 bytes.
"""

import triton
import triton.language as tl

from . import operand

ROW = tl.constexpr(4)


@triton.jit(do_not_specialize=["tensors"])
def inplace(
    table_ptr,
    tensors,
    thresholds_ptr,
    kept_ptr,
    FUNCTION: tl.constexpr,
    DTYPE: tl.constexpr,
    COMPUTE: tl.constexpr,
    COLS: tl.constexpr,
):
    """x = FUNCTION(x) for each of so many tensors; with kept_ptr, how many elements each program kept."""
    pid = tl.program_id(0)
    row = table_ptr + ROW * tl.load(table_ptr + ROW * tensors + pid)
    address = tl.load(row)
    numel = tl.load(row + 1)
    chunk = pid - tl.load(row + 2)
    t = tl.load(row + 3)
    if thresholds_ptr is None:
        t = t.to(tl.float64, bitcast=True)
    else:
        t = tl.load(thresholds_ptr + t)
    values = (t.to(COMPUTE),)
    SIZE: tl.constexpr = DTYPE.primitive_bitwidth // 8
    lead = (address & 15) // SIZE
    base = chunk * (8 * COLS)
    x_ptr = tl.multiple_of((address - (address & 15) + base * SIZE).to(tl.pointer_type(DTYPE)), 16)
    start = tl.maximum(lead - base, 0).to(tl.int32)  # of the tensor, counted from the program's first element
    end = tl.minimum(lead + numel - base, 8 * COLS).to(tl.int32)
    lane = tl.arange(0, COLS)
    kept = tl.zeros([COLS], dtype=tl.int32)
    if (start == 0) & (end == 8 * COLS):
        xs = ()
        for j in tl.static_range(8):  # all loads in flight before the first store
            xs = xs + (tl.load(x_ptr + (j * COLS + lane)),)
        for j in tl.static_range(8):
            y, keep = FUNCTION(xs[j], xs[j].to(COMPUTE), values)
            tl.store(x_ptr + (j * COLS + lane), y.to(DTYPE))
            kept += keep
    else:
        j = 0
        while j * COLS < end:
            o = j * COLS + lane
            valid = (o >= start) & (o < end)
            x = operand.read(x_ptr + o, valid)
            y, keep = FUNCTION(x, x.to(COMPUTE), values)
            tl.store(x_ptr + o, y.to(DTYPE), mask=valid)
            kept += tl.where(valid, keep, 0)
            j += 1
    if kept_ptr is not None:
        tl.store(kept_ptr + pid, tl.sum(kept))
