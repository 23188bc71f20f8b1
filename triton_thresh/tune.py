"""Fills the table of block sizes for the GPU at hand, by the search that a first use would make."""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import gates, losses, tuning
from .backend import has_triton, use_backend
from .registry import OPS, Gate, Loss, Op

SIZES = tuple(range(10, 29, 2))
DTYPES = ("float32", "bfloat16", "float16")
Call = Callable[[], Any]


def calls(op: Op, x: Tensor) -> Iterator[Call]:
    """The calls of an op that search. Reductions do not, so that their bits do not depend on a timing."""
    if isinstance(op, Gate) and not op.straight_through and x.dtype in op.dtypes:
        x.requires_grad_(op.saves != "nothing")
        yield lambda: gates.run(op, x, op.example)
    elif isinstance(op, Loss):
        for kind, rule in op.cells:
            base, made = kind(*kind.example), rule(*rule.example)
            yield lambda base=base, made=made: losses.run(op.name, x, x, base, made, reduction="none")  # type: ignore[misc]


def gpu() -> torch.device | None:
    """The GPU to tune for; None if there is none that Triton drives."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() and has_triton() else None


class CannotTuneError(RuntimeError):
    """There is no GPU to tune for, or no search may run."""


def run(ops: Sequence[str], dtypes: Sequence[str], sizes: Sequence[int], out: Path | None) -> None:
    """Search what the table of the GPU at hand does not have, and say what was found. `out`: a file that gets the same."""
    device = gpu()
    if device is None:
        raise CannotTuneError("needs a GPU that Triton can drive; torch finds none")
    if not tuning.may_search():
        raise CannotTuneError(tuning.NO_SEARCH)
    name = tuning.device_name(device)
    found: dict[str, tuning.Config] = {}
    with use_backend("triton"):
        for size, dtype, op in itertools.product(sizes, dtypes, ops):
            known = set(tuning.table(name))
            try:
                for call in calls(OPS[op], torch.rand(1 << size, device=device).to(getattr(torch, dtype))):
                    call()
            except torch.OutOfMemoryError:
                print(f"{op} at 2^{size} {dtype}: out of memory", file=sys.stderr)
            for key, config in tuning.table(name).items():
                if key not in known:
                    found[key] = config
                    print(f"{key}: block {config.block}, {config.num_warps} warps", flush=True)
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps({key: list(config) for key, config in found.items()}, indent=1) + "\n")
    print(f"{len(found)} block sizes in {tuning.table_path(name)}" + (f" and {out}" if out else ""))
