"""Every op with every feature of torch that surrounds a call: each gives what the plain call gives, bit for bit.

Under transforms the reference runs: selections are still equal bit for bit, sums and losses to rounding.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

import triton_thresh as tt
from triton_thresh.rules import ByLoss

from ..calls import Case, all_same
from ..conftest import FULL
from ..gates import equal, same, upstream
from ..losses import CELLS, REDUCTIONS, Cell
from ..rows import OPS, ForeachGate, Gate, GradientGate, LearnedGate, Loss

SHAPE = (4, 6)


def _calls() -> Iterator[Case]:
    """Every op with numbers, with a threshold per channel, and with what learns; every cell of the grid of losses."""
    for op in OPS.values():
        if isinstance(op, Loss) and op.rule is None:
            for i, cell in enumerate(CELLS):
                yield Case(op, "channel", cell=cell, reduction=REDUCTIONS[i % 3])
        elif isinstance(op, Loss):
            yield Case(op, cell=Cell(op.base, op.rule))
        else:
            yield Case(op)
            if not isinstance(op, ForeachGate):
                yield Case(op, "channel")
            if isinstance(op, LearnedGate) or (isinstance(op, Gate) and op.learns):
                yield Case(op, "learned")


def _one_of_each_shell() -> Iterator[Case]:
    """What differs in the code that runs on Triton: the interpreter takes a hundred times as long."""
    named = {str(case): case for case in _calls()}
    for kind in ("number", "learned"):
        yield named[f"softshrink-float32-{kind}"]
    yield named["binary_threshold-float32-channel"]
    yield named["jumprelu_l0-float32-learned"]
    yield named["threshold_bce_with_logits_loss-bce_with_logits-ByPrediction-mean-float32-number"]
    yield Case(OPS["threshold_loss"], "channel", cell=Cell("mse", ByLoss), reduction="none")
    yield named["threshold_grad-float32-number"]
    yield named["threshold_gradients_-float32-number"]


CALLS = list(_calls() if FULL else _one_of_each_shell())
DIFFERENTIABLE = [case for case in CALLS if case.differentiable]
FUNCTIONAL = [case for case in CALLS if not isinstance(case.op, ForeachGate)]
every_call = pytest.mark.parametrize("case", CALLS, ids=str)
functional_calls = pytest.mark.parametrize("case", FUNCTIONAL, ids=str)
differentiable_calls = pytest.mark.parametrize("case", DIFFERENTIABLE, ids=str)


def of_dtype(case: Case, dtype: torch.dtype) -> Case:
    return Case(case.op, case.kind, dtype, case.cell, case.reduction)


def outcome(output: Tensor, leaves: Sequence[Tensor], **keywords: Any) -> list[Tensor]:
    """The output and, where it has any, the leaves' gradients for small whole upstream gradients."""
    if not output.requires_grad:
        return [output]
    g = upstream(output.detach(), special=False)
    return [output.detach(), *torch.autograd.grad(output, leaves, g, **keywords)]


def plain(case: Case, leaves: Sequence[Tensor]) -> list[Tensor]:
    """What the call gives by itself."""
    return outcome(case(*leaves), leaves)


def agree(case: Case, actual: Any, expected: Any) -> None:
    """Selections bit for bit, but for the sign of a gradient's zero; sums and losses to rounding."""
    exact = isinstance(case.op, Gate) and case.op.selects
    if isinstance(case.op, Loss) or (isinstance(case.op, (Gate, LearnedGate)) and not exact) or case.kind == "learned":
        torch.testing.assert_close(actual, expected)
    else:
        torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


# ------------------------------------------------------------------------------------------------------- lazy negation


def negated(tensor: Tensor) -> Tensor:
    """The same values, negated in memory: a leaf like ``z.conj().imag``."""
    return torch._neg_view(-tensor.detach()).detach()


@functional_calls
def test_negated_in_memory(case: Case, device: torch.device) -> None:
    leaves = case.leaves(device, shape=SHAPE)
    agree(case, plain(case, [negated(leaf).requires_grad_() for leaf in leaves]), plain(case, leaves))
    if case.differentiable:
        output = case(*leaves)
        g = upstream(output.detach(), special=False)
        expected = torch.autograd.grad(output, leaves, g, retain_graph=True)
        agree(case, torch.autograd.grad(output, leaves, negated(g)), expected)


def test_gradients_negated_in_memory(device: torch.device) -> None:
    parameter = torch.zeros(60, device=device, requires_grad=True)
    g = torch.linspace(-1, 1, 60, device=device)
    parameter.grad = negated(g)
    tt.threshold_gradients_([parameter], 0.5)
    same(parameter.grad.resolve_neg(), torch.where(g.abs() > 0.5, g, 0))


# ------------------------------------------------------------------------------------------------------ mixed precision


@pytest.mark.parametrize("low", [torch.float16, torch.bfloat16], ids=str)
@every_call
def test_autocast(case: Case, low: torch.dtype, device: torch.device) -> None:
    """Inputs are read as they are; losses of 16-bit inputs are float32, other results have the dtype they have without."""
    for dtype in (low, torch.float32):
        typed = of_dtype(case, dtype)
        leaves = typed.leaves(device, shape=SHAPE)
        expected = typed(*leaves).detach()
        saved: list[Tensor] = []
        with torch.autocast(device.type, dtype=low):
            with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=saved: kept.append(t) or t, lambda t: t):
                output = typed(*leaves)
            inside = plain(typed, leaves)
        wide = isinstance(case.op, Loss) and dtype.itemsize == 2
        assert output.dtype == (torch.float32 if wide else expected.dtype)
        same(output.detach().to(expected.dtype), expected)
        if isinstance(case.op, Loss):
            assert leaves[0].data_ptr() in {t.data_ptr() for t in saved}, "the input was copied"
        all_same(outcome(output, leaves), inside)  # backward may run outside
        if output.requires_grad and not wide:
            all_same(inside, plain(typed, leaves))


@differentiable_calls
def test_grad_scaler(case: Case, device: torch.device) -> None:
    """A scaled and unscaled gradient is the gradient; a step of infinite gradients is skipped."""
    leaves = case.leaves(device, shape=SHAPE)
    _, *expected = plain(case, leaves)
    start = [leaf.detach().clone() for leaf in leaves]
    optimizer = torch.optim.SGD(leaves, lr=0.125)
    scaler = torch.amp.GradScaler(device.type, init_scale=1024.0)
    output = case(*leaves)
    scaler.scale((output * upstream(output.detach(), special=False)).sum()).backward()
    scaler.unscale_(optimizer)
    equal([leaf.grad for leaf in leaves], expected)  # type: ignore[arg-type]
    scaler.step(optimizer)
    scaler.update()
    equal([leaf.detach() for leaf in leaves], [p - 0.125 * g for p, g in zip(start, expected)])  # type: ignore[arg-type]
    before = [leaf.detach().clone() for leaf in leaves]
    optimizer.zero_grad()
    scaler.scale((case(*leaves) * torch.inf).sum()).backward()
    scaler.step(optimizer)
    scaler.update()
    if not all(leaf.grad is None or leaf.grad.isfinite().all() for leaf in leaves):
        assert scaler.get_scale() == 512.0
        equal([leaf.detach() for leaf in leaves], before)  # type: ignore[arg-type]
    else:
        assert case.op.name == "step"  # its input's gradient is 0
        assert scaler.get_scale() == 1024.0


# ------------------------------------------------------------------------------------------------- the graph of autograd


@differentiable_calls
def test_accumulation(case: Case, device: torch.device) -> None:
    """The gradients of several calls add up in .grad, and gradients handed out before stay as they were."""
    leaves = case.leaves(device, shape=SHAPE)
    outputs = [case(*leaves) for _ in range(3)]
    g = upstream(outputs[0].detach(), special=False)
    once = torch.autograd.grad(outputs[0], leaves, g)
    kept = [each.clone() for each in once]
    for output in outputs[1:]:
        output.backward(g)
    equal([leaf.grad for leaf in leaves], [2 * each for each in kept])
    all_same(once, kept)


@differentiable_calls
def test_retain_graph(case: Case, device: torch.device) -> None:
    """Each backward scales with its own upstream gradient; after the last one the graph is freed."""
    leaves = case.leaves(device, shape=SHAPE)
    output = case(*leaves)
    g = upstream(output.detach(), special=False)
    once = torch.autograd.grad(output, leaves, g, retain_graph=True)
    kept = [each.clone() for each in once]
    equal(torch.autograd.grad(output, leaves, 2 * g, retain_graph=True), [2 * each for each in kept])
    torch.autograd.grad(output, leaves, g)
    all_same(once, kept)
    if not (isinstance(case.op, GradientGate) and case.kind == "number"):  # which saves nothing
        with pytest.raises(RuntimeError, match="a second time"):
            torch.autograd.grad(output, leaves, g)


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not-reentrant"])
@differentiable_calls
def test_checkpoint(case: Case, reentrant: bool, device: torch.device) -> None:
    leaves = case.leaves(device, shape=SHAPE)
    output = checkpoint(case, *leaves, use_reentrant=reentrant)
    g = upstream(output.detach(), special=False)
    expected = plain(case, leaves)
    output.backward(g)
    all_same([output.detach(), *(leaf.grad for leaf in leaves)], expected)


@pytest.mark.parametrize("hooks", ["clone", "save_on_cpu", "numpy"])
@differentiable_calls
def test_saved_tensor_hooks(case: Case, hooks: str, device: torch.device) -> None:
    """What is saved passes through the hooks, the gradient computed ahead too; backward twice reads it twice."""
    leaves = case.leaves(device, shape=SHAPE)
    expected = plain(case, leaves)
    context: AbstractContextManager[Any] = torch.autograd.graph.save_on_cpu()
    if hooks == "clone":
        context = torch.autograd.graph.saved_tensors_hooks(torch.clone, torch.clone)
    if hooks == "numpy":
        context = torch.autograd.graph.saved_tensors_hooks(lambda t: (t.numpy(force=True), t.device), _unpacked)
    with context:
        output = case(*leaves)
    all_same(outcome(output, leaves, retain_graph=True), expected)
    all_same(outcome(output, leaves), expected)


def _unpacked(packed: tuple[Any, torch.device]) -> Tensor:
    array, device = packed
    return torch.from_numpy(array.copy()).to(device)


@every_call
def test_without_gradients(case: Case, device: torch.device) -> None:
    """no_grad and inference_mode change neither values nor layout, and nothing is saved."""
    leaves = case.leaves(device, shape=SHAPE)
    expected = case(*leaves).detach()
    for context in (torch.no_grad, torch.inference_mode):
        saved: list[Tensor] = []
        with context(), torch.autograd.graph.saved_tensors_hooks(lambda t, s=saved: s.append(t) or t, lambda t: t):
            output = case(*leaves)
        assert output.grad_fn is None
        assert not saved
        same(output, expected)
        assert output.stride() == expected.stride()
        with torch.inference_mode():
            same(case(*(leaf.detach().clone() for leaf in leaves)), expected)


@functional_calls
def test_inference_tensors_outside(case: Case, device: torch.device) -> None:
    """Tensors made in inference mode are inputs like any other, as long as nothing of them is recorded."""
    leaves = case.leaves(device, shape=SHAPE)
    with torch.inference_mode():
        inferred = [leaf.detach().clone() for leaf in leaves]
    assert inferred[0].is_inference()
    same(case(*inferred), case(*leaves).detach())


@differentiable_calls
def test_anomaly_mode(case: Case, device: torch.device) -> None:
    """No NaN where none belongs, also in memory that nobody wrote; a NaN that does is traced to the op."""
    leaves = case.leaves(device, shape=SHAPE)
    expected = plain(case, leaves)
    with torch.autograd.detect_anomaly(check_nan=True):
        all_same(plain(case, leaves), expected)
        output = case(*leaves)
        poisoned = torch.full_like(output, torch.nan)
        if case.op.name == "step" and case.kind != "learned":  # dx is 0 whatever comes
            assert not torch.autograd.grad(output, leaves, poisoned)[0].any()
            return
        with pytest.raises(RuntimeError, match="returned nan values"), pytest.warns(UserWarning, match="Traceback"):
            torch.autograd.grad(output, leaves, poisoned)


@every_call
def test_deterministic_algorithms(case: Case, device: torch.device) -> None:
    leaves = case.leaves(device, shape=SHAPE)
    expected = plain(case, leaves)
    torch.use_deterministic_algorithms(True)
    try:
        all_same(plain(case, leaves), expected)
    finally:
        torch.use_deterministic_algorithms(False)


@differentiable_calls
def test_backward_hooks(case: Case, device: torch.device) -> None:
    """Hooks on tensors see the gradient and may replace it; the leaf's accumulation comes last."""
    leaves = case.leaves(device, shape=SHAPE)
    _, *expected = plain(case, leaves)
    order: list[str] = []
    leaves[0].register_hook(lambda g: order.append("hook") or 2 * g)
    leaves[0].register_post_accumulate_grad_hook(lambda p: order.append("accumulated"))
    output = case(*leaves)
    output.backward(upstream(output.detach(), special=False))
    assert order == ["hook", "accumulated"]
    equal(leaves[0].grad, 2 * expected[0])


# ------------------------------------------------------------------------------------------------- settings and threads


@every_call
def test_default_dtype(case: Case, device: torch.device) -> None:
    leaves = case.leaves(device, shape=SHAPE)
    expected = plain(case, leaves)
    try:
        for dtype in (torch.float64, torch.bfloat16):
            torch.set_default_dtype(dtype)
            all_same(plain(case, leaves), expected)
    finally:
        torch.set_default_dtype(torch.float32)


@every_call
def test_default_device(case: Case, device: torch.device) -> None:
    """A default device, where it is another than the inputs', is not where anything is made."""
    leaves = case.leaves(device, shape=SHAPE)
    expected = plain(case, leaves)
    with torch.device("meta"):
        output = case(*leaves)
        with torch.device("cpu"):
            g = upstream(output.detach(), special=False)
        found = torch.autograd.grad(output, leaves, g) if output.requires_grad else ()
    all_same([output.detach(), *found], expected)


@every_call
def test_threads(case: Case, device: torch.device) -> None:
    """Two threads with a backend each, and backward in the main thread; what one chooses the other does not see."""
    mine = tt.get_backend()
    leaves = {backend: case.leaves(device, shape=SHAPE) for backend in (mine, "auto" if mine == "eager" else "eager")}
    expected = {}
    for backend in leaves:
        with tt.use_backend(backend):
            expected[backend] = plain(case, leaves[backend])
    outputs: dict[str, list[Tensor]] = {}
    together = threading.Barrier(2)

    def work(backend: str) -> None:
        together.wait(10)
        with tt.use_backend(backend):
            outputs[backend] = [case(*leaves[backend]) for _ in range(3)]

    threads = [threading.Thread(target=work, args=(backend,)) for backend in leaves]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert tt.get_backend() == mine
    for backend, several in outputs.items():
        for output in several:
            all_same(outcome(output, leaves[backend]), expected[backend])
    assert outputs.keys() == leaves.keys()


# ----------------------------------------------------------------------------------------------------------- transforms


def in_double(case: Case, device: torch.device, shape: tuple[int, ...] = SHAPE) -> tuple[Case, list[Tensor]]:
    """The case and its leaves in float64, so that two orders of summation agree to many digits."""
    case = of_dtype(case, torch.float64)
    return case, [leaf.detach().double().requires_grad_() for leaf in case.leaves(device, shape=shape)]


@differentiable_calls
def test_func_grad_and_vjp(case: Case, device: torch.device) -> None:
    case, leaves = in_double(case, device)
    expected = plain(case, leaves)
    g = upstream(expected[0], special=False)
    points = [leaf.detach() for leaf in leaves]
    every = tuple(range(len(points)))
    agree(case, torch.func.grad(lambda *points: (case(*points) * g).sum(), argnums=every)(*points), tuple(expected[1:]))
    output, pull = torch.func.vjp(case, *points)
    agree(case, output, expected[0])
    agree(case, pull(g), tuple(expected[1:]))


@differentiable_calls
def test_batched_gradients(case: Case, device: torch.device) -> None:
    """Backward under vmap, functorch's and the older kind, of a graph that was recorded outside."""
    leaves = case.leaves(device, shape=SHAPE)
    output = case(*leaves)
    several = torch.stack([upstream(output.detach(), special=False) * k for k in (1, -2, 4)])
    expected = [torch.autograd.grad(case(*leaves), leaves, g) for g in several]
    stacked = tuple(torch.stack(each) for each in zip(*expected, strict=True))
    kinds = (
        torch.autograd.grad(output, leaves, several, retain_graph=True, is_grads_batched=True),
        torch.func.vmap(lambda g: torch.autograd.grad(output, leaves, g, retain_graph=True))(several),
    )
    for found in kinds:
        agree(case, found, stacked)


@differentiable_calls
def test_double_backward(case: Case, device: torch.device) -> None:
    """As a gradient penalty uses it: the gradient is the same with and without its own graph, and is differentiable."""
    case, leaves = in_double(case, device)
    _, *expected = plain(case, leaves)
    output = case(*leaves)
    g = upstream(output.detach(), special=False).requires_grad_()
    gradients = torch.autograd.grad(output, leaves, g, create_graph=True)
    agree(case, [each.detach() for each in gradients], expected)
    total = sum(each.sum() for each in gradients)
    if case.op.name == "step" and case.kind != "learned":  # whose gradient is 0 whatever comes
        if total.requires_grad:
            assert not any(g is not None and g.any() for g in torch.autograd.grad(total, g, allow_unused=True))
        return
    (back,) = torch.autograd.grad(total, g)
    torch.testing.assert_close((back * g).sum(), total)  # the gradient is linear in g


# ------------------------------------------------------------------------------------- tensors that are not plain


@functional_calls
def test_fake_tensors(case: Case, device: torch.device) -> None:
    """Shapes, dtypes, layouts and devices of outputs and gradients, without data."""
    leaves = case.leaves(device, shape=SHAPE)
    expected = plain(case, leaves)
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(leaf) for leaf in leaves]
        output = case(*fakes)
        found = [output, *(torch.autograd.grad(output.sum(), fakes) if output.requires_grad else ())]
    described = [(t.shape, t.dtype, t.stride(), t.device) for t in found]
    assert described == [(t.shape, t.dtype, t.stride(), t.device) for t in expected]


@functional_calls
def test_meta_tensors_where_triton_is_forced(case: Case, device: torch.device) -> None:
    """They have no data for a kernel, interpreted or not: an error that says so, not a launch."""
    leaves = [leaf.detach().to("meta") for leaf in case.leaves(device, shape=SHAPE)]
    with tt.use_backend("triton"), pytest.raises(RuntimeError, match="expected a tensor on a GPU") as caught:
        case(*leaves)
    assert "'meta'" in str(caught.value)


class Tagged(Tensor):
    """A subclass that changes nothing."""


@functional_calls
def test_subclasses(case: Case, device: torch.device) -> None:
    """Come in, and come out where torch's own ops return them; gradients reach the leaf."""
    leaves = case.leaves(device, shape=SHAPE)
    expected = plain(case, leaves)
    tagged = [leaf.detach().as_subclass(Tagged).requires_grad_() for leaf in leaves]
    output = case(*tagged)
    found = outcome(output, tagged)
    agree(case, [t.as_subclass(Tensor) for t in found], expected)
