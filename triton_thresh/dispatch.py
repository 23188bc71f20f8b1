"""Which backend serves a call: the setting and the device, then, for "auto" on a GPU, the size from which Triton is faster.

That size, the crossover, stands in the tables of block sizes under ``<op>/<dtype>``, or ``<op>/<dtype>/grad`` where a backward
may follow; without an entry Triton serves every size. Of many tensors it is their number.
"""

from __future__ import annotations

import functools
import importlib
from types import ModuleType

import torch
from torch import Tensor

from . import tuning
from .backend import choose, get_backend, interpreting


@functools.cache
def crossover_key(op: str, dtype: torch.dtype, records: bool) -> str:
    """A crossover's key in the tables."""
    return f"{op}/{str(dtype).removeprefix('torch.')}" + ("/grad" if records else "")


def crossover(op: str, dtype: torch.dtype, device: torch.device, records: bool) -> int:
    """From the shipped table, then the user's, which ranks of a process group may not share; 0 where nothing was measured."""
    if interpreting():
        return 0
    name, key = tuning.device_name(device), crossover_key(op, dtype, records)
    size = tuning.shipped_crossovers(name).get(key)
    if size is None:
        size = tuning.cached_crossovers(name).get(key, 0)
        if size and tuning.among_others():
            return 0
    return size


@functools.cache
def _eager_below(least: int, things: str) -> tuple[str, str]:
    return "eager", f"auto: eager torch was measured to be faster below {least:,} {things}"


def _chosen(
    op: str, dtype: torch.dtype, device: torch.device, records: bool, size: int, things: str
) -> tuple[str, str]:
    found = choose(device)
    if found[0] == "triton" and get_backend() == "auto":
        least = crossover(op, dtype, device, records)
        if size < least:
            return _eager_below(least, things)
    return found


def chosen(op: str, input: Tensor, records: bool) -> tuple[str, str]:
    """The backend for a call on `input` of what the tables know as `op`, and why; `records`: a backward may follow."""
    return _chosen(op, input.dtype, input.device, records, input.numel(), "elements")


def chosen_for_many(op: str, dtype: torch.dtype, device: torch.device, count: int) -> tuple[str, str]:
    """The same for a call on `count` tensors."""
    return _chosen(op, dtype, device, False, count, "tensors")


@functools.cache
def launcher(name: str) -> ModuleType:
    """A module that runs kernels, "launch" or "learned": imported when one is first needed, since it imports Triton."""
    return importlib.import_module(f".{name}", __package__)
