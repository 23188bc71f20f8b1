"""Checks of arguments, and the rounding of numbers. An error names the argument, what it was, and what would be accepted."""

from __future__ import annotations

import functools
import math
import numbers
import warnings
from collections.abc import Iterable, Sequence
from typing import Any, Literal, Union

import torch
from torch import Tensor
from torch._C import _is_tracing
from torch.compiler import is_compiling, is_dynamo_compiling
from torch.jit._trace import TracerWarning

Operand = Union[float, int, Tensor]
"""A number, a 0-dim tensor, or a tensor that broadcasts to the input's shape."""

Reduction = Literal["mean", "sum", "none"]

HALF = frozenset({torch.float16, torch.bfloat16})
FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INTEGER = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
REAL = (*FLOATING, *INTEGER, torch.bool)
REDUCTIONS = ("mean", "sum", "none")
LARGEST = {dtype: torch.finfo(dtype).max for dtype in FLOATING}
NO_GRADIENT = "this op has no gradient to give it; pass {name}.detach()"
LEAST_POSITIVE = torch.finfo(torch.float32).tiny
FEW = 1 << 13  # elements of which a pass takes less time than a call
_REAL = frozenset(REAL)


# ------------------------------------------------------------------------------------------------------------ rounding


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """float32 for 16-bit inputs, else the input's own."""
    return torch.float32 if dtype in HALF else dtype


def cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """tensor.to(dtype), which takes a microsecond where it does nothing."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


# asked here, since torch.compile of torch 2.11 cannot ask
AUTOCAST = tuple(
    kind for kind in ("cpu", "cuda", "xpu", "mps", "mtia", "hpu", "xla") if torch.amp.is_autocast_available(kind)
)


def is_autocast(kind: str) -> bool:
    """True if autocast is on for such devices."""
    return kind in AUTOCAST and torch.is_autocast_enabled(kind)


def result_dtype(input: Tensor) -> torch.dtype:
    """A loss has the input's dtype; float32 under autocast."""
    return torch.float32 if input.dtype in HALF and is_autocast(input.device.type) else input.dtype


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


def is_exporting() -> bool:
    """True while `torch.export` traces. Dynamo of torch 2.11 takes torch's own function to be true in every compiled program."""
    return torch.compiler._is_exporting_flag


def is_open(number: float) -> bool:
    """True if a compiler leaves the number open: its program is to serve other numbers too."""
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


def constant(value: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A number as a 0-dim tensor of a dtype, rounded as `held` rounds it."""
    number = held(value, dtype, device) if dtype.is_floating_point else value
    return number if isinstance(number, Tensor) else torch.full((), number, dtype=dtype, device=device)


def are_few(x: Tensor) -> bool:
    """True if numbers may be passed as tensors that are cached. On a GPU such a tensor would be tied to a stream."""
    return x.is_cpu and x.numel() <= FEW


@functools.lru_cache(maxsize=1024)
def _cached_constant(value: float, sign: float, dtype: torch.dtype) -> Tensor:
    held = round_to(value, dtype) if dtype.is_floating_point else value
    return torch.full((), held, dtype=dtype, device="cpu")


def cached_constant(value: float, dtype: torch.dtype) -> Tensor:
    """A number as a 0-dim CPU tensor, cached and not to be written to; its sign tells -0 from 0.

    An op of torch makes such a tensor of every number that it is given, which takes longer than a comparison of few elements.
    """
    return _cached_constant(value, math.copysign(1.0, value), dtype)


# ------------------------------------------------------------------------------------------------------------- numbers


def check_number(op: str, name: str, value: object) -> float | int:
    """`value` as a Python number; a 0-dim CPU tensor counts as one."""
    if type(value) is float or type(value) is int:
        return value
    if isinstance(value, Tensor) and value.dim() == 0 and value.device.type == "cpu" and not value.is_complex():
        if value.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"{op}: {name} requires grad, but has no gradient; pass {name}.detach()")
        number: float | int = value.item()
        return number
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real):
        return float(value)
    if isinstance(value, (torch.SymFloat, torch.SymInt)):
        return value  # type: ignore[return-value]
    raise TypeError(f"{op}: {name} must be a number, got {describe(value)}")


def check_positive(op: str, name: str, value: object) -> float:
    """`value` as a number above 0, finite, and with a reciprocal in float32."""
    number = value if type(value) is float else as_float(op, name, check_number(op, name, value))
    if not LEAST_POSITIVE <= number < math.inf:
        least = f" (of {LEAST_POSITIVE:.2g} or more)" if 0 < number < LEAST_POSITIVE else ""
        raise ValueError(f"{op}: {name} must be a finite number above 0{least}, got {number}")
    return number


class OutOfRange(ValueError, RuntimeError):  # noqa: N818 - torch raises RuntimeError for some of these, users expect ValueError
    """A number that an op cannot take."""


def check_least(op: str, name: str, value: float, least: float = 0) -> float:
    """`value` if it is at least `least`."""
    if not value >= least:
        raise OutOfRange(f"{op}: {name} must be at least {least}, got {value}")
    return value


def as_float(op: str, name: str, value: float) -> float:
    """`value` as a float: Python's integers may be too large for one."""
    try:
        return float(value) if type(value) is int else value
    except OverflowError:
        raise ValueError(f"{op}: {name} is an integer beyond what a float holds, expected a number within it") from None


def check_range(
    owner: str, field: str, value: Operand | None, least: float, most: float = math.inf, hint: str = ""
) -> None:
    """A number from `least` to `most`. Tensors are not looked at, and the op that is called refuses what is neither."""
    if not isinstance(value, (int, float)) or is_open(value):
        return
    number = as_float(owner, field, value)
    if not least <= number <= most or number == math.inf:
        accepted = (
            f"a finite number of {least:g} or more" if most == math.inf else f"a number from {least:g} to {most:g}"
        )
        raise ValueError(f"{owner}: {field} must be {accepted}{hint}, got {value!r}")


def check_held(op: str, name: str, value: float, dtype: torch.dtype) -> float:
    """A number within the range of a floating dtype, as ATen demands. Infinities and NaN are within it."""
    limit = LARGEST[dtype]
    if not is_compiling() and limit < abs(value) < math.inf:
        raise RuntimeError(f"{op}: {name} is {value}, which {dtype} cannot hold; expected -{limit} to {limit}")
    return float(value) if type(value) is int else value


def check_integer(op: str, name: str, value: float, dtype: torch.dtype) -> int:
    """A number truncated to an integer dtype that can hold it, as ATen does; 0 or 1 for bool.

    ATen wraps a negative integer around in an unsigned dtype, and no fraction. Since torch 2.15 it takes 255.5 as 255 in
    uint8, and refused it before; here it is 255 with every torch.
    """
    if dtype is torch.bool:
        return int(bool(value))
    info = torch.iinfo(dtype)
    if info.min == 0 and not isinstance(value, (float, torch.SymFloat)) and -info.max <= value < 0:
        value += info.max + 1
    if not info.min <= value < info.max + 1:
        raise RuntimeError(f"{op}: {name} is {value}, which {dtype} cannot hold; expected {info.min} to {info.max}")
    return int(value)


def within(dtype: torch.dtype, values: Iterable[Any], nonnegative: bool) -> bool:
    """True if these are floats, or integers of 64 bits, that a floating dtype holds (the first of them not below 0)."""
    limit = LARGEST.get(dtype)
    if limit is None:
        return False
    least = 0.0 if nonnegative else -limit
    for value in values:
        kind = type(value)
        if kind is not float and (kind is not int or value.bit_length() > 63):
            return False
        if not least <= value <= limit:
            return False
        least = -limit
    return True


# ------------------------------------------------------------------------------------------------------------- tensors


def check_input(
    op: str, input: object, dtypes: tuple[torch.dtype, ...], *, jagged: bool = True, name: str = "input"
) -> None:
    """`input` is a strided tensor of one of `dtypes`, or a jagged one, which takes the formulas in plain torch."""
    if not isinstance(input, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor, got {type(input).__name__}")
    if input.dtype not in dtypes:
        raise TypeError(f"{op}: {name} has dtype {input.dtype}, expected one of {_names(dtypes)}")
    if input.layout is not torch.strided and not (jagged and input.layout is torch.jagged):
        hint = "; pass the values() of input and target" if input.layout is torch.jagged and name == "input" else ""
        raise TypeError(f"{op}: {name} has layout {input.layout}, expected a dense (strided) tensor{hint}")


def check_dtype(op: str, dtype: object) -> torch.dtype:
    """`dtype` is one that an output may have."""
    if dtype not in REAL:
        raise TypeError(f"{op}: dtype is {dtype!r}, expected one of {_names(REAL)}")
    return dtype


def check_operand(
    op: str, name: str, value: object, input: Tensor, *, learns: bool = False, why: str = NO_GRADIENT
) -> Operand:
    """`value` as a number or a tensor that broadcasts to the input's shape; `why` it may not require grad unless it `learns`."""
    if type(value) is float:
        return value
    if type(value) is int:
        return as_float(op, name, value) if input.is_floating_point() else value
    if not isinstance(value, Tensor):
        if isinstance(value, (numbers.Real, torch.SymFloat, torch.SymInt)):
            return check_number(op, name, value)
        raise TypeError(f"{op}: {name} must be a number or a tensor, got {describe(value)}")
    check_real(op, name, value)
    if value.requires_grad and not learns and torch.is_grad_enabled():
        raise ValueError(f"{op}: {name} requires grad, but {why.format(name=name)}")
    if value.device != input.device:
        _check_place(op, name, value, input)
    if value.dim():
        _check_broadcasts(op, name, value, input)
    return value


def _check_place(op: str, name: str, value: Tensor, input: Tensor) -> None:
    if value.dim():
        raise RuntimeError(f"{op}: {name} is on {value.device}, expected {input.device}, where the input is")
    if value.device.type != "cpu":
        raise RuntimeError(
            f"{op}: {name} is on {value.device}, expected {input.device} (the input's) or a 0-dim CPU tensor"
        )


def _check_broadcasts(op: str, name: str, value: Tensor, input: Tensor) -> None:
    # The common ones are soon told apart; of (8,) == (batch, 8) a compiler would keep the guard that batch is not 8.
    if not is_compiling() and not _is_tracing():
        own, like = value.shape, input.shape
        if own == like or (like and len(own) == 1 and own[0] == like[-1]):
            return
    shape, target = _sizes(value), _sizes(input)
    if len(shape) > len(target) or any(s != 1 and s != t for s, t in zip(reversed(shape), reversed(target))):
        raise ValueError(
            f"{op}: {name} has shape {tuple(shape)}, which does not broadcast to the input's shape {tuple(target)}"
            + _one_per_row(tuple(shape), tuple(target))
        )


def _one_per_row(shape: tuple[int, ...], target: tuple[int, ...]) -> str:
    """A hint, if the shape is the input's without one of its dimensions, as a reduction over that one leaves it."""
    for dim in range(len(target) - 1, -1, -1):
        if shape == (*target[:dim], *target[dim + 1 :]):
            kept = (*target[:dim], 1, *target[dim + 1 :])
            return f"; {kept} does, which keepdim=True or unsqueeze({dim}) gives"
    return ""


def _sizes(tensor: Tensor) -> Sequence[int]:
    """The shape; while torch.jit.trace makes a tensor of every size, their numbers, without its warnings."""
    if is_dynamo_compiling() or not _is_tracing():
        return tensor.shape
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TracerWarning)
        return [int(size) for size in tensor.shape]


def check_real(op: str, name: str, value: Tensor) -> None:
    """`value` is a strided or jagged tensor of a real dtype that torch computes with."""
    if value.dtype not in _REAL:
        accepted = "a real tensor: " + _names(REAL)
        raise TypeError(f"{op}: {name} has dtype {value.dtype}, expected {accepted}")
    if value.layout not in (torch.strided, torch.jagged):
        raise TypeError(f"{op}: {name} has layout {value.layout}, expected a dense (strided) tensor")


def check_target(op: str, input: Tensor, target: object) -> None:
    """`target` is a real tensor of the input's shape and device."""
    if not isinstance(target, Tensor):
        raise TypeError(f"{op}: target must be a tensor, got {describe(target)}")
    check_real(op, "target", target)
    shape, expected = _sizes(target), _sizes(input)
    if len(shape) != len(expected) or shape != expected:
        raise ValueError(
            f"{op}: target has shape {tuple(shape)}, expected the input's shape {tuple(expected)} (no broadcasting)"
        )
    if target.device != input.device:
        raise RuntimeError(f"{op}: target is on {target.device}, expected {input.device}, where the input is")


def check_reduction(op: str, reduction: object) -> None:
    """`reduction` is "mean", "sum" or "none"."""
    if reduction not in REDUCTIONS:
        raise ValueError(f"{op}: reduction must be one of {', '.join(map(repr, REDUCTIONS))}, got {reduction!r}")


def check_mask(op: str, mask: object, input: Tensor) -> Tensor:
    """`mask` is a bool tensor that broadcasts to the input's shape."""
    if not isinstance(mask, Tensor):
        raise TypeError(f"{op}: mask must be a bool tensor, got {describe(mask)}")
    if mask.dtype is not torch.bool:
        raise TypeError(f"{op}: mask has dtype {mask.dtype}, expected torch.bool (True where an element counts)")
    check_operand(op, "mask", mask, input)
    return mask


def check_divisor(op: str, divisor: object, input: Tensor, reduction: str) -> Operand:
    """`divisor` is a number above 0 or a 0-dim tensor, and goes with the mean."""
    if reduction != "mean":
        raise ValueError(f"{op}: divisor goes with reduction 'mean', got reduction {reduction!r}")
    if not isinstance(divisor, Tensor):
        return check_positive(op, "divisor", divisor)
    if divisor.dim():
        raise ValueError(f"{op}: divisor has shape {tuple(divisor.shape)}, expected a number or a 0-dim tensor")
    return check_operand(op, "divisor", divisor, input, why="it has no gradient; pass {name}.detach()")


def check_inplace(op: str, input: Tensor) -> None:
    """`input` may be written to: raised before anything is."""
    if torch._debug_has_internal_overlap(input) == 1:
        raise RuntimeError(
            f"{op}: input has elements that share memory (shape {tuple(input.shape)}, strides {input.stride()}) and cannot be "
            "changed in place; clone() it first"
        )
    if input.requires_grad and torch.is_grad_enabled():
        if input.is_leaf:
            raise RuntimeError(
                f"{op}: a leaf Variable that requires grad is being used in an in-place operation (input)"
            )
        if input._base is not None and input._base.is_leaf:
            raise RuntimeError(
                f"{op}: a view of a leaf Variable that requires grad is being used in an in-place operation (input)"
            )
    if input.is_inference() and not torch.is_inference_mode_enabled():
        raise RuntimeError(f"{op}: input is an inference tensor and cannot be changed in place; clone() it first")


def _names(dtypes: tuple[torch.dtype, ...]) -> str:
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


def describe(value: object) -> str:
    """A value as an error shows it."""
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)} and dtype {value.dtype} on {value.device}"
    return f"{type(value).__name__} {value!r}"
