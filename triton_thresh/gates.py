"""Gates: from the public call to the kernels of kernels/gate.py, and back for backward."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling
from torch.nn import Parameter

from . import backend, checks, eager, layout, reference, tuning
from .checks import FLOATING, HALF, Operand, compute_dtype, is_exporting, round_to
from .fused import Fused, define, parted, restored
from .launch import CHANNEL, ELEMENT, SHORT, Kernel, Packed, blocks, device_code, pack, pack_all, triton_dtype
from .registry import GATES, KEEP_LARGE, Gate
from .tuning import Choice, Config

ROWS = 32  # a program of backward sums so many: partial sums and thresholds then cost 3/8 byte per element
MANY = 1 << 22  # elements; torch keeps at most 16 MiB for the backward of fewer
WIDEST = 1 << 27  # elements of a row; eight rows are then offset by less than 2**31
COUNT_BLOCK = 2048  # bytes of a plane of bits that one program counts
FIRED_BLOCK = 1024  # bytes of a group of rows that one program counts by feature, for ROWS groups
BETTER_IN_TORCH = "auto: torch's own kernel does the same, and its call costs less"
STEEP = (
    "its gradient is zero almost everywhere; pass {name}.detach() (from the data: x.detach().mean()), or take jumprelu, whose "
    "threshold learns"
)


def _signature(row: Gate) -> dict[str, Any]:
    parameters = list(inspect.signature(getattr(reference, row.name)).parameters.values())[1:]
    return {p.name: p.default for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD}


SIGNATURES: Mapping[str, dict[str, Any]] = MappingProxyType(
    {row.name: _signature(row) for row in (*GATES.values(), KEEP_LARGE)}
)
"""The operands and numbers of each gate with their defaults, as its function in reference.py declares them."""


KEYWORDS = frozenset({"dtype", "inplace", "input_gradient", "return_fired"})
"""Keywords that a public function may pass on beside them."""


# ------------------------------------------------------------------------------------------------------------- the call


def call(row: Gate, input: Tensor, *parameters: Any, **keywords: Any) -> Any:
    """`run`, where parameters that are left out have their defaults."""
    defaults = tuple(SIGNATURES[row.name].values())
    return run(row, input, parameters + defaults[len(parameters) :], **keywords)


def run(
    row: Gate,
    input: Tensor,
    parameters: tuple[Any, ...],
    *,
    inplace: bool = False,
    dtype: torch.dtype | None = None,
    input_gradient: bool = False,
    return_fired: bool = False,
) -> Any:
    """Check the arguments, choose the way, go."""
    learns = False
    if _is_simple(row, input, parameters, dtype):
        on_cpu = input.is_cpu and backend.get_backend() != "triton"  # asked apart, since it takes a third of the time
        way = "eager" if on_cpu else backend.choose(input.device)[0]
        by_torch = eager.GATES.get(row.name)
        wanted = way == "eager" or _is_better_in_torch(row, input, parameters, False)
        if by_torch and wanted and not inplace and input.dtype not in HALF:
            return by_torch(input, *parameters)
    else:
        parameters = _checked(row, input, parameters, dtype)
        way = backend.way(input, *parameters[: row.operands])
        if row.rounds:
            parameters = _read(row, input, parameters, way)
        learns = row.learns and _requires_grad(parameters[0])
    if inplace and way != "formula":
        checks.check_inplace(row.name, input)
    if way == "triton" and not _is_better_in_torch(row, input, parameters, learns):
        return _on_triton(row, input, parameters, learns, dtype or input.dtype, inplace, input_gradient, return_fired)
    if way == "op" and (row.straight_through or learns):
        return _traced(row, input, parameters, learns, input_gradient, return_fired)
    way = "eager" if way == "triton" else way  # "op" goes on as "formula" does: the gate is traced in plain torch
    output = _plain(row, input, parameters, way, learns, inplace=inplace, dtype=dtype, input_gradient=input_gradient)
    return (*output, reference.fired(input, parameters[0])) if return_fired else output


def _is_simple(row: Gate, input: Tensor, parameters: tuple[Any, ...], dtype: torch.dtype | None) -> bool:
    """True for an ordinary dense input and numbers that its dtype holds: nothing is left to check."""
    if is_dynamo_compiling() or type(input) not in (Tensor, Parameter):
        return False
    if dtype is not None or row.operands > 1 or not row.rounds:
        return False
    return checks.within(input.dtype, parameters, row.nonnegative) and backend.is_plain(input)


def _requires_grad(threshold: object) -> bool:
    return isinstance(threshold, Tensor) and threshold.requires_grad and torch.is_grad_enabled()


def _on_triton(
    row: Gate,
    input: Tensor,
    parameters: tuple[Any, ...],
    learns: bool,
    result: torch.dtype,
    inplace: bool,
    input_gradient: bool,
    return_fired: bool,
) -> Any:
    fired = None
    if return_fired:
        fired = torch.zeros(input.shape[-1:], dtype=torch.int64, device=input.device)
    records = (input.requires_grad or learns) and torch.is_grad_enabled() and row.saves != "nothing"
    made = _call(row, result, records, learns, input_gradient)
    if records:
        output = GATE.record(input, parameters[0], parameters[1:], made, inplace, fired)
        return output if fired is None else (*output, fired)
    y, count, *_ = forward(input, parameters[0], parameters[1:], made, inplace, fired)
    if fired is not None:
        return y, count, fired
    if inplace:
        torch.autograd.graph.increment_version(input)
        return input
    return y if count is None else (y, count)


def _checked(row: Gate, input: Tensor, parameters: tuple[Any, ...], dtype: torch.dtype | None) -> tuple[Any, ...]:
    """Operands and numbers as they are computed with; an error names what cannot be."""
    op = row.name
    checks.check_input(op, input, row.dtypes)
    if row.counts and input.dim() == 0:
        raise ValueError(f"{op}: input has shape (), expected at least one dimension to count along")
    if row.straight_through:
        threshold, bandwidth = parameters
        threshold = checks.check_operand(op, "threshold", threshold, input, learns=True)
        return threshold, checks.check_positive(op, "bandwidth", bandwidth)
    operands = _checked_operands(row, input, parameters[: row.operands])
    numbers = zip([*SIGNATURES[op]][row.operands :], parameters[row.operands :])
    result = input.dtype if dtype is None else checks.check_dtype(op, dtype)
    check = checks.check_held if result.is_floating_point else checks.check_integer
    return (*operands, *[check(op, name, checks.check_number(op, name, value), result) for name, value in numbers])


def _checked_operands(row: Gate, input: Tensor, values: Sequence[Any]) -> list[Operand]:
    op, found = row.name, []
    least: float = 0
    for name, value in zip(SIGNATURES[op], values):
        operand = checks.check_operand(op, name, value, input, learns=row.learns, why=STEEP)
        if not isinstance(operand, Tensor):
            if row.nonnegative:
                operand = least = checks.check_least(op, name, operand, least)
            if row.casts and input.dtype not in FLOATING:
                operand = checks.check_integer(op, name, operand, input.dtype)
        found.append(operand)
    return found


def _read(row: Gate, input: Tensor, parameters: tuple[Any, ...], way: str) -> tuple[Any, ...]:
    """The same with 0-dim CPU tensors as numbers, where they do not learn. To Triton's interpreter the CPU is the device."""
    if way not in ("eager", "triton") or (way == "triton" and input.is_cpu):
        return parameters
    return tuple(_number(row, input, v) if i < row.operands else v for i, v in enumerate(parameters))


def _number(row: Gate, input: Tensor, value: Operand) -> Operand:
    if not isinstance(value, Tensor) or value.dim() or not value.is_cpu or (row.learns and _requires_grad(value)):
        return value
    (name, *_), number = SIGNATURES[row.name], value.item()
    if input.is_floating_point():
        number = float(number)
    if row.casts and input.dtype not in FLOATING:
        number = checks.check_integer(row.name, name, number, input.dtype)
    return checks.check_least(row.name, name, number) if row.nonnegative else number


def _plain(
    row: Gate,
    input: Tensor,
    parameters: tuple[Any, ...],
    way: str,
    learns: bool,
    *,
    inplace: bool,
    dtype: torch.dtype | None,
    input_gradient: bool,
) -> Any:
    """By torch's own kernels where they give the same bits, else by the formula."""
    records = input.requires_grad and torch.is_grad_enabled()
    function: Any = getattr(reference, row.name)
    keywords: dict[str, Any] = {} if dtype is None else {"dtype": dtype}
    if row.straight_through and way == "eager":
        threshold, bandwidth = parameters
        output = eager.learned(row.name, input, threshold, bandwidth, input_gradient, learns or records)
        return output if input.is_contiguous() else _laid_out(output, input)
    if row.straight_through:
        keywords = {"input_gradient": input_gradient}
    elif way == "eager" and _has_torch_kernel(row, input, parameters):
        parameters = _rounded(input.dtype, parameters, dtype)
        if inplace and not records and row.name in eager.IN_PLACE:
            return eager.IN_PLACE[row.name](input, *parameters)
        function = eager.GATES[row.name]
    if inplace:
        source = input.clone() if records and way == "eager" else input  # what is saved must outlive the write
        return input.copy_(function(source, *parameters, **keywords))
    output = function(input, *parameters, **keywords)
    return _laid_out(output, input) if way == "eager" and not input.is_contiguous() else output


def _is_better_in_torch(row: Gate, input: Tensor, parameters: tuple[Any, ...], learns: bool) -> bool:
    """True where backend "auto" leaves a GPU's tensor to a kernel of torch that does the same.

    Without a gradient it takes as long (hardshrink of 2**26 bfloat16 on an H100: 92.3 µs against 93.4), and its call costs less
    (7 µs against 26). With one it saves the whole input, which its backward reads: it serves where calls take all the time.
    """
    if not input.is_cuda or row.name not in eager.SAME_KERNELS or not _has_torch_kernel(row, input, parameters):
        return False
    records = input.requires_grad and torch.is_grad_enabled()
    return backend.get_backend() != "triton" and not learns and (not records or input.numel() < MANY)


def _has_torch_kernel(row: Gate, input: Tensor, parameters: tuple[Any, ...]) -> bool:
    return row.name in eager.GATES and input.dtype in FLOATING and not isinstance(parameters[0], Tensor)


def _rounded(stored: torch.dtype, numbers: tuple[Any, ...], dtype: torch.dtype | None) -> tuple[Any, ...]:
    """Numbers rounded to the input's dtype, where torch's kernels would round them otherwise: to 16 bits, or out of range."""
    if stored not in HALF and checks.within(stored, numbers, False):
        return numbers
    first, *rest = numbers
    return (round_to(first, stored), *(rest if dtype else [round_to(value, stored) for value in rest]))


def _laid_out(output: Any, input: Tensor) -> Any:
    """The output as the input lies; torch.where may lay it out as a threshold does."""
    if isinstance(output, tuple):
        return (_laid_out(output[0], input), *output[1:])
    like = torch.empty_like(input, dtype=output.dtype)
    return output if output.stride() == like.stride() else like.copy_(output)


# ------------------------------------------------------------------------------------------------------- what is called


class Call(NamedTuple):
    """A call of a gate on Triton, less its tensors and numbers."""

    row: Gate
    result: torch.dtype
    bits: int  # that forward saves of each element
    by_column: bool  # the kernels see rows in which a threshold keeps to its columns
    input_gradient: bool
    function: str  # the device function of y
    key: str  # its name in the tables of block sizes
    traced: bool = False

    @property
    def searches(self) -> bool:
        """True if a search may choose the block size: where it fixes no order of summation."""
        return not self.by_column

    @property
    def kind(self) -> tuning.Kind:
        return "learned" if self.by_column else "gate"


@functools.lru_cache(maxsize=4096)
def _call(row: Gate, result: torch.dtype, records: bool, learns: bool, input_gradient: bool) -> Call:
    name = row.name if row.saves != "bit" or not learns else f"{row.name}_learned"
    if not records or row.saves not in ("bit", "two bits"):
        bits = 0
    elif row.saves == "two bits":
        bits = 1 if row.learns and not (learns or input_gradient) else 2
    else:
        bits = 2 if learns else 1
    return Call(row, result, bits, row.straight_through or learns, input_gradient, row.value or name, name)


class Prepared(NamedTuple):
    """Operands and numbers as the kernels compare them."""

    values: tuple[Operand, ...]
    held: tuple[torch.dtype, ...]  # what a number among them is held in
    compute: torch.dtype
    promoted: torch.dtype | None  # the 16-bit type in which an integer input is compared
    packed: Packed | None = None  # of numbers that float32 arguments hold

    def pack(self, x: Tensor) -> Packed:
        return self.packed or pack_all(self.values, x, self.held)


def _prepared(call: Call, input: Tensor, values: tuple[Operand, ...]) -> Prepared:
    dtype, result = input.dtype, call.result
    if set(map(type, values)) == {float} and dtype in FLOATING and result in FLOATING:
        return _prepared_numbers(call.row, dtype, result, tuple(map(float.hex, values)))  # type: ignore[arg-type]
    return _prepare(call.row, input, values, result)


@functools.lru_cache(maxsize=4096)
def _prepared_numbers(row: Gate, dtype: torch.dtype, result: torch.dtype, digits: tuple[str, ...]) -> Prepared:
    """For numbers alone, given by their digits, which tell -0 from 0."""
    made = _prepare(row, torch.empty(0, dtype=dtype), tuple(map(float.fromhex, digits)), result)
    return made._replace(packed=pack_all(made.values, None, made.held)) if SHORT.issuperset(made.held) else made  # type: ignore[arg-type]


def _prepare(row: Gate, input: Tensor, values: tuple[Any, ...], result: torch.dtype) -> Prepared:
    """reference.compared is the rule; numbers beside the operands are held as the output holds them."""
    if not row.rounds:
        compute = functools.reduce(torch.promote_types, _floating_dtypes(values), compute_dtype(input.dtype))
        return Prepared(values, (compute,) * len(values), compute, None)
    operands, dtypes = zip(*(_compared(row, input, value) for value in values[: row.operands]))
    promoted = functools.reduce(torch.promote_types, dtypes)
    compute = compute_dtype(promoted)
    if result.is_floating_point:
        constants, storage = [round_to(value, result) for value in values[row.operands :]], result
    else:
        constants, storage = [int(value) for value in values[row.operands :]], torch.int64
    held = (compute,) * row.operands + (storage,) * len(constants)
    narrow = promoted if not input.is_floating_point() and promoted in HALF else None
    return Prepared((*operands, *constants), held, compute, narrow)


def _floating_dtypes(values: Sequence[Any]) -> list[torch.dtype]:
    return [v.dtype for v in values if isinstance(v, Tensor) and v.is_floating_point()]


def _compared(row: Gate, input: Tensor, threshold: Operand) -> tuple[Operand, torch.dtype]:
    """A threshold as it is compared, and the dtype of the comparison."""
    scalar = not isinstance(threshold, Tensor) or threshold.dim() == 0
    if scalar and (input.is_floating_point() or row.casts):
        dtype = input.dtype
    else:
        threshold = reference.by_value(input, threshold)
        dtype = torch.result_type(input, threshold)
    if isinstance(threshold, Tensor):
        rounds = scalar or (dtype in HALF and not threshold.is_floating_point())
        return (threshold.to(dtype) if rounds else threshold), dtype
    return (round_to(threshold, dtype) if dtype.is_floating_point else int(threshold)), dtype


# -------------------------------------------------------------------------------------------------------------- forward


class Saved(NamedTuple):
    """How bits lie: rows of `width`, for a tensor of this dense layout; and how the threshold was compared.

    pattern: (inner, mid) of a threshold that keeps to its columns, (0, 0) of another, None where a row is one block.
    """

    width: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    pattern: tuple[int, int] | None
    compute: torch.dtype


@functools.cache
def _forward_kernel(
    function: str,
    kinds: tuple[int, ...],
    compute: torch.dtype,
    promoted: Any,
    bits: int,
    by_column: bool,
    config: Config,
) -> Kernel:
    return Kernel(
        device_code("gate").forward,
        num_warps=config.num_warps,
        KINDS=kinds,
        FUNCTION=getattr(device_code("pointwise"), function),
        COMPUTE=triton_dtype(compute),
        PROMOTED=None if promoted is None else triton_dtype(promoted),
        BITS=bits,
        BY_COLUMN=by_column,
        COLS=config.block,
    )


@functools.cache
def _fired_kernel(block: int) -> Kernel:
    return Kernel(device_code("gate").fired, num_warps=4, GROUPS=ROWS, BLOCK=block)


@functools.cache
def _count_kernel(parts: int, block: int) -> Kernel:
    return Kernel(device_code("gate").count, num_warps=4, PARTS=parts, BLOCK=block)


def choose(call: Call, x: Tensor, launch: tuning.Launch | None = None) -> Choice:
    """The block size of a call."""
    return tuning.choose(call.kind, call.key, x.dtype, x.numel(), x.device, launch, searches=call.searches)


def forward(
    input: Tensor,
    threshold: Operand,
    rest: Sequence[Operand],
    call: Call,
    inplace: bool = False,
    fired: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None, Saved]:
    """y, the count of each row if the gate counts, the bits for backward, and how they lie; `fired` is added to."""
    values = (threshold, *rest)
    x = layout.dense(input)
    if call.row.counts:
        x = x.contiguous()
    prepared = _prepared(call, x, values)
    into = inplace and layout.is_dense(input) and not layout.share_memory(threshold, input)
    y = input.detach() if into else torch.empty_like(x, dtype=call.result)
    saved = Saved(0, x.shape, x.stride(), None, prepared.compute)
    count = torch.empty(x.shape[:-1], dtype=compute_dtype(x.dtype), device=x.device) if call.row.counts else None
    bits = _memory(x, call.bits, call.row.counts) if call.traced else None
    if x.numel() == 0:
        bits = _memory(x, 0, False) if bits is None else bits
        count = None if count is None else count.zero_()
    elif call.by_column:
        saved, bits = _forward_by_column(call, prepared, x, y, count, saved, bits, fired)
    else:
        saved, bits = _forward_by_block(call, prepared, x, y, saved)
    if inplace:
        if not into:
            input.detach().copy_(y)
        y = input
    elif call.row.counts and not input.is_contiguous():
        y = torch.empty_like(input).copy_(y)
    return y, count, bits, saved


def _forward_by_block(
    call: Call, prepared: Prepared, x: Tensor, y: Tensor, saved: Saved
) -> tuple[Saved, Tensor | None]:
    """A row is one block: no mask but in the last tile."""
    n, (operands, kinds) = x.numel(), prepared.pack(x)

    def launch(config: Config, out: Tensor) -> Tensor | None:
        tiles = blocks(n, 8 * config.block)
        size = call.bits * tiles * config.block
        bits = torch.empty(size, dtype=torch.uint8, device=x.device) if size else None
        kernel = _forward_kernel(call.function, kinds, prepared.compute, prepared.promoted, call.bits, False, config)
        kernel(tiles, x, out, bits, n, tiles, None, operands)
        return bits

    config = choose(call, x, lambda config: launch(config, torch.empty_like(y))).config
    return saved._replace(width=config.block), launch(config, y)


def _forward_by_column(
    call: Call,
    prepared: Prepared,
    x: Tensor,
    y: Tensor,
    count: Tensor | None,
    saved: Saved,
    memory: Tensor | None,
    fired: Tensor | None,
) -> tuple[Saved, Tensor | None]:
    """Rows that are a multiple of the threshold's period, so that the count and the sums of backward run along them."""
    n, counts = x.numel(), call.row.counts
    config = choose(call, x).config
    width, pattern = _rows(x.shape, x.stride(), _own_shape(prepared.values[0]), counts, config.block)
    if width > WIDEST:
        raise ValueError(f"{call.row.name}: input has rows of {x.shape[-1]} elements, expected at most {WIDEST}")
    operands, kinds = _column_operands(prepared, x, width, pattern)
    down, across = blocks(n, 8 * width), blocks(width, config.block)
    planes = max(call.bits, int(counts))
    bits = memory if call.bits else None
    if bits is None and planes:
        bits = torch.empty(planes * down * width, dtype=torch.uint8, device=x.device)
    kernel = _forward_kernel(call.function, kinds, prepared.compute, None, planes, pattern != (0, 0), config)
    kernel(down * across, x, y, bits, n, down, width, operands)
    if count is not None:
        lanes = min(COUNT_BLOCK, 1 << max((x.shape[-1] - 1).bit_length() - 2, 0))  # a fourth of a row, four times
        parts = COUNT_BLOCK // lanes
        programs = blocks(down * (width // x.shape[-1]), parts)
        _count_kernel(parts, lanes)(programs, bits, count, count.numel(), width, x.shape[-1])
    if fired is not None:
        _count_fired(bits, fired, n, width)
    return saved._replace(width=width, pattern=pattern), bits if call.bits else memory


def _count_fired(bits: Tensor | None, fired: Tensor, n: int, width: int) -> None:
    """Add to `fired` how often each feature's bit is set, in the first plane of n elements in rows of `width`."""
    features, groups = len(fired), blocks(n, 8 * width)
    block = min(FIRED_BLOCK, 1 << (width - 1).bit_length())
    programs = blocks(width, block) * blocks(groups, ROWS)
    _fired_kernel(block)(programs, bits, fired, n // features, groups, width, features)


def _own_shape(threshold: Operand) -> tuple[int, ...] | None:
    """The shape of a threshold that is more than a number."""
    return threshold.shape if isinstance(threshold, Tensor) and threshold.numel() > 1 else None


@functools.lru_cache(maxsize=4096)
def _rows(
    shape: tuple[int, ...], stride: tuple[int, ...], own: tuple[int, ...] | None, counts: bool, block: int
) -> tuple[int, tuple[int, int]]:
    """The width of the rows that the kernels see, and the threshold's (inner, mid) if it keeps to its columns, else (0, 0).

    The width is a common multiple of 16 (alignment), the threshold's period and, if we count, the feature dimension; it is scaled
    up to about `block` elements. If there are too few rows for that, or they are too long, a count takes them as they are.
    """
    n, features = math.prod(shape), shape[-1] if counts else 1
    pattern = (1, 1) if own is None else layout.broadcast_pattern(shape, stride, own)
    if pattern is not None:
        unit = math.lcm(math.prod(pattern), features, 16)
        if unit <= WIDEST and (n >= 8 * unit or (pattern == (1, 1) and not counts)):
            return _widened(unit, n, block), pattern
    unit = math.lcm(features, 16)
    if counts and (n < 8 * unit or unit > WIDEST):
        return features, pattern if pattern == (1, 1) else (0, 0)
    return _widened(unit, n, block), (0, 0)


@functools.lru_cache(maxsize=4096)
def _widened(unit: int, n: int, block: int) -> int:
    """Among the multiples of `unit` for which n elements still make eight rows, the one that wastes the fewest lanes."""
    fitting = [m * unit for m in range(1, max(8, block // unit) + 1) if n >= 8 * m * unit and m * unit <= WIDEST]
    return max(fitting, key=lambda width: width / (blocks(width, block) * block), default=unit)


def _column_operands(prepared: Prepared, x: Tensor, width: int, pattern: tuple[int, int]) -> Packed:
    """The threshold and the constants, packed; a threshold as wide as the rows is one that lies as they do."""
    threshold, *numbers = prepared.values
    constants, kinds = pack_all(numbers, x, (prepared.compute,) * len(numbers))
    whole = pattern == (1, width) and isinstance(threshold, Tensor)
    if whole and threshold.dim() == 1 and threshold.is_contiguous():  # type: ignore[union-attr]
        return ((threshold,), *constants), (ELEMENT, *kinds)
    packed, kind = pack(threshold, x, prepared.compute)
    if whole and kind == CHANNEL:
        packed, kind = packed[:1], ELEMENT
    return (packed, *constants), (kind, *kinds)


# ------------------------------------------------------------------------------------------------------------- backward


@functools.cache
def _backward_bit_kernel(block: int, itemsize: int, lanes: int) -> Kernel:
    return Kernel(device_code("gate").backward_bit, num_warps=tuning.gate_warps(block, itemsize, lanes), COLS=block)


@functools.cache
def _backward_input_kernel(function: str, kinds: tuple[int, ...], compute: torch.dtype, config: Config) -> Kernel:
    return Kernel(
        device_code("gate").backward_input,
        num_warps=config.num_warps,
        KINDS=kinds,
        FUNCTION=getattr(device_code("pointwise"), function),
        COMPUTE=triton_dtype(compute),
        COLS=config.block,
    )


@functools.cache
def _backward_code_kernel(
    function: str,
    kinds: tuple[int, ...],
    compute: torch.dtype,
    bits: int,
    input_gradient: bool,
    by_column: bool,
    groups: int,
    config: Config,
) -> Kernel:
    return Kernel(
        device_code("gate").backward_code,
        num_warps=config.num_warps,
        KINDS=kinds,
        FUNCTION=getattr(device_code("pointwise"), function),
        COMPUTE=triton_dtype(compute),
        BITS=bits,
        INPUT_GRADIENT=input_gradient,
        BY_COLUMN=by_column,
        GROUPS=groups,
        COLS=config.block,
    )


def _backward_bit(bits: Tensor, saved: Saved, gradient: Tensor) -> Tensor:
    """The gradient where the element's bit is set, else 0."""
    g = layout.laid_out_as(gradient, saved.shape, saved.stride)
    dx = torch.empty_strided(saved.shape, saved.stride, dtype=g.dtype, device=g.device)
    if g.numel():
        kernel = _backward_bit_kernel(saved.width, g.dtype.itemsize, tuning.lanes(g.device))
        kernel(blocks(g.numel(), 8 * saved.width), g, bits, dx, g.numel())
    return dx


def _backward_input(call: Call, input: Tensor, values: tuple[Operand, ...], gradient: Tensor) -> Tensor:
    """The gradient times dy/dx, evaluated again."""
    x = layout.dense(input)
    g, dx = layout.laid_out_as(gradient, x.shape, x.stride()), torch.empty_like(x)
    if x.numel():
        prepared = _prepared(call, x, values)
        operands, kinds = prepared.pack(x)
        config = tuning.default("gate", x.dtype.itemsize, tuning.lanes(x.device))
        kernel = _backward_input_kernel(call.function, kinds, prepared.compute, config)
        kernel(blocks(x.numel(), 8 * config.block), g, x, dx, x.numel(), operands)
    return dx


def _backward_code(
    call: Call,
    values: tuple[Operand, ...],
    bits: Tensor,
    saved: Saved,
    gradients: Sequence[Tensor],
    own: torch.Size | None,
) -> tuple[Tensor, Tensor | None]:
    """dx, and dt summed to the threshold's shape `own` (None: not wanted), in the type of comparison."""
    g = layout.laid_out_as(gradients[0], saved.shape, saved.stride)
    count = gradients[1].contiguous() if call.row.counts else None
    dx = torch.empty_strided(saved.shape, saved.stride, dtype=g.dtype, device=g.device)
    n, width = g.numel(), saved.width
    if n == 0:
        return dx, None if own is None else torch.zeros(own, dtype=saved.compute, device=g.device)
    prepared = _prepared(call, dx, values)._replace(compute=saved.compute)
    config = choose(call, g).config
    if saved.pattern is None:
        config = Config(width, config.num_warps)
        operands, kinds = prepared.pack(dx)
    else:
        operands, kinds = _column_operands(prepared, dx, width, saved.pattern)
    by_column = saved.pattern is not None and saved.pattern != (0, 0)
    rows = ROWS if by_column else 8
    down, across = blocks(n, rows * width), blocks(width, config.block)
    dt = None
    if own is not None and by_column:
        dt = torch.empty(down * width, dtype=saved.compute, device=g.device)
    elif own is not None:
        dt = torch.empty_like(dx, dtype=saved.compute)
    features = saved.shape[-1] if call.row.counts else width
    kernel = _backward_code_kernel(
        f"{call.key}_backward", kinds, saved.compute, call.bits, call.input_gradient, by_column, rows // 8, config
    )
    slices, counted = blocks(n, 8 * width), None if features == width else features
    kernel(down * across, g, count, bits, dx, dt, n, slices, width, counted, operands)
    if dt is None or own is None:
        return dx, None
    return dx, _summed_by_column(dt, own, saved) if by_column else layout.summed(dt, own)


def _summed_by_column(dt: Tensor, own: torch.Size, saved: Saved) -> Tensor:
    """Partial sums of each column, added up to the threshold's shape."""
    assert saved.pattern is not None
    inner, mid = saved.pattern
    total = dt if dt.numel() == mid else dt.view(-1, mid).sum(0) if inner == 1 else dt.view(-1, mid, inner).sum((0, 2))
    return layout.unblock(total, own, saved.shape, saved.stride)


def _unpacked(bits: Tensor, saved: Saved, plane: int) -> Tensor:
    """A plane of bits as a bool tensor, in plain torch."""
    if math.prod(saved.shape) == 0:
        return torch.empty_strided(saved.shape, saved.stride, dtype=torch.bool, device=bits.device)
    flat = layout.unpack(bits, saved.width, plane, math.prod(saved.shape))
    return flat.as_strided(saved.shape, saved.stride)


def _backward_formula(
    call: Call, low: Tensor, high: Tensor | None, values: tuple[Operand, ...], gradients: Sequence[Tensor | None]
) -> tuple[Tensor, Tensor | None]:
    """dx and the elementwise dt from bits, in plain torch: differentiable in the gradients and in the threshold."""
    if call.bits == 1 and not call.row.straight_through:
        assert gradients[0] is not None
        return torch.where(low, gradients[0], 0), None
    high = torch.zeros_like(low) if high is None else high
    return reference.from_bits(call.row.name, gradients, low, high, values, call.result, call.input_gradient)


def _backward_of_formula(
    call: Call, input: Tensor, values: tuple[Operand, ...], gradients: Sequence[Tensor | None], learns: bool
) -> tuple[Tensor, ...]:
    """Gradients of the plain formula at a saved input: differentiable, and under any transform."""
    keywords = {"input_gradient": call.input_gradient} if call.row.straight_through else {}

    def formula(x: Tensor, *threshold: Operand) -> Any:
        return getattr(reference, call.row.name)(x, *(threshold or values[:1]), *values[1:], **keywords)

    outputs, pull, *_ = torch.func.vjp(formula, input, *(values[:1] if learns else ()))
    if not isinstance(outputs, tuple):
        return pull(gradients[0])  # type: ignore[no-any-return]
    return pull(tuple(torch.zeros_like(o) if g is None else g for o, g in zip(outputs, gradients)))  # type: ignore[no-any-return]


# ---------------------------------------------------------------------------------------------- autograd, eager and traced


def _setup(ctx: Any, arguments: tuple[Any, ...], outputs: tuple[Any, ...]) -> None:
    input, threshold, rest, ctx.call, inplace, *_ = arguments
    y, count, bits, *saved = outputs
    row = ctx.call.row
    values = (threshold, *rest)
    if isinstance(threshold, Tensor):
        ctx.own, ctx.dtype = threshold.shape, threshold.dtype
    if ctx.traced:
        ctx.mark_non_differentiable(*([bits] if row.counts else [count, bits]))
        from_bits = ctx.call.bits >= (2 if ctx.needs_input_grad[1] or ctx.call.input_gradient else 1)
        ctx.saved = input.shape, None if row.counts else y.stride()
    else:
        from_bits = row.saves != "input"
        (ctx.saved,) = saved
        if inplace:
            ctx.mark_dirty(input)
    ctx.from_bits, ctx.stride = from_bits, y.stride()
    if from_bits and not ctx.traced and (not row.reads_threshold or ctx.call.bits == 1):
        values = tuple(0.0 if isinstance(value, Tensor) else value for value in values)
    ctx.numbers, tensors = parted(values)
    ctx.save_for_backward(bits if from_bits else input, *tensors)


def _backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
    given = [g for g in gradients if g is not None]
    if not given:
        return None, None
    kept, *tensors = ctx.saved_tensors
    values = restored(ctx.numbers, tensors) if tensors else ctx.numbers
    call, learns = ctx.call, ctx.needs_input_grad[1]
    last = not torch.is_grad_enabled() and (backend.is_ordinary(*given) or backend.is_one_op(*given))
    if not ctx.from_bits:
        if last and not ctx.traced:
            return _backward_input(call, kept, values, given[0]), None
        found = _backward_of_formula(call, kept, values, gradients, learns)
        return found[0], found[1] if learns else None
    dx, dt = (_backward_traced if ctx.traced else _backward_of_bits)(ctx, kept, values, gradients, learns, last)
    return _lying_as_input(ctx, dx, dt) if call.row.counts and last else (dx, dt)


def _lying_as_input(ctx: Any, dx: Tensor | None, dt: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of a gate that counts, whose kernels read the input as contiguous."""
    if dx is None or dx.stride() == ctx.stride:  # what compilers leave open is not looked at further
        return dx, dt
    if dt is not None and dt.shape == dx.shape:
        dt = layout.laid_out_as(dt, dx.shape, ctx.stride)
    return layout.laid_out_as(dx, dx.shape, ctx.stride), dt


def _backward_of_bits(
    ctx: Any,
    kept: Tensor,
    values: tuple[Operand, ...],
    gradients: Sequence[Tensor | None],
    learns: bool,
    last: bool,
) -> tuple[Tensor, Tensor | None]:
    """By kernels; or, to be differentiated or transformed, in plain torch."""
    call, saved = ctx.call, ctx.saved
    given = [g for g in gradients if g is not None]
    if last and call.bits == 1 and not call.by_column:
        return _backward_bit(kept, saved, given[0]), None
    if last:
        dx, dt = _backward_code(call, values, kept, saved, given, ctx.own if learns else None)
        return dx, None if dt is None else dt.to(ctx.dtype)
    high = _unpacked(kept, saved, 1) if call.bits == 2 else None
    dx, dt = _backward_formula(call, _unpacked(kept, saved, 0), high, values, gradients)
    return dx, layout.summed(dt, ctx.own).to(ctx.dtype) if learns and dt is not None else None


# The threshold of a traced gate is a tensor or, where that is None, the first of `numbers`. Its bits are in memory whose size
# follows from the input's shape; `size` and `stride` are those of the dense tensor they belong to (None: contiguous).
_TRACED = "Tensor? threshold, float[] numbers, str name, bool input_gradient, int planes"


def _traced(
    row: Gate, input: Tensor, parameters: tuple[Any, ...], learns: bool, input_gradient: bool, return_fired: bool
) -> Any:
    """A gate whose threshold may learn, as one op: two bits an element for backward, one where only the input learns.

    Other gates are plain torch when they are traced. Inductor fuses those with their neighbours, where they move no byte of their
    own; as an op each would move 2s + 1/8 bytes an element each way.
    """
    threshold, *constants = parameters
    tensor = threshold if isinstance(threshold, Tensor) else None
    numbers = [torch.sym_float(value) for value in (constants if tensor is not None else parameters)]
    bits = 0
    if torch.is_grad_enabled() and (learns or input.requires_grad):
        bits = 2 if learns or input_gradient else 1
    counted = return_fired and not is_exporting()  # a decomposed program has no bits
    y, count, saved = GATE.op(input, tensor, numbers, row.name, input_gradient, max(bits, int(counted)))
    if counted:
        size = input.shape
        return y, count, _fired_op(input.dtype, saved, size, None, tensor, numbers, row.name, input_gradient, bits or 1)
    if return_fired:
        return y, count, reference.fired(input, parameters[0])
    return (y, count) if row.counts else y


def _decode(
    input: Tensor, threshold: Tensor | None, numbers: Sequence[float], name: str, input_gradient: bool, bits: int
) -> tuple[Any, ...]:
    first, rest = (numbers[0], numbers[1:]) if threshold is None else (threshold, numbers)
    row = GATES[name]
    call = _call(row, input.dtype, True, True, input_gradient)._replace(bits=bits, traced=True)
    return input, first, tuple(rest), call, False


def _memory(input: Tensor, bits: int, counts: bool) -> Tensor:
    """Memory for bits. Their rows are at most an eighth of the elements long, or as short as can be: see `_rows`."""
    least = 16 + (input.shape[-1] if counts else 0)
    return input.new_empty(bits * (input.numel() // 4 + least), dtype=torch.uint8)


def _fake(
    input: Tensor, threshold: Tensor | None, numbers: Sequence[float], name: str, input_gradient: bool, bits: int
) -> tuple[Tensor, Tensor, Tensor]:
    counts = GATES[name].counts
    count = input.new_empty(0)
    if counts:
        count = input.new_empty(input.shape[:-1], dtype=compute_dtype(input.dtype))
    return torch.empty_like(input), count, _memory(input, bits, counts)


def _formula(
    input: Tensor, threshold: Tensor | None, numbers: Sequence[float], name: str, input_gradient: bool, bits: int
) -> tuple[Tensor, Tensor, Tensor]:
    row, values = GATES[name], (*([] if threshold is None else [threshold]), *numbers)
    keywords = {"input_gradient": input_gradient} if row.straight_through else {}
    outputs = getattr(reference, name)(input, *values, **keywords)
    y, count = outputs if row.counts else (outputs, input.new_empty(0))
    return y, count, _memory(input, bits, row.counts)


GATE = Fused(
    "gate",
    f"(Tensor input, {_TRACED}) -> (Tensor, Tensor count, Tensor bits)",
    forward=forward,
    fake=_fake,
    setup=_setup,
    backward=_backward,
    decode=_decode,
    formula=_formula,
    outputs=3,
    public=2,
)


def _backward_traced(
    ctx: Any,
    bits: Tensor,
    values: tuple[Operand, ...],
    gradients: Sequence[Tensor | None],
    learns: bool,
    last: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """Backward as one op too; or, to be differentiated or transformed, the bits as an op and plain torch."""
    call, (size, stride) = ctx.call, ctx.saved
    threshold, numbers = (values[0], values[1:]) if isinstance(values[0], Tensor) else (None, values)
    more = size, stride, threshold, numbers, call.row.name, call.input_gradient, call.bits
    if not last:
        low, high = _bits_op(call.result, bits, *more)
        dx, dt = _backward_formula(call, low, high, values, gradients)
        return dx, layout.summed(dt, ctx.own).to(ctx.dtype) if learns and dt is not None else None
    gradient, *counts = gradients
    count = counts[0] if call.row.counts else None
    if gradient is None:
        assert count is not None
        gradient = count.new_zeros(size, dtype=call.result)
    elif call.row.counts and count is None:
        count = gradient.new_zeros(size[:-1], dtype=compute_dtype(call.result))
    dx, dt = _backward_op(gradient, count, learns, bits, *more)
    return dx, dt if learns else None


def _saved(dtype: torch.dtype, device: torch.device, size: Any, stride: Any, call: Call, threshold: Operand) -> Saved:
    """How the bits of a traced gate lie: as an eager one's would."""
    like = torch.empty(tuple(size), dtype=dtype, device="meta")
    if stride is not None:
        like = like.as_strided(tuple(size), tuple(stride))
    compute = functools.reduce(torch.promote_types, _floating_dtypes([threshold]), compute_dtype(dtype))
    if call.row.rounds:
        compute = compute_dtype(_compared(call.row, like, threshold)[1])
    if like.numel() == 0:
        return Saved(0, like.shape, like.stride(), (0, 0), compute)
    config = tuning.choose(call.kind, call.key, dtype, like.numel(), device).config
    width, pattern = _rows(like.shape, like.stride(), _own_shape(threshold), call.row.counts, config.block)
    return Saved(width, like.shape, like.stride(), pattern, compute)


def _backward_kernel(
    gradient: Tensor, of_count: Tensor | None, learns: bool, bits: Tensor, size: Any, stride: Any, *traced: Any
) -> tuple[Tensor, Tensor]:
    _, threshold, rest, call, _ = _decode(gradient, *traced)
    saved = _saved(gradient.dtype, gradient.device, size, stride, call, threshold)
    own = threshold.shape if learns and isinstance(threshold, Tensor) else None
    values = (threshold if call.row.reads_threshold else 0.0, *rest)
    upstream = [gradient] if of_count is None else [gradient, of_count]
    dx, dt = _backward_code(call, values, bits, saved, upstream, own)
    return dx, gradient.new_empty(0) if dt is None else dt.to(threshold.dtype).contiguous()


def _backward_fake(
    gradient: Tensor, of_count: Tensor | None, learns: bool, bits: Tensor, size: Any, stride: Any, *traced: Any
) -> tuple[Tensor, Tensor]:
    threshold = traced[0]
    dx = gradient.new_empty(size) if stride is None else gradient.new_empty_strided(size, stride)
    if threshold is None or not learns:
        return dx, gradient.new_empty(0)
    return dx, gradient.new_empty(threshold.shape, dtype=threshold.dtype)


def _bits_kernel(dtype: torch.dtype, bits: Tensor, size: Any, stride: Any, *traced: Any) -> tuple[Tensor, Tensor]:
    _, threshold, _, call, _ = _decode(torch.empty(0, dtype=dtype, device="meta"), *traced)
    saved = _saved(dtype, bits.device, size, stride, call, threshold)
    low = _unpacked(bits, saved, 0)
    return low, _unpacked(bits, saved, 1) if call.bits == 2 else torch.zeros_like(low)


def _bits_fake(dtype: torch.dtype, bits: Tensor, size: Any, stride: Any, *traced: Any) -> tuple[Tensor, Tensor]:
    low = bits.new_empty(size, dtype=torch.bool)
    if stride is not None:
        low = bits.new_empty_strided(size, stride, dtype=torch.bool)
    return low, torch.empty_like(low)


def _fired_of_bits(dtype: torch.dtype, bits: Tensor, size: Any, stride: Any, *traced: Any) -> Tensor:
    _, threshold, _, call, _ = _decode(torch.empty(0, dtype=dtype, device="meta"), *traced)
    saved = _saved(dtype, bits.device, size, stride, call, threshold)
    fired = torch.zeros(size[-1:], dtype=torch.int64, device=bits.device)
    if saved.width:
        _count_fired(bits, fired, math.prod(saved.shape), saved.width)
    return fired


def _fired_fake(dtype: torch.dtype, bits: Tensor, size: Any, stride: Any, *traced: Any) -> Tensor:
    return bits.new_empty(size[-1:], dtype=torch.int64)


_BITS = "Tensor bits, SymInt[] size, SymInt[]? stride"
_backward_op = define(
    "gate_backward",
    f"(Tensor gradient, Tensor? count_gradient, bool learns, {_BITS}, {_TRACED}) -> (Tensor dx, Tensor dt)",
    _backward_kernel,
    _backward_fake,
    of_backward=True,
)
_fired_op = define("gate_fired", f"(ScalarType dtype, {_BITS}, {_TRACED}) -> Tensor", _fired_of_bits, _fired_fake)
_bits_op = define(
    "gate_bits", f"(ScalarType dtype, {_BITS}, {_TRACED}) -> (Tensor low, Tensor high)", _bits_kernel, _bits_fake
)


# ----------------------------------------------------------------------------------------------------------------- plan


def plan(
    row: Gate,
    input: Tensor,
    *parameters: Any,
    inplace: bool = False,
    dtype: torch.dtype | None = None,
    input_gradient: bool = False,
    return_fired: bool = False,
) -> backend.Plan:
    """A call as `run` would make it: its checks, its way, its block size, and the bytes of its kernels."""
    values = _checked(row, input, parameters, dtype)
    operands = [value for value in values[: row.operands] if isinstance(value, Tensor)]
    way = backend.way(input, *operands)
    learns = row.learns and _requires_grad(values[0])
    if way == "op" and not (row.straight_through or learns):
        way = "formula"
    records = (input.requires_grad or learns) and torch.is_grad_enabled() and row.saves != "nothing"
    call = _call(row, dtype or input.dtype, records, learns, input_gradient)
    if way == "triton" and _is_better_in_torch(row, input, values, learns):
        return backend.planned("eager", input.device, None, False, 0, 0, 0)._replace(reason=BETTER_IN_TORCH)
    choice = choose(call, input) if way in ("triton", "op") else None
    moved, *more = _bytes(call, input, operands, records)
    if return_fired:
        moved += -(-input.numel() // 8) + 8 * input.shape[-1]
    return backend.planned(way, input.device, choice, call.searches and tuning.may_search(), moved, *more)


def _bytes(call: Call, input: Tensor, operands: Sequence[Tensor], records: bool) -> tuple[int, int, int]:
    """Bytes that the kernels move forward and backward, and what is kept for backward."""
    row, n, size = call.row, input.numel(), input.element_size()
    plane, read, count = -(-n // 8), layout.total_bytes(operands), 0
    forward = n * (size + call.result.itemsize) + read
    if row.counts and n:
        count = n // input.shape[-1] * compute_dtype(input.dtype).itemsize
        # the count reads a plane of bits, and writes it if no backward asked for it
        forward += count + (1 if records else 2) * plane
    if not records:
        return forward, 0, 0
    if row.saves == "input":
        return forward, 3 * n * size + read, n * size + read
    bits = call.bits * plane
    again = read if row.reads_threshold and call.bits == 2 else 0
    learning = layout.total_bytes([t for t in operands if t.requires_grad])
    return forward + bits, 2 * n * size + bits + count + again + learning, bits + again
