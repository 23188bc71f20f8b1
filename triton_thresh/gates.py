"""Gates: from the public call to the kernels of kernels/gate.py, and back for backward.

`run` takes every call. It hands it to `_on_triton` (kernels), `_in_torch` (eager torch, or the formula) or `_as_op` (an op that a
compiler sees whole). `forward` and `_backward` serve the kernels and the op alike.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import backend, checks, eager, layout, reference, tuning
from .backend import Way
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
NO_SLOPE = (
    "its gradient is zero almost everywhere; pass {name}.detach() (from the data: x.detach().mean()), or take jumprelu, whose "
    "threshold learns"
)


def _signature(gate: Gate) -> dict[str, Any]:
    parameters = list(inspect.signature(getattr(reference, gate.name)).parameters.values())[1:]
    return {p.name: p.default for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD}


SIGNATURES: Mapping[str, dict[str, Any]] = MappingProxyType(
    {gate.name: _signature(gate) for gate in (*GATES.values(), KEEP_LARGE)}
)
"""The operands and numbers of each gate with their defaults, as its function in reference.py declares them."""


KEYWORDS = frozenset({"dtype", "inplace", "input_gradient", "return_fired"})
"""The keywords that a public function may pass on, beside the parameters in SIGNATURES."""


# ------------------------------------------------------------------------------------------------------------- the call


def call(gate: Gate, input: Tensor, *parameters: Any, **keywords: Any) -> Any:
    """`run`, where parameters that are left out have their defaults."""
    defaults = tuple(SIGNATURES[gate.name].values())
    return run(gate, input, parameters + defaults[len(parameters) :], **keywords)


def run(
    gate: Gate,
    input: Tensor,
    parameters: tuple[Any, ...],
    *,
    inplace: bool = False,
    dtype: torch.dtype | None = None,
    input_gradient: bool = False,
    return_fired: bool = False,
) -> Any:
    """Check the arguments, ask which way the call goes, and go.

    `parameters` are all operands and numbers after the input, in the order of SIGNATURES. `dtype` is the output's, if not the
    input's. With `input_gradient` the straight-through estimate has a gradient for the input too. `return_fired` adds an output.
    """
    learns = False
    way = _way_of_simple(gate, input, parameters, dtype)
    is_simple = way is not None
    if way is None:
        parameters = _checked(gate, input, parameters, dtype)
        way = backend.way(input, *parameters[: gate.operands])
        if not gate.straight_through:
            parameters = _read_thresholds(gate, input, parameters, way)
        learns = gate.learns and _requires_grad(parameters[0])
    if way == "triton" and _is_better_in_torch(gate, input, parameters):
        way = "eager"
    if is_simple and way == "eager" and not inplace and input.dtype not in HALF:
        function = eager.GATES.get(gate.name)
        if function is not None:
            return function(input, *parameters)
    if inplace and way != "formula":
        checks.check_inplace(gate.name, input)
    if way == "triton":
        return _on_triton(gate, input, parameters, learns, dtype or input.dtype, inplace, input_gradient, return_fired)
    if way == "op" and (gate.straight_through or learns):  # other gates are traced in plain torch
        return _as_op(gate, input, parameters, learns, input_gradient, return_fired)
    output = _in_torch(gate, input, parameters, way, learns, inplace, dtype, input_gradient)
    return (*output, reference.fired(input, parameters[0])) if return_fired else output


def _way_of_simple(gate: Gate, input: Tensor, parameters: tuple[Any, ...], dtype: torch.dtype | None) -> Way | None:
    """The way of an ordinary dense input and numbers that its dtype holds, where nothing is left to check; None for others."""
    if gate.straight_through or gate.operands > 1 or dtype is not None:
        return None
    way = backend.way_of_plain(input)
    return way if way and checks.within(input.dtype, parameters, gate.nonnegative) else None


def _requires_grad(threshold: object) -> bool:
    """True if the threshold is to get a gradient."""
    return isinstance(threshold, Tensor) and threshold.requires_grad and torch.is_grad_enabled()


def _records(gate: Gate, input: Tensor, learns: bool) -> bool:
    """True if autograd records the call."""
    return (learns or input.requires_grad) and torch.is_grad_enabled() and gate.saves != "nothing"


def _on_triton(
    gate: Gate,
    input: Tensor,
    parameters: tuple[Any, ...],
    learns: bool,
    result: torch.dtype,
    inplace: bool,
    input_gradient: bool,
    return_fired: bool,
) -> Any:
    """The call by kernels: what the public function returns. `result` is the dtype of the output."""
    fired = torch.zeros(input.shape[-1:], dtype=torch.int64, device=input.device) if return_fired else None
    records = _records(gate, input, learns)
    variant = _variant(gate, result, records, learns, input_gradient)
    arguments = input, parameters[0], parameters[1:], variant, inplace, fired
    if records:
        output = GATE.record(*arguments)
    else:
        y, count, *_ = forward(*arguments)
        output = y if count is None else (y, count)
        if inplace:
            torch.autograd.graph.increment_version(input)
    return output if fired is None else (*output, fired)


def _checked(gate: Gate, input: Tensor, parameters: tuple[Any, ...], dtype: torch.dtype | None) -> tuple[Any, ...]:
    """The parameters after their checks: Python numbers and tensors of the right kind, shape and place."""
    op = gate.name
    checks.check_input(op, input, gate.dtypes)
    if gate.counts and input.dim() == 0:
        raise ValueError(f"{op}: input has shape (), expected at least one dimension to count along")
    if gate.straight_through:
        threshold, bandwidth = parameters
        threshold = checks.check_operand(op, "threshold", threshold, input, learns=True)
        return threshold, checks.check_positive(op, "bandwidth", bandwidth)
    operands = _checked_operands(gate, input, parameters[: gate.operands])
    numbers = zip([*SIGNATURES[op]][gate.operands :], parameters[gate.operands :])
    result = input.dtype if dtype is None else checks.check_dtype(op, dtype)
    check = checks.check_held if result.is_floating_point else checks.check_integer
    return (*operands, *[check(op, name, checks.check_number(op, name, value), result) for name, value in numbers])


def _checked_operands(gate: Gate, input: Tensor, values: Sequence[Any]) -> list[Operand]:
    """The operands among them. Each number is at least the one before it, if the gate takes none below 0."""
    op, found = gate.name, []
    least: float = 0
    for name, value in zip(SIGNATURES[op], values):
        operand = checks.check_operand(op, name, value, input, learns=gate.learns, why=NO_SLOPE)
        if not isinstance(operand, Tensor):
            if gate.nonnegative:
                operand = least = checks.check_least(op, name, operand, least)
            if gate.casts and input.dtype not in FLOATING:
                operand = checks.check_integer(op, name, operand, input.dtype)
        found.append(operand)
    return found


def _read_thresholds(gate: Gate, input: Tensor, parameters: tuple[Any, ...], way: str) -> tuple[Any, ...]:
    """The parameters with numbers for 0-dim CPU tensors that get no gradient. Triton's interpreter takes those as they are."""
    if way not in ("eager", "triton") or (way == "triton" and input.is_cpu):
        return parameters
    named = zip(SIGNATURES[gate.name], parameters[: gate.operands])
    operands = [_read_threshold(gate, input, name, value) for name, value in named]
    return (*operands, *parameters[gate.operands :])


def _read_threshold(gate: Gate, input: Tensor, name: str, value: Operand) -> Operand:
    if not isinstance(value, Tensor) or value.dim() or not value.is_cpu or (gate.learns and _requires_grad(value)):
        return value
    number = value.item()
    if input.is_floating_point():
        number = float(number)
    if gate.casts and input.dtype not in FLOATING:
        number = checks.check_integer(gate.name, name, number, input.dtype)
    return checks.check_least(gate.name, name, number) if gate.nonnegative else number


def _in_torch(
    gate: Gate,
    input: Tensor,
    parameters: tuple[Any, ...],
    way: str,
    learns: bool,
    inplace: bool,
    dtype: torch.dtype | None,
    input_gradient: bool,
) -> Any:
    """The call by torch's own kernels where they give the same bits, else by the formula of reference.py."""
    function: Any = getattr(reference, gate.name)
    records, is_eager = _records(gate, input, learns), way == "eager"
    keywords: dict[str, Any] = {} if dtype is None else {"dtype": dtype}
    if is_eager and gate.name in eager.STRAIGHT_THROUGH:
        threshold, bandwidth = parameters
        output = eager.straight_through_gate(gate.name, input, threshold, bandwidth, input_gradient, records)
        return output if input.is_contiguous() else _laid_out(output, input)
    if gate.straight_through:
        keywords = {"input_gradient": input_gradient}
    elif is_eager and _has_torch_kernel(gate, input, parameters):
        parameters = _rounded(input.dtype, parameters, dtype)
        if inplace and not records and gate.name in eager.IN_PLACE:
            return eager.IN_PLACE[gate.name](input, *parameters)
        function = eager.GATES[gate.name]
    if inplace:
        source = input.clone() if records and is_eager else input  # what is saved must outlive the write
        return input.copy_(function(source, *parameters, **keywords))
    output = function(input, *parameters, **keywords)
    return _laid_out(output, input) if is_eager and not input.is_contiguous() else output


def _is_better_in_torch(gate: Gate, input: Tensor, parameters: tuple[Any, ...]) -> bool:
    """True where backend "auto" leaves a GPU's tensor to a kernel of torch that does the same.

    Without a gradient it takes as long (hardshrink of 2**26 bfloat16 on an H100: 92.3 µs against 93.4), and its call costs less
    (7 µs against 26). With one it saves the whole input, which its backward reads: it serves where calls take all the time.
    """
    if not input.is_cuda or gate.name not in eager.SAME_KERNELS or not _has_torch_kernel(gate, input, parameters):
        return False
    return backend.get_backend() != "triton" and (input.numel() < MANY or not _records(gate, input, False))


def _has_torch_kernel(gate: Gate, input: Tensor, parameters: tuple[Any, ...]) -> bool:
    """True if a kernel of torch computes the same: it takes floats, and a number for threshold."""
    return gate.name in eager.GATES and input.dtype in FLOATING and not isinstance(parameters[0], Tensor)


def _rounded(stored: torch.dtype, numbers: tuple[Any, ...], dtype: torch.dtype | None) -> tuple[Any, ...]:
    """Numbers rounded to the input's dtype, where torch's kernels would round them otherwise: to 16 bits, or out of range."""
    if stored not in HALF and checks.within(stored, numbers, False):
        return numbers
    first, *rest = numbers
    return (round_to(first, stored), *(rest if dtype else [round_to(value, stored) for value in rest]))


def _laid_out(output: Any, input: Tensor) -> Any:
    """The output with the memory format of the input. torch.where may give it the threshold's."""
    if isinstance(output, tuple):
        return (_laid_out(output[0], input), *output[1:])
    like = torch.empty_like(input, dtype=output.dtype)
    return output if output.stride() == like.stride() else like.copy_(output)


# ------------------------------------------------------------------------------------------------------- what is called


class Variant(NamedTuple):
    """Everything about a call that chooses its kernels, except its tensors and numbers."""

    gate: Gate
    result: torch.dtype
    bits: int  # that forward saves of each element
    by_column: bool  # the kernels see rows, in which each column has its own entry of the threshold if that can be
    input_gradient: bool
    function: str  # the device function of y
    key: str  # the name in the tables of block sizes
    traced: bool = False  # its bits lie in memory whose size `_fake` can tell

    @property
    def searches(self) -> bool:
        """True if a search may choose the block size: where it fixes no order of summation."""
        return not self.by_column

    @property
    def kind(self) -> tuning.Kind:
        """The kind of kernel for which tuning.py has defaults."""
        return "learned" if self.by_column else "gate"


@functools.lru_cache(maxsize=4096)
def _variant(gate: Gate, result: torch.dtype, records: bool, learns: bool, input_gradient: bool) -> Variant:
    """The variant of a call whose output has the dtype `result`."""
    name = gate.name if gate.saves != "bit" or not learns else f"{gate.name}_learned"
    if not records or gate.saves not in ("bit", "two bits"):
        bits = 0
    elif gate.saves == "two bits":
        bits = 1 if gate.learns and not (learns or input_gradient) else 2
    else:
        bits = 2 if learns else 1
    return Variant(gate, result, bits, gate.straight_through or learns, input_gradient, gate.value or name, name)


class KernelOperands(NamedTuple):
    """The operands and numbers of a call, rounded as the kernels compare them."""

    values: tuple[Operand, ...]
    held: tuple[torch.dtype, ...]  # for each, the dtype that holds it if it is a number
    compute: torch.dtype  # the dtype of the comparison
    promoted: torch.dtype | None  # the 16-bit type in which an integer input is compared
    packed: Packed | None = None  # of numbers that float32 arguments hold

    def pack(self, x: Tensor) -> Packed:
        """The kernels' arguments for them, and the kinds of these."""
        return self.packed or pack_all(self.values, x, self.held)


def _kernel_operands(variant: Variant, input: Tensor, values: tuple[Operand, ...]) -> KernelOperands:
    """The values rounded; for numbers alone from a cache."""
    dtype, result = input.dtype, variant.result
    if set(map(type, values)) == {float} and dtype in FLOATING and result in FLOATING:
        return _operands_of_numbers(variant.gate, dtype, result, tuple(map(float.hex, values)))  # type: ignore[arg-type]
    return _round_operands(variant.gate, input, values, result)


@functools.lru_cache(maxsize=4096)
def _operands_of_numbers(
    gate: Gate, dtype: torch.dtype, result: torch.dtype, digits: tuple[str, ...]
) -> KernelOperands:
    """Numbers rounded and packed. They are given by their digits, which tell -0 from 0."""
    made = _round_operands(gate, torch.empty(0, dtype=dtype, device="cpu"), tuple(map(float.fromhex, digits)), result)
    return made._replace(packed=pack_all(made.values, None, made.held)) if SHORT.issuperset(made.held) else made  # type: ignore[arg-type]


def _round_operands(gate: Gate, input: Tensor, values: tuple[Any, ...], result: torch.dtype) -> KernelOperands:
    """Operands rounded as reference.compared does it, and the numbers after them to the dtype `result` of the output."""
    if gate.straight_through:
        compute = reference.widest(values, compute_dtype(input.dtype))
        return KernelOperands(values, (compute,) * len(values), compute, None)
    operands, dtypes = zip(*(_compared(gate, input, value) for value in values[: gate.operands]))
    promoted = functools.reduce(torch.promote_types, dtypes)
    compute = compute_dtype(promoted)
    if result.is_floating_point:
        constants, storage = [round_to(value, result) for value in values[gate.operands :]], result
    else:
        constants, storage = [int(value) for value in values[gate.operands :]], torch.int64
    held = (compute,) * gate.operands + (storage,) * len(constants)
    narrow = promoted if not input.is_floating_point() and promoted in HALF else None
    return KernelOperands((*operands, *constants), held, compute, narrow)


def _compared(gate: Gate, input: Tensor, threshold: Operand) -> tuple[Operand, torch.dtype]:
    """A threshold as it is compared, and the dtype of the comparison."""
    scalar = not isinstance(threshold, Tensor) or threshold.dim() == 0
    if scalar and (input.is_floating_point() or gate.casts):
        dtype = input.dtype
    else:
        threshold = reference.by_value(input, threshold)
        dtype = torch.result_type(input, threshold)
    if isinstance(threshold, Tensor):
        rounds = scalar or (dtype in HALF and not threshold.is_floating_point())
        return (threshold.to(dtype) if rounds else threshold), dtype
    return (round_to(threshold, dtype) if dtype.is_floating_point else int(threshold)), dtype


# -------------------------------------------------------------------------------------------------------------- forward


class BitLayout(NamedTuple):
    """The place of each element's bit. The kernels see the memory of a dense tensor as rows of `width` elements."""

    width: int
    shape: tuple[int, ...]  # of the dense tensor
    stride: tuple[int, ...]
    pattern: tuple[int, int] | None  # the threshold's (inner, mid) if each column has one, else (0, 0); None: by block
    compute: torch.dtype  # the dtype of the comparison


@functools.cache
def _forward_kernel(
    function: str, kinds: tuple[int, ...], compute: torch.dtype, narrow: Any, bits: int, by_column: bool, config: Config
) -> Kernel:
    return Kernel(
        device_code("gate").forward,
        num_warps=config.num_warps,
        KINDS=kinds,
        FUNCTION=getattr(device_code("pointwise"), function),
        COMPUTE=triton_dtype(compute),
        PROMOTED=None if narrow is None else triton_dtype(narrow),
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


def choose(variant: Variant, x: Tensor, launch: tuning.Launch | None = None) -> Choice:
    """The block size of a call on x; a search tries each with `launch`."""
    return tuning.choose(variant.kind, variant.key, x.dtype, x.numel(), x.device, launch, searches=variant.searches)


def forward(
    input: Tensor,
    threshold: Operand,
    rest: Sequence[Operand],
    variant: Variant,
    inplace: bool = False,
    fired: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None, BitLayout]:
    """Launch the kernels of a call.

    Returns the output, the count of each row (None if the gate does not count), the bits for backward (None if none are needed),
    and how these lie. With `inplace` the output is the input. `fired` is added to: how often each feature is above the threshold.
    """
    x = layout.dense(input)
    if variant.gate.counts:
        x = x.contiguous()
    operands = _kernel_operands(variant, x, (threshold, *rest))
    writes_input = inplace and layout.is_dense(input) and not layout.share_memory(threshold, input)
    y = input.detach() if writes_input else torch.empty_like(x, dtype=variant.result)
    bit_layout = BitLayout(0, x.shape, x.stride(), None, operands.compute)
    count = torch.empty(x.shape[:-1], dtype=compute_dtype(x.dtype), device=x.device) if variant.gate.counts else None
    bits = _bit_memory(x, variant.bits, variant.gate.counts) if variant.traced else None
    if x.numel() == 0:
        bits = _bit_memory(x, 0, False) if bits is None else bits
        count = None if count is None else count.zero_()
    elif variant.by_column:
        bit_layout, bits = _forward_by_column(variant, operands, x, y, count, bit_layout, bits, fired)
    else:
        bit_layout, bits = _forward_by_block(variant, operands, x, y, bit_layout)
    if inplace:
        if not writes_input:
            input.detach().copy_(y)
        y = input
    elif variant.gate.counts and not input.is_contiguous():
        y = torch.empty_like(input).copy_(y)
    return y, count, bits, bit_layout


def _forward_by_block(
    variant: Variant, operands: KernelOperands, x: Tensor, y: Tensor, bit_layout: BitLayout
) -> tuple[BitLayout, Tensor | None]:
    """Launch where a row is one block, so that only the last tile has a mask; returns how the bits lie, and the bits."""
    n, planes, (arguments, kinds) = x.numel(), variant.bits, operands.pack(x)

    def launch(config: Config, out: Tensor) -> Tensor | None:
        tiles = blocks(n, 8 * config.block)
        size = planes * tiles * config.block
        bits = torch.empty(size, dtype=torch.uint8, device=x.device) if size else None
        kernel = _forward_kernel(variant.function, kinds, operands.compute, operands.promoted, planes, False, config)
        kernel(tiles, x, out, bits, n, tiles, None, arguments)
        return bits

    config = choose(variant, x, lambda config: launch(config, torch.empty_like(y))).config
    return bit_layout._replace(width=config.block), launch(config, y)


def _forward_by_column(
    variant: Variant,
    operands: KernelOperands,
    x: Tensor,
    y: Tensor,
    count: Tensor | None,
    bit_layout: BitLayout,
    memory: Tensor | None,
    fired: Tensor | None,
) -> tuple[BitLayout, Tensor | None]:
    """Launch where the rows are a multiple of the threshold's period, so that counts and the sums of backward run along them.

    Writes `y`, `count` and `fired`. Returns how the bits lie, and the bits, in `memory` if that is given.
    """
    n, counts = x.numel(), variant.gate.counts
    config = choose(variant, x).config
    width, pattern = _row_width(x.shape, x.stride(), _threshold_shape(operands.values[0]), counts, config.block)
    if width > WIDEST:
        raise ValueError(f"{variant.gate.name}: input has rows of {x.shape[-1]} elements, expected at most {WIDEST}")
    arguments, kinds = _column_operands(operands, x, width, pattern)
    down, across = blocks(n, 8 * width), blocks(width, config.block)
    planes = max(variant.bits, int(counts))
    bits = memory if variant.bits else None
    if bits is None and planes:
        bits = torch.empty(planes * down * width, dtype=torch.uint8, device=x.device)
    kernel = _forward_kernel(variant.function, kinds, operands.compute, None, planes, pattern != (0, 0), config)
    kernel(down * across, x, y, bits, n, down, width, arguments)
    if count is not None:
        lanes = min(COUNT_BLOCK, 1 << max((x.shape[-1] - 1).bit_length() - 2, 0))  # a fourth of a row, four times
        parts = COUNT_BLOCK // lanes
        programs = blocks(down * (width // x.shape[-1]), parts)
        _count_kernel(parts, lanes)(programs, bits, count, count.numel(), width, x.shape[-1])
    if fired is not None:
        _count_fired(bits, fired, n, width)
    return bit_layout._replace(width=width, pattern=pattern), bits if variant.bits else memory


def _count_fired(bits: Tensor | None, fired: Tensor, n: int, width: int) -> None:
    """Add to `fired` how often each feature's bit is set, in the first plane of n elements in rows of `width`."""
    features, groups = len(fired), blocks(n, 8 * width)
    block = min(FIRED_BLOCK, 1 << (width - 1).bit_length())
    programs = blocks(width, block) * blocks(groups, ROWS)
    _fired_kernel(block)(programs, bits, fired, n // features, groups, width, features)


def _threshold_shape(threshold: Operand) -> tuple[int, ...] | None:
    """The shape of a threshold that is more than a number."""
    return threshold.shape if isinstance(threshold, Tensor) and threshold.numel() > 1 else None


@functools.lru_cache(maxsize=4096)
def _row_width(
    shape: tuple[int, ...], stride: tuple[int, ...], threshold_shape: tuple[int, ...] | None, counts: bool, block: int
) -> tuple[int, tuple[int, int]]:
    """The width of the rows that the kernels see, and the threshold's (inner, mid) if each column has one, else (0, 0).

    The width is a common multiple of 16 (alignment), the threshold's period and, if we count, the feature dimension; it is scaled
    up to about `block` elements. If there are too few rows for that, or if they are too long, a count takes them as they are.
    """
    n, features = math.prod(shape), shape[-1] if counts else 1
    pattern = (1, 1) if threshold_shape is None else layout.broadcast_pattern(shape, stride, threshold_shape)
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


def _column_operands(operands: KernelOperands, x: Tensor, width: int, pattern: tuple[int, int]) -> Packed:
    """The kernels' arguments for the operands, and the kinds of these; a threshold as wide as the rows is read as they are."""
    threshold, *numbers = operands.values
    constants, kinds = pack_all(numbers, x, (operands.compute,) * len(numbers))
    whole = pattern == (1, width) and isinstance(threshold, Tensor)
    if whole and threshold.dim() == 1 and threshold.is_contiguous():  # type: ignore[union-attr]
        return ((threshold,), *constants), (ELEMENT, *kinds)
    packed, kind = pack(threshold, x, operands.compute)
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


def _backward_bit(bits: Tensor, bit_layout: BitLayout, gradient: Tensor) -> Tensor:
    """Launch the backward of one bit: dx is the gradient where the element's bit is set, else 0."""
    g = layout.laid_out_as(gradient, bit_layout.shape, bit_layout.stride)
    dx = torch.empty_strided(bit_layout.shape, bit_layout.stride, dtype=g.dtype, device=g.device)
    if g.numel():
        kernel = _backward_bit_kernel(bit_layout.width, g.dtype.itemsize, tuning.lanes(g.device))
        kernel(blocks(g.numel(), 8 * bit_layout.width), g, bits, dx, g.numel())
    return dx


def _backward_input(variant: Variant, input: Tensor, values: tuple[Operand, ...], gradient: Tensor) -> Tensor:
    """Launch the backward of a saved input: dx is the gradient times dy/dx, which is evaluated again."""
    x = layout.dense(input)
    g, dx = layout.laid_out_as(gradient, x.shape, x.stride()), torch.empty_like(x)
    if x.numel():
        operands = _kernel_operands(variant, x, values)
        arguments, kinds = operands.pack(x)
        config = tuning.default("gate", x.dtype.itemsize, tuning.lanes(x.device))
        kernel = _backward_input_kernel(variant.function, kinds, operands.compute, config)
        kernel(blocks(x.numel(), 8 * config.block), g, x, dx, x.numel(), arguments)
    return dx


def _backward_code(
    variant: Variant,
    values: tuple[Operand, ...],
    bits: Tensor,
    bit_layout: BitLayout,
    gradients: Sequence[Tensor],
    shape: torch.Size | None,
) -> tuple[Tensor, Tensor | None]:
    """Launch the backward of a code: dx, and dt in the dtype of the comparison, summed to `shape`, the threshold's.

    A `shape` of None says that dt is not wanted. `gradients` are those of y and, if the gate counts, of the count.
    """
    g = layout.laid_out_as(gradients[0], bit_layout.shape, bit_layout.stride)
    count = gradients[1].contiguous() if variant.gate.counts else None
    dx = torch.empty_strided(bit_layout.shape, bit_layout.stride, dtype=g.dtype, device=g.device)
    n, width, compute = g.numel(), bit_layout.width, bit_layout.compute
    if n == 0:
        return dx, None if shape is None else torch.zeros(shape, dtype=compute, device=g.device)
    operands = _kernel_operands(variant, dx, values)._replace(compute=compute)
    config = choose(variant, g).config
    if bit_layout.pattern is None:
        config = Config(width, config.num_warps)
        arguments, kinds = operands.pack(dx)
    else:
        arguments, kinds = _column_operands(operands, dx, width, bit_layout.pattern)
    by_column = bit_layout.pattern is not None and bit_layout.pattern != (0, 0)
    rows = ROWS if by_column else 8
    down, across = blocks(n, rows * width), blocks(width, config.block)
    dt = None
    if shape is not None and by_column:
        dt = torch.empty(down * width, dtype=compute, device=g.device)
    elif shape is not None:
        dt = torch.empty_like(dx, dtype=compute)
    kernel = _backward_code_kernel(
        f"{variant.key}_backward", kinds, compute, variant.bits, variant.input_gradient, by_column, rows // 8, config
    )
    features = bit_layout.shape[-1] if variant.gate.counts and bit_layout.shape[-1] != width else None
    kernel(down * across, g, count, bits, dx, dt, n, blocks(n, 8 * width), width, features, arguments)
    if dt is None or shape is None:
        return dx, None
    return dx, _summed_by_column(dt, shape, bit_layout) if by_column else layout.summed(dt, shape)


def _summed_by_column(dt: Tensor, threshold_shape: torch.Size, bit_layout: BitLayout) -> Tensor:
    """Partial sums of each column, added up to the threshold's shape."""
    assert bit_layout.pattern is not None
    inner, mid = bit_layout.pattern
    total = dt if dt.numel() == mid else dt.view(-1, mid).sum(0) if inner == 1 else dt.view(-1, mid, inner).sum((0, 2))
    return layout.unblock(total, threshold_shape, bit_layout.shape, bit_layout.stride)


def _unpacked(bits: Tensor, bit_layout: BitLayout, plane: int) -> Tensor:
    """A plane of bits as a bool tensor, in plain torch."""
    if math.prod(bit_layout.shape) == 0:
        return torch.empty_strided(bit_layout.shape, bit_layout.stride, dtype=torch.bool, device=bits.device)
    flat = layout.unpack(bits, bit_layout.width, plane, math.prod(bit_layout.shape))
    return flat.as_strided(bit_layout.shape, bit_layout.stride)


def _gradients_of_bits(
    ctx: Any,
    low: Tensor,
    high: Tensor | None,
    values: tuple[Operand, ...],
    gradients: Sequence[Tensor | None],
    learns: bool,
) -> tuple[Tensor, Tensor | None]:
    """dx and dt from bits, in plain torch: differentiable in the gradients and in the threshold."""
    variant: Variant = ctx.variant
    if variant.bits == 1 and not variant.gate.straight_through:
        assert gradients[0] is not None
        return torch.where(low, gradients[0], 0), None
    high = torch.zeros_like(low) if high is None else high
    name, dtype = variant.gate.name, variant.result
    dx, dt = reference.from_bits(name, gradients, low, high, values, dtype, variant.input_gradient)
    return dx, layout.summed(dt, ctx.threshold_shape).to(ctx.threshold_dtype) if learns else None


def _gradients_of_formula(
    variant: Variant, input: Tensor, values: tuple[Operand, ...], gradients: Sequence[Tensor | None], learns: bool
) -> tuple[Tensor, ...]:
    """Gradients of the plain formula at a saved input: differentiable, and under any transform."""
    keywords = {"input_gradient": variant.input_gradient} if variant.gate.straight_through else {}

    def formula(x: Tensor, *threshold: Operand) -> Any:
        return getattr(reference, variant.gate.name)(x, *(threshold or values[:1]), *values[1:], **keywords)

    outputs, pull, *_ = torch.func.vjp(formula, input, *(values[:1] if learns else ()))
    if not isinstance(outputs, tuple):
        return pull(gradients[0])  # type: ignore[no-any-return]
    return pull(tuple(torch.zeros_like(o) if g is None else g for o, g in zip(outputs, gradients)))  # type: ignore[no-any-return]


# ---------------------------------------------------------------------------------------------- autograd, eager and traced


def _setup(ctx: Any, arguments: tuple[Any, ...], outputs: tuple[Any, ...]) -> None:
    """Save for backward: the bits, or the input if they do not tell enough, and the operands that backward reads."""
    input, threshold, rest, ctx.variant, inplace, *_ = arguments
    y, count, bits, *more = outputs
    gate = ctx.variant.gate
    values = (threshold, *rest)
    if isinstance(threshold, Tensor):
        ctx.threshold_shape, ctx.threshold_dtype = threshold.shape, threshold.dtype
    if ctx.traced:
        ctx.mark_non_differentiable(*([bits] if gate.counts else [count, bits]))
        from_bits = ctx.variant.bits >= (2 if ctx.needs_input_grad[1] or ctx.variant.input_gradient else 1)
        ctx.dense = input.shape, None if gate.counts else y.stride()
    else:
        from_bits = gate.saves != "input"
        (ctx.bit_layout,) = more
        if inplace:
            ctx.mark_dirty(input)
    ctx.from_bits, ctx.stride = from_bits, y.stride()
    if from_bits and not ctx.traced and (not gate.reads_threshold or ctx.variant.bits == 1):
        values = tuple(0.0 if isinstance(value, Tensor) else value for value in values)
    ctx.numbers, tensors = parted(values)
    ctx.save_for_backward(bits if from_bits else input, *tensors)


def _backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
    """The gradients of input and threshold. `last` says that nothing will differentiate or transform them: kernels may run."""
    given = [g for g in gradients if g is not None]
    if not given:
        return None, None
    saved, *tensors = ctx.saved_tensors
    values = restored(ctx.numbers, tensors) if tensors else ctx.numbers
    variant, learns = ctx.variant, ctx.needs_input_grad[1]
    last = not torch.is_grad_enabled() and (backend.is_ordinary(*given) or backend.is_one_op(*given))
    if not ctx.from_bits:
        if last and not ctx.traced:
            return _backward_input(variant, saved, values, given[0]), None
        found = _gradients_of_formula(variant, saved, values, gradients, learns)
        return found[0], found[1] if learns else None
    dx, dt = (_backward_as_op if ctx.traced else _backward_of_bits)(ctx, saved, values, gradients, learns, last)
    return _lying_as_input(ctx, dx, dt) if variant.gate.counts and last else (dx, dt)


def _lying_as_input(ctx: Any, dx: Tensor | None, dt: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """dx and dt in the input's layout, for a gate that counts: its kernels read the input as contiguous."""
    # The usual end comes first: a compiler may leave sizes open, and a comparison of them would decide them.
    if dx is None or dx.stride() == ctx.stride:
        return dx, dt
    if dt is not None and dt.shape == dx.shape:
        dt = layout.laid_out_as(dt, dx.shape, ctx.stride)
    return layout.laid_out_as(dx, dx.shape, ctx.stride), dt


def _backward_of_bits(
    ctx: Any, bits: Tensor, values: tuple[Operand, ...], gradients: Sequence[Tensor | None], learns: bool, last: bool
) -> tuple[Tensor, Tensor | None]:
    """dx and dt from the bits of an eager call: by kernels if this is the last derivative, else in plain torch."""
    variant, bit_layout = ctx.variant, ctx.bit_layout
    given = [g for g in gradients if g is not None]
    if last and variant.bits == 1 and not variant.by_column:
        return _backward_bit(bits, bit_layout, given[0]), None
    if last:
        dx, dt = _backward_code(variant, values, bits, bit_layout, given, ctx.threshold_shape if learns else None)
        return dx, None if dt is None else dt.to(ctx.threshold_dtype)
    high = _unpacked(bits, bit_layout, 1) if variant.bits == 2 else None
    return _gradients_of_bits(ctx, _unpacked(bits, bit_layout, 0), high, values, gradients, learns)


# The threshold of a traced gate is a tensor or, where that is None, the first of `numbers`. Its bits are in memory whose size
# follows from the input's shape; `size` and `stride` are those of the dense tensor they belong to (None: contiguous).
_TRACED = "Tensor? threshold, float[] numbers, str name, bool input_gradient, int planes"


def _as_op(
    gate: Gate, input: Tensor, parameters: tuple[Any, ...], learns: bool, input_gradient: bool, return_fired: bool
) -> Any:
    """A gate whose threshold may learn, as one op: two bits an element for backward, one where only the input learns.

    Other gates are plain torch when they are traced. Inductor fuses those with their neighbours, where they move no byte of their
    own; as an op each would move 2 s + 1/8 bytes each way for an element of s bytes.
    """
    threshold, *constants = parameters
    tensor = threshold if isinstance(threshold, Tensor) else None
    numbers = [torch.sym_float(value) for value in (constants if tensor is not None else parameters)]
    planes = 0
    if _records(gate, input, learns):
        planes = 2 if learns or input_gradient else 1
    counted = return_fired and not is_exporting()  # a decomposed program has no bits
    y, count, bits = GATE.op(input, tensor, numbers, gate.name, input_gradient, max(planes, int(counted)))
    if counted:
        fired = _fired_op(input.dtype, bits, input.shape, None, tensor, numbers, gate.name, input_gradient, planes or 1)
        return y, count, fired
    if return_fired:
        return y, count, reference.fired(input, parameters[0])
    return (y, count) if gate.counts else y


def _decode(
    input: Tensor, threshold: Tensor | None, numbers: Sequence[float], name: str, input_gradient: bool, planes: int
) -> tuple[Any, ...]:
    """The arguments of `forward` from those of the op."""
    first, rest = (numbers[0], numbers[1:]) if threshold is None else (threshold, numbers)
    gate = GATES[name]
    variant = _variant(gate, input.dtype, True, True, input_gradient)._replace(bits=planes, traced=True)
    return input, first, tuple(rest), variant, False


def _bit_memory(input: Tensor, planes: int, counts: bool) -> Tensor:
    """Memory for planes of bits. Their rows are an eighth of the elements long at most, or as short as `_row_width` can be."""
    least = 16 + (input.shape[-1] if counts else 0)
    return input.new_empty(planes * (input.numel() // 4 + least), dtype=torch.uint8)


def _fake(
    input: Tensor, threshold: Tensor | None, numbers: Sequence[float], name: str, input_gradient: bool, planes: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The op's outputs without their values."""
    counts = GATES[name].counts
    count = input.new_empty(input.shape[:-1], dtype=compute_dtype(input.dtype)) if counts else input.new_empty(0)
    return torch.empty_like(input), count, _bit_memory(input, planes, counts)


def _formula(
    input: Tensor, threshold: Tensor | None, numbers: Sequence[float], name: str, input_gradient: bool, planes: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The op's outputs in plain torch. Nothing reads its bits."""
    gate, values = GATES[name], (*([] if threshold is None else [threshold]), *numbers)
    keywords = {"input_gradient": input_gradient} if gate.straight_through else {}
    outputs = getattr(reference, name)(input, *values, **keywords)
    y, count = outputs if gate.counts else (outputs, input.new_empty(0))
    return y, count, _bit_memory(input, planes, gate.counts)


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


def _backward_as_op(
    ctx: Any, bits: Tensor, values: tuple[Operand, ...], gradients: Sequence[Tensor | None], learns: bool, last: bool
) -> tuple[Tensor | None, Tensor | None]:
    """dx and dt from the bits of a traced call: by one op if this is the last derivative, else from bits that an op unpacks."""
    variant, (size, stride) = ctx.variant, ctx.dense
    threshold, numbers = (values[0], values[1:]) if isinstance(values[0], Tensor) else (None, values)
    more = size, stride, threshold, numbers, variant.gate.name, variant.input_gradient, variant.bits
    if not last:
        low, high = _bits_op(variant.result, bits, *more)
        return _gradients_of_bits(ctx, low, high, values, gradients, learns)
    gradient, *counts = gradients
    count = counts[0] if variant.gate.counts else None
    if gradient is None:
        assert count is not None
        gradient = count.new_zeros(size, dtype=variant.result)
    elif variant.gate.counts and count is None:
        count = gradient.new_zeros(size[:-1], dtype=compute_dtype(variant.result))
    dx, dt = _backward_op(gradient, count, learns, bits, *more)
    return dx, dt if learns else None


def _bit_layout_of(
    dtype: torch.dtype, device: torch.device, size: Any, stride: Any, variant: Variant, threshold: Operand
) -> BitLayout:
    """How the bits of a traced call lie: as those of an eager call on a tensor of this size and stride."""
    gate, like = variant.gate, torch.empty(tuple(size), dtype=dtype, device="meta")
    if stride is not None:
        like = like.as_strided(tuple(size), tuple(stride))
    compute = reference.widest([threshold], compute_dtype(dtype))
    if not gate.straight_through:
        compute = compute_dtype(_compared(gate, like, threshold)[1])
    if like.numel() == 0:
        return BitLayout(0, like.shape, like.stride(), (0, 0), compute)
    config = tuning.choose(variant.kind, variant.key, dtype, like.numel(), device).config
    width, pattern = _row_width(like.shape, like.stride(), _threshold_shape(threshold), gate.counts, config.block)
    return BitLayout(width, like.shape, like.stride(), pattern, compute)


def _traced_backward(
    gradient: Tensor, count_gradient: Tensor | None, learns: bool, bits: Tensor, size: Any, stride: Any, *traced: Any
) -> tuple[Tensor, Tensor]:
    _, threshold, rest, variant, _ = _decode(gradient, *traced)
    bit_layout = _bit_layout_of(gradient.dtype, gradient.device, size, stride, variant, threshold)
    threshold_shape = threshold.shape if learns and isinstance(threshold, Tensor) else None
    values = (threshold if variant.gate.reads_threshold else 0.0, *rest)
    upstream = [gradient] if count_gradient is None else [gradient, count_gradient]
    dx, dt = _backward_code(variant, values, bits, bit_layout, upstream, threshold_shape)
    return dx, gradient.new_empty(0) if dt is None else dt.to(threshold.dtype).contiguous()


def _backward_fake(
    gradient: Tensor, count_gradient: Tensor | None, learns: bool, bits: Tensor, size: Any, stride: Any, *traced: Any
) -> tuple[Tensor, Tensor]:
    threshold = traced[0]
    dx = gradient.new_empty(size) if stride is None else gradient.new_empty_strided(size, stride)
    if threshold is None or not learns:
        return dx, gradient.new_empty(0)
    return dx, gradient.new_empty(threshold.shape, dtype=threshold.dtype)


def _traced_layout(dtype: torch.dtype, bits: Tensor, size: Any, stride: Any, *traced: Any) -> tuple[Variant, BitLayout]:
    """The variant of a traced call, and how its bits lie."""
    _, threshold, _, variant, _ = _decode(torch.empty(0, dtype=dtype, device="meta"), *traced)
    return variant, _bit_layout_of(dtype, bits.device, size, stride, variant, threshold)


def _traced_bits(dtype: torch.dtype, bits: Tensor, size: Any, stride: Any, *traced: Any) -> tuple[Tensor, Tensor]:
    variant, bit_layout = _traced_layout(dtype, bits, size, stride, *traced)
    low = _unpacked(bits, bit_layout, 0)
    return low, _unpacked(bits, bit_layout, 1) if variant.bits == 2 else torch.zeros_like(low)


def _bits_fake(dtype: torch.dtype, bits: Tensor, size: Any, stride: Any, *traced: Any) -> tuple[Tensor, Tensor]:
    low = bits.new_empty(size, dtype=torch.bool)
    if stride is not None:
        low = bits.new_empty_strided(size, stride, dtype=torch.bool)
    return low, torch.empty_like(low)


def _traced_fired(dtype: torch.dtype, bits: Tensor, size: Any, stride: Any, *traced: Any) -> Tensor:
    _, bit_layout = _traced_layout(dtype, bits, size, stride, *traced)
    fired = torch.zeros(size[-1:], dtype=torch.int64, device=bits.device)
    if bit_layout.width:
        _count_fired(bits, fired, math.prod(bit_layout.shape), bit_layout.width)
    return fired


def _fired_fake(dtype: torch.dtype, bits: Tensor, size: Any, stride: Any, *traced: Any) -> Tensor:
    return bits.new_empty(size[-1:], dtype=torch.int64)


_BITS = "Tensor bits, SymInt[] size, SymInt[]? stride"
_backward_op = define(
    "gate_backward",
    f"(Tensor gradient, Tensor? count_gradient, bool learns, {_BITS}, {_TRACED}) -> (Tensor dx, Tensor dt)",
    _traced_backward,
    _backward_fake,
    of_backward=True,
)
_fired_op = define("gate_fired", f"(ScalarType dtype, {_BITS}, {_TRACED}) -> Tensor", _traced_fired, _fired_fake)
_bits_op = define(
    "gate_bits", f"(ScalarType dtype, {_BITS}, {_TRACED}) -> (Tensor low, Tensor high)", _traced_bits, _bits_fake
)


# ----------------------------------------------------------------------------------------------------------------- plan


def plan(
    gate: Gate,
    input: Tensor,
    *parameters: Any,
    inplace: bool = False,
    dtype: torch.dtype | None = None,
    input_gradient: bool = False,
    return_fired: bool = False,
) -> backend.Plan:
    """How `run` would make a call: its way, its block size, and the bytes that its kernels move. It is checked likewise."""
    values = _checked(gate, input, parameters, dtype)
    operands = [value for value in values[: gate.operands] if isinstance(value, Tensor)]
    way = backend.way(input, *operands)
    learns = gate.learns and _requires_grad(values[0])
    if way == "op" and not (gate.straight_through or learns):
        way = "formula"
    records = _records(gate, input, learns)
    variant = _variant(gate, dtype or input.dtype, records, learns, input_gradient)
    if way == "triton" and _is_better_in_torch(gate, input, values):
        return backend.planned("eager", input.device, None, False, 0, 0, 0)._replace(reason=BETTER_IN_TORCH)
    choice = choose(variant, input) if way in ("triton", "op") else None
    moved, *more = _bytes(variant, input, operands, records)
    if return_fired:
        moved += -(-input.numel() // 8) + 8 * input.shape[-1]
    return backend.planned(way, input.device, choice, variant.searches and tuning.may_search(), moved, *more)


def _bytes(variant: Variant, input: Tensor, operands: Sequence[Tensor], records: bool) -> tuple[int, int, int]:
    """Bytes that the kernels move forward and backward, and what is kept for backward."""
    gate, n, size = variant.gate, input.numel(), input.element_size()
    plane, read, count = -(-n // 8), layout.total_bytes(operands), 0
    forward = n * (size + variant.result.itemsize) + read
    if gate.counts and n:
        count = n // input.shape[-1] * compute_dtype(input.dtype).itemsize
        # the count reads a plane of bits, and writes it if no backward asked for it
        forward += count + (1 if records else 2) * plane
    if not records:
        return forward, 0, 0
    if gate.saves == "input":
        return forward, 3 * n * size + read, n * size + read
    bits = variant.bits * plane
    again = read if gate.reads_threshold and variant.bits == 2 else 0
    learning = layout.total_bytes([t for t in operands if t.requires_grad])
    return forward + bits, 2 * n * size + bits + count + again + learning, bits + again
