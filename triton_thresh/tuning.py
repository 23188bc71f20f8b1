"""Block sizes: from the table shipped for this GPU, then the user's own, then a search on first use, else a default.

Reductions never search (block and warps fix the order of summation), nor does anything while a
CUDA graph is captured or a process group is up (ranks must agree); ranks use shipped tables and defaults alone.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple

import torch

from . import measured
from .backend import interpreting, on_device
from .measured import Config


class Choice(NamedTuple):
    """A configuration and where it came from: shipped table, user cache, search, default or interpreter."""

    config: Config
    source: str


GATE_BLOCK = 512
LOSS_BYTES = 8192  # with 4 warps of 32 each thread loads four times 16 bytes
INTERPRETER = {"gate": Config(1024, 4), "learned": Config(1024, 4), "loss": Config(4096, 4)}
CANDIDATE_BLOCKS = (256, 512, 1024)


def bucket(numel: int) -> int:
    """The power-of-two size bucket: ceil(log2(numel))."""
    return max(numel - 1, 0).bit_length()


@functools.cache
def gate_warps(block: int, itemsize: int, lanes: int) -> int:
    """The warps that give each thread 16 bytes a load."""
    return max(1, block * itemsize // (lanes * 16))


@functools.cache
def default(shell: str, itemsize: int, lanes: int = 32) -> Config:
    """The configuration where nothing was measured, for warps of so many lanes."""
    if shell == "loss":
        return Config(LOSS_BYTES // itemsize, 4)
    return Config(GATE_BLOCK, gate_warps(GATE_BLOCK, itemsize, lanes))


def candidates(shell: str, itemsize: int, lanes: int = 32) -> list[Config]:
    """What a search tries: 16 bytes a thread a load at three tile sizes, and the same with half the threads."""
    start = default(shell, itemsize, lanes)
    found = [start]
    for size in CANDIDATE_BLOCKS:
        scale = size / GATE_BLOCK
        for warps in (start.num_warps * scale, start.num_warps * scale / 2):
            config = Config(int(start.block * scale), int(warps))
            if warps >= 1 and config not in found:
                found.append(config)
    return found


NO_SEARCH = "no search may run: TRITON_THRESH_AUTOTUNE=0, a process group, or a CUDA graph being captured"


def among_others() -> bool:
    """Whether this process is one of a group, whose ranks must agree."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


_searches: ContextVar[bool] = ContextVar("triton_thresh_searches", default=True)


@contextmanager
def without_search() -> Iterator[None]:
    """In this thread no call searches: what no table has runs with defaults."""
    token = _searches.set(False)
    try:
        yield
    finally:
        _searches.reset(token)


def may_search() -> bool:
    """Whether a search may run now: not where ranks could disagree, nor while a CUDA graph is captured, nor if switched off."""
    if not _searches.get():
        return False
    if os.environ.get("TRITON_THRESH_AUTOTUNE", "1") == "0":
        return False
    if among_others():
        return False
    return not (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing())


def search(configs: Sequence[Config], launch: Callable[[Config], object]) -> Config:
    """The configuration with the smallest median time; one that the GPU cannot hold is passed over, save the first."""
    from triton.runtime.errors import OutOfResources, PTXASError
    from triton.testing import do_bench

    times = {}
    for config in configs:
        try:
            times[config] = do_bench(lambda c=config: launch(c), warmup=5, rep=20, return_mode="median")
        except (OutOfResources, PTXASError):
            times[config] = math.inf
    return min(times, key=lambda config: times[config])


_collected: ContextVar[dict[str, Config] | None] = ContextVar("triton_thresh_collected", default=None)


@contextmanager
def collecting(found: dict[str, Config]) -> Iterator[None]:
    """In this thread each searchable call searches, whatever the tables say, unless `found` holds it; results go there alone.

    Raises RuntimeError where no search may run.
    """
    if not may_search():
        raise RuntimeError(NO_SEARCH)
    token = _collected.set(found)
    try:
        yield
    finally:
        _collected.reset(token)


@functools.cache
def device_name(device: torch.device) -> str:
    return str(torch.get_device_module(device).get_device_name(device))


@functools.cache
def lanes(device: torch.device) -> int:
    """Threads of a warp: 64 on AMD's data-centre GPUs, else 32."""
    if device.type != "cuda":
        return 32
    return int(getattr(torch.cuda.get_device_properties(device), "warp_size", 32))


_settled: dict[tuple[str, str, torch.dtype, int, torch.device], Choice] = {}


def choose(
    shell: str,
    op: str,
    dtype: torch.dtype,
    numel: int,
    device: torch.device,
    searchable: bool,
    launch: Callable[[Config], object] | None = None,
) -> Choice:
    """The configuration for a call; `launch`, if a search is due, runs the op once on scratch tensors."""
    size = bucket(numel)
    collected = _collected.get()
    if collected is not None and searchable and launch is not None:
        key = f"{op}/{str(dtype).removeprefix('torch.')}/{size}"
        if key not in collected:
            with on_device(device):
                collected[key] = search(candidates(shell, dtype.itemsize, lanes(device)), launch)
        return Choice(collected[key], "search")
    signature = (shell, op, dtype, size, device)
    choice = _settled.get(signature)
    if choice is None:
        choice = _resolve(shell, op, dtype, size, device, searchable, launch)
        if not searchable or choice.source != "default":
            _settled[signature] = choice
    return choice


def _resolve(
    shell: str,
    op: str,
    dtype: torch.dtype,
    size: int,
    device: torch.device,
    searchable: bool,
    launch: Callable[[Config], object] | None,
) -> Choice:
    if interpreting():
        return Choice(INTERPRETER[shell], "interpreter")
    name, label = device_name(device), str(dtype).removeprefix("torch.")
    found = measured.nearest(measured.shipped(name).entries, op, label, size)
    if found:
        return Choice(found, "shipped table")
    if searchable and may_search():
        key = f"{op}/{label}/{size}"
        own = measured.cached(name).entries.get(key)
        if own:
            return Choice(own, "user cache")
        if launch is not None:
            with on_device(device):
                found = search(candidates(shell, dtype.itemsize, lanes(device)), launch)
            measured.remember(name, {key: found})
            return Choice(found, "search")
    return Choice(default(shell, dtype.itemsize, lanes(device)), "default")
