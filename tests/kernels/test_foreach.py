"""Gradient thresholding on Triton: the gate in backward, and the kernel over many tensors."""

from __future__ import annotations

from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

import triton_thresh as tt

from ..conftest import FULL, INTERPRETED
from ..gates import LAYOUTS, Case, Layout, inputs, kept, label, same, upstream
from ..gradients import (
    FLOATS,
    THRESHOLDS,
    any_list,
    by_name,
    each,
    foreach,
    gradient_cases,
    gradient_gates,
    gradients,
    large,
    parameter,
    parameters,
    thresholded,
)
from ..rows import ForeachGate, GradientGate
from .test_traffic import COLS, Arena, watched

# Each number twice, each dtype five times or six.
PAIRS = [
    pytest.param(dtype, number, marks=() if (i + j) % 2 == 0 else pytest.mark.matrix)
    for i, dtype in enumerate(FLOATS)
    for j, number in enumerate(THRESHOLDS)
]
interpreted = pytest.mark.skipif(not INTERPRETED, reason="the interpreter counts: TRITON_INTERPRET is not 1")
CHUNK = 8 * COLS


# -------------------------------------------------------------------------------------------------------- one gradient


@pytest.mark.parametrize(("op", "case"), gradient_cases(full=FULL), ids=by_name)
def test_case(op: GradientGate, case: Case, device: torch.device) -> None:
    """The gradient, and the gradient of that."""
    g, (threshold,) = case.make(device)
    x, gg = torch.zeros_like(g).requires_grad_(), upstream(g)
    expected, version = op.gate.reference(g, threshold), g._version
    y = op(x, threshold)
    assert y.data_ptr() == x.data_ptr()
    (dx,) = torch.autograd.grad(y, x, g, retain_graph=True)
    same(dx, expected)
    (dx,) = torch.autograd.grad(y, x, g.requires_grad_(), create_graph=True)
    same(dx.detach(), expected)
    (ddx,) = torch.autograd.grad(dx, g, gg)
    same(ddx, torch.where(kept(op.gate, g, threshold), gg, 0))
    assert g._version == version


@gradient_gates
def test_transforms(op: GradientGate, device: torch.device) -> None:
    x, w = torch.zeros(6, 10, device=device), inputs(0.5, torch.float32, (6, 10), device)
    thresholds = torch.linspace(0, 2, 6, device=device)
    same(torch.func.grad(lambda x: (op(x, 0.5) * w).sum())(x), thresholded(w, 0.5))
    per_row = torch.func.vmap(torch.func.grad(lambda x, w, t: (op(x, t) * w).sum()))(x, w, thresholds)
    same(per_row, op.gate.reference(w, thresholds[:, None]))


@interpreted
@gradient_gates
@pytest.mark.parametrize("n", [CHUNK, CHUNK + 1000])
@pytest.mark.parametrize("dtype", FLOATS, ids=label)
def test_traffic_of_backward(op: GradientGate, dtype: torch.dtype, n: int) -> None:
    """Nothing forward, 2s backward; a per-element threshold adds its own size."""
    x, g, t = torch.zeros(n, dtype=dtype, requires_grad=True), torch.ones(n, dtype=dtype), torch.ones(n, dtype=dtype)
    for threshold, own in ((0.5, 0), (t, n * dtype.itemsize)):
        with watched(Arena(), x=x, g=g, t=t) as forward:
            y = op(x, threshold)
        assert forward.total == 0
        with watched(Arena(), x=x, g=g, t=t) as backward:
            torch.autograd.grad(y, x, g)
        assert (backward.loaded["g"], backward.stored["made"]) == (n * dtype.itemsize,) * 2
        assert (backward.loaded["t"], backward.loaded["x"]) == (own, 0)
        plan = tt.explain(op.name, x, threshold)
        told = plan.forward_bytes, plan.backward_bytes, plan.saved_bytes
        assert told == (0, 2 * n * dtype.itemsize + own, own)


# ------------------------------------------------------------------------------------------------------- many gradients


def run(op: ForeachGate, threshold: Any, dtype: torch.dtype, device: torch.device, **options: Any) -> Tensor | None:
    """All gradients and all around them are as they should be, and so is the kept fraction."""
    made, check = parameters(threshold, dtype, device)
    before = [g.clone() for g in gradients(made)]
    versions = [g._version for g in gradients(made)]
    fraction = op(made, threshold, **options)
    kept = 0
    for p, g, t, version in zip(made, before, each(threshold, len(made)), versions, strict=True):
        assert p.grad is not None
        same(p.grad, thresholded(g, t))
        assert p.grad._version > version
        kept += int(large(g, t).sum())
    check()
    if options:
        assert fraction is not None
        assert (fraction.shape, fraction.dtype, fraction.device.type) == ((), torch.float32, device.type)
        torch.testing.assert_close(fraction.item(), kept / sum(g.numel() for g in before), rtol=2e-7, atol=0)
    return fraction


@foreach
@pytest.mark.parametrize(("dtype", "threshold"), PAIRS, ids=str)
def test_numbers(op: ForeachGate, threshold: float, dtype: torch.dtype, device: torch.device) -> None:
    run(op, threshold, dtype, device, return_kept=True)


@foreach
@pytest.mark.parametrize("dtype", FLOATS, ids=label)
@pytest.mark.parametrize("kind", ["list", "0dim", "0dim-float64", "1dim", "1dim-float64", "1dim-cpu"])
def test_thresholds(op: ForeachGate, kind: str, dtype: torch.dtype, device: torch.device) -> None:
    own = torch.tensor(THRESHOLDS, dtype=torch.float64)
    made = {
        "list": own.tolist(),
        "0dim": torch.tensor(0.1, device=device),
        "0dim-float64": own[1].to(device),
        "1dim": own.float().to(device),
        "1dim-float64": own.to(device),
        "1dim-cpu": own,
    }
    assert run(op, made[kind], dtype, device) is None


@foreach
@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if layout.name != "expanded"], ids=by_name)
def test_layouts(op: ForeachGate, layout: Layout, device: torch.device) -> None:
    """What a gradient that is not dense skips over in memory stays as it was."""
    memory = [layout.lay(inputs(0.5, dtype, layout.shape, device)) for dtype in FLOATS for _ in range(2)]
    made, before = [parameter(g) for g in memory], [g.clone() for g in memory]
    around = [g.as_strided((g.untyped_storage().nbytes() // g.itemsize,), (1,), 0).clone() for g in memory]
    op(made, 0.5)
    for g, was, storage in zip(memory, before, around, strict=True):
        same(g, thresholded(was, 0.5))
        storage.as_strided(g.shape, g.stride(), g.storage_offset()).copy_(g)
        same(g.as_strided(storage.shape, (1,), 0), storage)


@foreach
def test_parameters_without_gradients(op: ForeachGate, device: torch.device) -> None:
    g = inputs(0.5, torch.float32, (2, 50), device)
    like = torch.zeros(50, device=device)
    made = [parameter(None, like), parameter(g[0].clone()), parameter(None, like), parameter(g[1].clone())]
    thresholds = [0.1, 0.5, torch.inf, 2.5]
    for threshold in (thresholds, torch.tensor(thresholds, device=device)):
        op(made, threshold)
        same(made[1].grad, thresholded(g[0], 0.5))
        same(made[3].grad, thresholded(g[1], 2.5))
        assert made[0].grad is made[2].grad is None


@foreach
def test_nothing_to_do(op: ForeachGate, device: torch.device) -> None:
    empty = parameter(torch.zeros(0, 3, device=device))
    for made in ([], [parameter(None, torch.zeros(3, device=device))], [empty], [empty, empty]):
        assert op(made, 0.5) is None
        fraction = op(made, 0.5, return_kept=True)
        assert fraction is not None
        assert fraction.isnan()
        assert fraction.device.type == (device.type if made else "cpu")


@foreach
def test_several_dtypes_and_generators(op: ForeachGate, device: torch.device) -> None:
    memory = [inputs(0.1, dtype, (77,), device) for dtype in FLOATS * 2]
    before = [g.clone() for g in memory]
    fraction = op((parameter(g) for g in memory), 0.1, return_kept=True)
    for g, was in zip(memory, before, strict=True):
        same(g, thresholded(was, 0.1))
    kept = sum(int(large(g, 0.1).sum()) for g in before)
    torch.testing.assert_close(fraction, torch.tensor(kept / (77 * 8), device=device), rtol=2e-7, atol=0)


@foreach
def test_views_of_one_buffer(op: ForeachGate, device: torch.device) -> None:
    """As DistributedDataParallel's buckets."""
    buffer = inputs(0.5, torch.bfloat16, (30_001,), device)
    expected = thresholded(buffer, 0.5)
    op([parameter(part) for part in buffer.split([1, 7, 9_000, 8_191, 2, 8_192, 4_608])], 0.5)
    same(buffer, expected)


@foreach
def test_a_parameter_given_twice(op: ForeachGate, device: torch.device) -> None:
    """Two programs read and write the same elements at once. Either order writes the same values."""
    buffer = inputs(0.5, torch.bfloat16, (30_001,), device)
    expected = thresholded(buffer, 0.5)
    made = [parameter(part) for part in buffer.split([9_001, 21_000])]
    op([*made, *made], 0.5)
    same(buffer, expected)


@foreach
def test_autograd_notices(op: ForeachGate, device: torch.device) -> None:
    g = torch.ones(5, device=device, requires_grad=True)
    middle = g * 2
    square = middle * middle
    p = torch.nn.Parameter(torch.zeros(5, device=device))
    p.grad = middle
    op(p, 5.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        square.sum().backward()


@foreach
@hypothesis.settings(max_examples=15, deadline=None, suppress_health_check=list(hypothesis.HealthCheck))
@hypothesis.given(data=st.data())
def test_any_list(op: ForeachGate, data: st.DataObject, device: torch.device) -> None:
    any_list(op, data, device)


@interpreted
@foreach
@pytest.mark.parametrize("dtype", FLOATS, ids=label)
@pytest.mark.parametrize("count", [False, True])
def test_traffic(op: ForeachGate, dtype: torch.dtype, count: bool) -> None:
    """2s; a table of 40 bytes a program, and 4 for its count. Only the first and last tile of a tensor are masked."""
    made, _ = parameters(0.5, dtype, torch.device("cpu"))
    all_gradients = gradients(made)
    with watched(Arena(), gradients=tuple(all_gradients)) as moved:
        op(made, 0.5, return_kept=count)
    once = sum(g.nbytes for g in all_gradients)
    programs = sum(-(-(g.data_ptr() % 16 + g.nbytes) // (CHUNK * g.itemsize)) for g in all_gradients if g.numel())
    assert moved.loaded == {"gradients": once, "made": 40 * programs}
    assert moved.stored == {"gradients": once, **({"made": 4 * programs} if count else {})}
    assert tt.explain(op.name, made, 0.5).forward_bytes == 2 * once
