"""Runs kernels/foreach.py: a gate over many tensors of one dtype and device, from a table of their addresses."""

from __future__ import annotations

import functools
import struct
from array import array
from collections.abc import Iterable, Sequence

import torch
import triton.language as tl
from torch import Tensor

from . import layout, tuning
from .kernel_cache import Kernel
from .kernels import foreach, pointwise
from .launch import COMPUTE
from .measured import Config
from .reference import compute_dtype
from .rounding import round_to

TYPES = {
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.float32: tl.float32,
    torch.float64: tl.float64,
}
ALIGNMENT = 16


def bits(value: float) -> int:
    """The bits of a float64 as an int64."""
    (found,) = struct.unpack("q", struct.pack("d", value))
    return int(found)


def _int64(values: Iterable[int]) -> Tensor:
    return torch.frombuffer(array("q", values), dtype=torch.int64)


def _table(tensors: Sequence[Tensor], thresholds: Sequence[int], chunk: int) -> tuple[Tensor, int]:
    """What the kernel reads, on the device, and the number of its programs: built on the host, moved by one copy."""
    itemsize, device = tensors[0].element_size(), tensors[0].device
    addresses, numels = _int64(map(Tensor.data_ptr, tensors)), _int64(map(Tensor.numel, tensors))
    ends = torch.where(numels > 0, addresses % ALIGNMENT // itemsize + numels, 0)
    programs = (ends + (chunk - 1)) // chunk
    last = programs.cumsum(0)
    total = int(last[-1])
    rows = torch.stack([addresses, numels, last - programs, _int64(thresholds)], dim=1).view(-1)
    owners = torch.repeat_interleave(programs, output_size=total)
    table = torch.empty(len(rows) + total, dtype=torch.int64, device="cpu", pin_memory=device.type != "cpu")
    torch.cat([rows, owners], out=table)
    return table.to(device, non_blocking=True), total


@functools.cache
def _kernel(dtype: torch.dtype, config: Config) -> Kernel:
    return Kernel(
        foreach.inplace,
        num_warps=config.num_warps,
        FUNCTION=pointwise.keep_large,
        DTYPE=TYPES[dtype],
        COMPUTE=COMPUTE[compute_dtype(dtype)],
        COLS=config.block,
    )


def keep_large_(
    op: str,
    tensors: Sequence[Tensor],
    thresholds: Sequence[float] | Tensor,
    places: Sequence[int],
    *,
    count: bool,
) -> list[Tensor]:
    """Zero what is not large; with `count`, how many elements are kept, as an int64 tensor.

    thresholds: a number for each tensor, or on their device a 0-dim tensor, or a 1-dim one in which each has its place.
    """
    dtype, device = tensors[0].dtype, tensors[0].device
    dense = [layout.dense(tensor) for tensor in tensors]
    if isinstance(thresholds, Tensor):
        pointer, own = thresholds.to(dtype).contiguous(), places if thresholds.dim() else [0] * len(places)
    else:
        rounded = {t: bits(round_to(t, dtype)) for t in set(thresholds)}
        pointer, own = None, [rounded[t] for t in thresholds]
    numel = sum(tensor.numel() for tensor in dense)
    config = tuning.choose("gate", op, dtype, numel, device, False).config
    table, programs = _table(dense, own, 8 * config.block)
    kept = torch.empty(programs, dtype=torch.int32, device=device) if count else None
    if programs:
        _kernel(dtype, config)(programs, table, len(dense), pointer, kept)
    for tensor, copy in zip(tensors, dense):
        if copy is not tensor:
            tensor.copy_(copy)
    torch.autograd.graph.increment_version(tensors)
    return [] if kept is None else [kept.sum(dtype=torch.int64)]
