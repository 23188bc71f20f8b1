"""The eager backend's gates: bits and gradients, transforms, forward-mode AD, torch.compile; and the reference itself.

A gradient of -0 may come back as 0: autograd adds the branches of torch.where.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

import triton_thresh as tt
from triton_thresh import checks

from .gates import (
    DIFFERENTIABLE,
    GATES,
    INPLACE,
    LAYOUTS,
    LEARNED,
    OPERANDS,
    Case,
    Layout,
    Operand,
    bits,
    cases,
    equal,
    gradient,
    inputs,
    kept,
    label,
    same,
    threshold_gradient,
    upstream,
)
from .gates import Gate as Op
from .gates import agree as near
from .rows import OPS, failing, together

CPU = torch.device("cpu")
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
CASES = list(cases(full=True))
NUMBERS = (0.1, 0, 3, -0.0, -0.75, torch.inf, -torch.inf, torch.nan, 1e-41, 1e-8, 65519.0)
SIZES = (1, 7, 31, 64, 1000)  # vector lanes and tails

# the contract's formulas, on Python numbers: what is dropped, and y
CONTRACT: dict[str, tuple[Callable[[float, float], bool], Callable[[float, float], float]]] = {
    "threshold": (lambda x, t: x <= t, lambda x, t: -2.0 if x <= t else x),
    "hardshrink": (lambda x, t: -t <= x <= t, lambda x, t: 0.0 if -t <= x <= t else x),
    "softshrink": (
        lambda x, t: -t <= x <= t,
        lambda x, t: x - t if x > t else x + t if x < -t else x if math.isnan(x) else 0.0,
    ),
    "binary_threshold": (lambda x, t: True, lambda x, t: 3.0 if x > t else -1.0),
}


@pytest.fixture(params=["few", "many"])
def elements(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the size, numbers go in as they do for few elements, or as for many."""
    monkeypatch.setattr(checks, "FEW", 1 << 13 if request.param == "few" else 0)


@pytest.fixture(autouse=True)
def eager_backend() -> Iterator[None]:
    with tt.use_backend("eager"):
        yield


def rest(op: Op, threshold: float) -> tuple[Any, ...]:
    """The example's other arguments; further thresholds are not below this one."""
    return tuple(max(threshold, t) for t in op.example[1:]) if op.operands > 1 else op.example[1:]


def by_id(value: object) -> str | None:
    return getattr(value, "id", None) or getattr(value, "name", None) or label(value)


def example(op: Op, dtype: torch.dtype = torch.float32, n: int = 60) -> Tensor:
    return inputs(op.example[0], dtype, (n,), CPU)


def agree(op: Op, x: Tensor, *rest: Any, result: Tensor) -> None:
    """The reference's bits, but for the sign of a zero in a dropped element's place (F.softshrink's tails keep it)."""
    expected = op.reference(x, *rest)
    if not op.selects:
        equal(result, expected)
        return
    if op.differentiable and x.is_floating_point():
        dropped = ~kept(op, x, *rest) & (expected == 0) & (result == 0)
        result = torch.where(dropped, expected, result)
    same(result, expected)


# -------------------------------------------------------------------------------------------------------- the reference


@pytest.mark.parametrize("t", [0.5, 0.0, -0.75, math.inf, math.nan])
@pytest.mark.parametrize("name", CONTRACT)
def test_the_reference_is_the_contract(name: str, t: float) -> None:
    op, (drops, value) = OPS[name], CONTRACT[name]
    x = inputs(t, torch.float64, (60,), CPU)
    same(op.reference(x, t, *op.example[1:]), torch.tensor([value(v, t) for v in x.tolist()], dtype=x.dtype))
    if op.differentiable and not (op.nonnegative and not t >= 0):
        assert kept(op, x, t, *op.example[1:]).tolist() == [not drops(v, t) for v in x.tolist()]


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64], ids=label)
@pytest.mark.parametrize("op", GATES, ids=label)
def test_integer_thresholds_of_a_floating_input(op: Op, dtype: torch.dtype) -> None:
    """They are values of the input's dtype, in which -t is the negative of t."""
    t = torch.tensor([0, 1, 1, 0, 1, 1]).to(dtype).repeat(10)
    x = inputs(t, torch.float32, (60,), CPU)
    for threshold in (t, t[1]):
        expected = op.reference(x, threshold.float(), *op.example[1:])
        same(op.reference(x, threshold, *op.example[1:]), expected)
        equal(op(x, threshold, *op.example[1:]), expected)  # a 0 that F.softshrink drops to may be -0


@pytest.mark.usefixtures("elements")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=label)
@pytest.mark.parametrize("op", GATES, ids=label)
def test_numbers_and_scalars_are_rounded(op: Op, dtype: torch.dtype) -> None:
    """A number just below x rounds to x, so that x lies on the boundary; a tensor with dimensions does not round."""
    x = torch.tensor([0.1], dtype=dtype)
    t = x.item() * (1 - 2**-13)
    for function in (op, op.reference):
        boundary = function(x, x.item(), *op.example[1:])
        for rounds in (t, torch.tensor(t), torch.tensor(t, dtype=torch.float64)):
            same(function(x, rounds, *op.example[1:]), boundary)
        assert function(x, torch.tensor([t]), *op.example[1:]) != boundary


@pytest.mark.parametrize("dtype", FLOATS, ids=label)
@pytest.mark.parametrize("name", ["threshold", "hardshrink", "softshrink"])
def test_torch_agrees(name: str, dtype: torch.dtype) -> None:
    """With a threshold that the dtype holds, the values are torch's own."""
    op = OPS[name]
    x = inputs(0.5, dtype, (1000,), CPU)
    agree(op, x, 0.5, *op.example[1:], result=getattr(torch.nn.functional, name)(x, 0.5, *op.example[1:]))


# ------------------------------------------------------------------------------------------------ values and gradients


@pytest.mark.parametrize("several", together(CASES))
def test_case(several: list[Case]) -> None:
    for case in several:
        with failing(case):
            _check(case)


def _check(case: Case) -> None:
    x, rest = case.make(CPU)
    g = upstream(x, special=case.op.selects)  # in a product of slopes an infinite gradient may meet a 0
    arguments = [x, g, *(t for t in rest if isinstance(t, Tensor))]
    before, versions = [bits(t) for t in arguments], [t._version for t in arguments]
    agree(case.op, x, *rest, result=case.op(x, *rest))
    if case.op.differentiable and case.dtype.is_floating_point:
        y = case.op(x.requires_grad_(), *rest)
        agree(case.op, x.detach(), *rest, result=y.detach())
        (dx,) = torch.autograd.grad(y, x, g)
        near(case.op, dx, gradient(case.op, x, *rest, g=g))
    assert all(torch.equal(bits(t), b) for t, b in zip(arguments, before, strict=True)), "an argument was written to"
    assert [t._version for t in arguments] == versions


@pytest.mark.usefixtures("elements")
@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize("op", GATES, ids=label)
def test_numbers(op: Op, number: float) -> None:
    if op.nonnegative and not number >= 0:
        pytest.skip("raises: see tests/test_errors.py")
    for dtype in FLOATS:
        x = inputs(number, dtype, (60,), CPU)
        agree(op, x, number, *rest(op, number), result=op(x, number, *rest(op, number)))
        if op.differentiable:
            g = upstream(x, special=op.selects)
            (dx,) = torch.autograd.grad(op(x.requires_grad_(), number, *rest(op, number)), x, g)
            near(op, dx, gradient(op, x, number, *rest(op, number), g=g))


@pytest.mark.usefixtures("elements")
@pytest.mark.parametrize("number", [1e39, 3.5e38, 2**63, 2**70, 10**40], ids=str)
@pytest.mark.parametrize("op", GATES, ids=label)
def test_numbers_beyond_what_torch_takes(op: Op, number: float) -> None:
    """Thresholds round to infinity, and integers of any size are numbers, as they are for the kernels."""
    for dtype in FLOATS:
        x = torch.tensor(
            [1.0, torch.inf, -torch.inf, torch.nan, -torch.finfo(dtype).max, torch.finfo(dtype).max], dtype=dtype
        )
        rounded = torch.tensor(float(number), dtype=dtype).item()
        same(op(x, number, *rest(op, number)), op(x, rounded, *rest(op, rounded)))
        if op.inplace:
            same(op(x.clone(), number, *op.example[1:], inplace=True), op(x, rounded, *op.example[1:]))
        for n in range(op.operands, len(op.example) if number < torch.finfo(dtype).max else 0):
            numbers = list(op.example[1:])
            numbers[n - 1] = number
            same(op(x, op.example[0], *numbers), op(x, op.example[0], *map(float, numbers)))


def test_no_scalar_is_kept_for_another_device() -> None:
    """On a GPU it would be the work of one stream, or of a graph being captured."""
    before = checks._cached_constant.cache_info().currsize
    tt.binary_threshold(torch.empty(3, device="meta"), 0.5, 17.25, -3.75)
    assert checks._cached_constant.cache_info().currsize == before


@pytest.mark.parametrize("op", GATES, ids=label)
def test_how_a_number_is_rounded_is_not_traced(op: Op) -> None:
    """A number that no call has met gives the graph that it gives ever after."""
    x = torch.randn(4, dtype=torch.bfloat16)
    first, second = (make_fx(lambda x: op(x, 0.3137, *op.example[1:]))(x).code for _ in range(2))
    assert first == second


@pytest.mark.usefixtures("elements")
@pytest.mark.parametrize("constant", [-0.0, torch.nan, -torch.inf, torch.inf, 0.1, 1e-41])
@pytest.mark.parametrize("op", [op for op in GATES if len(op.example) > op.operands], ids=label)
def test_constants(op: Op, constant: float) -> None:
    for dtype in FLOATS:
        x = example(op, dtype)
        for constants in ((constant,) * (len(op.example) - 1), (2.5, constant)[: len(op.example) - 1]):
            same(op(x, op.example[0], *constants), op.reference(x, op.example[0], *constants))


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("op", DIFFERENTIABLE, ids=label)
def test_nan_keeps_its_gradient_in_lanes_and_tails(op: Op, n: int) -> None:
    for dtype in FLOATS:
        for x in (torch.full((n,), torch.nan, dtype=dtype), example(op, dtype, n)):
            g = upstream(x, special=op.selects)
            (dx,) = torch.autograd.grad(op(x.requires_grad_(), *op.example), x, g)
            near(op, dx, gradient(op, x, *op.example, g=g))


@pytest.mark.parametrize("op", DIFFERENTIABLE, ids=label)
def test_backward_twice(op: Op) -> None:
    x = example(op).requires_grad_()
    y, g = op(x, *op.example), upstream(x, special=False)
    y.backward(g, retain_graph=True)
    y.backward(2 * g)
    near(op, x.grad, gradient(op, x, *op.example, g=3 * g))


@pytest.mark.parametrize("operand", [o for o in OPERANDS if o.spans != "number" and not o.dtype], ids=by_id)
@pytest.mark.parametrize("dtype", FLOATS, ids=label)
@pytest.mark.parametrize("op", LEARNED, ids=label)
def test_gradient_of_the_threshold(op: Op, dtype: torch.dtype, operand: Operand) -> None:
    """Exact sums; autograd adds one sum a branch, each rounded to the threshold's dtype."""
    x, (t, *constants) = Case(op, dtype, operand, LAYOUTS[0]).make(CPU)
    g = upstream(x, special=False)
    (dt,) = torch.autograd.grad(op(x, t.requires_grad_(), *constants), t, g)
    slack = torch.finfo(dtype).eps * g.double().abs().sum_to_size(t.shape)
    assert dt.dtype == t.dtype
    assert ((dt - threshold_gradient(op, x, t, *constants, g=g)).abs() <= slack).all()


@pytest.mark.parametrize("shape", [(), (1,), (20, 1)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=label)
@pytest.mark.parametrize("op", LEARNED, ids=label)
def test_sums_of_16_bit_gradients_that_cancel(op: Op, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x = torch.randn(20, 3000, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()
    t = torch.full(shape, 0.5, requires_grad=True)
    g = torch.ones_like(x)
    dx, dt = torch.autograd.grad(op(x, t), (x, t), g)
    near(op, dx, gradient(op, x, t.detach(), g=g))
    assert torch.equal(dt.double(), threshold_gradient(op, x, t, g=g))


# ------------------------------------------------------------------------------------------------------------- in place


@pytest.mark.parametrize("operand", [OPERANDS[0], Operand("nchw")], ids=by_id)
@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if layout.name != "expanded"], ids=by_id)
@pytest.mark.parametrize("op", INPLACE, ids=label)
def test_inplace(op: Op, layout: Layout, operand: Operand) -> None:
    if not operand.fits(layout.shape):
        pytest.skip("no such threshold of a 0-dim input")
    for dtype in (torch.bfloat16, torch.float32):
        x, rest = Case(op, dtype, operand, layout).make(CPU)
        expected, version = op.reference(x, *rest), x._version
        assert op(x, *rest, inplace=True) is x
        same(x, expected)
        assert x._version > version


@pytest.mark.parametrize("op", INPLACE, ids=label)
def test_inplace_under_autograd(op: Op) -> None:
    for threshold in (op.example[0], torch.tensor(op.example[0])):
        rest = (threshold, *op.example[1:])
        x = example(op).requires_grad_()
        g, middle = upstream(x), x.clone()
        op(middle, *rest, inplace=True).backward(g)
        same(middle.detach(), op.reference(x.detach(), *rest))
        near(
            op, x.grad, gradient(op, x, *rest, g=g) + 0
        )  # torch adds the gradient of what was overwritten, +0, to a -0
        middle = x.clone()
        square = middle * middle
        op(middle, *rest, inplace=True)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            square.sum().backward()


# ----------------------------------------------------------------------------------------------------------- transforms


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=label)
@pytest.mark.parametrize("op", DIFFERENTIABLE, ids=label)
def test_func_grad_and_jvp(op: Op, dtype: torch.dtype) -> None:
    x = example(op, dtype)
    for t in (op.example[0], torch.tensor(op.example[0]), torch.full((60,), op.example[0], dtype=dtype)):
        rest = (t, *op.example[1:])
        dx = torch.func.grad(lambda x, rest=rest: op(x, *rest).sum())(x)
        near(op, dx, gradient(op, x, *rest, g=torch.ones((), dtype=dtype)))
        y, tangent = torch.func.jvp(lambda x, rest=rest: op(x, *rest), (x,), (torch.full_like(x, 2.0),))
        same(y, op.reference(x, *rest))
        assert torch.equal(tangent, gradient(op, x, *rest, g=torch.full_like(x, 2.0)))


@pytest.mark.parametrize("op", GATES, ids=label)
def test_vmap(op: Op) -> None:
    x, thresholds = example(op).view(6, 10), torch.linspace(0.0, 2.0, 6)
    rest = op.example[1:]
    same(torch.func.vmap(lambda x: op(x, *op.example))(x), op.reference(x, *op.example))
    same(torch.func.vmap(lambda x, t: op(x, t, *rest))(x, thresholds), op.reference(x, thresholds[:, None], *rest))
    over_thresholds = torch.func.vmap(lambda t: op(x, t, *rest))(thresholds)
    same(over_thresholds, torch.stack([op.reference(x, t, *rest) for t in thresholds]))


@pytest.mark.parametrize("op", DIFFERENTIABLE, ids=label)
def test_vmap_of_grad(op: Op) -> None:
    x = example(op).view(6, 10)
    grads = torch.func.vmap(torch.func.grad(lambda x: op(x, *op.example).sum()))(x)
    near(op, grads, gradient(op, x, *op.example, g=torch.ones(())))


@pytest.mark.parametrize("op", DIFFERENTIABLE, ids=label)
def test_forward_mode(op: Op) -> None:
    x, direction = example(op), torch.full((60,), 3.0)
    with torch.autograd.forward_ad.dual_level():
        y, tangent = torch.autograd.forward_ad.unpack_dual(
            op(torch.autograd.forward_ad.make_dual(x, direction), *op.example)
        )
    same(y, op.reference(x, *op.example))
    near(op, tangent, gradient(op, x, *op.example, g=direction))


@pytest.mark.parametrize("as_tensor", [False, True], ids=["number", "tensor"])
@pytest.mark.parametrize("op", DIFFERENTIABLE, ids=label)
def test_gradcheck(op: Op, as_tensor: bool) -> None:
    x = torch.tensor([-2.0, -0.05, 0.3, 1.5], dtype=torch.float64, requires_grad=True)
    if as_tensor:
        t = torch.tensor([0.7, 0.2, 0.1, 0.4], dtype=torch.float64, requires_grad=bool(op.learns))
        function, points = (lambda x, t: op(x, t, *op.example[1:])), (x, t)
    else:
        function, points = (lambda x: op(x, *op.example)), (x,)
    assert torch.autograd.gradcheck(function, points, check_batched_grad=True, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(function, points, check_batched_grad=True, check_fwd_over_rev=True)


# -------------------------------------------------------------------------------------------------------- torch.compile


@pytest.mark.slow
def test_compile_with_changing_numbers() -> None:
    """A program's number may become another, a whole one, or 0: for gates of one number, two, and constants.

    tests/test_inductor.py has every gate with one number after another.
    """
    torch.compiler.reset()
    ops = [OPS[name] for name in ("hardshrink", "firm", "threshold")]
    calls = [(op.function, rest(op, 2)) for op in ops]
    compiled = torch.compile(lambda xs, t: [f(x, t, *r) for (f, r), x in zip(calls, xs)], fullgraph=True)
    xs = [example(op) for op in ops]
    for t in (0.1, 0.7, 1, 2, 0.0):
        for op, x, y in zip(ops, xs, compiled(xs, t)):
            same(y, op.reference(x, t, *rest(op, 2)))


def test_compile_inplace() -> None:
    torch.compiler.reset()
    calls = [(op.function, op.example) for op in INPLACE]
    xs = [example(op) for op in INPLACE]
    expected = [op.reference(x, *op.example) for op, x in zip(INPLACE, xs)]
    torch.compile(lambda xs: [f(x, *r, inplace=True) for (f, r), x in zip(calls, xs)], fullgraph=True)(xs)
    for x, due in zip(xs, expected):
        same(x, due)


def test_every_gate_has_a_public_function() -> None:
    x: Any = torch.linspace(-1, 1, 9)
    for op in GATES:
        equal(getattr(tt, op.name)(x, *op.example), op.reference(x, *op.example))
