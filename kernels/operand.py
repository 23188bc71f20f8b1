"""Operands: a threshold, weight or factor that is a number, a 0-dim tensor, a broadcast tensor or a full-size tensor.

An operand is a tuple whose layout its kind names:

    NUMBER  (value,)                value travels as a float32 argument
    SCALAR  (pointer,)              one element, read on the device
    CHANNEL (pointer, inner, mid)   element o of the input meets entry (o // inner) % mid
    ELEMENT (pointer,)              laid out as the input is
"""

import triton
import triton.language as tl

NUMBER = tl.constexpr(0)
SCALAR = tl.constexpr(1)
CHANNEL = tl.constexpr(2)
ELEMENT = tl.constexpr(3)


@triton.jit
def read(pointer, mask):
    """Load; mask None on full tiles, so that vectors stay whole; zeros where a mask is off, so that sums stay sums."""
    if mask is None:
        value = tl.load(pointer)
    else:
        value = tl.load(pointer, mask=mask, other=0)
    return value


@triton.jit
def widen(x, COMPUTE: tl.constexpr):
    """x in the compute type. The upper bfloat16 of a register takes one instruction by its bits, a mask, and two by a cast."""
    if x.dtype == tl.bfloat16:
        x = (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    return x.to(COMPUTE)


@triton.jit
def _channel(operand, base, lane):
    """(o // inner) % mid, unsigned where the offsets are int32: 8 instructions fewer an element than signed."""
    o = base + lane
    if base.dtype == tl.int32:
        o = o.to(tl.uint32)
    return (o // tl.cast(operand[1], o.dtype)) % tl.cast(operand[2], o.dtype)


@triton.jit
def load(operand, KIND: tl.constexpr, base, lane, mask):
    """The operand's values for flat elements base + lane; mask None on full tiles."""
    if KIND == NUMBER:
        value = tl.cast(operand[0], tl.float32)
    elif KIND == SCALAR:
        value = tl.load(operand[0])
    elif KIND == CHANNEL:
        value = read(operand[0] + _channel(operand, base, lane), mask)
    else:
        value = read(operand[0] + base + lane, mask)
    return value


@triton.jit
def load_all(operands, KINDS: tl.constexpr, base, lane, mask):
    """A tuple of operands, loaded."""
    values = ()
    for i in tl.static_range(len(KINDS)):
        values = values + (load(operands[i], KINDS[i], base, lane, mask),)
    return values
