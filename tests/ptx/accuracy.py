"""The largest errors of each loss and its gradient on compiled PTX, exact and with instructions as wrong as NVIDIA documents.

    python -m tests.ptx.accuracy [COUNT]        writes benchmarks/results/ptx/accuracy.json

An error is measured in units of eps times the size of the terms that were added (tests/losses.py), which is what rounding can be
held to where terms cancel. Elements where a relative step of 1e-5 in the input makes loss or gradient jump are left out, since a
rounding there may decide a selection; so are sizes below 1e-30, where a GPU's exp2 and rsqrt drop denormals.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

import triton_thresh as tt

from ..losses import PAIRS, SETTINGS, Cell, Setup, inputs, truth
from ..rows import BASE_NAMES
from .approximation import Approximation, Mode
from .driver import PtxDriver, on_ptx

RESULT = Path(__file__).parents[2] / "benchmarks" / "results" / "ptx" / "accuracy.json"
COUNT = 20_000
STEP = 1e-5
LEAST = 1e-30
WAYS = ("eager", *get_args(Mode))


def spread(base: str, count: int) -> Tensor:
    """Ordinary inputs, inputs of every size, and those that go wrong easily."""
    u, v = torch.rand(2, count, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    kind = BASE_NAMES[base].kind
    if kind == "probabilities":
        parts, hard = [10 ** (-38 * v), 1 - 10 ** (-7.2 * v)], [0.0, 1.0, 0.5, 2**-24, 1 - 2**-24]
    else:
        wide = 120.0 if kind == "logits" else 10.0
        parts = [wide * (2 * u - 1), (2 * u - 1).sign() * 10 ** (8 * v - 6)]
        hard = [0.0, 20.0, -20.0, 88.0, -88.0]
    ordinary = inputs(base, (count,), torch.float64)
    return torch.cat([ordinary[::3], *(part[i::3] for i, part in enumerate(parts)), torch.tensor(hard).double()])


def setup(cell: Cell, dtype: torch.dtype, count: int) -> Setup:
    x = spread(cell.base, count).to(dtype)
    z = torch.rand(len(x), generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    y = (3 * z - 1).clamp(0, 1)  # soft labels, and as many of 0 and of 1
    near = 10 ** (-8 * z[::7])  # some are just beside these
    y[::7] = torch.where(y[::7] < 0.5, near, 1 - near)
    return Setup(cell, x, y.to(dtype), cell.rule(*SETTINGS[cell.rule]))


def steady(s: Setup) -> Tensor:
    """Where loss and gradient are smooth."""
    wide = s._replace(input=s.input.double(), target=s.target.double())
    at = truth(wide)
    found = torch.ones_like(s.input, dtype=torch.bool)
    for step in (STEP, -STEP):
        x = wide.input.detach()
        odds = (
            1 - x if BASE_NAMES[s.cell.base].kind == "probabilities" else 1.0
        )  # p (1 - p) is what a logit's step makes
        moved = truth(wide._replace(input=x * (1 + step * odds)))
        for here, there, size in ((at.loss, moved.loss, at.loss_size), (at.slope, moved.slope, at.slope_size)):
            jump = (here - there).detach().abs()
            found &= ~(jump > 1e-3 * (size + size.new_tensor(0.01)))
    return found


def worst(actual: Tensor, value: Tensor, size: Tensor, where: Tensor) -> float:
    """The largest error, in units."""
    info = torch.finfo(actual.dtype)
    where = where & (value.abs() <= info.max) & (size > LEAST)
    return float(torch.where(where, (actual.double() - value).abs() / (info.eps * size), 0.0).max())


def run(s: Setup, way: str, approximate: Approximation) -> tuple[Tensor, Tensor]:
    """Loss and gradient of each element."""
    if way != "eager":
        approximate.mode = way  # type: ignore[assignment]
    with tt.use_backend("eager" if way == "eager" else "triton"):
        x = s.input.clone().requires_grad_()
        loss = s("none", x)
        (slope,) = torch.autograd.grad(loss, x, torch.ones_like(loss))
    return loss.detach(), slope


def measured(cell: Cell, approximate: Approximation, count: int = COUNT) -> dict[str, Any]:
    """Of a pair, in float32: the largest errors by the eager path and in each mode."""
    s = setup(cell, torch.float32, count)
    expected, where = truth(s), steady(s)
    found = {way: run(s, way, approximate) for way in WAYS}
    row: dict[str, Any] = {"base": cell.base, "rule": cell.rule.__name__}
    row |= {"inputs": int(where.sum()), "left_out": int((~where).sum())}
    for place, kind in enumerate(("loss", "gradient")):
        value, size = (expected.loss, expected.loss_size) if place == 0 else (expected.slope, expected.slope_size)
        errors = {way: worst(found[way][place], value.detach(), size.detach(), where) for way in WAYS}
        row[kind] = {way: float(f"{error:.2g}") for way, error in errors.items()}
    return row


def main() -> None:
    count = int(sys.argv[1]) if len(sys.argv) > 1 else COUNT
    with tempfile.TemporaryDirectory() as folder, on_ptx(PtxDriver(90, Path(folder))) as driver:
        rows = []
        for cell in PAIRS:
            rows.append(measured(cell, driver.approximate, count))
            print(json.dumps(rows[-1]), flush=True)
    RESULT.parent.mkdir(parents=True, exist_ok=True)
    RESULT.write_text("[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n")


if __name__ == "__main__":
    main()
