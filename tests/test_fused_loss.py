"""fused_loss: every kind of formula and of call against autograd in float64, and how often and into what it is compiled.

Compiling takes seconds. So most tests run the programs uncompiled, on what Inductor would get; those that are slow compile.
"""

from __future__ import annotations

import inspect
import math
import os
import re
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from torch._dynamo.utils import counters
from torch._inductor.utils import run_and_get_code
from torch.utils.checkpoint import checkpoint

import triton_thresh as tt
from triton_thresh import compiled, losses
from triton_thresh.bases import BASES, Base
from triton_thresh.rules import RULES

from .conftest import INTERPRETED

pytestmark = pytest.mark.skipif(INTERPRETED, reason="once is enough")
MANY = (72, 96)


@pytest.fixture
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs run as they are written, on the arguments that Inductor would get."""
    monkeypatch.setattr(compiled, "_compiled", lambda program, name: program)


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> CompileCounter:
    """Dynamo traces the programs, and nothing compiles them."""
    counter = CompileCounter()
    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **options: compile(f, backend=counter, **options))
    return counter


@pytest.fixture(autouse=True)
def silent() -> Iterator[None]:
    """A formula that is not compiled says so, and no test but those of the warning may see that."""
    torch.compiler.reset()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*the formula runs as it is")
        yield


def leaf(x: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """A tensor of its own that requires grad."""
    return x.detach().to(dtype, copy=True).requires_grad_()


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def expected(
    formula: Callable[..., Tensor],
    x: Tensor,
    *others: Any,
    weight: Any = 1.0,
    mask: Tensor | None = None,
    divisor: Any = None,
    reduction: str = "mean",
    upstream: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Loss and gradient by autograd in float64, of the valid elements alone."""
    wide = leaf(x, torch.float64)
    others = tuple(
        v.double().expand(x.shape) if isinstance(v, Tensor) and v.is_floating_point() and v.dim() else v for v in others
    )
    others = tuple(v.expand(x.shape) if isinstance(v, Tensor) and v.dim() else v for v in others)
    losses = formula(wide, *others)
    losses = losses * (weight.double() if isinstance(weight, Tensor) else weight)
    valid = torch.ones(x.shape, dtype=torch.bool) if mask is None else mask.expand(x.shape)
    losses = losses.masked_fill(~valid, 0.0)
    if reduction == "mean":
        loss = losses.sum() / (valid.sum() if divisor is None else divisor)
    else:
        loss = losses.sum() if reduction == "sum" else losses
    (gradient,) = torch.autograd.grad(loss, wide, torch.ones_like(loss) if upstream is None else upstream.double())
    return loss.detach(), gradient


def close(actual: Tensor, truth: Tensor, dtype: torch.dtype, name: str = "") -> None:
    eps = torch.finfo(dtype).eps
    size = truth.abs().nan_to_num(0.0).max().item() if truth.numel() else 0.0
    torch.testing.assert_close(
        actual.double(),
        truth,
        rtol=4 * eps,
        atol=8 * eps * min(size, 1e6),
        equal_nan=True,
        msg=lambda m: f"{name}: {m}",
    )


# -------------------------------------------------------------------------------------------------------------- formulas


def icepop(ratio: Tensor, advantage: Tensor, low: Any = 0.5, high: Any = 5.0) -> Tensor:
    return torch.where((ratio > low) & (ratio < high), -ratio * advantage, 0)


def ppo(ratio: Tensor, advantage: Tensor, low: Any = 0.8, high: Any = 1.2) -> Tensor:
    return -torch.minimum(ratio * advantage, torch.clamp(ratio, low, high) * advantage)


def focal(x: Tensor, y: Tensor, alpha: Any = 0.25, gamma: Any = 2.0) -> Tensor:
    p = x.sigmoid()
    cross = F.binary_cross_entropy_with_logits(x, y, reduction="none")
    return (alpha * y + (1 - alpha) * (1 - y)) * (1 - p * y - (1 - p) * (1 - y)) ** gamma * cross


def asymmetric(x: Tensor, y: Tensor, clip: Any = 0.05, negative: Any = 4.0) -> Tensor:
    p = x.sigmoid()
    q = (1 - p + clip).clamp(max=1)
    factor = (1 - p * y - q * (1 - y)) ** (y + negative * (1 - y))
    return -factor * (y * p.clamp(min=1e-8).log() + (1 - y) * q.clamp(min=1e-8).log())


def surplus(x: Tensor, y: Tensor) -> Tensor:
    """Its slope is one number for all elements."""
    return x - y


def squared(x: Tensor, y: Tensor) -> Tensor:
    return (x - y) ** 2


def huber(x: Tensor, y: Tensor, delta: Any = 0.75) -> Tensor:
    d = (x - y).abs()
    return torch.where(d <= delta, 0.5 * d * d, delta * (d - 0.5 * delta))


def quantile(x: Tensor, y: Tensor, q: Any = 0.3) -> Tensor:
    return torch.maximum(q * (y - x), (q - 1) * (y - x))


def hinge(x: Tensor, y: Tensor, margin: Any = 1.0) -> Tensor:
    return F.relu(margin - x * (2 * y - 1))


def log_cosh(x: Tensor, y: Tensor) -> Tensor:
    d = x - y
    return d + F.softplus(-2 * d) - math.log(2)


def charbonnier(x: Tensor, y: Tensor, eps: Any = 1e-3) -> Tensor:
    return ((x - y) ** 2 + eps * eps).sqrt()


def cauchy(x: Tensor, y: Tensor, c: Any = 1.5) -> Tensor:
    return torch.log1p(((x - y) / c) ** 2)


def welsch(x: Tensor, y: Tensor, c: Any = 1.5) -> Tensor:
    return 1 - torch.exp(-0.5 * ((x - y) / c) ** 2)


def tukey(x: Tensor, y: Tensor, c: Any = 2.0) -> Tensor:
    u = (1 - ((x - y) / c) ** 2).clamp(min=0)
    return 1 - u * u * u


def poisson(x: Tensor, y: Tensor) -> Tensor:
    return x.exp() - y * x


def gaussian(x: Tensor, y: Tensor, variance: Tensor) -> Tensor:
    return 0.5 * (variance.log() + (x - y) ** 2 / variance)


def preference(x: Tensor, reference: Tensor, beta: Any = 0.1, smoothing: Any = 0.0) -> Tensor:
    z = beta * (x - reference)
    return -(1 - smoothing) * F.logsigmoid(z) - smoothing * F.logsigmoid(-z)


def generalized(x: Tensor, y: Tensor, q: Any = 0.7) -> Tensor:
    p = torch.where(y > 0.5, x, -x).sigmoid()
    return (1 - p**q) / q


def poly(x: Tensor, y: Tensor, epsilon: Any = 1.0) -> Tensor:
    p = torch.where(y > 0.5, x, -x).sigmoid()
    return -p.log() + epsilon * (1 - p)


def hardest(x: Tensor, y: Tensor, bound: Tensor) -> Tensor:
    cross = F.binary_cross_entropy_with_logits(x, y, reduction="none")
    return torch.where(cross >= bound, cross, 0)


def switched(
    x: Tensor, y: Tensor, squares: bool = True, side: str = "both", bound: Any = None, *, scale: Any = 1
) -> Tensor:
    d = x - y
    if side == "above":
        d = d.clamp(min=0)
    if bound is not None:
        d = d.clamp(max=bound)
    return scale * (d * d if squares else d.abs())


RANDOM = torch.randn(2, *MANY, generator=generator())
X, VALUES = RANDOM
LABELS = (VALUES > 0.5).float()
POSITIVE = 0.1 + VALUES.abs()
FORMULAS: dict[str, tuple[Callable[..., Tensor], tuple[Any, ...]]] = {
    "icepop": (icepop, (VALUES, 0.25)),
    "ppo": (ppo, (VALUES, 0.5)),
    "focal": (focal, (LABELS, 0.25, 1.5)),
    "asymmetric": (asymmetric, (LABELS,)),
    "surplus": (surplus, (VALUES,)),
    "squared": (squared, (VALUES,)),
    "huber": (huber, (VALUES, 0.5)),
    "quantile": (quantile, (VALUES, 0.75)),
    "hinge": (hinge, (LABELS,)),
    "log_cosh": (log_cosh, (VALUES,)),
    "charbonnier": (charbonnier, (VALUES, 0.01)),
    "cauchy": (cauchy, (VALUES,)),
    "welsch": (welsch, (VALUES, 0.5)),
    "tukey": (tukey, (VALUES,)),
    "poisson": (poisson, (POSITIVE,)),
    "gaussian": (gaussian, (VALUES, POSITIVE)),
    "preference": (preference, (VALUES, 0.5, 0.125)),
    "generalized": (generalized, (LABELS,)),
    "poly": (poly, (LABELS, 2.0)),
    "hardest": (hardest, (LABELS, torch.tensor(0.625))),
    "switched": (switched, (VALUES, False, "above", 2)),
}


def check_formula(name: str) -> None:
    formula, others = FORMULAS[name]
    x = leaf(X)
    loss = tt.fused_loss(formula)(x, *others)
    loss.backward()
    value, gradient = expected(formula, x, *others)
    assert x.grad is not None
    close(loss, value, torch.float32, name)
    close(x.grad, gradient, torch.float32, f"d {name}")


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("name", FORMULAS)
def test_formula(name: str) -> None:
    check_formula(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ppo", "focal", "asymmetric", "surplus", "gaussian", "generalized", "switched"])
def test_formula_compiled(name: str) -> None:
    check_formula(name)


def test_formula_compiled_once() -> None:
    """One that make check runs."""
    check_formula("icepop")


# ----------------------------------------------------------------------------------------------------------------- calls


def weighed(x: Tensor, y: Any, t: Any = 0.5, k: Any = 2.0) -> Tensor:
    d = x - 1.0 * y
    return d * d * torch.where(x > t, k, 1.0)


N, C = MANY
IMAGES = torch.randn(2, 8, 18, 24, generator=generator()).contiguous(memory_format=torch.channels_last)
MASK = torch.rand(MANY, generator=generator(1)) > 0.3
CALLS: dict[str, tuple[Tensor, tuple[Any, ...], dict[str, Any]]] = {
    "float32": (X, (VALUES,), {}),
    "float64": (X.double(), (VALUES.double(), 0.1), {}),
    "bfloat16": (X.bfloat16(), (VALUES.bfloat16(),), {}),
    "float16": (X.half(), (VALUES.half(),), {}),
    "16 bits and wider": (X.bfloat16(), (VALUES,), {}),
    "float64 and narrower": (X.double(), (VALUES,), {}),
    "transposed": (X.T, (VALUES.T,), {}),
    "transposed alone": (X.T, (VALUES.reshape(C, N),), {}),
    "channels last": (IMAGES, (torch.randn(8, 1, 1),), {}),
    "sliced": (torch.randn(N, 2 * C, generator=generator())[:, ::2], (VALUES,), {}),
    "offset": (torch.randn(N * C + 3, generator=generator())[3:].view(MANY), (VALUES,), {}),
    "expanded": (X[:1].expand(MANY), (VALUES,), {}),
    "per channel": (X, (VALUES[0], 0.25), {}),
    "per row": (X, (VALUES, VALUES[:, :1]), {}),
    "per row and channel": (X, (VALUES[0], VALUES[:, :1], POSITIVE[:1]), {}),
    "in the middle": (X.view(8, 9, C), (VALUES[0, :9, None],), {}),
    "at both ends": (X.view(8, 9, C), (VALUES[:8, None, :1].expand(8, 1, C),), {}),
    "0-dim": (X, (torch.tensor(0.5), torch.tensor(0.25)), {}),
    "numbers": (X, (1, 0, 3), {}),
    "int64": (X, ((VALUES * 3).long(),), {}),
    "bool": (X, (VALUES > 0,), {}),
    "weight": (X, (VALUES,), {"weight": 0.3}),
    "weight per channel": (X, (VALUES,), {"weight": POSITIVE[0]}),
    "weight per element": (X.bfloat16(), (VALUES,), {"weight": POSITIVE.bfloat16()}),
    "mask": (X, (VALUES,), {"mask": MASK}),
    "mask, float64": (X.double(), (VALUES.double(),), {"mask": MASK}),
    "divisor, 0-dim, float64": (X.double(), (VALUES,), {"divisor": torch.tensor(7, dtype=torch.int32)}),
    "mask per row": (X, (VALUES,), {"mask": MASK[:, :1]}),
    "mask and weight, 16 bits": (X.half(), (VALUES,), {"mask": MASK, "weight": POSITIVE}),
    "divisor": (X, (VALUES,), {"divisor": 100}),
    "divisor, 0-dim, and mask": (X, (VALUES,), {"divisor": torch.tensor(100), "mask": MASK}),
    "sum": (X, (VALUES,), {"reduction": "sum", "mask": MASK}),
    "none": (X, (VALUES,), {"reduction": "none"}),
    "none, bfloat16": (X.T.bfloat16(), (VALUES.T,), {"reduction": "none", "mask": MASK.T}),
    "none, float16": (X.half(), (VALUES,), {"reduction": "none", "weight": 3}),
    "few": (X[:6, :5], (VALUES[:6, :5],), {}),
    "one element": (X[:1, :1], (VALUES[:1, :1],), {}),
    "one number": (X[0, 0], (VALUES[0, 0],), {"mask": torch.tensor(True)}),
    "nothing": (X[:0], (VALUES[:0],), {}),
    "nothing, summed": (X[:, :0], (1.0,), {"reduction": "sum"}),
    "nothing, with a divisor": (X[:0], (1.0,), {"divisor": 3.0}),
    "nothing, not reduced": (X[:0], (VALUES[:0],), {"reduction": "none"}),
}  # fmt: skip
COMPILED = ("float16", "per row and channel", "mask and weight, 16 bits", "none, bfloat16")


def check_call(name: str, recorded: bool = False) -> None:
    x, others, options = CALLS[name]
    loss_of = tt.fused_loss(weighed)
    own = x.detach().requires_grad_()
    before = x.clone()
    loss = loss_of(own, *others, **options)
    reduction = options.get("reduction", "mean")
    upstream = torch.randn(x.shape, generator=generator(2)).to(x.dtype) if reduction == "none" else None
    value, gradient = expected(weighed, x, *others, **options, upstream=upstream)
    (actual,) = torch.autograd.grad(loss, own, upstream)
    assert loss.dtype == actual.dtype == x.dtype
    assert torch.equal(x, before)
    assert loss.shape == value.shape
    dense = torch.empty_like(x)
    assert actual.stride() == dense.stride() or actual.numel() <= 1
    if reduction == "none" and x.numel() > 1:
        assert loss.stride() == dense.stride()
    close(loss, value, x.dtype, name)
    close(actual, gradient, x.dtype, f"gradient, {name}")
    if recorded:
        return
    with torch.no_grad():
        alone = loss_of(x, *others, **options)
    assert not alone.requires_grad
    close(alone, value, x.dtype, f"without gradient, {name}")


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("name", CALLS)
def test_call(name: str) -> None:
    check_call(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", COMPILED)
def test_call_compiled(name: str) -> None:
    check_call(name, recorded=True)


@pytest.mark.slow
def test_values_compiled() -> None:
    """A call that wants no gradient has a program of its own."""
    loss_of = tt.fused_loss(weighed)
    for mask in (None, MASK):
        value, _ = expected(weighed, X, VALUES, mask=mask)
        close(loss_of(X, VALUES, mask=mask), value, torch.float32)


@pytest.mark.parametrize("name", CALLS)
def test_call_as_it_is(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a compiler."""
    monkeypatch.setattr(compiled, "COMPILES", False)
    monkeypatch.setattr(compiled.Engine, "warn", lambda self: None)
    check_call(name)


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("upstream", [1.0, 65536.0, 0.0, -0.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_upstream(upstream: float, dtype: torch.dtype) -> None:
    x = leaf(X, dtype)
    (tt.fused_loss(weighed)(x, VALUES) * upstream).backward()
    assert x.grad is not None
    close(x.grad, upstream * expected(weighed, x, VALUES)[1], dtype)


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_backward_twice(reduction: str, dtype: torch.dtype) -> None:
    """A second backward adds as much again; the caller's tensors and what was saved stay as they were."""
    x = leaf(X, dtype)
    loss = tt.fused_loss(weighed)(x, VALUES, mask=MASK, reduction=reduction)
    ones = torch.ones_like(loss)
    (once,) = torch.autograd.grad(loss, x, ones, retain_graph=True)
    kept = once.clone()
    (again,) = torch.autograd.grad(loss, x, 2 * ones, retain_graph=True)
    torch.testing.assert_close(again, 2 * once)
    loss.backward(ones)
    assert torch.equal(once, kept)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward(ones)


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_slopes_and_losses_that_are_numbers_or_arguments(reduction: str) -> None:
    """A slope of one number, and losses that are an argument, have memory of their own: it is written to."""
    x, y = leaf(X), VALUES.clone()
    check_reduction_of(surplus, x, y, reduction)
    check_reduction_of(lambda x, y: y + 0 * x, x, y[:1], reduction)
    loss = tt.fused_loss(lambda x, y: y)(x, y, reduction="none")
    loss.detach().zero_()
    assert torch.equal(y, VALUES)


def check_reduction_of(formula: Callable[..., Tensor], x: Tensor, y: Tensor, reduction: str) -> None:
    loss = tt.fused_loss(formula)(x, y, reduction=reduction)
    (gradient,) = torch.autograd.grad(loss, x, torch.full_like(loss, 3))
    value, slope = expected(formula, x, y, reduction=reduction)
    close(loss, value, torch.float32)
    close(gradient, 3 * slope, torch.float32)


@pytest.mark.usefixtures("uncompiled")
def test_an_input_written_to_is_noticed() -> None:
    x = leaf(X) * 1
    loss = tt.fused_loss(weighed)(x, VALUES)
    with torch.no_grad():
        x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize(
    "options", [{}, {"mask": MASK[:2, :3]}, {"reduction": "sum", "weight": 2.0}, {"reduction": "none"}]
)
def test_differentiated_twice(options: dict[str, Any]) -> None:
    loss_of = tt.fused_loss(log_cosh)
    x = leaf(X[:2, :3], torch.float64)
    call = partial(loss_of, y=VALUES[:2, :3].double(), **options)
    assert torch.autograd.gradcheck(call, (x,))
    assert torch.autograd.gradgradcheck(call, (x,))


@pytest.mark.usefixtures("uncompiled")
def test_transforms() -> None:
    loss_of, x, y = tt.fused_loss(log_cosh), X[:2, :3], VALUES[:2, :3]
    torch.testing.assert_close(torch.func.grad(loss_of)(x, y), expected(log_cosh, x, y)[1].float())
    rows = torch.func.vmap(torch.func.grad(lambda x, y: loss_of(x, y, reduction="sum")))(x, y)
    torch.testing.assert_close(rows, expected(log_cosh, x, y, reduction="sum")[1].float())
    tangent = torch.ones_like(x)
    _, slope = torch.func.jvp(lambda x: loss_of(x, y), (x,), (tangent,))
    torch.testing.assert_close(slope, expected(log_cosh, x, y)[1].float().sum())
    hessian = torch.func.hessian(lambda x: loss_of(x, y, reduction="sum"))(x).reshape(6, 6)
    torch.testing.assert_close(hessian, torch.diag(1 - torch.tanh(x - y).flatten() ** 2))
    own = leaf(x)
    loss = loss_of(own, y, reduction="none")
    (batched,) = torch.autograd.grad(loss, own, torch.eye(6).view(6, 2, 3), is_grads_batched=True)
    torch.testing.assert_close(batched.sum(0), torch.tanh(x - y))


# ------------------------------------------------------------------------------------------------------------- selection


def poisoned() -> tuple[Tensor, Tensor, Tensor]:
    """Input, target and weight that hold NaN and infinities where the mask is False."""
    tensors = [t.clone() for t in (X, VALUES, POSITIVE)]
    for i, tensor in enumerate(tensors):
        for j, poison in enumerate((math.nan, math.inf, -math.inf)):
            rows = ~MASK
            rows[torch.arange(N) % 9 != 3 * i + j] = False
            tensor[rows] = poison
    return tensors[0], tensors[1], tensors[2]


def steep(x: Tensor, y: Tensor) -> Tensor:
    """Not finite at 0, where a masked element might be put."""
    return (x * x).log() * y


def check_selection(dtype: torch.dtype, *reductions: str) -> None:
    x, y, weight = poisoned()
    loss_of = tt.fused_loss(steep)
    for reduction in reductions or ("mean", "sum", "none"):
        own = leaf(x, dtype)
        loss = loss_of(own, y, weight=weight, mask=MASK, reduction=reduction)
        loss.backward(torch.ones_like(loss))
        assert own.grad is not None
        assert loss.isfinite().all()
        assert (own.grad[~MASK] == 0).all()
        clean = X.to(dtype).where(MASK, 1.0)
        value, gradient = expected(steep, clean, VALUES, weight=POSITIVE, mask=MASK, reduction=reduction)
        close(loss, value, dtype)
        close(own.grad, gradient, dtype)


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_masked_elements_count_for_nothing(dtype: torch.dtype) -> None:
    check_selection(dtype)


def test_masked_elements_count_for_nothing_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "COMPILES", False)
    monkeypatch.setattr(compiled.Engine, "warn", lambda self: None)
    check_selection(torch.float32)


@pytest.mark.slow
def test_masked_elements_count_for_nothing_compiled() -> None:
    check_selection(torch.float32, "mean")


@pytest.mark.parametrize("way", ["uncompiled", "as it is"])
def test_nothing_valid(way: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if way == "uncompiled":
        request.getfixturevalue("uncompiled")
    else:
        monkeypatch.setattr(compiled, "COMPILES", False)
        monkeypatch.setattr(compiled.Engine, "warn", lambda self: None)
    loss_of, nothing = tt.fused_loss(steep), torch.zeros(MANY, dtype=torch.bool)
    x = torch.full(MANY, math.nan, requires_grad=True)
    for options, value in (({}, math.nan), ({"divisor": 4.0}, 0.0)):
        loss = loss_of(x, VALUES, mask=nothing, **options)
        torch.testing.assert_close(loss, torch.tensor(value), equal_nan=True)
        (gradient,) = torch.autograd.grad(loss, x)
        assert (gradient == 0).all()


# ------------------------------------------------------------------------------------------------------- mixed precision


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype: torch.dtype) -> None:
    """The loss is float32, and the formula is not narrowed by autocast."""
    x = leaf(X, dtype)
    for autocast in (False, True):
        with torch.autocast("cpu", dtype=dtype, enabled=autocast):
            loss = tt.fused_loss(focal)(x, LABELS)
        assert loss.dtype == (torch.float32 if autocast else dtype)
        value, gradient = expected(focal, x, LABELS)
        close(loss, value, loss.dtype)
        (actual,) = torch.autograd.grad(loss, x)
        close(actual, gradient, dtype)


@pytest.mark.usefixtures("uncompiled")
def test_float16_keeps_a_scaled_gradient() -> None:
    """1/n of a slope underflows in float16 before the scale reaches it."""
    x = leaf(X * 1e-3, torch.float16)
    with torch.autocast("cpu", dtype=torch.float16):
        loss = tt.fused_loss(squared)(x, torch.zeros(MANY), divisor=2.0**24)
    (loss * 2.0**20).backward()
    assert x.grad is not None
    close(x.grad, 2 * x.detach().double() / 16, torch.float16)


# ---------------------------------------------------------------------------------------------------- under other machinery


@pytest.mark.slow
def test_inside_a_compiled_model() -> None:
    """The formula is traced with what stands around it."""
    loss_of = tt.fused_loss(focal)

    def step(x: Tensor, y: Tensor, gamma: Tensor) -> Tensor:
        return loss_of(x.tanh() * 3, y, gamma=gamma, mask=y >= 0)

    own, other = leaf(X), leaf(X)
    loss = torch.compile(step, fullgraph=True)(own, LABELS, torch.tensor(1.5))
    loss.backward()
    focal(other.tanh() * 3, LABELS, gamma=torch.tensor(1.5)).mean().backward()
    torch.testing.assert_close(own.grad, other.grad)


def test_exported() -> None:
    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.loss = tt.fused_loss(huber)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return self.loss(x, y, delta=0.5, mask=y > 0)  # type: ignore[no-any-return]

    n = torch.export.Dim("n")
    program = torch.export.export(Model(), (X, VALUES), dynamic_shapes={"x": {0: n}, "y": {0: n}})
    value, _ = expected(huber, X[:7], VALUES[:7], 0.5, mask=VALUES[:7] > 0)
    torch.testing.assert_close(program.module()(X[:7], VALUES[:7]), value.float())


@pytest.mark.usefixtures("traced")
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed(reentrant: bool) -> None:
    """A checkpoint hooks into saved tensors, under which torch.func would not run."""
    x = leaf(X)
    loss_of = tt.fused_loss(huber)
    checkpoint(lambda x: loss_of(x * 2, VALUES), x, use_reentrant=reentrant).backward()
    torch.testing.assert_close(x.grad, 2 * expected(huber, 2 * x, VALUES)[1].float())


@pytest.mark.usefixtures("uncompiled")
def test_inference_mode_and_parameters() -> None:
    loss_of = tt.fused_loss(huber)
    value, gradient = expected(huber, X, VALUES)
    with torch.inference_mode():
        torch.testing.assert_close(loss_of(X.clone(), VALUES.clone()), value.float())
    parameter = torch.nn.Parameter(X.clone())
    loss_of(parameter, VALUES).backward()
    torch.testing.assert_close(parameter.grad, gradient.float())


@pytest.mark.usefixtures("uncompiled")
def test_threads() -> None:
    loss_of, found = tt.fused_loss(huber), []
    threads = [threading.Thread(target=lambda: found.append(loss_of(X, VALUES))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({loss.item() for loss in found}) == 1
    assert len(found) == 4


# ------------------------------------------------------------------------------------------------------ how it is compiled


def test_numbers_and_sizes_do_not_compile_again(traced: CompileCounter) -> None:
    loss_of = tt.fused_loss(weighed)
    for rows in range(2, 12):
        x = torch.randn(rows, 7 * rows, requires_grad=True)
        loss_of(x, rows / 7, t=rows, k=-rows, weight=0.1 * rows, divisor=rows)
        loss_of(x, torch.tensor(0.5), t=0, k=1, weight=3, divisor=torch.tensor(2.0))
    assert traced.frame_count == 1


@pytest.mark.slow
def test_one_program_for_each_kind_of_call(traced: CompileCounter) -> None:
    """More kinds than the eight that Dynamo keeps for a function."""
    loss_of = tt.fused_loss(weighed)
    x = torch.randn(6, 4, 4)
    kinds: list[tuple[Tensor, Any]] = [
        (x.to(dtype), y.to(other))
        for dtype in (torch.float32, torch.bfloat16)
        for other in (torch.float32, torch.int64)
        for y in (x + 1, x[0], x[:, :1])
    ]
    for count, (input, y) in enumerate(kinds):
        for _ in range(2):
            loss_of(input, y)
        assert traced.frame_count == count + 1
    before = traced.frame_count
    for _ in range(2):
        loss_of(x.requires_grad_(), x.detach())
        loss_of(x, x.detach().transpose(1, 2))
        loss_of(x.transpose(0, 2), x.detach().transpose(0, 2))
        with torch.autocast("cpu"):
            loss_of(x, x.detach())
        with torch.enable_grad():
            loss_of(x, x.detach())
    assert traced.frame_count == before + 1
    flags = tt.fused_loss(switched)
    for side in ("both", "above", "both"):
        flags(x, 1.0, True, side)
    assert traced.frame_count == before + 3
    tt.fused_loss(weighed)(x, 1.0)
    assert traced.frame_count == before + 4, "a formula decorated again is a formula of its own"


@pytest.mark.slow
def test_compilations_by_inductor() -> None:
    """One for every size, one more for a single element; none for an empty tensor, or for other numbers."""
    loss_of, counts = tt.fused_loss(squared), []
    for sizes in ((10_000, 4097, 1 << 20), (3, 4096, 50, 4098), (1,), (0,), (1, 2, 5000)):
        before = counters["stats"]["unique_graphs"]
        for size in sizes:
            loss_of(torch.ones(size, requires_grad=True), size / 7).backward()
        counts.append(counters["stats"]["unique_graphs"] - before)
    few = counts[1]  # for which Inductor adds another guard where it sums in float32
    assert counts == [1, few, 1, 0, 0]
    assert few <= 1


def loops(code: str) -> list[str]:
    """The loops over elements in the C++ that Inductor wrote, vector and tail together."""
    assert code.count("async_compile.cpp_pybinding(") == 1
    return re.split(r"for\s*\(int64_t x0\s*=", code)[1:]


@pytest.mark.slow
def test_one_pass() -> None:
    """The loss and its gradient come from one loop; a mask that is counted takes another, over itself."""
    loss_of = tt.fused_loss(focal)
    x = torch.randn(1 << 16, requires_grad=True)
    y = (torch.rand(1 << 16) < 0.5).float()
    _, (code,) = run_and_get_code(lambda: loss_of(x, y))
    (loop,) = loops(code)
    assert {"in_ptr0", "in_ptr1"} <= set(re.findall(r"in_ptr\d+", loop))
    assert len(re.findall(r"empty_strided_cpu\(\(s\d+, \)", code)) == 1, "no tensor but the gradient"
    _, (code,) = run_and_get_code(lambda: loss_of(x, y, mask=y > 0))
    counting, loop = loops(code)
    assert set(re.findall(r"in_ptr\d+", counting)) == {"in_ptr0"}
    assert len(re.findall(r"empty_strided_cpu\(\(s\d+, \)", code)) == 1


@pytest.mark.slow
@pytest.mark.parametrize("op", [tt.threshold_mse_loss, tt.threshold_bce_loss])
def test_one_pass_of_a_closed_form(op: Callable[..., torch.Tensor]) -> None:
    """Where the slope is written out, too."""
    losses.engine.cache_clear()  # what another test compiled would not be compiled again
    x, y = torch.rand(1 << 16, requires_grad=True), torch.rand(1 << 16)
    with tt.use_backend("inductor"):
        _, (code,) = run_and_get_code(lambda: op(x, y, 0.7))
    assert len(loops(code)) == 1


@pytest.mark.slow
def test_large_sums_are_right_and_the_same() -> None:
    x = leaf(torch.full((1 << 24,), 1.1))
    loss_of = tt.fused_loss(squared)
    found = {loss_of(x, 0.0, reduction="sum").detach().item() for _ in range(5)}
    assert len(found) == 1
    assert found.pop() == pytest.approx((1 << 24) * x.detach()[0].item() ** 2, rel=1e-6)


# --------------------------------------------------------------------------------------------------------- other formulas


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("base", BASES, ids=lambda base: base.__name__)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_the_backend_serves_the_losses(base: type[Base], dtype: torch.dtype, reduction: Any) -> None:
    """Value and gradient, for an upstream gradient of 3: those of the eager backend."""
    x, y = (0.05 + 0.9 * torch.rand(MANY, generator=generator())).to(dtype), LABELS
    rules = [None, *[rule(*rule.example) for rule in RULES if base.kind in rule.kinds]]
    for rule in rules:
        found = []
        for backend in ("eager", "inductor"):
            leaf = x.clone().requires_grad_()
            with tt.use_backend(backend):  # type: ignore[arg-type]
                loss = tt.threshold_loss(
                    leaf, y, rule, base=base(*base.example), weight=VALUES.abs(), reduction=reduction
                )
            (gradient,) = torch.autograd.grad(loss, leaf, torch.full_like(loss, 3.0))
            found.append((loss.detach(), gradient))
        for ours, theirs in zip(*found, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=2e-3 if dtype is torch.float16 else 1e-4, atol=1e-5)


# ------------------------------------------------------------------------------------------------ where it is not compiled


def undecided(x: Tensor, y: Tensor) -> Tensor:
    return x - y if float(x.detach().sum()) > 0 else y - x


def test_a_formula_that_dynamo_refuses_runs_as_it_is_and_says_so_once() -> None:
    loss_of = tt.fused_loss(undecided)
    x = leaf(X)
    with pytest.warns(UserWarning, match="undecided: the formula runs as it is.*torch.compile refused it") as caught:
        loss_of(x, VALUES)
    loss = loss_of(x, VALUES)  # a second warning would be an error here
    assert caught.pop(UserWarning).filename == __file__
    (gradient,) = torch.autograd.grad(loss, x)
    close(gradient, expected(undecided, x, VALUES)[1], torch.float32)


def test_no_compiler() -> None:
    x = torch.ones(5000, requires_grad=True)
    with (
        torch._inductor.config.patch({"cpp.cxx": ("no-such-compiler",), "force_disable_caches": True}),
        pytest.warns(UserWarning, match="squared: the formula runs as it is"),
    ):
        tt.fused_loss(squared)(x, 0.5).backward()
    torch.testing.assert_close(x.grad, torch.full((5000,), 1 / 5000))


@pytest.mark.slow
def test_switched_off_by_the_environment() -> None:
    code = """
import torch, warnings
import triton_thresh as tt
square = tt.fused_loss(lambda x, y: (x - y) ** 2)
x = torch.ones(5, requires_grad=True)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(2):
        square(x, 0.5).backward()
print(x.grad.tolist(), len(caught), caught[0].message)
"""
    environment = {**os.environ, "TRITON_THRESH_COMPILE": "0", "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("[0.4")
    assert " 1 <lambda>: the formula runs as it is" in done.stdout
    assert "TRITON_THRESH_COMPILE=0" in done.stdout


@pytest.mark.usefixtures("uncompiled")
def test_an_error_of_the_formula_is_the_formulas() -> None:
    def wrong(x: Tensor, y: Tensor) -> Tensor:
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        tt.fused_loss(wrong)(X, VALUES)


# ---------------------------------------------------------------------------------------------------------------- errors


def reserved(x: Tensor, mask: Tensor) -> Tensor:
    return x


def anything(x: Tensor, *others: Tensor) -> Tensor:
    return x


def nothing() -> Tensor:
    return torch.zeros(())


@pytest.mark.parametrize(
    ("formula", "words"),
    [
        (reserved, ("reserved", "'mask'", "rename", "weight, mask, divisor, reduction")),
        (lambda x, weight=None: x, ("'weight'",)),
        (lambda x, divisor=None: x, ("'divisor'",)),
        (lambda x, *, reduction="mean": x, ("'reduction'",)),
        (anything, ("anything", "*others", "names")),
        (nothing, ("nothing", "no positional parameter")),
        (3, ("formula must be a function", "int 3")),
    ],
)
def test_formulas_that_cannot_be_losses(formula: Any, words: tuple[str, ...]) -> None:
    with pytest.raises(TypeError) as caught:
        tt.fused_loss(formula)
    for word in ("fused_loss", *words):
        assert word in str(caught.value)


LEARNS = torch.ones(C, requires_grad=True)
MISTAKES: dict[str, tuple[Callable[[Any], object], type[Exception], tuple[str, ...]]] = {
    "list": (lambda f: f([0.1], 0.5), TypeError, ("x must be a tensor, got list",)),
    "integers": (lambda f: f(X.long(), 0.5), TypeError, ("x has dtype torch.int64", "float32")),
    "sparse": (lambda f: f(X.to_sparse(), 0.5), TypeError, ("x has layout",)),
    "array": (lambda f: f(X, VALUES.numpy()), TypeError, ("y must be a number or a tensor", "ndarray")),
    "tuple": (lambda f: f(X, 1.0, t=(1, 2)), TypeError, ("t must be a number or a tensor", "tuple")),
    "complex": (lambda f: f(X, VALUES.cfloat()), TypeError, ("y has dtype torch.complex64",)),
    "shape": (lambda f: f(X, VALUES[:, :5]), ValueError, ("y has shape (72, 5)", "broadcast", "(72, 96)")),
    "more dimensions": (lambda f: f(X, VALUES[None]), ValueError, ("y has shape (1, 72, 96)",)),
    "device": (lambda f: f(X, VALUES.to("meta")), RuntimeError, ("y is on meta", "expected cpu")),
    "learns": (lambda f: f(X, LEARNS), ValueError, ("y requires grad", "only x gets a gradient", "weighed.__wrapped__")),
    "weight learns": (lambda f: f(X, 1.0, weight=LEARNS), ValueError, ("weight requires grad", "only x")),
    "weight": (lambda f: f(X, 1.0, weight="1"), TypeError, ("weight must be a number or a tensor", "str '1'")),
    "weight's shape": (lambda f: f(X, 1.0, weight=torch.ones(5)), ValueError, ("weight has shape (5,)",)),
    "mask": (lambda f: f(X, 1.0, mask=[True]), TypeError, ("mask must be a bool tensor", "list")),
    "mask's dtype": (lambda f: f(X, 1.0, mask=LABELS), TypeError, ("mask has dtype torch.float32", "torch.bool")),
    "mask's shape": (lambda f: f(X, 1.0, mask=MASK[:5]), ValueError, ("mask has shape (5, 96)", "(72, 96)")),
    "divisor": (lambda f: f(X, 1.0, divisor=0), ValueError, ("divisor must be a finite number above 0", "got 0")),
    "divisor's kind": (lambda f: f(X, 1.0, divisor="4"), TypeError, ("divisor must be a number", "str '4'")),
    "divisor's shape": (lambda f: f(X, 1.0, divisor=torch.ones(2)), ValueError, ("divisor has shape (2,)", "0-dim")),
    "divisor learns": (lambda f: f(X, 1.0, divisor=LEARNS.sum()), ValueError, ("divisor requires grad",)),
    "divisor of a sum": (
        lambda f: f(X, 1.0, divisor=2, reduction="sum"), ValueError, ("divisor goes with reduction 'mean'", "'sum'")
    ),
    "reduction": (lambda f: f(X, 1.0, reduction="avg"), ValueError, ("reduction must be one of 'mean'", "'avg'")),
    "missing": (lambda f: f(X), TypeError, ("missing the argument 'y'",)),
    "too many": (lambda f: f(X, 1, 2, 3, 4), TypeError, ("takes 4 positional arguments, got 5",)),
    "unknown": (lambda f: f(X, 1.0, gamma=2), TypeError, ("unexpected keyword argument 'gamma'",)),
    "twice": (lambda f: f(X, 1.0, y=2), TypeError, ("several values for argument 'y'",)),
}  # fmt: skip


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes(name: str) -> None:
    call, error, words = MISTAKES[name]
    with pytest.raises(error) as caught:
        call(tt.fused_loss(weighed))
    for word in ("weighed", *words):
        assert word in str(caught.value)


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("formula", [lambda x, y: (x - y).mean(), lambda x, y: 1.0, lambda x, y: x[:3]])
def test_a_formula_that_is_not_elementwise(formula: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match=r"the formula returned .*expected a real tensor of the shape \(72, 96\)"):
        tt.fused_loss(formula)(X, VALUES)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["float32", "float16", "per row and channel", "mask", "none, bfloat16", "one element"])
def test_on_a_gpu(name: str) -> None:
    """Equal to float64 on a CPU, to the bit the same again, and the host never waits."""
    x, others, options = CALLS[name]
    reduction = options.get("reduction", "mean")
    upstream = torch.ones(x.shape, dtype=x.dtype) if reduction == "none" else None
    value, gradient = expected(weighed, x, *others, **options, upstream=upstream)
    loss_of, own = tt.fused_loss(weighed), leaf(x.cuda(), x.dtype)
    there = [v.cuda() if isinstance(v, Tensor) else v for v in others]
    options = {key: v.cuda() if isinstance(v, Tensor) else v for key, v in options.items()}
    g = None if upstream is None else upstream.cuda()
    found = []
    for _ in range(3):
        loss = loss_of(own, *there, **options)
        found.append((loss.detach(), *torch.autograd.grad(loss, own, g)))
        torch.cuda.set_sync_debug_mode("error")  # from the second call on: the first compiles
    torch.cuda.set_sync_debug_mode("default")
    close(found[0][0].cpu(), value, x.dtype, name)
    close(found[0][1].cpu(), gradient, x.dtype, name)
    for again in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], again))


module_level = tt.fused_loss(huber)


def test_the_loss_looks_like_its_formula() -> None:
    assert module_level.__name__ == "huber"
    assert module_level.__wrapped__ is huber  # type: ignore[attr-defined]
    assert str(inspect.signature(module_level)).startswith(
        "(x: 'Tensor', y: 'Tensor', delta: 'Any' = 0.75, *, weight=None, "
    )
    assert str(inspect.signature(module_level)).endswith("-> 'Tensor'")
