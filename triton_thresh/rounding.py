"""Numbers as torch rounds them, in eager torch and where a compiler holds them."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor
from torch.compiler import is_compiling, is_dynamo_compiling, is_exporting

HALF = frozenset({torch.float16, torch.bfloat16})
# the digits of a dtype, and the exponent below which it has fewer, as math.frexp counts
_FORMATS = {torch.float32: (24, -125), torch.bfloat16: (8, -125), torch.float16: (11, -13)}


def _nearest(value: float, dtype: torch.dtype) -> float:
    """In Python's numbers alone, so that Dynamo makes a constant of it."""
    if value == 0 or not math.isfinite(value):
        return value
    digits, least = _FORMATS[dtype]
    unit = math.ldexp(1.0, max(math.frexp(value)[1], least) - digits)
    rounded = round(value / unit) * unit  # halves to even
    return math.copysign(rounded if abs(rounded) <= torch.finfo(dtype).max else math.inf, value)


@functools.lru_cache(maxsize=1024)
def _rounded(value: float, dtype: torch.dtype) -> float:
    return _nearest(_nearest(value, torch.float32), dtype)


def round_to(value: float, dtype: torch.dtype) -> float:
    """A number rounded to a floating dtype, through float32 for the 16-bit ones; zeros keep their sign."""
    if dtype is torch.float64 or value == 0:
        return value
    if is_dynamo_compiling():
        return _nearest(_nearest(value, torch.float32), dtype)
    return _rounded(value, dtype)


def is_open(number: float) -> bool:
    """Whether a compiler leaves the number open: its program is to serve other numbers too."""
    if not is_compiling():
        return False
    from torch.fx.experimental.symbolic_shapes import has_static_value  # which a compiler has imported

    return not has_static_value(number)


def held(number: float, dtype: torch.dtype, device: torch.device) -> float | Tensor:
    """A number as a floating dtype holds it: rounded here, since compilers keep the constants of 16-bit tensors in float32.

    One that a compiler leaves open becomes a 0-dim tensor, by a product: in torch.full it would become a constant.
    """
    if not is_open(number):
        return round_to(number, dtype)
    wide = torch.float32 if dtype in HALF else dtype
    return narrowed(torch.ones((), dtype=wide, device=device) * number, dtype)


def narrowed(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor in a dtype, and rounded to it where Inductor compiles this too.

    Inductor drops the rounding of a cast to 16 bits whose result is computed with, and a view of the bits that is undone at
    once; it keeps one whose bits are changed, here twice.
    """
    tensor = tensor.to(dtype)
    if dtype not in HALF or not is_compiling() or is_exporting():
        return tensor
    return (~~tensor.view(torch.int16)).view(dtype)
