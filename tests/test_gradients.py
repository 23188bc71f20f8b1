"""Gradient thresholding in eager torch: values, autograd, transforms, compiled code, optimizers, errors; launches on a stub."""

from __future__ import annotations

import copy
import math
import pickle
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import triton_thresh as tt
from triton_thresh import gradients as module
from triton_thresh import tuning
from triton_thresh.backend import has_triton

from .conftest import INTERPRETED
from .gates import LAYOUTS, Case, Layout, bits, equal, inputs, kept, label, same, upstream
from .gradients import (
    FLOATS,
    SHAPES,
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
from .rows import ForeachGate, GradientGate

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def eager_backend() -> Iterator[None]:
    with tt.use_backend("eager"):
        yield


def example(*shape: int) -> Tensor:
    return torch.linspace(-2, 2, math.prod(shape or (8,))).reshape(shape or (8,))


# -------------------------------------------------------------------------------------------------------- one gradient


@pytest.mark.parametrize("threshold", THRESHOLDS)
@pytest.mark.parametrize("dtype", FLOATS, ids=label)
@gradient_gates
def test_the_reference_is_the_formula(op: GradientGate, dtype: torch.dtype, threshold: float) -> None:
    g = inputs(torch.tensor(threshold, dtype=torch.float64), dtype, (200,), CPU)
    same(op.gate.reference(g, threshold), thresholded(g, threshold))
    same(op.gate(g, threshold), thresholded(g, threshold))


@pytest.mark.parametrize(("op", "case"), gradient_cases(full=True), ids=by_name)
def test_case(op: GradientGate, case: Case) -> None:
    """The gradient, and the gradient of that."""
    g, (threshold,) = case.make(CPU)
    x, gg = torch.zeros_like(g).requires_grad_(), upstream(g)
    expected, before = op.gate.reference(g, threshold), bits(g)
    y = op(x, threshold)
    assert (y.data_ptr(), y._base is x) == (x.data_ptr(), True)
    (dx,) = torch.autograd.grad(y, x, g, retain_graph=True)
    same(dx, expected)
    (dx,) = torch.autograd.grad(y, x, g.requires_grad_(), create_graph=True)
    equal(dx.detach(), expected)
    (ddx,) = torch.autograd.grad(dx, g, gg)
    equal(ddx, torch.where(kept(op.gate, g, threshold), gg, 0))
    assert torch.equal(bits(g), before)


@gradient_gates
def test_without_gradient(op: GradientGate) -> None:
    x = example()
    for y in (op(x, 0.5), op(x.requires_grad_().detach(), 0.5)):
        assert (y.data_ptr(), y.requires_grad) == (x.data_ptr(), False)
    with torch.no_grad():
        assert not op(x, 0.5).requires_grad
    with torch.inference_mode():
        same(op(x, 0.5), x.detach())


@gradient_gates
def test_backward_again_accumulated_and_expanded(op: GradientGate) -> None:
    x, g = example().requires_grad_(), example().flip(0)
    y = op(x, 0.7)
    y.backward(g, retain_graph=True)
    y.backward(2 * g)
    same(x.grad, thresholded(g, 0.7) + thresholded(2 * g, 0.7))
    for t, due in ((0.5, 1.0), (1.0, 0.0)):
        (dx,) = torch.autograd.grad(op(x, t).sum(), x)
        same(dx, torch.full_like(x, due))


@gradient_gates
def test_only_a_tensor_threshold_is_saved(op: GradientGate) -> None:
    x, t = example().requires_grad_(), torch.rand(8)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        op(x * 1, 0.5)
        assert len(saved) == 0
        op(x * 1, t)
    assert [s.data_ptr() for s in saved] == [t.data_ptr()]
    y = op(x, t)
    t.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward(example())


@gradient_gates
def test_in_place_on_the_output_is_refused(op: GradientGate) -> None:
    y = op(example().requires_grad_() * 1, 0.5)
    with pytest.raises(RuntimeError, match="cloning the output"):
        y.relu_()
    y = op(example().requires_grad_() * 1, 0.5).clone()
    y.relu_().sum().backward()


@gradient_gates
def test_checkpoint(op: GradientGate) -> None:
    for reentrant in (True, False):
        x, g = example().requires_grad_(), example().flip(0)
        checkpoint(lambda x: op(x * 2, 1.0), x, use_reentrant=reentrant).backward(g)
        same(x.grad, 2 * thresholded(g, 1.0))


@gradient_gates
def test_backend_is_that_of_forward(op: GradientGate, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    stock = op.gate.reference
    x = example().requires_grad_()
    monkeypatch.setattr(module.gates, "run", lambda row, g, p: seen.append(tt.get_backend()) or stock(g, *p))
    with tt.use_backend("eager"):
        y = op(x, 0.5)
    with tt.use_backend("auto"):
        y.backward(example())
    assert seen == ["eager"]


@gradient_gates
def test_func_transforms(op: GradientGate) -> None:
    x, w = example(6, 10), inputs(0.5, torch.float32, (6, 10), CPU)
    thresholds = torch.linspace(0, 2, 6)
    for t in (0.5, torch.tensor(0.5), torch.full((10,), 0.5)):
        same(torch.func.grad(lambda x, t=t: (op(x, t) * w).sum())(x), thresholded(w, 0.5))
        y, pull = torch.func.vjp(lambda x, t=t: op(x, t), x)
        same(y, x)
        same(pull(w)[0], thresholded(w, 0.5))
        y, tangent = torch.func.jvp(lambda x, t=t: op(x, t), (x,), (w,))
        same(y, x)
        same(tangent, w)
    same(torch.func.vmap(lambda x: op(x, 0.5))(x), x)
    rows = torch.func.vmap(torch.func.grad(lambda x, w, t: (op(x, t) * w).sum()))(x, w, thresholds)
    expected = op.gate.reference(w, thresholds[:, None])
    same(rows, expected)
    inside = torch.func.grad(lambda x: (torch.func.vmap(op)(x, thresholds) * w).sum())(x)
    same(inside, expected)
    finite = w.clamp(-3, 3).round().nan_to_num()  # sums are exact
    shared = torch.func.grad(lambda x: (torch.func.vmap(lambda t: op(x, t))(thresholds) * finite).sum())(x[0])
    equal(shared, op.gate.reference(finite, thresholds[:, None]).sum(0))
    columns = torch.func.vmap(lambda x, t: op(x, t), in_dims=(1, 1), out_dims=1)
    same(torch.func.grad(lambda x: (columns(x, w.abs()) * w).sum())(x), op.gate.reference(w, w.abs()))
    close = torch.full((6,), 0.1, dtype=torch.float64)  # rounds to float32, as a 0-dim tensor does
    rounds = torch.func.vmap(torch.func.grad(lambda x, t: (op(x, t) * 0.1).sum()))(x, close)
    same(rounds, torch.zeros_like(x))
    same(torch.func.jacrev(lambda x: op(x, 0.5))(x[0]), torch.eye(10))


@gradient_gates
def test_forward_mode(op: GradientGate) -> None:
    x, direction = example(), torch.full((8,), 0.1)
    with torch.autograd.forward_ad.dual_level():
        y = op(torch.autograd.forward_ad.make_dual(x, direction), 0.5)
        value, tangent = torch.autograd.forward_ad.unpack_dual(y)
    same(value, x)
    same(tangent, direction)


@gradient_gates
@pytest.mark.parametrize("batched", ["is_grads_batched", "vmap"])
def test_batched_gradients(op: GradientGate, batched: str) -> None:
    x, g = example().requires_grad_(), inputs(0.5, torch.float32, (5, 8), CPU)
    y = op(x, 0.5)
    if batched == "vmap":
        dx = torch.func.vmap(lambda g: torch.autograd.grad(y, x, g, retain_graph=True)[0])(g)
    else:
        (dx,) = torch.autograd.grad(y, x, g, is_grads_batched=True)
    same(dx, thresholded(g, 0.5))


@pytest.mark.slow
@gradient_gates
def test_compile(op: GradientGate) -> None:
    """The identity also where the compiled function returns nothing else: each alias keeps its backward."""
    torch.compiler.reset()
    thresholds = 0.5, torch.tensor(0.5), torch.full((8,), 0.5)

    def alone(xs: list[Tensor], *thresholds: Any) -> list[Tensor]:
        return [op(x, t) for x, t in zip(xs, thresholds)]

    def within(xs: list[Tensor], *thresholds: Any) -> list[Tensor]:
        scaled = [op(x * 2, t) * 3 for x, t in zip(xs, thresholds)]
        return scaled + [op(op(x, t), t).square() for x, t in zip(xs[len(thresholds) :], thresholds)]

    for function in (within, alone):
        found = []
        for run in (torch.compile(function, fullgraph=True), function):
            xs = [example().requires_grad_() for _ in range(2 * len(thresholds))]
            ys = run(xs, *thresholds)
            g = [inputs(0.5, torch.float32, (8,), CPU) for _ in ys]
            found.append([y.detach() for y in ys] + list(torch.autograd.grad(ys, xs[: len(ys)], g)))
        for actual, expected in zip(*found, strict=True):
            equal(actual, expected)


@pytest.mark.slow
@gradient_gates
def test_compile_of_transforms_and_changing_numbers(op: GradientGate) -> None:
    torch.compiler.reset()
    x, w = example(), inputs(0.5, torch.float32, (8,), CPU)
    compiled = torch.compile(torch.func.grad(lambda x, t: (op(x, t) * w).sum()))
    for t in (0.5, 0.7, 1.0):
        equal(compiled(x, t), thresholded(w, t))


# ------------------------------------------------------------------------------------------------------- many gradients


@foreach
@pytest.mark.parametrize("dtype", FLOATS, ids=label)
@pytest.mark.parametrize("threshold", [*THRESHOLDS, "list", "1dim", "0dim"], ids=str)
def test_gradients(op: ForeachGate, threshold: Any, dtype: torch.dtype) -> None:
    numbers = {"list": list(THRESHOLDS), "1dim": torch.tensor(THRESHOLDS), "0dim": torch.tensor(0.1)}
    threshold = numbers.get(threshold, threshold) if isinstance(threshold, str) else threshold
    for count in (False, True):
        made, check = parameters(threshold, dtype, CPU)
        before, versions = [g.clone() for g in gradients(made)], [g._version for g in gradients(made)]
        fraction = op(made, threshold, return_kept=count)
        total = 0
        for p, g, t, version in zip(made, before, each(threshold, len(made)), versions, strict=True):
            assert p.grad is not None
            same(p.grad, thresholded(g, t))
            assert p.grad._version > version
            total += int(large(g, t).sum())
        check()
        assert (fraction is None) is not count
        if fraction is not None:
            expected = torch.tensor(total / sum(g.numel() for g in before))
            torch.testing.assert_close(fraction, expected, rtol=2e-7, atol=0)


@foreach
@pytest.mark.parametrize("layout", LAYOUTS, ids=by_name)
def test_joined_and_alone(op: ForeachGate, layout: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients of one shape, of which some are not contiguous, below and above the size that is joined."""
    for small in (0, 10**6):
        monkeypatch.setattr(module, "SMALL", small)
        if layout.name == "expanded":
            continue
        memory = [layout.lay(inputs(0.5, torch.float32, layout.shape, CPU)) for _ in range(3)]
        memory += [inputs(0.5, torch.float32, layout.shape, CPU) for _ in range(3)]
        before = [g.clone() for g in memory]
        op([parameter(g) for g in memory], 0.5)
        for g, was in zip(memory, before, strict=True):
            same(g, thresholded(was, 0.5))


@foreach
@hypothesis.settings(max_examples=50, deadline=None, suppress_health_check=list(hypothesis.HealthCheck))
@hypothesis.given(data=st.data())
def test_any_list(op: ForeachGate, data: st.DataObject) -> None:
    any_list(op, data, CPU)


@foreach
def test_a_single_tensor_and_a_tuple(op: ForeachGate) -> None:
    p = parameter(example())
    op(p, 1.0)
    same(p.grad, thresholded(example(), 1.0))
    q = parameter(example())
    op((q, parameter(example())), (1.0, 0.5))
    same(q.grad, p.grad)


@foreach
def test_gradients_that_require_grad(op: ForeachGate) -> None:
    """Those of create_graph=True: changed without a record, and noticed."""
    x = example().requires_grad_()
    (x**3).sum().backward(create_graph=True)
    assert x.grad is not None
    before = x.grad.detach().clone()
    op(x, 1.0)
    same(x.grad.detach(), thresholded(before, 1.0))


@foreach
def test_inference_mode(op: ForeachGate) -> None:
    p = parameter(example())
    with torch.inference_mode():
        op(p, 1.0)
        inner = parameter(example())
        op(inner, 1.0)
    same(p.grad, thresholded(example(), 1.0))
    with torch.inference_mode():
        same(inner.grad, p.grad)


@foreach
def test_gradients_of_a_subclass(op: ForeachGate) -> None:
    """Run by torch's own ops, beside ordinary ones."""

    class Mine(Tensor):
        pass

    odd, even = parameter(example()), parameter(example())
    odd.grad = example().as_subclass(Mine)
    fraction = op([odd, even], 1.0, return_kept=True)
    assert type(odd.grad) is Mine
    same(odd.grad.as_subclass(Tensor), thresholded(example(), 1.0))
    same(even.grad, thresholded(example(), 1.0))
    assert fraction.item() == large(example(), 1.0).sum() / 8


@foreach
def test_meta_gradients(op: ForeachGate) -> None:
    p = parameter(torch.zeros(3, device="meta"))
    assert op([p, p], [0.5, 0.7], return_kept=True).device.type == "meta"


@pytest.mark.slow
@foreach
def test_inside_of_compiled_code(op: ForeachGate) -> None:
    torch.compiler.reset()
    made = [parameter(example()), parameter(example().flip(0)), parameter(None, example())]

    @torch.compile
    def step(threshold: Any) -> None:
        op(made, threshold)

    step(1.0)
    for p in made[:2]:
        assert p.grad is not None
        assert int((p.grad == 0).sum()) == int((~large(example(), 1.0)).sum())
    step([1.5, 1.0, 0.0])
    same(made[0].grad, thresholded(example(), 1.5))


@pytest.mark.slow
@foreach
def test_compiled_in_one_graph(op: ForeachGate) -> None:
    """Thresholds on the CPU are not read while a graph is made, so that they may change."""
    torch.compiler.reset()
    compiled = torch.compile(
        lambda lists, thresholds: [op(made, t, return_kept=True) for made, t in zip(lists, thresholds)], fullgraph=True
    )
    for scale in (1, 2):
        thresholds = (
            1.0 * scale,
            [1.0 * scale, 0.5 * scale],
            torch.tensor(1.0) * scale,
            torch.tensor([1.0, 0.5]) * scale,
        )
        lists, expected = [], []
        for t in thresholds:
            made = [parameter(example()), parameter(example().flip(0)), parameter(None, example())]
            if len(each(t, 3)) == 2:
                made.pop()
            lists.append(made)
            pairs = zip(made, each(t, len(made)), strict=True)
            expected.append([thresholded(p.grad, v) for p, v in pairs if p.grad is not None])
        compiled(lists, thresholds)
        for made, due in zip(lists, expected):
            for g, one in zip(gradients(made), due, strict=True):
                same(g, one)


@foreach
def test_explain(op: ForeachGate) -> None:
    made = [parameter(example()), parameter(None, example()), parameter(example(2, 4))]
    explanation = tt.explain(op.name, made, 0.5)
    assert (explanation.backend, explanation.forward_bytes) == ("eager", None)
    assert "no parameter has a gradient" in str(tt.explain(op.name, made[1], 0.5))


@gradient_gates
def test_explain_one(op: GradientGate) -> None:
    x = example().requires_grad_()
    explanation = tt.explain(op.name, x, torch.ones(8))
    moved = (explanation.forward_bytes, explanation.backward_bytes, explanation.saved_bytes)
    assert moved == (None, None, 32)


# --------------------------------------------------------------------------------------------------------------- errors


@contextmanager
def refused(error: type[Exception], *words: object, of: list[Any]) -> Iterator[None]:
    """The error has these words, and no gradient has changed."""
    found = [p.grad for p in of if p.grad is not None and p.grad.layout is torch.strided]
    before = [(bits(g).tolist(), g._version) for g in found]
    with pytest.raises(error) as caught:
        yield
    missing = [str(w) for w in words if not re.search(rf"(?<!\w){re.escape(str(w))}(?!\w)", str(caught.value))]
    assert not missing, f"{missing} not in {str(caught.value)!r}"
    assert [(bits(g).tolist(), g._version) for g in found] == before


@foreach
@pytest.mark.parametrize("threshold", [[0.5], [0.5] * 3, torch.ones(1), torch.ones(3), ()], ids=str)
def test_number_of_thresholds(op: ForeachGate, threshold: Any) -> None:
    made = [parameter(example()), parameter(None, example())]
    with refused(ValueError, op.name, "threshold", len(threshold), 2, "one per parameter", of=made):
        op(made, threshold)


@foreach
@pytest.mark.parametrize(
    ("threshold", "error", "words"),
    [
        ("0.5", TypeError, ("threshold", "str", "'0.5'")),
        (None, TypeError, ("threshold", "NoneType")),
        (1j, TypeError, ("threshold", "complex")),
        ([0.5, "x"], TypeError, ("threshold[1]", "str")),
        ({0.5, 0.6}, TypeError, ("threshold", "set")),
        (torch.tensor(1j), TypeError, ("threshold", "torch.complex64")),
        (torch.ones(2, 1), ValueError, ("threshold", (2, 1))),
        (torch.ones(2, requires_grad=True), ValueError, ("threshold", "requires grad", "detach")),
        (torch.tensor(0.5, requires_grad=True), ValueError, ("threshold", "requires grad", "detach")),
    ],
    ids=str,
)
def test_thresholds_refused(op: ForeachGate, threshold: Any, error: type[Exception], words: tuple[Any, ...]) -> None:
    made = [parameter(example()), parameter(example())]
    with refused(error, op.name, *words, of=made):
        op(made, threshold)


@foreach
def test_sparse_gradients(op: ForeachGate) -> None:
    embedding = torch.nn.Embedding(4, 3, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    made = [parameter(example()), embedding.weight]
    with refused(TypeError, op.name, "parameters[1].grad", "torch.sparse_coo", "dense", of=made):
        op(made, 0.5)


@foreach
@pytest.mark.parametrize("dtype", [torch.complex64, torch.float8_e4m3fn], ids=label)
def test_dtypes(op: ForeachGate, dtype: torch.dtype) -> None:
    made = [parameter(example()), parameter(torch.zeros(3, dtype=dtype))]
    with refused(TypeError, op.name, "parameters[1].grad", dtype, "bfloat16", of=made[:1]):
        op(made, 0.5)


@foreach
def test_gradients_that_overlap_themselves(op: ForeachGate) -> None:
    made = [parameter(example()), parameter(example(3, 1).expand(3, 4))]
    with refused(RuntimeError, op.name, "parameters[1].grad", (3, 4), (1, 0), "clone", of=made):
        op(made, 0.5)


@foreach
def test_inference_gradients(op: ForeachGate) -> None:
    with torch.inference_mode():
        inner = parameter(example())
    with pytest.raises(RuntimeError, match=r"parameters\[0\]\.grad is an inference tensor"):
        op(inner, 0.5)


@foreach
def test_shared_gradients_with_a_threshold_each(op: ForeachGate) -> None:
    buffer = example(20)
    made = [parameter(buffer[:10]), parameter(buffer[10:]), parameter(buffer[5:15])]
    with refused(ValueError, op.name, "parameters[0].grad", "parameters[2].grad", "share memory", of=made):
        op(made, [0.1, 0.2, 0.3])
    op(made[:2], [0.1, 1.5])
    same(buffer, torch.cat([thresholded(example(20)[:10], 0.1), thresholded(example(20)[10:], 1.5)]))
    op(made, 1.8)
    same(buffer, thresholded(example(20), 1.8))


@foreach
@pytest.mark.parametrize("given", [3, None, torch.nn.Linear(2, 2)], ids=["int", "none", "module"])
def test_what_is_no_list_of_tensors(op: ForeachGate, given: Any) -> None:
    with refused(TypeError, op.name, "parameters", type(given).__name__, of=[]):
        op(given, 0.5)
    with refused(TypeError, op.name, "parameters[0]", "tuple", of=[]):
        op(list(torch.nn.Linear(2, 2).named_parameters()), 0.5)


@gradient_gates
def test_one_gradient_refused(op: GradientGate) -> None:
    x = example().requires_grad_()
    for error, match, input, threshold in (
        (TypeError, "input has dtype torch.int64", torch.arange(3), 0.5),
        (TypeError, "input must be a tensor, got list", [1.0], 0.5),
        (TypeError, "threshold must be a number or a tensor, got str", x, "x"),
        (
            ValueError,
            r"threshold has shape \(3,\), which does not broadcast to the input's shape \(8,\)",
            x,
            torch.ones(3),
        ),
        (ValueError, "threshold requires grad", x, torch.ones((), requires_grad=True)),
    ):
        with pytest.raises(error, match=f"{op.name}: {match}"):
            op(input, threshold)


@pytest.mark.skipif(INTERPRETED or not has_triton(), reason="needs Triton, without its interpreter")
def test_triton_on_a_cpu() -> None:
    made = [parameter(example())]
    with tt.use_backend("triton"):
        with refused(RuntimeError, "cpu", "TRITON_INTERPRET=1", of=made):
            tt.threshold_gradients_(made, 0.5)
        with pytest.raises(RuntimeError, match="TRITON_INTERPRET=1"):
            tt.threshold_grad(example().requires_grad_(), 0.5)


# ----------------------------------------------------------------------------------------------------------- optimizers


def model(seed: int = 0) -> torch.nn.Sequential:
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1))


def batches(count: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(5, 8, generator=generator), torch.randn(5, 1, generator=generator)) for _ in range(count)]


def by_hand(net: torch.nn.Module, threshold: float) -> None:
    for p in net.parameters():
        if p.grad is not None:
            p.grad = thresholded(p.grad, threshold)


def train(
    net: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    before: Callable[[], None] = lambda: None,
    accumulated: int = 1,
    run: Callable[..., Any] | None = None,
) -> list[Tensor]:
    """Four steps; `before` is called before each."""
    data = iter(batches(4 * accumulated))
    for _ in range(4):
        optimizer.zero_grad()
        for _ in range(accumulated):
            x, y = next(data)
            ((run or net)(x) - y).square().mean().backward()
        before()
        optimizer.step()
    return [p.detach().clone() for p in net.parameters()]


T = 0.05  # of the demo network's gradients about half are larger


@pytest.mark.parametrize("accumulated", [1, 3])
@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW], ids=lambda o: o.__name__)
def test_step(optimizer: Any, accumulated: int) -> None:
    net, other = model(), model()
    plain = train(copy.deepcopy(net), optimizer(net.parameters(), lr=0.0))
    hooked = optimizer(net.parameters(), lr=0.1)
    with tt.GradientThreshold(hooked, T, track_kept=True) as hook:
        assert hook.kept is None
        actual = train(net, hooked, accumulated=accumulated)
    expected = train(
        other, optimizer(other.parameters(), lr=0.1), before=lambda: by_hand(other, T), accumulated=accumulated
    )
    for a, e in zip(actual, expected, strict=True):
        same(a, e)
    assert hook.kept is not None
    assert 0 < hook.kept < 1
    assert any(not torch.equal(a, p) for a, p in zip(actual, plain, strict=True))


def test_removed() -> None:
    net, other = model(), model()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    hook = tt.GradientThreshold(optimizer, math.inf)
    before = [p.detach().clone() for p in net.parameters()]
    for a, b in zip(train(net, optimizer), before, strict=True):
        same(a, b)
    hook.remove()
    hook.remove()
    expected = train(other, torch.optim.SGD(other.parameters(), lr=0.1))
    for a, e in zip(train(net, optimizer), expected, strict=True):
        same(a, e)
    with pytest.raises(ZeroDivisionError), tt.GradientThreshold(optimizer, math.inf):
        _ = 1 / 0
    assert not optimizer._optimizer_step_pre_hooks


@pytest.mark.parametrize("scale", [2.0**10, 2.0**16])
def test_grad_scaler(scale: float) -> None:
    """unscale_, then step: thresholds meet gradients as they would be without a scaler."""
    net, other = model(), model()
    optimizer, plain = (torch.optim.SGD(n.parameters(), lr=0.1) for n in (net, other))
    scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    tt.GradientThreshold(optimizer, T)
    for x, y in batches(4):
        for n, o in ((net, optimizer), (other, plain)):
            o.zero_grad()
            loss = (n(x) - y).square().mean()
            (scaler.scale(loss) if n is net else loss).backward()
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        by_hand(other, T)
        plain.step()
    for a, e in zip(net.parameters(), other.parameters(), strict=True):
        same(a.detach(), e.detach())


def test_grad_scaler_that_leaves_unscaling_to_the_step() -> None:
    net = model()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, fused=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    tt.GradientThreshold(optimizer, T)
    for unscales in (True, False):
        scaler.scale(net(batches(1)[0][0]).mean()).backward()
        if unscales:
            scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
        else:
            with pytest.raises(RuntimeError, match="unscale_"):
                scaler.step(optimizer)


@pytest.mark.parametrize("keyword", [False, True])
@pytest.mark.parametrize("make", [lambda p: torch.optim.LBFGS(p, max_iter=5), lambda p: torch.optim.SGD(p, lr=0.1)])
def test_closures(make: Any, keyword: bool) -> None:
    """Every evaluation's gradients are thresholded, not those before the first."""
    net, other = model(), model()
    (x, y), seen = batches(1)[0], []

    def closure(n: torch.nn.Module, o: torch.optim.Optimizer, hand: bool) -> Tensor:
        o.zero_grad()
        loss = (n(x) - y).square().mean()
        loss.backward()
        if hand:
            by_hand(n, T)
        seen.append(n)
        return loss

    hooked, plain = make(net.parameters()), make(other.parameters())
    tt.GradientThreshold(hooked, T)
    for _ in range(2):
        ours = lambda: closure(net, hooked, False)  # noqa: E731
        loss = hooked.step(closure=ours) if keyword else hooked.step(ours)
        same(loss.detach(), plain.step(lambda: closure(other, plain, True)).detach())
    for a, e in zip(net.parameters(), other.parameters(), strict=True):
        same(a.detach(), e.detach())
    assert seen.count(net) == seen.count(other)


def test_thresholds_per_parameter_and_added_groups() -> None:
    p, q, r = (parameter(example()) for _ in range(3))
    optimizer = torch.optim.SGD([p], lr=1.0)
    optimizer.add_param_group({"params": [q], "lr": 2.0})
    with tt.GradientThreshold(optimizer, [0.5, 1.5]):
        optimizer.step()
        same(p.detach(), -thresholded(example(), 0.5) + 0.0)
        same(q.detach(), -2 * thresholded(example(), 1.5) + 0.0)
        optimizer.add_param_group({"params": [r]})
        before = r.detach().clone()
        with pytest.raises(ValueError, match="threshold has 2 entries for 3 parameters"):
            optimizer.step()
        same(r.detach(), before)
    with tt.GradientThreshold(optimizer, 1.9):
        optimizer.step()
    same(r.grad, thresholded(example(), 1.9))


@pytest.mark.slow
def test_compiled_modules_and_steps() -> None:
    torch.compiler.reset()
    net, other = model(), model()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    with tt.GradientThreshold(optimizer, T):
        actual = train(net, optimizer, run=torch.compile(net, fullgraph=True))
    expected = train(other, torch.optim.SGD(other.parameters(), lr=0.1), before=lambda: by_hand(other, T))
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e)
    p = parameter(example())
    optimizer = torch.optim.SGD([p], lr=1.0)
    tt.GradientThreshold(optimizer, 1.0)
    torch.compile(optimizer.step)()
    same(p.detach(), -thresholded(example(), 1.0) + 0.0)


def test_copies_of_the_optimizer() -> None:
    p = parameter(example())
    optimizer = torch.optim.SGD([p], lr=1.0)
    hook = tt.GradientThreshold(optimizer, math.inf)
    for twin in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        (own,) = twin.param_groups[0]["params"]
        own.grad = example()
        twin.step()
        same(own.detach(), -example())
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.step()
    same(p.detach(), torch.zeros(8))
    assert repr(hook) == "GradientThreshold(threshold=inf, track_kept=False)"


def test_hooks_refused() -> None:
    p = parameter(example())
    with pytest.raises(TypeError, match="got list"):
        tt.GradientThreshold([p], 0.5)  # type: ignore[arg-type]
    optimizer = torch.optim.SGD([p], lr=1.0)
    for threshold, error in (("x", TypeError), ([0.5, 0.5], ValueError)):
        with pytest.raises(error, match="GradientThreshold: threshold"):
            tt.GradientThreshold(optimizer, threshold)  # type: ignore[arg-type]
    assert not optimizer._optimizer_step_pre_hooks


# ------------------------------------------------------------------------------------------------------------- launches


@pytest.mark.skipif(INTERPRETED or not has_triton(), reason="needs Triton, without its interpreter")
def test_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    """A thousand gradients: one launch for each dtype, whatever the sizes, alignments and thresholds; compiled once."""
    from benchmarks.stub_driver import StubDriver

    monkeypatch.setattr(tuning, "device_name", lambda device: "stub")
    monkeypatch.setattr(tuning, "lanes", lambda device: 32)
    monkeypatch.setattr(tuning, "_settled", {})
    monkeypatch.setattr(module.backend, "choose", lambda *_: ("triton", "stub"))
    shapes = [SHAPES[place % len(SHAPES)] for place in range(1000)]
    made = [parameter(torch.zeros(shape)) for shape in shapes]
    with StubDriver() as stub:
        for count in (0, 1, 7, 16, 1000):
            stub.clear()
            tt.threshold_gradients_(made[:count], 0.5)
            assert len(stub.launches) == min(count, 1)
        signature = stub.launches[0].signature
        for threshold in (0.1, 1.0, 16.0, [0.5] * 1000):
            stub.clear()
            tt.threshold_gradients_(made, threshold)
            (launch,) = stub.launches
            chunk = 8 * tuning.default("gate", 4).block
            programs = sum(-(-(g.data_ptr() % 16 // 4 + g.numel()) // chunk) for g in gradients(made) if g.numel())
            assert (launch.grid, launch.signature) == ((programs, 1, 1), signature)
            assert not launch.specialised
        stub.clear()
        tt.threshold_gradients_(made, 0.5, return_kept=True)
        assert len(stub.launches) == 1
        for place, p in enumerate(made):
            p.data = p.data.to(FLOATS[place % 4])
            p.grad = torch.zeros_like(p)
        stub.clear()
        tt.threshold_gradients_(made, 0.5)
        assert len(stub.launches) == 4
