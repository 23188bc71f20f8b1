"""The kernels of gates whose threshold learns, against the straight-through formulas: values, gradients, sums, memory saved."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from triton_thresh import gates as family
from triton_thresh import layout

from ..conftest import FULL
from ..gates import OPERANDS, equal, label, same
from ..interpreted.tools import sentinel_view
from ..learned import BANDWIDTH, FLOATS, OPS, Case, cases, check, inputs, outputs_of, truth, upstream
from ..rows import LearnedGate, spread
from .test_gates import saved_bytes

CASES = list(cases(full=FULL))
# rows by features: several blocks of 32 rows, of columns, and tails of each; 16 does not divide some
SHAPES = ((1, 1), (7, 48), (40, 1040), (70, 1001), (129, 33), (3, 3000), (8200,))


def by_id(value: object) -> str | None:
    return getattr(value, "id", None) or label(value)


@pytest.mark.parametrize("case", spread(CASES, keep=1), ids=by_id)
def test_case(case: Case, device: torch.device) -> None:
    check(case, device, input_gradient=False, special=True)


def tells_input_gradient(case: Case) -> bool:
    """Every operand in one dtype, every fourth in all: the flag adds to a gradient that test_case holds in each."""
    place = OPERANDS.index(case.operand)
    return case.layout.name in ("contiguous", "channels_last") and place % 4 in (0, FLOATS.index(case.dtype))


@pytest.mark.parametrize("case", spread([*filter(tells_input_gradient, CASES)], keep=1), ids=by_id)
def test_input_gradient(case: Case, device: torch.device) -> None:
    check(case, device, input_gradient=True, special=False)


def random_call(
    op: LearnedGate, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """An input, a threshold per feature in float32 with exact values, and gradients."""
    t = (torch.arange(shape[-1]) % 13 - 4).div(8).to(device, torch.float32)
    x = inputs(t, dtype, shape, device)
    with torch.no_grad():
        gradients = upstream(outputs_of(op(x, t, BANDWIDTH)))
    return x, t, gradients


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("op", OPS, ids=by_id)
def test_sizes(op: LearnedGate, shape: tuple[int, ...], device: torch.device) -> None:
    """Full blocks and tails; what lies around input and gradient is neither read into a sum nor written."""
    x, t, gradients = random_call(op, shape, torch.bfloat16 if len(shape) % 2 else torch.float32, device)
    expected = truth(op, x, t, BANDWIDTH, gradients)
    x, check_input = sentinel_view(x)
    gradients[0], check_gradient = sentinel_view(gradients[0], 3)
    recorded = outputs_of(op(x.requires_grad_(), t.requires_grad_(), BANDWIDTH))
    for output, value in zip(recorded, expected.outputs, strict=True):
        same(output.detach(), value)
    dx, dt = torch.autograd.grad(recorded, (x, t), gradients)
    equal(dx, expected.dx)
    equal(dt, expected.dt.sum_to_size(t.shape).float())
    check_input()
    check_gradient()


@pytest.mark.parametrize("op", OPS, ids=by_id)
def test_sums_are_no_worse_than_float32(op: LearnedGate, device: torch.device) -> None:
    """Gradients that are not exact: within the error of summing 32 rows one after the other."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(300, 64, generator=generator).to(device, torch.bfloat16).requires_grad_()
    t = torch.rand(64, generator=generator).to(device).requires_grad_()
    recorded = outputs_of(op(x, t, 0.3))
    gradients = [torch.randn(o.shape, generator=generator).to(device, o.dtype) for o in recorded]
    _, dt = torch.autograd.grad(recorded, (x, t), gradients)
    expected = truth(op, x, t, 0.3, gradients)
    slack = 8 * torch.finfo(torch.float32).eps * expected.size.sum(0)
    assert ((dt.double() - expected.dt.sum(0)).abs() <= slack).all()


@pytest.mark.parametrize("op", OPS, ids=by_id)
def test_same_bits_every_time(op: LearnedGate, device: torch.device) -> None:
    x = torch.randn(70, 40, device=device).requires_grad_()
    t = torch.rand(40, device=device).requires_grad_()
    recorded = outputs_of(op(x, t, 0.5))
    gradients = [torch.randn(o.shape, device=device) for o in recorded]
    first, second = (torch.autograd.grad(recorded, (x, t), gradients, retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=label)
@pytest.mark.parametrize("op", OPS, ids=by_id)
def test_threshold_is_never_rounded(op: LearnedGate, dtype: torch.dtype, device: torch.device) -> None:
    """Thresholds between two values of the input's dtype tell its neighbours apart."""
    x = torch.tensor([1.0], dtype=torch.bfloat16 if dtype == torch.float32 else torch.float32, device=device)
    nudge = torch.finfo(dtype).eps
    below, above = (torch.tensor([1 + sign * nudge], dtype=dtype, device=device) for sign in (-1, 1))
    assert outputs_of(op(x, below))[0].item() == 1
    assert outputs_of(op(x, above))[0].item() == 0
    assert outputs_of(op(x, above[0]))[0].item() == 0


@pytest.mark.parametrize("op", OPS, ids=by_id)
def test_gradients_of_gradients(op: LearnedGate, device: torch.device) -> None:
    """Linear in the upstream gradient, and through -(threshold / bandwidth) in the threshold."""
    x, t, gradients = random_call(op, (40, 16), torch.float64, device)
    x, t = x.requires_grad_(), t.double().requires_grad_()
    gradients = [g.requires_grad_() for g in gradients]
    dx, dt = torch.autograd.grad(outputs_of(op(x, t, BANDWIDTH)), (x, t), gradients, create_graph=True)
    expected = truth(op, x, t, BANDWIDTH, [g.detach() for g in gradients])
    equal(dx.detach(), expected.dx)
    equal(dt.detach(), expected.dt.sum(0))
    into = torch.arange(16, dtype=torch.float64, device=device)
    second = torch.autograd.grad(dt, [*gradients, t], into, allow_unused=True)
    inside = (x.detach() - t.detach()).abs() < BANDWIDTH / 2
    per_element = torch.where(inside, into, 0) / -BANDWIDTH
    if op.name == "step":
        equal(second[0], per_element)
    else:
        equal(second[0], per_element * t.detach())
        equal(second[-1], (per_element * gradients[0].detach()).sum(0))
    if op.counts:
        equal(second[1], per_element.sum(-1))


@pytest.mark.parametrize("op", OPS, ids=by_id)
def test_batched_gradients(op: LearnedGate, device: torch.device) -> None:
    x, t, gradients = random_call(op, (20, 16), torch.float32, device)
    x, t = x.requires_grad_(), t.requires_grad_()
    several = [torch.stack([g, 2 * g]) for g in gradients]
    dx, dt = torch.autograd.grad(outputs_of(op(x, t, BANDWIDTH)), (x, t), several, is_grads_batched=True)
    expected = truth(op, x, t, BANDWIDTH, gradients)
    equal(dx, torch.stack([expected.dx, 2 * expected.dx]))
    equal(dt, torch.stack([expected.dt.sum(0).float()] * 2) * torch.tensor([[1.0], [2.0]], device=device))


@pytest.mark.parametrize("op", OPS, ids=by_id)
def test_one_gradient_alone(op: LearnedGate, device: torch.device) -> None:
    """Of the threshold where the input needs none, and of each output where the other is not used."""
    x, t, gradients = random_call(op, (40, 48), torch.float32, device)
    recorded = outputs_of(op(x, t.requires_grad_(), BANDWIDTH))
    for i, output in enumerate(recorded):
        only = [g if i == j else torch.zeros_like(g) for j, g in enumerate(gradients)]
        (dt,) = torch.autograd.grad(output, t, gradients[i], retain_graph=True)
        equal(dt, truth(op, x, t, BANDWIDTH, only).dt.sum(0).float())


# ------------------------------------------------------------------------------------------------------ layout of the codes


@pytest.mark.parametrize("dtype", FLOATS, ids=label)
@pytest.mark.parametrize("op", OPS, ids=by_id)
def test_two_bits_an_element_are_saved(op: LearnedGate, dtype: torch.dtype, device: torch.device) -> None:
    """And what backward reads of the threshold; one bit where the threshold does not learn."""
    x, t, _ = random_call(op, (32, 80), dtype, device)
    own = t.nbytes if op.reads_threshold else 0
    assert sum(saved_bytes(lambda: op(x.requires_grad_(), t.requires_grad_(), BANDWIDTH))) == x.numel() / 4 + own
    assert sum(saved_bytes(lambda: op(x, t.detach(), BANDWIDTH))) == x.numel() / 8
    assert saved_bytes(lambda: op(x.detach(), t.detach(), BANDWIDTH)) == []


ROWS: list[tuple[tuple[int, ...], Any, bool, tuple[int, bool]]] = [
    ((64, 4096), (4096,), False, (4096, True)),
    ((64, 4096), (4096,), True, (4096, True)),
    ((64, 1001), (1001,), False, (0, False)),  # eight rows of 16 * 1001 do not fit
    ((160, 1001), (1001,), False, (16016, True)),
    ((160, 1001), (1001,), True, (16016, True)),
    ((4, 1001), (1001,), True, (1001, False)),
    ((64, 48), (), False, (0, True)),
    ((64, 48), (64, 1), True, (0, False)),
    ((64, 8, 16), (8, 16), False, (0, True)),
    ((64, 8, 16), (8, 1), False, (0, True)),
    ((64, 8, 16), (64, 8, 16), False, (0, False)),
]


@pytest.mark.parametrize(("shape", "own", "counts", "expected"), ROWS, ids=str)
def test_the_matrix_the_kernels_see(
    shape: tuple[int, ...], own: tuple[int, ...], counts: bool, expected: tuple[int, bool]
) -> None:
    """A width that 16 divides, of the threshold's period; sums by column where eight rows fit."""
    x = torch.empty(shape)
    width, pattern = family._row_width(shape, x.stride(), family._threshold_shape(torch.empty(own)), counts, 512)
    assert (width if expected[0] else 0, pattern != (0, 0)) == expected
    assert width % 16 == 0 or x.numel() < 8 * 16 * shape[-1]
    assert not counts or width % shape[-1] == 0
    assert pattern == (0, 0) or width % (pattern[0] * pattern[1]) == 0


def test_a_block_is_put_back_in_order() -> None:
    like = torch.empty(2, 3, 4, 5).permute(2, 0, 3, 1)
    operand = torch.arange(24.0).reshape(4, 2, 1, 3)
    flat = layout.block(operand, like)
    assert torch.equal(layout.unblock(flat, (4, 2, 1, 3), tuple(like.shape), like.stride()), operand)
