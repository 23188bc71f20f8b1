"""Runs the Triton kernels: operands, grids, block sizes, device guard. Knows tensors, not autograd."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from . import layout, tuning
from .kernel_cache import NUMBER, Kernel
from .kernels import gate, loss, operand, pointwise
from .measured import Config
from .reference import RULES, LossSpec, by_value, compute_dtype
from .rounding import round_to
from .rules import Numbers, Operand

COMPUTE = {
    torch.float16: tl.float32,
    torch.bfloat16: tl.float32,
    torch.float32: tl.float32,
    torch.float64: tl.float64,
    torch.uint8: tl.uint8,
    torch.int8: tl.int8,
    torch.int16: tl.int16,
    torch.int32: tl.int32,
    torch.int64: tl.int64,
}
SHORT = frozenset({torch.float16, torch.bfloat16, torch.float32})  # which a float32 holds
ROUNDED = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
SCALAR, CHANNEL, ELEMENT = (kind.value for kind in (operand.SCALAR, operand.CHANNEL, operand.ELEMENT))
RESCALE_PROGRAMS = 1024
FINISH_BLOCK = 1024


# -------------------------------------------------------------------------------------------------------------- operands


def pack(value: Operand, input: Tensor, dtype: torch.dtype) -> tuple[tuple[Any, ...], int]:
    """An operand as kernels take it, and its kind; a number is held in `dtype`.

    A number travels as a float32 argument if that holds it, else as a 0-dim tensor on the device.
    """
    if not isinstance(value, Tensor):
        if dtype in SHORT:
            return (float(value),), NUMBER
        return (torch.full((), value, dtype=dtype, device=input.device),), SCALAR
    if value.numel() == 1:
        if value.device != input.device:  # read on the CPU and filled in on the device: a copy would make the host wait
            value = torch.full((), value.item(), dtype=value.dtype, device=input.device)
        return (value,), SCALAR
    shape, stride = input.shape, input.stride()
    pattern = layout.broadcast_pattern(shape, stride, value.shape)
    if pattern is not None:
        inner, mid = pattern
        if inner == 1 and mid == input.numel():
            if value.is_contiguous() and input.is_contiguous():
                return (value,), ELEMENT
            return (layout.laid_out_as(value.reshape(shape), shape, stride),), ELEMENT
        return (layout.block(value, input), inner, mid), CHANNEL
    laid = torch.empty_strided(shape, stride, dtype=value.dtype, device=input.device)
    return (laid.copy_(value.detach()),), ELEMENT


def pack_all(
    values: Sequence[Operand], input: Tensor, dtypes: Sequence[torch.dtype]
) -> tuple[tuple[Any, ...], tuple[int, ...]]:
    """Several operands, and the tuple of their kinds."""
    if type(values) is Numbers and SHORT.issuperset(dtypes):
        return values.packed, (NUMBER,) * len(values)
    packed = [pack(value, input, dtype) for value, dtype in zip(values, dtypes)]
    return tuple([p for p, _ in packed]), tuple([kind for _, kind in packed])


# ----------------------------------------------------------------------------------------------------------------- gates


class Mask(NamedTuple):
    """Packed bits of a gate's derivative, and the layout of the tensor they belong to."""

    bits: Tensor
    block: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


class GateCall(NamedTuple):
    """A gate with its operands as they are compared and stored."""

    op: str
    function: str
    operands: tuple[Operand, ...]  # the threshold, then the constants
    held: tuple[torch.dtype, ...]  # what a number among them is held in
    compute: torch.dtype
    promoted: torch.dtype | None  # in which an integer input is compared
    result: torch.dtype


def gate_call(
    op: str, input: Tensor, threshold: Operand, constants: Sequence[float], result: torch.dtype, casts: bool
) -> GateCall:
    """How the gate `op` is called; its device function has its name."""
    t, promoted = compared(input, threshold, casts)
    compute = compute_dtype(promoted)
    storage = result if result.is_floating_point else torch.int64
    operands: tuple[Any, ...] = t, *(held(value, result) for value in constants)
    if set(map(type, operands)) == {float}:
        operands = Numbers(operands)
    types = (compute,) + (storage,) * len(constants)
    return GateCall(op, op, operands, types, compute, None if input.is_floating_point() else promoted, result)


def compared(input: Tensor, threshold: Operand, casts: bool) -> tuple[Operand, torch.dtype]:
    """The threshold as it is compared, and the dtype of the comparison (reference.compared is the rule).

    `casts`: on integer inputs, numbers and 0-dim tensors are cast to the input's dtype instead of compared by value.
    """
    scalar = not isinstance(threshold, Tensor) or threshold.dim() == 0
    if scalar and (input.is_floating_point() or casts):
        dtype = input.dtype
    else:
        threshold = by_value(input, threshold)
        dtype = torch.result_type(input, threshold)
    if isinstance(threshold, Tensor):
        rounds = scalar or (dtype in ROUNDED and not threshold.is_floating_point())
        return (threshold.to(dtype) if rounds else threshold), dtype
    return (round_to(threshold, dtype) if dtype.is_floating_point else int(threshold)), dtype


def held(value: float, dtype: torch.dtype) -> float:
    """A constant as an output of `dtype` holds it."""
    return round_to(value, dtype) if dtype.is_floating_point else int(value)


@functools.cache
def _gate_kernel(
    function: str, kinds: tuple[int, ...], compute: torch.dtype, promoted: torch.dtype | None, config: Config
) -> Kernel:
    return Kernel(
        gate.forward,
        num_warps=config.num_warps,
        KINDS=kinds,
        FUNCTION=getattr(pointwise, function),
        COMPUTE=COMPUTE[compute],
        COLS=config.block,
        PROMOTED=None if promoted is None else ROUNDED.get(promoted),
    )


@functools.cache
def _gate_backward_kernel(block: int, itemsize: int, lanes: int) -> Kernel:
    return Kernel(gate.backward, num_warps=tuning.gate_warps(block, itemsize, lanes), COLS=block)


def gate_forward(
    call: GateCall, input: Tensor, output: Tensor | None = None, *, want_mask: bool
) -> tuple[Tensor, Mask | None]:
    """The gate's output (written to `output` if given), and for backward one bit per element."""
    x = layout.dense(input)
    inplace = output is not None
    apart = output is None or not layout.is_dense(output) or layout.share_memory(call.operands[0], output)
    if output is None or apart:
        y = torch.empty_like(x) if call.result is x.dtype else torch.empty_like(x, dtype=call.result)
    else:
        y = output
    n, device = x.numel(), x.device
    if n == 0:
        empty = torch.empty(0, dtype=torch.uint8, device=device)
        return (input if inplace else y), Mask(empty, 0, x.shape, x.stride())
    operands, kinds = pack_all(call.operands, x, call.held)

    def run(config: Config, out: Tensor) -> Mask | None:
        tiles = layout.blocks(n, 8 * config.block)
        mask = torch.empty(tiles * config.block, dtype=torch.uint8, device=device) if want_mask else None
        kernel = _gate_kernel(call.function, kinds, call.compute, call.promoted, config)
        kernel(tiles, x, out, mask, n, operands)
        return None if mask is None else Mask(mask, config.block, x.shape, x.stride())

    def trial(config: Config) -> None:
        run(config, torch.empty_like(y))

    mask = run(tuning.choose("gate", call.op, x.dtype, n, device, True, trial).config, y)
    if output is not None and y is not output:
        y = output.copy_(y)
    return y, mask


def gate_backward(mask: Mask, gradient: Tensor) -> Tensor:
    """dx: the gradient where the element was kept, else 0."""
    g = layout.laid_out_as(gradient, mask.shape, mask.stride)
    device, n = g.device, g.numel()
    dx = torch.empty_strided(mask.shape, mask.stride, dtype=g.dtype, device=device)
    if n:
        kernel = _gate_backward_kernel(mask.block, g.dtype.itemsize, tuning.lanes(device))
        kernel(layout.blocks(n, 8 * mask.block), g, mask.bits, dx, n)
    return dx


def unpack(mask: Mask, plane: int = 0) -> Tensor:
    """One plane of a mask as a bool tensor, in plain torch."""
    size = torch.Size(mask.shape).numel()
    if size == 0:
        return torch.empty_strided(mask.shape, mask.stride, dtype=torch.bool, device=mask.bits.device)
    flat = layout.unpack(mask.bits, mask.block, plane, size)
    return flat.as_strided(mask.shape, mask.stride)


# ---------------------------------------------------------------------------------------------------------------- losses


@functools.cache
def _loss_kernel(
    function: str,
    spec: LossSpec,
    kinds: tuple[int, ...],
    compute: torch.dtype,
    config: Config,
    single: bool | None = None,
) -> Kernel:
    """The kernel "forward" (which also takes SINGLE) or "backward" for a cell of the grid."""
    return Kernel(
        getattr(loss, function),
        num_warps=config.num_warps,
        KINDS=kinds,
        BASE=getattr(pointwise, spec.base),
        BASE_COUNT=spec.base_count,
        RULE=getattr(pointwise, RULES[spec.rule].weight.__name__),
        RULE_COUNT=spec.rule_count,
        COMPUTE=COMPUTE[compute],
        REDUCTION=spec.reduction,
        **({} if single is None else {"SINGLE": single}),
        BLOCK=config.block,
    )


@functools.cache
def _finish_kernel(reduction: str) -> Kernel:
    return Kernel(loss.finish, num_warps=4, REDUCTION=reduction, BLOCK=FINISH_BLOCK)


@functools.cache
def _rescale_kernel(dtype: torch.dtype, config: Config) -> Kernel:
    return Kernel(loss.rescale, num_warps=config.num_warps, COMPUTE=COMPUTE[compute_dtype(dtype)], BLOCK=config.block)


def _prepared(input: Tensor, target: Tensor, operands: Sequence[Operand]) -> tuple[Any, ...]:
    """Input and target as they lie alike, the operands with their kinds, and the type they are computed in."""
    compute = compute_dtype(input.dtype)
    if input.is_contiguous() and target.is_contiguous():
        x, y = input, target
    else:
        x = layout.dense(input)
        y = layout.laid_out_as(target, x.shape, x.stride())
    return x, y, *pack_all(operands, x, (compute,) * len(operands)), compute


def loss_forward(
    spec: LossSpec, input: Tensor, target: Tensor, operands: Sequence[Operand], *, want_gradient: bool
) -> tuple[Tensor, Tensor | None]:
    """The loss, and for a reduction the gradient for an upstream gradient of 1, from one read of input and target."""
    x, y, packed, kinds, compute = _prepared(input, target, operands)
    n, device = x.numel(), x.device
    dx = torch.empty_like(x) if want_gradient else None
    if spec.reduction == "none":
        out = torch.empty_like(x, dtype=spec.result)

        def run(config: Config) -> None:
            kernel = _loss_kernel("forward", spec, kinds, compute, config, False)
            kernel(layout.blocks(n, config.block), x, y, None, out, n, packed)

        run(tuning.choose("loss", spec.key, x.dtype, n, device, True, run).config)
        return out, None
    config = tuning.choose("loss", spec.key, x.dtype, n, device, False).config
    programs = layout.blocks(n, config.block)
    out = torch.empty_strided((), (), dtype=spec.result, device=device)  # takes 0.6 of the time of torch.empty(())
    partials = out if programs == 1 else torch.empty(programs, dtype=compute, device=device)
    kernel = _loss_kernel("forward", spec, kinds, compute, config, programs == 1)
    kernel(programs, x, y, dx, partials, n, packed)
    if programs > 1:
        _finish_kernel(spec.reduction)(1, partials, out, n, programs)
    return out, dx


def loss_backward(
    spec: LossSpec, input: Tensor, target: Tensor, operands: Sequence[Operand], gradient: Tensor
) -> Tensor:
    """d loss / dx times the upstream gradient, recomputed from the inputs."""
    x, y, packed, kinds, compute = _prepared(input, target, operands)
    n, device = x.numel(), x.device
    if spec.reduction == "none":
        gradient = layout.laid_out_as(gradient, x.shape, x.stride())
    dx = torch.empty_like(x)
    config = tuning.choose("loss", spec.name, x.dtype, n, device, False).config
    kernel = _loss_kernel("backward", spec, kinds, compute, config)
    kernel(layout.blocks(n, config.block), x, y, gradient, dx, n, packed)
    return dx


def loss_rescale(spec: LossSpec, dx: Tensor, gradient: Tensor) -> None:
    """dx *= gradient, in place; moves nothing if the gradient is 1."""
    n, device = dx.numel(), dx.device
    config = tuning.default("loss", dx.dtype.itemsize, tuning.lanes(device))
    kernel = _rescale_kernel(dx.dtype, config)
    kernel(min(layout.blocks(n, config.block), RESCALE_PROGRAMS), gradient, dx, n)
