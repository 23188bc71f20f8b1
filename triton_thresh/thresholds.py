"""Thresholds from the data: the k-th largest element, a quantile, Otsu's."""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C import _is_tracing
from torch.compiler import is_dynamo_compiling

from . import layout
from .backend import choose, way, way_of_plain
from .checks import FLOATING, INTEGER, check_input, check_number
from .fused import define
from .launch import Kernel, blocks, device_code

IN_REGISTERS = 1 << 17  # bytes of a row that one program holds; twice as much would spill
FEW = 16  # one in so many: the share of elements below which torch.topk is faster than torch.kthvalue on a CPU
PROGRAMS = 1024  # of a launch over long rows
COUNTED_BINS = 1024  # of a histogram, up to which a kernel counts them: its instructions grow with their number
DTYPES = FLOATING + INTEGER
OTSU_DTYPES = (*FLOATING, torch.uint8, torch.int8, torch.int16)


# -------------------------------------------------------------------------------------------------- the public functions


def topk_threshold(op: str, input: Tensor, k: int | None, dim: int | None, fraction: float | None) -> Tensor:
    """Check the arguments, select."""
    n, by_row = _check_selection(op, input, dim)
    if (k is None) == (fraction is None):
        given = "neither" if k is None else f"k={k!r} and fraction={fraction!r}"
        raise ValueError(f"{op}: expected exactly one of k and fraction, got {given}")
    if fraction is not None:
        share = check_number(op, "fraction", fraction)
        if not 0 < share <= 1:
            raise ValueError(f"{op}: fraction must be above 0 and at most 1, got {fraction!r}")
        return kth_largest(input, _ceil(share, n), by_row=by_row)
    k = _check_int(op, "k", k, "; a share goes as fraction=")
    if not 1 <= k <= n:
        raise ValueError(f"{op}: k must be 1 to {n}, the number of elements{' of a row' if by_row else ''}, got {k}")
    return kth_largest(input, k, by_row=by_row)


def quantile_threshold(op: str, input: Tensor, q: float, dim: int | None) -> Tensor:
    """Check the arguments, select."""
    n, by_row = _check_selection(op, input, dim)
    share = check_number(op, "q", q)
    if not 0 <= share <= 1:
        raise ValueError(f"{op}: q must be 0 to 1, got {q!r}")
    return kth_largest(input, n + 1 - _ceil(share, n), by_row=by_row, any_nan=input.is_floating_point())


def otsu_threshold(op: str, input: Tensor, bins: int) -> Tensor:
    """Check the arguments, count, split."""
    check_input(op, input, OTSU_DTYPES, jagged=False)
    bins = _check_int(op, "bins", bins)
    if bins < 2:
        raise ValueError(f"{op}: bins must be 2 or more, got {bins}")
    if input.numel() == 0:
        raise ValueError(f"{op}: input is empty, shape {tuple(input.shape)}; expected at least one element")
    return _otsu(input.detach(), bins)


# ---------------------------------------------------------------------------------------------------------------- checks


def _check_selection(op: str, input: Tensor, dim: int | None) -> tuple[int, bool]:
    """How many elements one is selected from, and whether they are a row."""
    check_input(op, input, DTYPES, jagged=False)
    if dim is not None and dim != -1:
        raise ValueError(f"{op}: dim must be None or -1, got {dim!r}")
    shape = shape_of(input)
    by_row = dim is not None and len(shape) > 0
    n = shape[-1] if by_row else math.prod(shape)
    if n == 0:
        raise ValueError(f"{op}: input has shape {tuple(input.shape)}, expected at least one element to select from")
    return n, by_row


def shape_of(input: Tensor) -> Sequence[int]:
    """The shape in numbers, which `torch.jit.trace` then warns of as constants."""
    if is_dynamo_compiling() or not _is_tracing():
        return input.shape
    return [int(size) for size in input.shape]


def _check_int(op: str, name: str, value: object, hint: str = "") -> int:
    try:
        return operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise TypeError(f"{op}: {name} must be an int, got {type(value).__name__} {value!r}{hint}") from None


# ------------------------------------------------------------------------------------------------------------- selection


def _ceil(share: float, n: int) -> int:
    """max(1, ceil(share * n)), the product rounded to float64."""
    number = math.ceil(share * n)
    return max(1, number) if type(number) is int else torch.sym_max(1, number)


def kth_largest(
    values: Tensor, k: int | Tensor, *, by_row: bool = False, any_nan: bool = False, positive: bool = False
) -> Tensor:
    """The k-th largest element, exactly; NaN is the largest. The host reads nothing.

    A k above the number of elements is that number; below 1 it gives NaN (in float tensors): nothing is above the threshold.

    Args:
        values: a tensor that is not empty (a row that is not, if `by_row`).
        k: an int, or a 0-dim integer tensor on the device of `values`.
        by_row: of each row: a tensor with a last dimension of 1; else a 0-dim tensor.
        any_nan: NaN where there is any.
        positive: among the elements above 0 alone, which NaN is not.
    """
    if values.requires_grad:
        values = values.detach()
    if values.is_cpu and way_of_plain(values) == "eager":
        return _select_on_cpu(values, int(k), by_row, any_nan, positive)
    how = way(values, k)
    if how not in ("eager", "triton"):  # there may be a tangent
        values = values.detach()
    if how == "triton":
        return _launch_select(values, k, by_row, any_nan, positive)
    if how == "op":
        at, number = (k, 0) if isinstance(k, Tensor) else (None, k)
        return _select_op(values, at, number, by_row, any_nan, positive)  # type: ignore[no-any-return]
    return _select_by_formula(values, k, by_row, any_nan, positive)


def _select_on_cpu(values: Tensor, k: int, by_row: bool, any_nan: bool, positive: bool) -> Tensor:
    """Select by torch's own ops. The host looks at the result, which costs nothing on a CPU."""
    rows = values if by_row or values.dim() == 1 else values.reshape(-1)
    n = rows.shape[-1]
    if positive:
        if 0 < k <= n and not by_row:
            found, largest = _kth_on_cpu(rows, k, False, True)
            if found.item() > 0 and not math.isnan(largest.item()):  # else fewer are above 0, or there is NaN
                return found
        rows = rows[rows > 0]
        n = rows.shape[-1]
    k = min(k, n)
    if k < 1:
        return values.new_full((), math.nan)
    found, largest = _kth_on_cpu(rows, k, by_row, any_nan)
    if not any_nan:
        return found
    if by_row:
        return torch.where(largest.isnan(), largest, found)
    return largest if math.isnan(largest.item()) else found


def _kth_on_cpu(rows: Tensor, k: int, by_row: bool, and_largest: bool) -> tuple[Tensor, Tensor]:
    """Select by torch.topk where few elements are on one side, because it is faster there, and by torch.kthvalue elsewhere.

    Returns the largest element too, which is NaN if there is any; some tensor if nobody asks for it.
    """
    n = rows.shape[-1]
    few = min(k, n + 1 - k)
    if few * FEW > n > 64:
        found = rows.kthvalue(n + 1 - k, -1, by_row)[0]
    else:
        ends = rows.topk(few, -1, few == k)[0]
        found = ends.narrow(-1, few - 1, 1) if by_row else ends[few - 1]
        if few == k and and_largest:
            return found, ends.narrow(-1, 0, 1) if by_row else ends[0]
    return found, rows.amax(-1, by_row) if and_largest else found


def _select_by_formula(values: Tensor, k: int | Tensor, by_row: bool, any_nan: bool, positive: bool) -> Tensor:
    """In plain torch that compilers trace and transforms batch."""
    rows = values if by_row else values.reshape(-1)
    n = shape_of(rows)[-1]
    if positive:
        kept = rows > 0
        rows = torch.where(kept, rows, 0)
    if isinstance(k, Tensor):
        place = (k.clamp(1, n) - 1).expand(*rows.shape[:-1], 1)
        found = rows.sort(descending=True).values.gather(-1, place)
    else:
        found = rows.kthvalue(n + 1 - torch.sym_max(1, torch.sym_min(k, n)), keepdim=True).values
    if positive:  # the smallest of all, where fewer than k are
        smallest = torch.where(kept, rows, math.inf).amin(-1, keepdim=True)
        found = torch.where(found > 0, found, torch.where(kept.any(-1, keepdim=True), smallest, math.nan))
    if any_nan:
        found = torch.where(rows.isnan().any(-1, keepdim=True), math.nan, found)
    if positive or isinstance(k, Tensor):
        at = k if isinstance(k, Tensor) else torch.full((), k, device=values.device)
        found = torch.where(at < 1, math.nan, found)
    return found if by_row else found.reshape(())


def block_of(size: int) -> int:
    """Elements of a tile, of so many bytes each: more of 8 bytes would take too many registers."""
    return 4096 if size < 8 else 2048


def warps_of(cols: int) -> int:
    """Warps of a program that holds so many elements."""
    return max(4, min(16, cols // 1024))


@functools.cache
def _kernel(function: str, num_warps: int, **constants: Any) -> Any:
    """A kernel of kernels/select.py."""
    return Kernel(getattr(device_code("select"), function), num_warps=num_warps, **constants)


def _launch_select(values: Tensor, k: int | Tensor, by_row: bool, any_nan: bool, positive: bool) -> Tensor:
    if by_row:
        rows = values.reshape(-1, values.shape[-1])
        rows = rows if rows.stride(-1) == 1 else rows.contiguous()
        out = values.new_empty((*values.shape[:-1], 1))
    else:
        rows = layout.dense(values)
        rows = rows.as_strided((1, rows.numel()), (rows.numel(), 1))
        out = values.new_empty(())
    (height, n), stride, size = rows.shape, rows.stride(0), values.element_size()
    if height == 0:
        return out
    asked = {"POSITIVE": positive, "ANY_NAN": any_nan}
    cols = 1 << (n - 1).bit_length()
    if cols * max(size, 4) <= IN_REGISTERS:
        each = max(1, 2048 // cols)
        kernel = _kernel("rows", warps_of(cols), **asked, HEIGHT=each, COLS=cols)
        kernel(blocks(height, each), rows, out, k, height, n, stride)
        return out
    block = block_of(size)
    parts = min(blocks(n, block), max(1, PROGRAMS // height))
    work = torch.zeros((height, size + 1, 256), dtype=torch.int64, device=values.device)
    for digit in range(size):
        kernel = _kernel("count", 4, DIGIT=digit, DIGITS=size, **asked, BLOCK=block)
        kernel(height * parts, rows, work, k, n, stride, parts)
    _kernel("finish", 4, DIGITS=size, **asked)(height, work, out, k)
    return out


# ------------------------------------------------------------------------------------------------------------------ Otsu


def _otsu(input: Tensor, bins: int) -> Tensor:
    if not input.is_floating_point():
        info = torch.iinfo(input.dtype)
        values = torch.arange(info.min, info.max + 1, device=input.device, dtype=torch.float64)
        best = _best_split(_histogram(input, None, len(values)), values)
        return values.gather(0, best).reshape(()).to(input.dtype)
    wide = torch.float64 if input.dtype == torch.float64 else torch.float32
    low, high = (bound.to(wide) for bound in torch.aminmax(input))
    # x falls into bin (x * scale - low * scale) * slope; a power of 2 as the scale keeps these finite for every range
    exponent, half = (96.0 if wide == torch.float32 else 768.0), high / 2 - low / 2
    scale = torch.where(half > torch.finfo(wide).max / 4, 0.25, torch.ones_like(half))
    scale = torch.where(half < 2**-exponent, 2**exponent, scale)
    line = torch.stack([scale, low * scale, bins / (high * scale - low * scale)])
    values = torch.arange(bins, device=input.device, dtype=torch.float64)
    place = (_best_split(_histogram(input, line, bins), values).reshape(()) + 0.5) / bins
    centre = low.double() * (1 - place) + high.double() * place
    found = torch.where(low == high, low, centre)
    return torch.where(low.isfinite() & high.isfinite(), found, math.nan).to(input.dtype)


def _best_split(counts: Tensor, values: Tensor) -> Tensor:
    """The last bin of the lower class, as a tensor of shape (1,); where one bin has all, that bin."""
    below, moments = counts.cumsum(0), (counts * values).cumsum(0)
    above = below[-1:] - below
    gap = moments / below - (moments[-1:] - moments) / above
    variance = below.float() * above.float() * gap.square()  # float32 as in skimage: it decides between near ties
    variance = torch.where((below > 0) & (above > 0), variance, -1)
    best = variance.argmax(0, keepdim=True)
    return torch.where(variance.gather(0, best) < 0, counts.argmax(0, keepdim=True), best)


def _histogram(input: Tensor, line: Tensor | None, bins: int) -> Tensor:
    """How many elements lie in each bin, in int64; `line` as in kernels/select.py, or None: each value of the dtype is a bin."""
    how = way(input)
    if how == "triton" and bins <= COUNTED_BINS:
        return _launch_histogram(input, line, bins)
    if how == "op" and bins <= COUNTED_BINS:
        return _histogram_op(input, line, bins)  # type: ignore[no-any-return]
    return _histogram_by_formula(input, line, bins)


def _histogram_by_formula(input: Tensor, line: Tensor | None, bins: int) -> Tensor:
    if line is None:
        bin = input.reshape(-1).long() - torch.iinfo(input.dtype).min
    else:
        scale, start, slope = line.unbind()
        bin = ((input.reshape(-1).to(line.dtype) * scale - start) * slope).long().clamp(0, bins - 1)
    counts = torch.zeros(bins, dtype=torch.int64, device=input.device)
    return counts.index_add(0, bin, torch.ones_like(bin[:1]).expand(bin.shape))


def _launch_histogram(input: Tensor, line: Tensor | None, bins: int) -> Tensor:
    x = layout.dense(input)
    n, block = x.numel(), block_of(x.element_size())
    parts = min(blocks(n, block), PROGRAMS)
    counts = torch.zeros((2, max(256, 1 << (bins - 1).bit_length())), dtype=torch.int64, device=x.device)
    if line is None:  # what selection begins with
        kernel = _kernel("count", 4, DIGIT=0, DIGITS=1, POSITIVE=False, ANY_NAN=False, BLOCK=block)
        kernel(parts, x, counts, 1, n, n, parts)
    else:
        kernel = _kernel("histogram", 4, BINS=counts.shape[1], BLOCK=block)
        kernel(parts, x, line, counts, n, bins, parts)
    return counts[0, :bins]


# ------------------------------------------------------------------------------------------------------- traced as ops


def _kth_largest_kernel(
    values: Tensor, at: Tensor | None, k: int, by_row: bool, any_nan: bool, positive: bool
) -> Tensor:
    run = _launch_select if choose(values.device)[0] == "triton" else _select_by_formula
    return run(values, k if at is None else at, by_row, any_nan, positive)


def _kth_largest_fake(values: Tensor, at: Tensor | None, k: int, by_row: bool, any_nan: bool, positive: bool) -> Tensor:
    return values.new_empty((*values.shape[:-1], 1) if by_row else ())


def _histogram_kernel(input: Tensor, line: Tensor | None, bins: int) -> Tensor:
    run = _launch_histogram if choose(input.device)[0] == "triton" else _histogram_by_formula
    return run(input, line, bins)


def _histogram_fake(input: Tensor, line: Tensor | None, bins: int) -> Tensor:
    return input.new_empty(bins, dtype=torch.int64)


_select_op = define(
    "kth_largest",
    "(Tensor values, Tensor? at, SymInt k, bool by_row, bool any_nan, bool positive) -> Tensor",
    _kth_largest_kernel,
    _kth_largest_fake,
)
_histogram_op = define(
    "histogram", "(Tensor input, Tensor? line, int bins) -> Tensor", _histogram_kernel, _histogram_fake
)
