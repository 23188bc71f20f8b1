"""The types of PTX: bits as registers hold them, the values they stand for, and arithmetic that numpy lacks."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np

Array = Any  # a numpy array of any dtype

UINT: dict[int, Any] = {1: np.bool_, 8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}
INT: dict[int, Any] = {8: np.int8, 16: np.int16, 32: np.int32, 64: np.int64}
FLOATS = {"f16": 16, "bf16": 16, "f32": 32, "f64": 64, "f16x2": 32, "bf16x2": 32, "f32x2": 64}
WIDTH = {f"{kind}{width}": width for kind in "usb" for width in (8, 16, 32, 64)} | FLOATS
WIDTH |= {"pred": 1, "s16x2": 32, "u16x2": 32}
NAN32, NAN16 = np.uint32(0x7FFFFFFF), np.uint16(0x7FFF)


def is_pair(type: str) -> bool:
    """True for two values in one register."""
    return type.endswith("x2")


def integer(type: str, width: int = 0) -> Any:
    """The numpy type of an integer type, or of that signedness and another width."""
    return (INT if type[0] == "s" else UINT)[width or WIDTH[type]]


def decode(bits: Array, type: str) -> Array:
    """Bits as values: integers and wide floats as they are, 16-bit floats as float32, pairs with one dimension more."""
    if is_pair(type):
        return decode(np.ascontiguousarray(bits)[..., None].view(UINT[WIDTH[type] // 2]), type[:-2])
    if type == "bf16":
        return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)
    if type == "f16":
        return bits.view(np.float16).astype(np.float32)
    if type == "f32":
        return bits.view(np.float32)
    if type == "f64":
        return bits.view(np.float64)
    return bits.view(integer(type)) if type[0] == "s" else bits


def encode(values: Array, type: str) -> Array:
    """Values as bits, rounded once; a NaN of 32 or 16 bits becomes the canonical one, as results of arithmetic do."""
    if is_pair(type):
        return np.ascontiguousarray(encode(values, type[:-2])).view(UINT[WIDTH[type]])[..., 0]
    if type == "bf16":
        return bfloat16(values)
    if type == "f16":
        return np.where(np.isnan(values), NAN16, values.astype(np.float16).view(np.uint16))
    if type == "f32":
        values = values.astype(np.float32, copy=False)
        return np.where(np.isnan(values), NAN32, values.view(np.uint32))
    if type == "f64":
        return values.view(np.uint64)
    return values if type == "pred" else values.view(UINT[8 * values.dtype.itemsize])


def bfloat16(values: Array) -> Array:
    """The bits of bfloat16, rounded to nearest even; of a float64 by way of a float32 rounded to odd, which is one rounding."""
    if values.dtype == np.float64:
        near = values.astype(np.float32)
        bits, wide = near.view(np.uint32), near.astype(np.float64)
        bits = bits - ((np.abs(wide) > np.abs(values)) & ~np.isnan(values)).astype(np.uint32)  # towards zero
        bits = bits | ((wide != values) & np.isfinite(values)).astype(np.uint32)
    else:
        bits = values.view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(values), NAN16, rounded.astype(np.uint16))


def flushed(x: Array) -> Array:
    """Denormals of float32 as zeros of their sign; other types as they are."""
    return (
        np.where(np.abs(x) < np.finfo(np.float32).tiny, np.copysign(np.float32(0), x), x)
        if x.dtype == np.float32
        else x
    )


def extreme(a: Array, b: Array, largest: bool, nan: bool) -> Array:
    """max or min: a NaN loses (with `nan` it wins), and +0 is above -0."""
    if a.dtype.kind != "f":
        return np.maximum(a, b) if largest else np.minimum(a, b)
    pick: Any = (np.maximum if nan else np.fmax) if largest else (np.minimum if nan else np.fmin)
    negative = (np.logical_and if largest else np.logical_or)(np.signbit(a), np.signbit(b))
    zero = np.where(negative, a.dtype.type(-0.0), a.dtype.type(0.0))
    return np.where((a == 0) & (b == 0), zero, pick(a, b))


# ------------------------------------------------------------------------------------------------- a * b + c, rounded once


def _two_sum(a: Array, b: Array) -> tuple[Array, Array]:
    """a + b, and its rounding error (Knuth)."""
    s = a + b
    t = s - a
    return s, (a - (s - t)) + (b - t)


def _odd_sum(a: Array, b: Array) -> Array:
    """a + b in float64, rounded to odd: rounded once more to fewer digits it is rounded once (Boldo and Melquiond, 2008)."""
    s, error = _two_sum(a, b)
    bits = s.view(np.int64)
    beside = bits + np.where((error > 0) == (s > 0), 1, -1)
    return np.where((error != 0) & np.isfinite(s) & (bits & 1 == 0), beside.view(np.float64), s)


def _split(x: Array) -> tuple[Array, Array]:
    """x as a sum of two numbers of 26 digits (Veltkamp)."""
    c = 134217729.0 * x
    high = c - (c - x)
    return high, x - high


def fma(a: Array, b: Array, c: Array) -> Array:
    """a * b + c, rounded once: in float64, or for narrower types as a float64 that `encode` rounds."""
    a, b, c = np.broadcast_arrays(a, b, c)
    if a.dtype == np.float32:
        return _odd_sum(a.astype(np.float64) * b, c.astype(np.float64))  # the product is exact
    product = a * b
    (ah, al), (bh, bl) = _split(a), _split(b)
    rest = al * bl - (((product - ah * bh) - al * bh) - ah * bl)
    high, low = _two_sum(c, rest)
    top, left = _two_sum(product, high)
    found = top + _odd_sum(low, left)
    plain = (a == 0) | (b == 0) | ~(np.isfinite(a) & np.isfinite(b) & np.isfinite(c))
    small, large = 2.0**-900, 2.0**900
    safe = (
        (np.abs(product) > small)
        & (np.abs(product) < large)
        & (np.maximum(np.abs(a), np.abs(b)) < large)
        & (np.abs(c) < large)
    )
    found = np.where(plain, product + c, found)
    for place in np.flatnonzero(~plain & ~safe):
        found[place] = _exactly(*(float(v[place]) for v in (a, b, c)))
    return found


def _exactly(a: float, b: float, c: float) -> float:
    exact = Fraction(a) * Fraction(b) + Fraction(c)
    try:
        return float(exact) if exact else a * b + c  # which has the sign of a zero
    except OverflowError:
        return float("inf") if exact > 0 else float("-inf")
