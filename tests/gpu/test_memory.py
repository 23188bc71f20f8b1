"""Tensors with more elements than 32 bits count, and the most memory in use during a call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import triton_thresh as tt
from triton_thresh import ByPrediction

from ..gates import DIFFERENTIABLE, equal, gradient, label
from ..losses import CELLS, SETTINGS, Cell, Setup, Truth, assert_near, name, setup, truth
from ..rows import OPS, Gate
from .cases import DEVICE

pytestmark = pytest.mark.gpu

EDGE = 2**31
PERIOD = 2**26 - 5  # of the data: an offset that wraps around meets other values
PEAK_COUNT = 2**24 + 77
PEAK_SLACK = 4 * 2**20  # the allocator leaves up to 1 MiB of a block unsplit


def filled(n: int, dtype: torch.dtype, seed: int) -> Tensor:
    """n elements that repeat with PERIOD."""
    generator = torch.Generator(DEVICE).manual_seed(seed)
    pattern = torch.randn(min(n, PERIOD), generator=generator, device=DEVICE).to(dtype)
    made = torch.empty(n, dtype=dtype, device=DEVICE)
    for part in made.split(PERIOD):
        part.copy_(pattern[: part.numel()])
    return made


def windows(n: int) -> list[slice]:
    """The start, both sides of EDGE, the end."""
    return [slice(0, 5000), slice(EDGE - 2500, min(EDGE + 2500, n)), slice(n - 5000, n)]


def need_memory(gib: int = 40) -> None:
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info()[0] / 2**30
    if free < gib:
        pytest.skip(f"{free:.0f} GiB of GPU memory are free, {gib} are needed")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "dtype", "kind"),
    [
        ("hardshrink", torch.bfloat16, "number"),
        ("hardshrink", torch.bfloat16, "channel"),
        ("hardshrink", torch.bfloat16, "int8 element"),
        ("softshrink", torch.bfloat16, "learned"),
        ("threshold", torch.int8, "number"),
    ],
    ids=str,
)
def test_gate_beyond_32_bit_offsets(name: str, dtype: torch.dtype, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    need_memory()
    monkeypatch.setenv("TRITON_THRESH_AUTOTUNE", "0")
    op = OPS[name]
    assert isinstance(op, Gate)
    columns = 1027
    rows = EDGE // columns + 9
    n = rows * columns
    x = filled(n, dtype, 0).view(rows, columns).requires_grad_(dtype.is_floating_point)
    threshold: Any = 1 if dtype == torch.int8 else 0.5
    if kind == "channel":
        threshold = torch.linspace(0, 1, columns, device=DEVICE)
    elif kind == "int8 element":
        threshold = filled(n, torch.int8, 2).abs_().view(rows, columns)
    elif kind == "learned":
        threshold = torch.full((), 0.5, device=DEVICE, requires_grad=True)
    output = getattr(tt, name)(x, threshold)
    g = filled(n, torch.bfloat16, 1).view(rows, columns) if x.requires_grad else None
    dx = torch.autograd.grad(output, x, g)[0].view(-1) if g is not None else None
    for window in windows(n):
        part, t = x.detach().view(-1)[window], threshold
        if kind == "channel":
            t = threshold[torch.arange(window.start, window.stop, device=DEVICE) % columns]
        elif kind == "int8 element":
            t = threshold.view(-1)[window]
        elif kind == "learned":
            t = threshold.detach()
        equal(output.detach().view(-1)[window], op.reference(part, t))
        if g is not None and dx is not None:
            equal(dx[window], gradient(op, part, t, g=g.view(-1)[window]))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rows", "columns"), [(EDGE // 1024 + 9, 1024), (EDGE // 1027 + 9, 1027), (EDGE // 131072 - 1, 131072)]
)
def test_sums_by_column_near_32_bit_offsets(rows: int, columns: int) -> None:
    """Beyond them, and so close below that the last group of rows would reach beyond. Every sum is exact."""
    need_memory()
    x = filled(rows * columns, torch.bfloat16, 0).view(rows, columns).requires_grad_()
    t = torch.full((columns,), 0.5, device=DEVICE, requires_grad=True)
    y, count = tt.jumprelu_l0(x, t, 0.25)
    g, h = torch.ones_like(y), torch.full_like(count, 2.0)
    dx, dt = torch.autograd.grad((y, count), (x, t), (g, h))
    total = torch.zeros(columns, dtype=torch.float64, device=DEVICE)
    for start in range(0, rows, 2**14):
        part = x.detach()[start : start + 2**14].float()
        above, window = part > 0.5, (part - 0.5).abs() < 0.125
        equal(y.detach()[start : start + 2**14], torch.where(above, part, 0).bfloat16())
        equal(dx[start : start + 2**14], above.bfloat16())
        equal(count.detach()[start : start + 2**14], above.sum(1).float())
        total += window.sum(0) * (-(0.5 / 0.25) - 2.0 / 0.25)
    equal(dt, total.float())


@pytest.mark.slow
@pytest.mark.parametrize("beyond", [-1, 12345])
def test_loss_at_and_beyond_32_bit_offsets(beyond: int) -> None:
    need_memory()
    n = EDGE + beyond
    x, y = filled(n, torch.bfloat16, 0).requires_grad_(), filled(n, torch.bfloat16, 1)
    rule = ByPrediction(*SETTINGS[ByPrediction])
    with torch.autocast(DEVICE.type, torch.bfloat16):  # for a loss in float32
        loss = tt.threshold_mse_loss(x, y, **vars(rule))
    (3 * loss).backward()
    assert x.grad is not None

    def expected(part: slice) -> Truth:
        return truth(Setup(Cell("mse", ByPrediction), x.detach()[part], y[part], rule))

    sums = torch.zeros(2, dtype=torch.float64, device=DEVICE)
    for start in range(0, n, 2**25):
        there = expected(slice(start, start + 2**25))
        sums += torch.stack([there.loss.sum(), there.loss_size.sum()])
    assert_near(loss.detach(), sums[0] / n, sums[1] / n, terms=n)
    for window in windows(n):
        there = expected(window)
        assert_near(x.grad[window], there.slope * 3 / n, there.slope_size * 3 / n, roundings=2)


def peak(function: Callable[[], Any]) -> tuple[int, Any]:
    """The most memory in use during a call beyond that in use before it, and the result."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = function()
    return torch.cuda.max_memory_allocated() - before, result


@pytest.mark.parametrize("op", DIFFERENTIABLE, ids=label)
@pytest.mark.parametrize("elementwise", [False, True])
def test_peak_of_a_gate(op: Gate, elementwise: bool) -> None:
    x = torch.randn(PEAK_COUNT, device=DEVICE).bfloat16().requires_grad_()
    g = torch.ones_like(x)
    threshold = torch.rand_like(x) if elementwise else 0.5
    arguments = (threshold, *op.example[1:])
    getattr(tt, op.name)(x, *arguments)  # searches
    used, output = peak(lambda: getattr(tt, op.name)(x, *arguments))
    assert used <= 2 * PEAK_COUNT + PEAK_COUNT / 8 + PEAK_SLACK
    used, _ = peak(lambda: torch.autograd.grad(output, x, g))
    assert used <= 2 * PEAK_COUNT + PEAK_SLACK


@pytest.mark.parametrize("cell", CELLS, ids=name)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=name)
def test_peak_of_a_loss(cell: Cell, dtype: torch.dtype) -> None:
    """Forward and backward: one gradient buffer and the partial sums; what backward hands on is that buffer."""
    case = setup(cell, dtype, DEVICE, shape=(PEAK_COUNT,))
    x = case.input.requires_grad_()
    torch.autograd.grad(3 * case("mean", x), x)  # compiles

    def both() -> int | None:
        loss = case("mean", x)
        assert loss.grad_fn is not None
        buffer = loss.grad_fn.saved_tensors[-1]  # type: ignore[attr-defined]
        pointer = buffer.data_ptr() if dtype != torch.float16 else None
        del buffer
        (3 * loss).backward()
        return pointer

    used, pointer = peak(both)
    assert used <= dtype.itemsize * PEAK_COUNT + 4 * PEAK_COUNT // 1024 + PEAK_SLACK
    assert x.grad is not None
    assert pointer is None or x.grad.data_ptr() == pointer
