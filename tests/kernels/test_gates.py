"""The gates' kernels against the reference: values, gradients, in-place forms, memory saved, stray writes."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from ..conftest import FULL, INTERPRETED
from ..gates import (
    DIFFERENTIABLE,
    GATES,
    INPLACE,
    LAYOUTS,
    LEARNED,
    OPERANDS,
    REALS,
    Case,
    Layout,
    Operand,
    agree,
    bits,
    cases,
    gradient,
    inputs,
    label,
    permuted,
    same,
    threshold_gradient,
    upstream,
)
from ..interpreted.tools import sentinel_view
from ..rows import OPS, Gate

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
CASES = list(cases(full=FULL))
SIZES = (1, 7, 8191, 8192, 8193, 20_000)
NUMBERS = (0.1, 0, 3, -0.0, -0.75, torch.inf, -torch.inf, torch.nan, 1e-41, 1e-8, 65519.0)
SOME_LAYOUTS = [layout for layout in LAYOUTS if layout.name in ("contiguous", "channels_last", "spaced", "expanded")]


def by_id(value: object) -> str | None:
    return getattr(value, "id", None) or getattr(value, "name", None) or label(value)


def arguments(op: Gate, threshold: Any) -> tuple[Any, ...]:
    """The example with another threshold; further thresholds are not below it."""
    if op.operands > 1 and not isinstance(threshold, Tensor):
        return (threshold, *(max(threshold, t) for t in op.example[1:]))
    return (threshold, *op.example[1:])


def leaf(op: Gate, device: torch.device, n: int = 60, dtype: torch.dtype = torch.float32) -> Tensor:
    return inputs(op.example[0], dtype, (n,), device).requires_grad_()


@pytest.mark.parametrize("case", CASES, ids=by_id)
def test_case(case: Case, device: torch.device) -> None:
    x, rest = case.make(device)
    g = upstream(x)
    arguments = [x, g, *(t for t in rest if isinstance(t, Tensor))]
    before, versions = [bits(t) for t in arguments], [t._version for t in arguments]
    differentiable = case.op.differentiable and case.dtype.is_floating_point
    y = case.op(x.requires_grad_(differentiable), *rest)
    agree(case.op, y.detach(), case.op.reference(x.detach(), *rest))
    assert y.stride() == torch.empty_like(x).stride()
    if differentiable:
        (dx,) = torch.autograd.grad(y, x, g)
        agree(case.op, dx, gradient(case.op, x, *rest, g=g))
        assert dx.stride() == y.stride()
    assert all(torch.equal(bits(t), b) for t, b in zip(arguments, before, strict=True)), "an argument was written to"
    assert [t._version for t in arguments] == versions


@pytest.mark.parametrize("case", [c for c in CASES if c.dtype == torch.float32 and c.op.differentiable], ids=by_id)
def test_without_gradient(case: Case, device: torch.device) -> None:
    x, rest = case.make(device)
    y = case.op(x, *rest)
    agree(case.op, y, case.op.reference(x, *rest))
    assert y.stride() == torch.empty_like(x).stride()


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("op", GATES, ids=label)
def test_sizes(op: Gate, n: int, device: torch.device) -> None:
    """Full tiles and tails. The input ends where other memory begins."""
    dtype = torch.bfloat16 if n % 2 else torch.float32
    x, check = sentinel_view(inputs(op.example[0], dtype, (n,), device))
    x.requires_grad_(op.differentiable)
    y = op(x, *op.example)
    agree(op, y.detach(), op.reference(x.detach(), *op.example))
    if op.differentiable:
        g, check_gradient = sentinel_view(upstream(x), 3)
        (dx,) = torch.autograd.grad(y, x, g)
        agree(op, dx, gradient(op, x, *op.example, g=g))
        check_gradient()
    check()


@pytest.mark.parametrize("spans", ["c1", "1w", "cw"])
@pytest.mark.parametrize("op", GATES, ids=label)
def test_tensor_threshold_over_several_tiles(op: Gate, spans: str, device: torch.device) -> None:
    own = tuple(1 if s == "1" else size for s, size in zip(spans, (90, 101), strict=True))
    t = torch.tensor(REALS, device=device)[torch.arange(own[0] * own[1], device=device) % len(REALS)].reshape(own)
    x = inputs(t, torch.float32, (90, 101), device)
    agree(op, op(x, *arguments(op, t)), op.reference(x, *arguments(op, t)))


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize("op", GATES, ids=label)
def test_numbers(op: Gate, number: float, device: torch.device) -> None:
    if op.nonnegative and not number >= 0:
        pytest.skip("raises: see tests/test_errors.py")
    for dtype in FLOATS:
        x = inputs(number, dtype, (60,), device).requires_grad_(op.differentiable)
        y = op(x, *arguments(op, number))
        agree(op, y.detach(), op.reference(x.detach(), *arguments(op, number)))
        if op.differentiable:
            (dx,) = torch.autograd.grad(y, x, upstream(x))
            agree(op, dx, gradient(op, x, *arguments(op, number), g=upstream(x)))


@pytest.mark.parametrize("op", [op for op in GATES if len(op.example) > op.operands], ids=label)
@pytest.mark.parametrize("constant", [-0.0, torch.nan, -torch.inf, 0.1, 1e-41])
def test_constants(op: Gate, constant: float, device: torch.device) -> None:
    for dtype in FLOATS:
        if INTERPRETED and constant == 0 and dtype.itemsize < 8:
            continue  # the interpreter takes the number -0.0 for 0.0; where compiled, it is an argument
        x = inputs(op.example[0], dtype, (60,), device)
        for constants in ((constant,) * (len(op.example) - 1), (2.5, constant)[: len(op.example) - 1]):
            same(op(x, op.example[0], *constants), op.reference(x, op.example[0], *constants))


@pytest.mark.parametrize("dtype", FLOATS, ids=label)
@pytest.mark.parametrize("op", INPLACE, ids=label)
def test_selections_copy_the_bits_of_nan(op: Gate, dtype: torch.dtype, device: torch.device) -> None:
    info = torch.finfo(dtype)
    integer = {16: torch.int16, 32: torch.int32, 64: torch.int64}[info.bits]
    quiet = torch.full((40,), torch.nan, dtype=dtype).view(integer) | torch.arange(40, dtype=integer)
    x = torch.cat([quiet, quiet | torch.iinfo(integer).min]).view(dtype).to(device)
    assert torch.equal(bits(op(x, *op.example)), bits(x))


# ------------------------------------------------------------------------------------------------------------ integers


@pytest.mark.parametrize("dtype", INTEGERS, ids=label)
@pytest.mark.parametrize("op", [op for op in GATES if torch.int64 in op.dtypes], ids=label)
def test_integer_limits(op: Gate, dtype: torch.dtype, device: torch.device) -> None:
    info = torch.iinfo(dtype)
    for t in (info.min, info.max, info.max - 1, 3):
        x = inputs(t, dtype, (60,), device)
        x[:3] = torch.tensor([t, t - 1 if t > info.min else t, t + 1 if t < info.max else t], dtype=dtype)
        constants = (7, 2)[: len(op.example) - 1]
        same(op(x, t, *constants), op.reference(x, t, *constants))


@pytest.mark.parametrize("dtype", INTEGERS, ids=label)
@pytest.mark.parametrize("t", [300, -1, 2**40, -(10**30), 10**30, 0.5, -0.5, 254.5, torch.nan, torch.inf])
def test_binary_threshold_compares_integers_by_value(t: float, dtype: torch.dtype, device: torch.device) -> None:
    op = OPS["binary_threshold"]
    info = torch.iinfo(dtype)
    x = torch.tensor([info.min, 0, 1, 2, 44, 100, info.max], dtype=dtype, device=device)
    expected = [1 if v > t else 0 for v in x.tolist()]
    assert op(x, t).tolist() == op.reference(x, t).tolist() == expected


@pytest.mark.parametrize("op", [op for op in GATES if "dtype" in inspect.signature(op.reference).parameters], ids=label)
@pytest.mark.parametrize("result", [torch.bool, torch.uint8, torch.int64, *FLOATS], ids=label)
def test_result_dtype(op: Gate, result: torch.dtype, device: torch.device) -> None:
    constants = (0.5, 0.0) if result is torch.bool or result.is_floating_point else (200, 3)
    for dtype in (torch.bfloat16, torch.float64, torch.int32):
        x = inputs(op.example[0], dtype, (60,), device)
        same(op(x, op.example[0], *constants, dtype=result), op.reference(x, op.example[0], *constants, dtype=result))


# ------------------------------------------------------------------------------------------------------------- autograd


@pytest.mark.parametrize("layout", SOME_LAYOUTS, ids=by_id)
@pytest.mark.parametrize("op", DIFFERENTIABLE, ids=label)
def test_layouts_of_the_upstream_gradient(op: Gate, layout: Layout, device: torch.device) -> None:
    x = inputs(op.example[0], torch.float32, layout.shape, device).requires_grad_()
    y = op(x, *op.example)
    for g in (layout.lay(upstream(x)), permuted(upstream(x), (3, 1, 0, 2))):
        (dx,) = torch.autograd.grad(y, x, g, retain_graph=True)
        agree(op, dx, gradient(op, x, *op.example, g=g))
        assert dx.stride() == x.stride()


@pytest.mark.parametrize("op", DIFFERENTIABLE, ids=label)
def test_expanded_upstream_gradient(op: Gate, device: torch.device) -> None:
    x = leaf(op, device)
    op(x, *op.example).sum().backward()
    agree(op, x.grad, gradient(op, x, *op.example, g=torch.ones((), device=device)))


@pytest.mark.parametrize("op", DIFFERENTIABLE, ids=label)
def test_backward_twice(op: Gate, device: torch.device) -> None:
    x = leaf(op, device)
    y, g = op(x, *op.example), upstream(x, special=False)
    y.backward(g, retain_graph=True)
    y.backward(2 * g)
    agree(op, x.grad, gradient(op, x, *op.example, g=3 * g))
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        y.backward(g)


@pytest.mark.parametrize("op", DIFFERENTIABLE, ids=label)
def test_differentiable_gradient(op: Gate, device: torch.device) -> None:
    x = leaf(op, device)
    g = upstream(
        x, special=op.selects
    ).requires_grad_()  # of slopes that are computed an infinite gradient may meet a 0
    (dx,) = torch.autograd.grad(op(x, *op.example), x, g, create_graph=True)
    agree(op, dx.detach(), gradient(op, x, *op.example, g=g.detach()))
    (dg,) = torch.autograd.grad(dx, g, upstream(x, special=op.selects))
    agree(op, dg, gradient(op, x, *op.example, g=upstream(x, special=op.selects)))


@pytest.mark.parametrize("op", DIFFERENTIABLE, ids=label)
def test_batched_gradients(op: Gate, device: torch.device) -> None:
    x = leaf(op, device)
    g = torch.stack([upstream(x, special=op.selects), upstream(x, special=op.selects).flip(0), torch.ones_like(x)])
    (dx,) = torch.autograd.grad(op(x, *op.example), x, g, is_grads_batched=True)
    agree(op, dx, gradient(op, x, *op.example, g=g))


@pytest.mark.parametrize("op", DIFFERENTIABLE, ids=label)
def test_gradcheck(op: Gate, device: torch.device) -> None:
    x = torch.tensor([-2.0, -0.05, 0.3, 1.5], dtype=torch.float64, device=device, requires_grad=True)
    t = torch.tensor([0.7, 0.2, 0.1, 0.4], dtype=torch.float64, device=device, requires_grad=bool(op.learns))
    apply = lambda x, t: op(x, t, *op.example[1:])  # noqa: E731
    assert torch.autograd.gradcheck(apply, (x, t), check_batched_grad=True, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(apply, (x, t))


@pytest.mark.parametrize("op", DIFFERENTIABLE, ids=label)
def test_transforms(op: Gate, device: torch.device) -> None:
    x = leaf(op, device).detach()
    total = lambda x: op(x, *op.example).sum()  # noqa: E731
    agree(op, torch.func.grad(total)(x), gradient(op, x, *op.example, g=torch.ones((), device=device)))
    same(torch.func.vmap(lambda x: op(x, *op.example))(x.view(6, 10)), op.reference(x, *op.example).view(6, 10))


# ------------------------------------------------------------------------------------------------ thresholds that learn


@pytest.mark.parametrize("operand", [o for o in OPERANDS if o.spans != "number" and not o.dtype], ids=by_id)
@pytest.mark.parametrize("layout", SOME_LAYOUTS, ids=by_id)
@pytest.mark.parametrize("op", LEARNED, ids=label)
def test_gradient_of_the_threshold(op: Gate, layout: Layout, operand: Operand, device: torch.device) -> None:
    dtype = op.dtypes[(len(operand.spans) + len(layout.name)) % len(op.dtypes)]
    x, (t, *constants) = Case(op, dtype, operand, layout).make(device)
    x, t = x.requires_grad_(), t.requires_grad_()
    g = upstream(x, special=False)
    dx, dt = torch.autograd.grad(op(x, t, *constants), (x, t), g)
    agree(op, dx, gradient(op, x, t.detach(), *constants, g=g))
    torch.testing.assert_close(dt, threshold_gradient(op, x, t, *constants, g=g).to(t.dtype), rtol=0, atol=0)


@pytest.mark.parametrize("wide", [(), (1,), (20, 1)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=label)
@pytest.mark.parametrize("op", LEARNED, ids=label)
def test_threshold_in_float32_keeps_its_precision(
    op: Gate, dtype: torch.dtype, wide: tuple[int, ...], device: torch.device
) -> None:
    x = inputs(0.1, dtype, (20, 1000), device).requires_grad_()
    t = torch.full(wide, 0.1, device=device, requires_grad=True)
    g = upstream(x, special=False).abs() * (x > 0)
    (dt,) = torch.autograd.grad(op(x, t), t, g)
    truth = threshold_gradient(op, x, t, g=g).float()
    assert (truth != truth.bfloat16()).any()
    torch.testing.assert_close(dt, truth, rtol=0, atol=0)


@pytest.mark.parametrize("op", LEARNED, ids=label)
def test_threshold_learns_where_the_input_does_not(op: Gate, device: torch.device) -> None:
    x, t = leaf(op, device).detach(), torch.tensor([0.3], device=device, requires_grad=True)
    g = upstream(x, special=False)
    op(x, t).backward(g)
    torch.testing.assert_close(t.grad, threshold_gradient(op, x, t, g=g).float(), rtol=0, atol=0)


@pytest.mark.parametrize("op", LEARNED, ids=label)
def test_batched_gradients_of_the_threshold(op: Gate, device: torch.device) -> None:
    x, t = leaf(op, device), torch.tensor(0.3, device=device, requires_grad=True)
    g = torch.stack([upstream(x, special=False), torch.ones_like(x)])
    dx, dt = torch.autograd.grad(op(x, t), (x, t), g, is_grads_batched=True)
    agree(op, dx, gradient(op, x, t.detach(), g=g))
    truth = torch.stack([threshold_gradient(op, x, t, g=each) for each in g])
    torch.testing.assert_close(dt, truth.float(), rtol=0, atol=0)


# -------------------------------------------------------------------------------------------------------------- memory


def saved_bytes(run: Callable[[], object]) -> list[int]:
    sizes: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        sizes.append(tensor.untyped_storage().nbytes())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return sizes


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=label)
@pytest.mark.parametrize("op", DIFFERENTIABLE, ids=label)
def test_bits_are_saved(op: Gate, dtype: torch.dtype, device: torch.device) -> None:
    """One bit an element, or two; or, for a gate that evaluates its derivative again, the input."""
    n = 20_000
    x = leaf(op, device, n, dtype)
    (size,) = saved_bytes(lambda: op(x, *op.example))
    least = {"bit": n / 8, "two bits": n / 4, "input": n * dtype.itemsize}[op.saves]
    assert least <= size < least + 2048
    if op.learns:
        t = torch.tensor(0.3, device=device, requires_grad=True)
        (size,) = saved_bytes(lambda: op(x, *arguments(op, t)))
        assert n / 4 <= size < n / 4 + 2048


@pytest.mark.parametrize("op", GATES, ids=label)
def test_nothing_is_saved_without_need(op: Gate, device: torch.device) -> None:
    x = leaf(op, device)
    assert saved_bytes(lambda: op(x.detach(), *op.example)) == []
    with torch.no_grad():
        y = op(x, *op.example)
    assert not y.requires_grad


@pytest.mark.parametrize("op", [op for op in GATES if not op.differentiable], ids=label)
def test_result_without_gradient(op: Gate, device: torch.device) -> None:
    assert not op(leaf(op, device), *op.example).requires_grad


# ------------------------------------------------------------------------------------------------------------- in place


@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if layout.name != "expanded"], ids=by_id)
@pytest.mark.parametrize("op", INPLACE, ids=label)
def test_inplace(op: Gate, layout: Layout, device: torch.device) -> None:
    for operand in (OPERANDS[0], Operand("nchw")):
        if not operand.fits(layout.shape):
            continue
        values, rest = Case(op, torch.bfloat16, operand, layout).make(device)
        x, check = sentinel_view(values)
        version = x._version
        assert op(x, *rest, inplace=True) is x
        same(x, op.reference(values, *rest))
        assert x._version > version
        check()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64], ids=label)
@pytest.mark.parametrize("op", [op for op in INPLACE if torch.int64 in op.dtypes], ids=label)
def test_inplace_integers(op: Gate, dtype: torch.dtype, device: torch.device) -> None:
    x = inputs(3, dtype, (60,), device)
    expected = op.reference(x, 3, 7)
    same(op(x, 3, 7, inplace=True), expected)


@pytest.mark.parametrize("layout", [layout for layout in SOME_LAYOUTS if layout.name != "expanded"], ids=by_id)
@pytest.mark.parametrize("op", INPLACE, ids=label)
def test_inplace_on_an_intermediate(op: Gate, layout: Layout, device: torch.device) -> None:
    x = layout.lay(inputs(op.example[0], torch.float32, layout.shape, device)).requires_grad_()
    g = upstream(x)
    middle = x.clone()
    y = op(middle, *op.example, inplace=True)
    assert y is middle
    y.backward(g)
    agree(op, y.detach(), op.reference(x.detach(), *op.example))
    agree(op, x.grad, gradient(op, x, *op.example, g=g))


@pytest.mark.parametrize("op", INPLACE, ids=label)
def test_inplace_on_a_view_of_an_intermediate(op: Gate, device: torch.device) -> None:
    x = leaf(op, device)
    middle = x.clone()
    op(middle[10:30], *op.example, inplace=True)
    middle.backward(torch.ones_like(x))
    expected = torch.ones_like(x)
    expected[10:30] = gradient(op, x.detach()[10:30], *op.example, g=expected[10:30])
    same(x.grad, expected)


@pytest.mark.parametrize("op", INPLACE, ids=label)
def test_autograd_notices_what_was_overwritten(op: Gate, device: torch.device) -> None:
    x = leaf(op, device)
    for changed in (lambda t: op(t, *op.example, inplace=True), lambda t: op(t.detach(), *op.example, inplace=True)):
        middle = x.clone()
        square = middle * middle
        changed(middle)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            square.sum().backward()


@pytest.mark.parametrize("op", INPLACE, ids=label)
def test_inplace_on_a_leaf_without_grad_mode(op: Gate, device: torch.device) -> None:
    x = leaf(op, device)
    expected, version = op.reference(x.detach(), *op.example), x._version
    with torch.no_grad():
        op(x, *op.example, inplace=True)
    same(x.detach(), expected)
    assert x._version == version + 1
    assert x.is_leaf
    assert x.requires_grad


@pytest.mark.parametrize("where", [0, slice(0, 1), slice(5, 6)])
@pytest.mark.parametrize("op", INPLACE, ids=label)
def test_inplace_with_a_threshold_inside_the_input(op: Gate, where: int | slice, device: torch.device) -> None:
    """The threshold is read as it was before the call, by every program."""
    x = torch.full((20_000,), 3.0, device=device)
    x[where] = 5.0
    expected = op.reference(x, *arguments(op, x[where].clone()))
    op(x, *arguments(op, x[where]), inplace=True)
    same(x, expected)
