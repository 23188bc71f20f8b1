"""BatchTopK: the gate that keeps the largest positive elements of a batch, and the threshold that stands for it afterwards."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from . import gates
from .backend import way
from .checks import FLOATING, are_few, check_input, check_number
from .registry import GATES
from .thresholds import kth_largest, shape_of


def batch_topk(op: str, input: Tensor, k: float) -> Tensor:
    """Check the arguments, select, gate."""
    return _gated(input, _smallest_kept(op, input, check_k(op, k)))


def batch_topk_tracked(op: str, input: Tensor, k: float, momentum: float, threshold: Tensor) -> Tensor:
    """The same, and move `threshold` towards the smallest element kept, if there is one."""
    smallest = _smallest_kept(op, input, k)
    with torch.no_grad():
        moved = (1 - momentum) * threshold + momentum * smallest.to(threshold)
        # compiled, copy_ is lost on a 0-dim float64 CPU tensor
        threshold[...] = torch.where(smallest.isnan(), threshold, moved)
    return _gated(input, smallest)


def above_tracked(op: str, input: Tensor, threshold: Tensor) -> Tensor:
    """Keep elements above a 0-dim float64 threshold, in float32 for inputs that it holds: above the largest float32 up to it."""
    check_input(op, input, FLOATING, jagged=False)
    if input.dtype != torch.float64:
        near = threshold.float()
        below = torch.nextafter(near, torch.full_like(near, -math.inf))
        threshold = torch.where(near > threshold, below, near)
    return gates.run(GATES["jumprelu"], input, (threshold, 1e-3))  # type: ignore[no-any-return]


def check_k(op: str, k: object) -> float:
    number = check_number(op, "k", k)
    if not number >= 0:
        raise ValueError(f"{op}: k must be 0 or more, got {number}")
    return number


def _smallest_kept(op: str, input: Tensor, k: float) -> Tensor:
    """The smallest of the int(k * rows) largest positive elements; NaN if there is none."""
    check_input(op, input, FLOATING, jagged=False)
    shape = shape_of(input)
    n = math.prod(shape)
    if n == 0:
        return input.new_full((), math.nan)
    features = shape[-1] if shape else 1
    count = n if k >= features else torch.sym_int(k * math.prod(shape[:-1]))
    return kth_largest(input, count, positive=True)


def _gated(input: Tensor, smallest: Tensor) -> Tensor:
    """Keep elements from the smallest kept one on, which is above 0 and of the input's dtype. None reaches NaN."""
    how = way(input, smallest)
    if how == "eager" and input.is_cpu and not are_few(input):
        bound = torch.nextafter(smallest, torch.zeros_like(smallest)).item()
        output = torch.threshold(input, bound, 0.0)  # takes a tenth of the time of torch.where, but keeps NaN
        if not math.isnan(bound) and not math.isnan(output.detach().sum().item()):
            return output
    if how in ("eager", "formula"):
        return torch.where(input >= smallest, input, 0)
    wide = smallest if smallest.dtype == torch.float64 else smallest.float()
    below = torch.nextafter(wide, torch.zeros_like(wide))  # what reaches the one is above the other: jumprelu's rule
    return gates.run(GATES["jumprelu"], input, (below, 1e-3))  # type: ignore[no-any-return]
