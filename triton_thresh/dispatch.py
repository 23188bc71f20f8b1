"""Which backend serves a call: the setting and the device, then, for "auto" on a GPU, the size from which Triton is faster.

That size, the crossover, stands in the tables of block sizes under ``<op>/<dtype>``, or ``<op>/<dtype>/grad`` where a backward
may follow; without an entry Triton serves every size. Of many tensors it is their number.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Mapping
from types import ModuleType

import torch
from torch import Tensor

from . import measured, tuning
from .backend import ASKED, choose, interpreting


@functools.cache
def crossover_key(op: str, dtype: torch.dtype, records: bool) -> str:
    """A crossover's key in the tables."""
    return f"{op}/{str(dtype).removeprefix('torch.')}" + ("/grad" if records else "")


@functools.cache
def _looked_up(op: str, dtype: torch.dtype, device: torch.device, records: bool) -> tuple[int, bool]:
    """A crossover, 0 where nothing was measured, and whether it is the user's own."""
    if interpreting():
        return 0, False
    name, key = tuning.device_name(device), crossover_key(op, dtype, records)
    shipped = measured.shipped(name).crossovers.get(key)
    return (shipped, False) if shipped is not None else (measured.cached(name).crossovers.get(key, 0), True)


def crossover(op: str, dtype: torch.dtype, device: torch.device, records: bool) -> int:
    """From the shipped table, then the user's, which ranks of a process group may not share; 0 where nothing was measured."""
    size, own = _looked_up(op, dtype, device, records)
    return 0 if size and own and tuning.among_others() else size


def remember_crossovers(device_name: str, crossovers: Mapping[str, int]) -> None:
    """Add crossovers to the user's table; they hold from now on."""
    try:
        measured.remember(device_name, crossovers=crossovers)
    finally:
        _looked_up.cache_clear()


@functools.cache
def _eager_below(least: int, things: str) -> tuple[str, str]:
    return "eager", f"auto: eager torch was measured to be faster below {least:,} {things}"


def chosen(op: str, input: Tensor, records: bool) -> tuple[str, str]:
    """The backend for a call on `input` of what the tables know as `op`, and why; `records`: a backward may follow."""
    return _by_size(choose(input.device), op, input.dtype, input.device, records, input.numel(), "elements")


def chosen_for_many(op: str, dtype: torch.dtype, device: torch.device, count: int) -> tuple[str, str]:
    """The same for a call on `count` tensors."""
    return _by_size(choose(device), op, dtype, device, False, count, "tensors")


def _by_size(
    found: tuple[str, str], op: str, dtype: torch.dtype, device: torch.device, records: bool, size: int, things: str
) -> tuple[str, str]:
    if found[0] == "eager" or found[1] is ASKED:
        return found
    least = crossover(op, dtype, device, records)
    return _eager_below(least, things) if size < least else found


@functools.cache
def launcher(name: str) -> ModuleType:
    """A module that runs kernels, "launch" or "learned": imported when one is first needed, since it imports Triton."""
    return importlib.import_module(f".{name}", __package__)
