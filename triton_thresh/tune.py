"""Fills the tables for the GPU at hand: block sizes, by the search a first use would make; then the crossovers of "auto"."""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Callable, Iterator, Mapping
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
CANNOT_RUN = 2  # exit code
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


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--ops", nargs="+", choices=list(OPS), metavar="OP", help="default: every op")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument(
        "--sizes", nargs="+", type=int, default=list(SIZES), help="exponents of 2 (default: 10 to 28 by 2)"
    )
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="also write the table there, as triton_thresh/tuned/ ships it"
    )


def run(args: argparse.Namespace) -> int:
    """Exit code: 0, or 2 if nothing can be tuned here."""
    device = gpu()
    if device is None:
        print("tune: needs a GPU that Triton can drive; torch finds none", file=sys.stderr)
        return CANNOT_RUN
    name = tuning.device_name(device)
    if not tuning.may_search():
        print(f"tune: {tuning.NO_SEARCH}", file=sys.stderr)
        return CANNOT_RUN
    table = Table({}, {})
    everything, sizes = table

    def write() -> None:
        if args.out:
            args.out.parent.mkdir(parents=True, exist_ok=True)
            args.out.write_text(json.dumps(measured.document(name, table), indent=1) + "\n")

    with use_backend("triton"):
        for size, dtype, op in itertools.product(args.sizes, args.dtypes, args.ops or OPS):
            known = len(everything)
            search(OPS[op], getattr(torch, dtype), size, device, everything)
            found = dict(list(everything.items())[known:])
            if not found:
                continue
            measured.remember(name, found)
            for key, config in found.items():
                print(f"{key}: block {config.block}, {config.num_warps} warps", flush=True)
            write()
    for dtype, op in itertools.product(args.dtypes, args.ops or OPS):
        with tuning.without_search():
            for key, size in crossovers(OPS[op], getattr(torch, dtype), device, sizes):
                sizes[key] = size
                print(f"{key}: eager below {size:,}" if size else f"{key}: Triton at every size", flush=True)
        dispatch.remember_crossovers(name, sizes)
        write()
    print(
        f"{len(everything)} block sizes and {len(sizes)} crossovers in {measured.cache_path(name)}"
        + (f" and {args.out}" if args.out else "")
    )
    return 0
