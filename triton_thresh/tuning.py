"""Block sizes: from the table shipped for this GPU, then the user's cache, then a search on first use, else a default.

A table is ``{"device": ..., "entries": {"<op>/<dtype>/<log2 of the size>": [block, num_warps]}, "crossovers": {...}}``; a
size takes the nearest entry of its op and dtype (the crossovers are those of dispatch.py).
Reductions never search (block and warps fix the order of summation), nor does anything while a
CUDA graph is captured or a process group is up (ranks must agree); ranks use shipped tables and defaults alone.
"""

from __future__ import annotations

import functools
import json
import math
import os
import re
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .backend import interpreting, on_device


class Config(NamedTuple):
    """Elements a thread block covers (a gate's tile is 8 times that), and its warps."""

    block: int
    num_warps: int


class Choice(NamedTuple):
    """A configuration and where it came from: shipped table, user cache, search, default or interpreter."""

    config: Config
    source: str


GATE_BLOCK = 512
LOSS_BYTES = 8192  # with 4 warps of 32 each thread loads four times 16 bytes
INTERPRETER = {"gate": Config(1024, 4), "learned": Config(1024, 4), "loss": Config(4096, 4)}
CANDIDATE_BLOCKS = (256, 512, 1024)
MOST_PER_WARP = 4096  # of a block: beyond, a kernel would take minutes to compile


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


def slug(device_name: str) -> str:
    """A device's name as a file name."""
    return re.sub(r"[^A-Za-z0-9]+", "_", device_name).strip("_")


def _valid(entry: object) -> bool:
    if not (isinstance(entry, (list, tuple)) and len(entry) == 2 and all(type(v) is int for v in entry)):
        return False
    block, warps = entry
    if not (32 <= block <= 65536 and block & (block - 1) == 0 and warps in (1, 2, 4, 8, 16, 32)):
        return False
    return bool(block <= MOST_PER_WARP * warps)


def parse(text: str, origin: str) -> dict[str, Config]:
    """The valid entries of a table; what is not valid is left out with a warning, never an error."""
    try:
        entries = json.loads(text)["entries"]
        items = list(entries.items())
    except (ValueError, KeyError, TypeError, AttributeError):
        warnings.warn(f"triton_thresh: ignoring {origin}: not a table of block sizes", stacklevel=2)
        return {}
    table = {key: Config(*entry) for key, entry in items if _valid(entry)}
    if len(table) < len(items):
        warnings.warn(f"triton_thresh: ignoring {len(items) - len(table)} malformed entries of {origin}", stacklevel=2)
    return table


def parse_crossovers(text: str, origin: str) -> dict[str, int]:
    """The valid crossovers of a table, none if it has none."""
    try:
        crossovers = json.loads(text).get("crossovers", {})
    except (ValueError, AttributeError):
        return {}  # `parse` warns of it
    if not isinstance(crossovers, dict):
        warnings.warn(f"triton_thresh: ignoring the crossovers of {origin}: not a table", stacklevel=2)
        return {}
    items = crossovers.items()
    found = {key: value for key, value in items if type(value) is int and value >= 0}
    if len(found) < len(items):
        warnings.warn(
            f"triton_thresh: ignoring {len(items) - len(found)} malformed crossovers of {origin}", stacklevel=2
        )
    return found


def cache_folder() -> Path:
    """Where the user's tables are: TRITON_THRESH_CACHE_DIR, else ~/.cache/triton_thresh."""
    return Path(os.environ.get("TRITON_THRESH_CACHE_DIR") or Path.home() / ".cache" / "triton_thresh")


def cache_path(device_name: str) -> Path:
    """The user's table for a device."""
    return cache_folder() / f"{slug(device_name)}.json"


def shipped_devices() -> list[str]:
    """The devices for which a table is shipped."""
    files = (resources.files("triton_thresh") / "tuned").iterdir()
    return sorted(json.loads(file.read_text())["device"] for file in files if file.name.endswith(".json"))


def _shipped_text(device_name: str) -> str:
    file = resources.files("triton_thresh") / "tuned" / f"{slug(device_name)}.json"
    return file.read_text() if file.is_file() else '{"entries": {}}'


def _cached_text(device_name: str) -> str:
    try:
        return cache_path(device_name).read_text(errors="replace")
    except OSError:
        return '{"entries": {}}'


@functools.cache
def shipped(device_name: str) -> Mapping[str, Config]:
    """The table shipped for a device, empty if there is none."""
    return parse(_shipped_text(device_name), f"the table shipped for {device_name}")


@functools.cache
def cached(device_name: str) -> dict[str, Config]:
    """The user's table as it was on disk at first use, kept up to date by `remember`."""
    return parse(_cached_text(device_name), str(cache_path(device_name)))


@functools.cache
def shipped_crossovers(device_name: str) -> Mapping[str, int]:
    """The crossovers shipped for a device."""
    return parse_crossovers(_shipped_text(device_name), f"the table shipped for {device_name}")


@functools.cache
def cached_crossovers(device_name: str) -> dict[str, int]:
    """The user's own, as `cached`."""
    return parse_crossovers(_cached_text(device_name), str(cache_path(device_name)))


def document(device_name: str, table: Mapping[str, Config], crossovers: Mapping[str, int]) -> dict[str, Any]:
    """A table as it is written."""
    entries = {key: list(config) for key, config in sorted(table.items())}
    return {"device": device_name, "entries": entries, "crossovers": dict(sorted(crossovers.items()))}


def remember(
    device: str, entries: Mapping[str, Config] | None = None, crossovers: Mapping[str, int] | None = None
) -> None:
    """Add to the user's table, in memory and on disk; a disk that cannot be written to is no error."""
    table, sizes = cached(device), cached_crossovers(device)
    table.update(entries or {})
    sizes.update(crossovers or {})
    path = cache_path(device)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".tmp", delete=False) as file:
            json.dump(document(device, table, sizes), file, indent=1)
        os.replace(file.name, path)
    except OSError as error:
        warnings.warn(f"triton_thresh: block sizes were not saved to {path}: {error}", stacklevel=2)


def nearest(table: Mapping[str, Config], op: str, dtype: str, size: int) -> Config | None:
    """The entry of this op and dtype whose size is nearest; the smaller one of two."""
    prefix = f"{op}/{dtype}/"
    sizes = [
        int(key.removeprefix(prefix)) for key in table if key.startswith(prefix) and key.removeprefix(prefix).isdigit()
    ]
    if not sizes:
        return None
    return table[f"{prefix}{min(sizes, key=lambda s: (abs(s - size), s))}"]


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
    found = nearest(shipped(name), op, label, size)
    if found:
        return Choice(found, "shipped table")
    if searchable and may_search():
        key = f"{op}/{label}/{size}"
        if key in cached(name):
            return Choice(cached(name)[key], "user cache")
        if launch is not None:
            with on_device(device):
                found = search(candidates(shell, dtype.itemsize, lanes(device)), launch)
            remember(name, {key: found})
            return Choice(found, "search")
    return Choice(default(shell, dtype.itemsize, lanes(device)), "default")
