"""Runs the Triton kernels: operands, grids, block sizes, device guard. Knows tensors, not autograd."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import layout, tuning
from .kernels import gate, loss, operand, pointwise
from .reference import RULES, LossSpec, by_value, compute_dtype
from .rounding import round_to
from .rules import Operand

OPTIONS = {"enable_fp_fusion": True, "num_stages": 1}
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
ROUNDED = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
NUMBER, SCALAR, CHANNEL, ELEMENT = (
    kind.value for kind in (operand.NUMBER, operand.SCALAR, operand.CHANNEL, operand.ELEMENT)
)
RESCALE_PROGRAMS = 1024
FINISH_BLOCK = 1024


@contextlib.contextmanager
def _switched(device: torch.device) -> Any:
    with torch.get_device_module(device).device(device):
        yield


def on_device(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Makes `device` the current one, where there are several."""
    if device.type == "cpu" or device.index == torch.get_device_module(device).current_device():
        return contextlib.nullcontext()
    return _switched(device)


# -------------------------------------------------------------------------------------------------------------- operands


def pack(value: Operand, input: Tensor, dtype: torch.dtype) -> tuple[tuple[Any, ...], int]:
    """An operand as kernels take it, and its kind; a number is held in `dtype`.

    A number travels as a float32 argument if that holds it, else as a 0-dim tensor on the device.
    """
    if not isinstance(value, Tensor):
        if dtype.is_floating_point and dtype.itemsize <= 4:
            return (float(value),), NUMBER
        return (torch.full((), value, dtype=dtype, device=input.device),), SCALAR
    if value.numel() == 1:
        if value.device != input.device:  # read on the CPU and filled in on the device: a copy would make the host wait
            value = torch.full((), value.item(), dtype=value.dtype, device=input.device)
        return (value,), SCALAR
    shape, stride = tuple(input.shape), input.stride()
    pattern = layout.broadcast_pattern(shape, stride, tuple(value.shape))
    if pattern is not None:
        inner, mid = pattern
        if inner == 1 and mid == input.numel():
            return (layout.laid_out_as(value.reshape(shape), shape, stride),), ELEMENT
        return (layout.block(value, input), inner, mid), CHANNEL
    return (torch.empty_strided(shape, stride, dtype=value.dtype, device=input.device).copy_(value),), ELEMENT


def pack_all(
    values: Sequence[Operand], input: Tensor, dtypes: Sequence[torch.dtype]
) -> tuple[tuple[Any, ...], tuple[int, ...]]:
    """Several operands, and the tuple of their kinds."""
    packed = [pack(value, input, dtype) for value, dtype in zip(values, dtypes)]
    return tuple(p for p, _ in packed), tuple(kind for _, kind in packed)


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
    threshold: Operand
    constants: tuple[float, ...]
    promoted: torch.dtype
    result: torch.dtype


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


def gate_forward(
    call: GateCall, input: Tensor, output: Tensor | None = None, *, want_mask: bool
) -> tuple[Tensor, Mask | None]:
    """The gate's output (written to `output` if given), and for backward one bit per element."""
    x = layout.dense(input)
    inplace = output is not None
    apart = output is None or not layout.is_dense(output) or layout.share_memory(call.threshold, output)
    y = torch.empty_like(x, dtype=call.result) if output is None or apart else output
    n = x.numel()
    shape, stride = tuple(x.shape), x.stride()
    if n == 0:
        return (input if inplace else y), Mask(torch.empty(0, dtype=torch.uint8, device=x.device), 0, shape, stride)
    storage = call.result if call.result.is_floating_point else torch.int64
    compute = compute_dtype(call.promoted)
    dtypes = (compute,) + (storage,) * len(call.constants)
    operands, kinds = pack_all((call.threshold, *call.constants), x, dtypes)
    options = dict(KINDS=kinds, FUNCTION=getattr(pointwise, call.function), COMPUTE=COMPUTE[compute])
    if not x.is_floating_point():
        options["PROMOTED"] = ROUNDED.get(call.promoted)

    def run(config: tuning.Config, out: Tensor) -> Mask | None:
        tiles = triton.cdiv(n, 8 * config.block)
        mask = torch.empty(tiles * config.block, dtype=torch.uint8, device=x.device) if want_mask else None
        gate.forward[(tiles,)](
            x, out, mask, n, operands, **options, COLS=config.block, num_warps=config.num_warps, **OPTIONS
        )
        return None if mask is None else Mask(mask, config.block, shape, stride)

    with on_device(x.device):
        trial: Callable[[tuning.Config], object] = lambda config: run(config, torch.empty_like(y))  # noqa: E731
        config = tuning.choose("gate", call.op, x.dtype, n, x.device, True, trial).config
        mask = run(config, y)
    if output is not None and y is not output:
        y = output.copy_(y)
    return y, mask


def gate_backward(mask: Mask, gradient: Tensor) -> Tensor:
    """dx: the gradient where the element was kept, else 0."""
    g = layout.laid_out_as(gradient, mask.shape, mask.stride)
    dx = torch.empty_strided(mask.shape, mask.stride, dtype=g.dtype, device=g.device)
    n = g.numel()
    if n:
        warps = tuning.gate_warps(mask.block, g.dtype.itemsize, tuning.lanes(g.device))
        with on_device(g.device):
            gate.backward[(triton.cdiv(n, 8 * mask.block),)](
                g, mask.bits, dx, n, COLS=mask.block, num_warps=warps, **OPTIONS
            )
    return dx


def unpack(mask: Mask, plane: int = 0) -> Tensor:
    """One plane of a mask as a bool tensor, in plain torch."""
    size = torch.Size(mask.shape).numel()
    if size == 0:
        return torch.empty_strided(mask.shape, mask.stride, dtype=torch.bool, device=mask.bits.device)
    flat = layout.unpack(mask.bits, mask.block, plane, size)
    return flat.as_strided(mask.shape, mask.stride)


# ---------------------------------------------------------------------------------------------------------------- losses


class _LossLaunch(NamedTuple):
    """What the forward and the recomputing kernel share."""

    x: Tensor
    y: Tensor
    operands: tuple[Any, ...]
    options: dict[str, Any]


def _prepare(spec: LossSpec, input: Tensor, target: Tensor, operands: Sequence[Operand]) -> _LossLaunch:
    x = layout.dense(input)
    y = layout.laid_out_as(target, tuple(x.shape), x.stride())
    dtype = compute_dtype(x.dtype)
    packed, kinds = pack_all(operands, x, (dtype,) * len(operands))
    options = dict(
        KINDS=kinds,
        BASE=getattr(pointwise, spec.base),
        BASE_COUNT=spec.base_count,
        RULE=getattr(pointwise, RULES[spec.rule].weight.__name__),
        RULE_COUNT=spec.rule_count,
        COMPUTE=COMPUTE[dtype],
        REDUCTION=spec.reduction,
        **OPTIONS,
    )
    return _LossLaunch(x, y, packed, options)


def loss_name(spec: LossSpec) -> str:
    """The name a cell of the grid has in the tables of block sizes."""
    return f"{spec.base}.{spec.rule.__name__}"


def loss_forward(
    spec: LossSpec, input: Tensor, target: Tensor, operands: Sequence[Operand], *, want_gradient: bool
) -> tuple[Tensor, Tensor | None]:
    """The loss, and for a reduction the gradient for an upstream gradient of 1, from one read of input and target."""
    x, y, packed, options = _prepare(spec, input, target, operands)
    n = x.numel()
    dx = torch.empty_like(x) if want_gradient else None
    with on_device(x.device):
        if spec.reduction == "none":
            out = torch.empty_like(x, dtype=spec.result)

            def run(config: tuning.Config) -> None:
                loss.forward[(triton.cdiv(n, config.block),)](
                    x, y, None, out, n, packed, **options, SINGLE=False, BLOCK=config.block, num_warps=config.num_warps
                )

            run(tuning.choose("loss", f"{loss_name(spec)}.none", x.dtype, n, x.device, True, run).config)
            return out, None
        config = tuning.choose("loss", loss_name(spec), x.dtype, n, x.device, False).config
        programs = triton.cdiv(n, config.block)
        out = torch.empty((), dtype=spec.result, device=x.device)
        partials = out if programs == 1 else torch.empty(programs, dtype=compute_dtype(x.dtype), device=x.device)
        loss.forward[(programs,)](
            x,
            y,
            dx,
            partials,
            n,
            packed,
            **options,
            SINGLE=programs == 1,
            BLOCK=config.block,
            num_warps=config.num_warps,
        )
        if programs > 1:
            loss.finish[(1,)](
                partials, out, n, programs, REDUCTION=spec.reduction, BLOCK=FINISH_BLOCK, num_warps=4, **OPTIONS
            )
    return out, dx


def loss_backward(
    spec: LossSpec, input: Tensor, target: Tensor, operands: Sequence[Operand], gradient: Tensor
) -> Tensor:
    """d loss / dx times the upstream gradient, recomputed from the inputs."""
    x, y, packed, options = _prepare(spec, input, target, operands)
    if spec.reduction == "none":
        gradient = layout.laid_out_as(gradient, tuple(x.shape), x.stride())
    dx = torch.empty_like(x)
    n = x.numel()
    config = tuning.choose("loss", loss_name(spec), x.dtype, n, x.device, False).config
    with on_device(x.device):
        loss.backward[(triton.cdiv(n, config.block),)](
            x, y, gradient, dx, n, packed, **options, BLOCK=config.block, num_warps=config.num_warps
        )
    return dx


def loss_rescale(spec: LossSpec, dx: Tensor, gradient: Tensor) -> None:
    """dx *= gradient, in place; moves nothing if the gradient is 1."""
    n = dx.numel()
    block, warps = tuning.default("loss", dx.dtype.itemsize, tuning.lanes(dx.device))
    with on_device(dx.device):
        loss.rescale[(min(triton.cdiv(n, block), RESCALE_PROGRAMS),)](
            gradient, dx, n, COMPUTE=COMPUTE[compute_dtype(dx.dtype)], BLOCK=block, num_warps=warps, **OPTIONS
        )
