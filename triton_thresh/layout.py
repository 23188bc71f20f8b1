"""Memory layouts: which tensors a flat kernel may run over as they lie, and how a broadcast operand meets them."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

Shape = tuple[int, ...]


@functools.lru_cache(maxsize=4096)
def memory_order(shape: Shape, stride: Shape) -> Shape | None:
    """The dimensions longer than 1, outermost first, of a dense layout without overlap; None for any other layout."""
    order = sorted((d for d in range(len(shape)) if shape[d] != 1), key=lambda d: -stride[d])
    expected = 1
    for d in reversed(order):
        if stride[d] != expected:
            return None
        expected *= shape[d]
    return tuple(order)


def is_dense(tensor: Tensor) -> bool:
    """True if the elements fill one stretch of memory, in whatever order of dimensions."""
    return tensor.is_contiguous() or memory_order(tensor.shape, tensor.stride()) is not None


def dense(tensor: Tensor) -> Tensor:
    """The tensor itself where it is dense, else a copy, without gradient, as torch's own pointwise ops would lay it out."""
    return tensor if is_dense(tensor) else torch.empty_like(tensor).copy_(tensor.detach())


def laid_out_as(tensor: Tensor, shape: Shape, stride: Shape) -> Tensor:
    """The tensor itself where it lies as `stride` says, else a copy that does."""
    if tensor.stride() == stride:
        return tensor
    order = memory_order(shape, stride)
    if order is not None and order == memory_order(tensor.shape, tensor.stride()):
        return tensor
    return torch.empty_strided(shape, stride, dtype=tensor.dtype, device=tensor.device).copy_(tensor.detach())


def share_memory(operand: object, tensor: Tensor) -> bool:
    """True if writing `tensor` could change an operand."""
    return isinstance(operand, Tensor) and operand.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr()


@functools.lru_cache(maxsize=4096)
def broadcast_pattern(shape: Shape, stride: Shape, operand_shape: Shape) -> tuple[int, int] | None:
    """(inner, mid) such that flat element o of the dense input meets entry (o // inner) % mid of the operand.

    None where the operand's own dimensions are not one block of the input's memory order.
    """
    order = memory_order(shape, stride)
    assert order is not None
    own = (1,) * (len(shape) - len(operand_shape)) + operand_shape
    spans = [own[d] != 1 for d in order]
    first, last = spans.index(True), len(spans) - spans[::-1].index(True)
    if not all(spans[first:last]):
        return None
    inner = mid = 1
    for d in order[first:last]:
        mid *= shape[d]
    for d in order[last:]:
        inner *= shape[d]
    return inner, mid


def block(operand: Tensor, like: Tensor) -> Tensor:
    """A broadcast operand as a 1-dim tensor of its own elements in the memory order of `like`."""
    if operand.dim() == 1 and operand.is_contiguous():
        return operand
    order = memory_order(like.shape, like.stride())
    assert order is not None
    own = operand.reshape((1,) * (like.dim() - operand.dim()) + tuple(operand.shape))
    spanned = [d for d in order if own.shape[d] != 1]
    rest = [d for d in range(like.dim()) if d not in spanned]
    return own.permute(rest + spanned).reshape(-1).contiguous()


def unblock(own: Tensor, operand_shape: Shape, shape: Shape, stride: Shape) -> Tensor:
    """A tensor of an operand's elements in the memory order of the input, as `block` gives it, in the operand's shape."""
    if len(operand_shape) == 1:
        return own
    order = memory_order(shape, stride)
    assert order is not None
    sizes = (1,) * (len(shape) - len(operand_shape)) + operand_shape
    spanned = [d for d in order if sizes[d] != 1]
    ascending = sorted(range(len(spanned)), key=lambda i: spanned[i])
    return own.view([sizes[d] for d in spanned]).permute(ascending).reshape(operand_shape)


@functools.lru_cache(maxsize=4096)
def merged(shape: Shape, stride: Shape, operands: tuple[Shape, ...]) -> tuple[Shape, Shape, tuple[Shape, ...]]:
    """The fewest dimensions in which the operands still broadcast to a dense tensor, outermost in memory first.

    The order of its dimensions, its shape then, and that of each operand: a dimension is joined to its neighbour in memory where
    the same operands vary along both. Operands of the tensor's own shape leave a single one.
    """
    order = memory_order(shape, stride)
    assert order is not None
    own = [(1,) * (len(shape) - len(sizes)) + sizes for sizes in operands]
    sizes: list[int] = []
    varying: list[tuple[bool, ...]] = []
    for d in order:
        varies = tuple([each[d] != 1 for each in own])
        if varying and varying[-1] == varies:
            sizes[-1] *= shape[d]
        else:
            sizes.append(shape[d])
            varying.append(varies)
    small = tuple([d for d in range(len(shape)) if d not in order])
    if not sizes:
        return small, (1,), ((1,),) * len(own)
    columns = [tuple([n if varies[i] else 1 for n, varies in zip(sizes, varying)]) for i in range(len(own))]
    return (*order, *small), tuple(sizes), tuple(columns)


def unpack(bits: Tensor, width: int, plane: int, numel: int) -> Tensor:
    """One of the flat bool tensors that were packed."""
    tiles = -(-numel // (8 * width))
    cells = bits[plane * tiles * width : (plane + 1) * tiles * width].view(tiles, 1, width)
    shifts = torch.arange(8, dtype=torch.uint8, device=bits.device)[:, None]
    return ((cells >> shifts) & 1).bool().view(-1)[:numel]


def summed(elementwise: Tensor, shape: torch.Size) -> Tensor:
    """Summed over the dimensions along which `shape` was broadcast, in float32 or wider."""
    lead = elementwise.dim() - len(shape)
    dims = [d for d in range(elementwise.dim()) if d < lead or shape[d - lead] == 1]
    wide = torch.float64 if elementwise.dtype == torch.float64 else torch.float32
    total = elementwise.sum(dims, dtype=wide) if dims else elementwise
    return total.reshape(shape)


def total_bytes(tensors: Sequence[Tensor]) -> int:
    """The bytes of all their elements."""
    return sum(t.numel() * t.element_size() for t in tensors)
