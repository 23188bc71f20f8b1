"""Block sizes: a default, the user's table on disk, or a search at first use, which is written to that table.

Reductions always take the default, because block and warps fix the order of summation and with it the bits. Nothing searches
while a CUDA graph is captured. In a process group everything takes the default, so that its ranks agree.
"""

from __future__ import annotations

import functools
import json
import math
import os
import re
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from .backend import interpreting, on_device

Kind = Literal["gate", "learned", "loss"]
Launch = Callable[["Config"], object]


class Config(NamedTuple):
    """Elements a thread block covers (a gate's tile is 8 times that), and its warps."""

    block: int
    num_warps: int


class Choice(NamedTuple):
    """A configuration and where it came from: the user's table, a search, the default or the interpreter."""

    config: Config
    source: str


GATE_BLOCK = 512
LOSS_BYTES = 8192  # four tiles of 4 warps; on an H100 within 3 % of the best of 24 configurations, for each of 6 losses
INTERPRETER = {
    "gate": Config(1024, 4),
    "learned": Config(1024, 4),
    "loss": Config(4096, 16),
}
CANDIDATE_BLOCKS = (256, 512, 1024)
MOST_PER_WARP = 4096  # of a block: beyond, a kernel would take minutes to compile
NO_SEARCH = "no search may run: TRITON_THRESH_AUTOTUNE=0, a process group, or a CUDA graph being captured"


# ------------------------------------------------------------------------------------------------------------- defaults


@functools.cache
def lanes(device: torch.device) -> int:
    """Threads of a warp: 64 on AMD's data-centre GPUs, else 32."""
    if device.type != "cuda":
        return 32
    return int(getattr(torch.cuda.get_device_properties(device), "warp_size", 32))


@functools.cache
def gate_warps(block: int, itemsize: int, lanes: int) -> int:
    """The warps that give each thread 16 bytes a load."""
    return max(1, block * itemsize // (lanes * 16))


@functools.cache
def default(kind: Kind, itemsize: int, lanes: int = 32) -> Config:
    """The configuration where nothing was measured, for warps of so many lanes."""
    if kind == "loss":
        return Config(LOSS_BYTES // itemsize, 4)
    return Config(GATE_BLOCK, gate_warps(GATE_BLOCK, itemsize, lanes))


def tile(config: Config, itemsize: int, lanes: int) -> int:
    """The elements of a loss's block that its program computes at a time: 16 bytes a thread."""
    return min(config.block, config.num_warps * lanes * 16 // itemsize)


# --------------------------------------------------------------------------------------------------------------- search


def candidates(kind: Kind, itemsize: int, lanes: int = 32) -> list[Config]:
    """The configurations of a search: 16 bytes a thread a load at three tile sizes, and the same with half the threads."""
    start = default(kind, itemsize, lanes)
    found = [start]
    for size in CANDIDATE_BLOCKS:
        scale = size / GATE_BLOCK
        for warps in (start.num_warps * scale, start.num_warps * scale / 2):
            config = Config(int(start.block * scale), int(warps))
            if warps >= 1 and config not in found:
                found.append(config)
    return found


def _among_ranks() -> bool:
    """True in a process group. Its ranks agree on the default, because their tables may differ."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def may_search() -> bool:
    """True if a search may run now: it is not switched off, ranks could not disagree, and no CUDA graph is captured."""
    if os.environ.get("TRITON_THRESH_AUTOTUNE", "1") == "0":
        return False
    if _among_ranks():
        return False
    return not (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing())


def search(configs: Sequence[Config], launch: Launch) -> Config:
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


# ------------------------------------------------------------------------------------------------------- the user's table


def table_folder() -> Path:
    """The folder of the user's tables: TRITON_THRESH_CACHE_DIR, else ~/.cache/triton_thresh."""
    return Path(os.environ.get("TRITON_THRESH_CACHE_DIR") or Path.home() / ".cache" / "triton_thresh")


@functools.cache
def device_name(device: torch.device) -> str:
    return str(torch.get_device_module(device).get_device_name(device))


def slug(device_name: str) -> str:
    """A device's name as files have it."""
    return re.sub(r"[^A-Za-z0-9]+", "_", device_name).strip("_")


def table_path(device_name: str) -> Path:
    """The user's table for a device: ``{"<op>/<dtype>/<log2 of the size>": [block, num_warps], ...}``."""
    return table_folder() / f"{slug(device_name)}.json"


def _is_config(entry: object) -> bool:
    if not (isinstance(entry, list) and len(entry) == 2 and all(type(v) is int for v in entry)):
        return False
    block, warps = entry
    if not (32 <= block <= 65536 and block & (block - 1) == 0 and warps in (1, 2, 4, 8, 16, 32)):
        return False
    return bool(block <= MOST_PER_WARP * warps)


def parse(text: str, origin: str) -> dict[str, Config]:
    """The valid entries of a table; others are left out with a warning, never an error."""
    try:
        entries = json.loads(text)
    except ValueError:
        entries = None
    if not isinstance(entries, dict):
        warnings.warn(f"triton_thresh: ignoring {origin}: not a table of block sizes", stacklevel=2)
        return {}
    valid = {key: Config(*entry) for key, entry in entries.items() if _is_config(entry)}
    if len(valid) < len(entries):
        warnings.warn(
            f"triton_thresh: ignoring {len(entries) - len(valid)} malformed entries of {origin}", stacklevel=2
        )
    return valid


@functools.cache
def table(device_name: str) -> dict[str, Config]:
    """The user's table as it was on disk at first use, kept up to date by `remember`."""
    path = table_path(device_name)
    try:
        return parse(path.read_text(errors="replace"), str(path))
    except OSError:
        return {}


def remember(device_name: str, entries: Mapping[str, Config]) -> None:
    """Add to the user's table, in memory and on disk; a disk that cannot be written to is no error."""
    own, path = table(device_name), table_path(device_name)
    own.update(entries)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".tmp", delete=False) as file:
            json.dump({key: list(config) for key, config in sorted(own.items())}, file, indent=1)
        os.replace(file.name, path)
    except OSError as error:
        warnings.warn(f"triton_thresh: block sizes were not saved to {path}: {error}", stacklevel=2)


# --------------------------------------------------------------------------------------------------------------- choice


def key_of(op: str, dtype: torch.dtype, bucket: int) -> str:
    """An entry's key in a table."""
    return f"{op}/{str(dtype).removeprefix('torch.')}/{bucket}"


def bucket_of(numel: int) -> int:
    """The power-of-two size bucket: ceil(log2(numel))."""
    return max(numel - 1, 0).bit_length()


_settled: dict[tuple[Any, ...], Choice] = {}


def choose(
    kind: Kind,
    op: str,
    dtype: torch.dtype,
    numel: int,
    device: torch.device,
    launch: Launch | None = None,
    *,
    searches: bool = False,
) -> Choice:
    """The configuration for a call; `launch`, if a search is due, runs the op once on scratch tensors."""
    bucket = bucket_of(numel)
    signature = (kind, op, dtype, bucket, device)
    choice = _settled.get(signature)
    if choice is None:
        choice = _resolve(kind, op, dtype, bucket, device, launch, searches)
        if not searches or choice.source != "default":
            _settled[signature] = choice
    return choice


def _resolve(
    kind: Kind, op: str, dtype: torch.dtype, bucket: int, device: torch.device, launch: Launch | None, searches: bool
) -> Choice:
    if interpreting():
        return Choice(INTERPRETER[kind], "interpreter")
    if searches and not _among_ranks():
        name, key = device_name(device), key_of(op, dtype, bucket)
        own = table(name).get(key)
        if own:
            return Choice(own, "user's table")
        if launch is not None and may_search():
            with on_device(device):
                found = search(candidates(kind, dtype.itemsize, lanes(device)), launch)
            remember(name, {key: found})
            return Choice(found, "search")
    return Choice(default(kind, dtype.itemsize, lanes(device)), "default")
