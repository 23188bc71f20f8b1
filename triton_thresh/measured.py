"""What was measured on a GPU: block sizes and crossovers, from the table shipped for it and from the user's own on disk.

A table is ``{"device": ..., "entries": {"<op>/<dtype>/<log2 of the size>": [block, num_warps]}, "crossovers": {...}}``; a
size takes the nearest entry of its op and dtype, and dispatch.py says what a crossover is.
"""

from __future__ import annotations

import functools
import json
import os
import re
import tempfile
import warnings
from collections.abc import Callable, Mapping
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

MOST_PER_WARP = 4096  # of a block: beyond, a kernel would take minutes to compile


class Config(NamedTuple):
    """Elements a thread block covers (a gate's tile is 8 times that), and its warps."""

    block: int
    num_warps: int


class Table(NamedTuple):
    """The block sizes and the crossovers of a device."""

    entries: dict[str, Config]
    crossovers: dict[str, int]


def slug(device_name: str) -> str:
    """A device's name as a file name."""
    return re.sub(r"[^A-Za-z0-9]+", "_", device_name).strip("_")


def _is_config(entry: object) -> bool:
    if not (isinstance(entry, (list, tuple)) and len(entry) == 2 and all(type(v) is int for v in entry)):
        return False
    block, warps = entry
    if not (32 <= block <= 65536 and block & (block - 1) == 0 and warps in (1, 2, 4, 8, 16, 32)):
        return False
    return bool(block <= MOST_PER_WARP * warps)


def _is_size(entry: object) -> bool:
    return type(entry) is int and entry >= 0


def _valid(part: dict[str, Any], is_valid: Callable[[object], bool], what: str) -> dict[str, Any]:
    """The valid items of a part of a table."""
    found = {key: entry for key, entry in part.items() if is_valid(entry)}
    if len(found) < len(part):
        warnings.warn(f"triton_thresh: ignoring {len(part) - len(found)} malformed {what}", stacklevel=3)
    return found


def parse(text: str, origin: str) -> Table:
    """What is valid of a table; what is not is left out with a warning, never an error."""
    try:
        document = json.loads(text)
    except ValueError:
        document = None
    parts = document if isinstance(document, dict) else {}
    entries, crossovers = parts.get("entries"), parts.get("crossovers", {})
    if not isinstance(entries, dict):
        warnings.warn(f"triton_thresh: ignoring {origin}: not a table of block sizes", stacklevel=2)
        entries = {}
    if not isinstance(crossovers, dict):
        warnings.warn(f"triton_thresh: ignoring the crossovers of {origin}: not a table", stacklevel=2)
        crossovers = {}
    configs = _valid(entries, _is_config, f"entries of {origin}")
    sizes = _valid(crossovers, _is_size, f"crossovers of {origin}")
    return Table({key: Config(*entry) for key, entry in configs.items()}, sizes)


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


@functools.cache
def shipped(device_name: str) -> Table:
    """The table shipped for a device, empty if there is none."""
    file = resources.files("triton_thresh") / "tuned" / f"{slug(device_name)}.json"
    return parse(file.read_text(), f"the table shipped for {device_name}") if file.is_file() else Table({}, {})


@functools.cache
def cached(device_name: str) -> Table:
    """The user's table as it was on disk at first use, kept up to date by `remember`."""
    path = cache_path(device_name)
    try:
        return parse(path.read_text(errors="replace"), str(path))
    except OSError:
        return Table({}, {})


def document(device_name: str, table: Table) -> dict[str, Any]:
    """A table as it is written."""
    entries = {key: list(config) for key, config in sorted(table.entries.items())}
    return {"device": device_name, "entries": entries, "crossovers": dict(sorted(table.crossovers.items()))}


def remember(
    device_name: str, entries: Mapping[str, Config] | None = None, crossovers: Mapping[str, int] | None = None
) -> None:
    """Add to the user's table, in memory and on disk; a disk that cannot be written to is no error."""
    table, path = cached(device_name), cache_path(device_name)
    table.entries.update(entries or {})
    table.crossovers.update(crossovers or {})
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".tmp", delete=False) as file:
            json.dump(document(device_name, table), file, indent=1)
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
