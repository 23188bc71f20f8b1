"""Fills the tables for the GPU at hand: block sizes, by the search a first use would make; then the crossovers of "auto"."""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import dispatch, measured, tuning
from .backend import has_triton, use_backend
from .crossing import RULES, crossovers
from .families import Gate, Loss, Op
from .measured import Config, Table
from .registry import OPS

SIZES = tuple(range(10, 29, 2))
DTYPES = ("float32", "bfloat16", "float16")
Call = Callable[[], Any]


def gate_calls(op: Gate, x: Tensor) -> Iterator[Call]:
    """The gate with the numbers of its example, as in training."""
    x.requires_grad_(op.differentiable)
    yield lambda: op(x, *op.example)


def loss_calls(op: Loss, x: Tensor) -> Iterator[Call]:
    """Each cell without reduction: a reduction never searches, so that its bits do not depend on a timing."""
    for base, rule in op.cells:
        made = RULES[rule]
        yield lambda base=base, made=made: op(x, x, made, base=base, reduction="none")  # type: ignore[misc]


# Which calls search, by family of the registry; a family without a search has no entry.
CALLS: Mapping[str, Callable[[Any, Tensor], Iterator[Call]]] = {"gate": gate_calls, "loss": loss_calls}


def search(op: Op, dtype: torch.dtype, size: int, device: torch.device, found: dict[str, Config]) -> None:
    """Add to the table what an op searches for at a dtype and size (an exponent of 2), if it fits in memory."""
    if op.family not in CALLS or dtype not in getattr(op, "dtypes", (dtype,)):
        return
    try:
        with tuning.collecting(found):
            for call in CALLS[op.family](op, torch.rand(1 << size, device=device).to(dtype)):
                call()
    except torch.OutOfMemoryError:
        print(f"{op.name} at 2^{size} {dtype}: out of memory", file=sys.stderr)


def gpu() -> torch.device | None:
    """The GPU to tune for; None if there is none that Triton drives."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() and has_triton() else None


class CannotTuneError(RuntimeError):
    """There is no GPU to tune for, or no search may run."""


def run(ops: Sequence[str], dtypes: Sequence[str], sizes: Sequence[int], out: Path | None) -> None:
    """Fill the tables of the GPU at hand, and say what was found. `out`: a file that gets what this run found."""
    device = gpu()
    if device is None:
        raise CannotTuneError("needs a GPU that Triton can drive; torch finds none")
    name = tuning.device_name(device)
    if not tuning.may_search():
        raise CannotTuneError(tuning.NO_SEARCH)
    table = Table({}, {})
    everything, bounds = table

    def write() -> None:
        if out:
            out.parent.mkdir(parents=True, exist_ok=True)
            out.write_text(json.dumps(measured.document(name, table), indent=1) + "\n")

    with use_backend("triton"):
        for size, dtype, op in itertools.product(sizes, dtypes, ops):
            known = len(everything)
            search(OPS[op], getattr(torch, dtype), size, device, everything)
            found = dict(list(everything.items())[known:])
            if not found:
                continue
            measured.remember(name, found)
            for key, config in found.items():
                print(f"{key}: block {config.block}, {config.num_warps} warps", flush=True)
            write()
    for dtype, op in itertools.product(dtypes, ops):
        with tuning.without_search():
            for key, size in crossovers(OPS[op], getattr(torch, dtype), device, bounds):
                bounds[key] = size
                print(f"{key}: eager below {size:,}" if size else f"{key}: Triton at every size", flush=True)
        dispatch.remember_crossovers(name, bounds)
        write()
    print(
        f"{len(everything)} block sizes and {len(bounds)} crossovers in {measured.cache_path(name)}"
        + (f" and {out}" if out else "")
    )
