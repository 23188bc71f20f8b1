"""The eager backend's gates whose threshold learns: values, gradients, transforms, forward-mode AD, the module."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import triton_thresh as tt

from .gates import equal, label, same
from .learned import BANDWIDTH, FLOATS, OPS, Case, cases, check, inputs, outputs_of, truth, upstream
from .rows import LearnedGate, failing, together

CPU = torch.device("cpu")
CASES = list(cases(full=True))


@pytest.fixture(autouse=True)
def eager_backend() -> Iterator[None]:
    with tt.use_backend("eager"):
        yield


def by_id(value: object) -> str | None:
    return getattr(value, "id", None) or label(value)


def example(op: LearnedGate, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, list[Tensor]]:
    """An input of rows, a threshold per feature, gradients."""
    t = torch.tensor([0.5, -0.25, 0.0, 1.0, 0.125], dtype=torch.promote_types(dtype, torch.float32))
    x = inputs(t, dtype, (6, 5), CPU)
    return x, t, upstream(outputs_of(op(x, t, BANDWIDTH)))


def total(op: LearnedGate, x: Tensor, t: Any, gradients: list[Tensor]) -> Tensor:
    """The outputs weighed with whole numbers and summed."""
    products = [(o * g).sum() for o, g in zip(outputs_of(op(x, t, BANDWIDTH)), gradients, strict=True)]
    return sum(products, torch.zeros(()))


@pytest.mark.parametrize("several", together(CASES))
def test_case(several: list[Case]) -> None:
    for case in several:
        with failing(case):
            check(case, CPU, input_gradient=False, special=True)


@pytest.mark.parametrize("several", together([c for c in CASES if c.layout.name == "contiguous"]))
def test_input_gradient(several: list[Case]) -> None:
    for case in several:
        with failing(case):
            check(case, CPU, input_gradient=True, special=False)


@pytest.mark.parametrize("t", [0.5, 0, -0.75, -0.0, torch.inf, -torch.inf, torch.nan, 0.1])
@pytest.mark.parametrize("op", OPS, ids=by_id)
def test_numbers(op: LearnedGate, t: float) -> None:
    for dtype in FLOATS:
        x = inputs(t, dtype, (60,), CPU).requires_grad_()
        recorded = outputs_of(op(x, t, BANDWIDTH))
        gradients = upstream(recorded)
        expected = truth(op, x, t, BANDWIDTH, gradients)
        for output, value in zip(recorded, expected.outputs, strict=True):
            same(output.detach(), value)
        (dx,) = torch.autograd.grad(recorded, x, gradients)
        equal(dx, expected.dx)


@pytest.mark.parametrize("op", OPS, ids=by_id)
def test_func_grad_and_jvp(op: LearnedGate) -> None:
    x, t, gradients = example(op)
    expected = truth(op, x, t, BANDWIDTH, gradients)
    dx, dt = torch.func.grad(lambda x, t: total(op, x, t, gradients), argnums=(0, 1))(x.nan_to_num(), t)
    expected = truth(op, x.nan_to_num(), t, BANDWIDTH, gradients)
    equal(dx, expected.dx)
    equal(dt, expected.dt.sum(0).float())
    # <g, J v> = <J' g, v>
    x = x.nan_to_num(0, 1, 1)
    expected = truth(op, x, t, BANDWIDTH, gradients)
    vx, vt = torch.ones_like(x), torch.full_like(t, 2.0)
    for along_x, along_t in ((1, 1), (1, 0), (0, 1)):
        _, tangents = torch.func.jvp(lambda x, t: op(x, t, BANDWIDTH), (x, t), (along_x * vx, along_t * vt))
        forward = sum((o * g).sum() for o, g in zip(outputs_of(tangents), gradients, strict=True))
        assert forward == along_x * expected.dx.sum() + along_t * 2 * expected.dt.sum()


@pytest.mark.parametrize("op", OPS, ids=by_id)
def test_vmap(op: LearnedGate) -> None:
    x, t, _ = example(op)
    whole = outputs_of(op(x, t, BANDWIDTH))
    for over in (
        torch.func.vmap(lambda x: op(x, t, BANDWIDTH))(x),
        torch.func.vmap(lambda x, t: op(x, t, BANDWIDTH))(x, t.expand(6, 5)),
    ):
        for actual, expected in zip(outputs_of(over), whole, strict=True):
            same(actual, expected)
    several = torch.tensor([0.5, 0.25, -1.0])
    over = torch.func.vmap(lambda t: op(x, t, BANDWIDTH))(several)
    for i, actual in enumerate(outputs_of(over)):
        same(actual, torch.stack([outputs_of(op(x, t, BANDWIDTH))[i] for t in several]))


@pytest.mark.parametrize("op", OPS, ids=by_id)
def test_vmap_of_grad(op: LearnedGate) -> None:
    x, t, gradients = example(op)
    x = x.nan_to_num(0, 1, 1)
    grad = torch.func.grad(lambda t, x, *g: total(op, x, t, list(g)))
    actual = torch.func.vmap(grad, in_dims=(None, 0, *[0] * len(gradients)))(t, x, *gradients)
    equal(actual, truth(op, x, t, BANDWIDTH, gradients).dt.float())


@pytest.mark.parametrize("op", OPS, ids=by_id)
def test_gradients_of_gradients(op: LearnedGate) -> None:
    """The map from upstream gradients and thresholds to gradients has the derivatives that finite differences see."""
    x, t, gradients = example(op, torch.float64)
    x = x.nan_to_num(0, 1, 1).requires_grad_()

    def gradient(t: Tensor, *g: Tensor) -> tuple[Tensor, ...]:
        # the threshold's slope alone: which elements lie in the window stays as it is
        return torch.autograd.grad(outputs_of(op(x, t, BANDWIDTH)), (x, t), g, create_graph=True)

    x.data += 1e-3  # no element on an edge
    points = (t.requires_grad_(), *(g.requires_grad_() for g in gradients))
    assert torch.autograd.gradcheck(gradient, points)


@pytest.mark.parametrize("op", OPS, ids=by_id)
def test_forward_mode(op: LearnedGate) -> None:
    x, t, gradients = example(op)
    x = x.nan_to_num(0, 1, 1)
    expected = truth(op, x, t, BANDWIDTH, gradients)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(t, torch.ones_like(t))
        outputs = outputs_of(op(x, dual, BANDWIDTH))
        tangents = [torch.autograd.forward_ad.unpack_dual(o).tangent for o in outputs]
    assert sum((o * g).sum() for o, g in zip(tangents, gradients, strict=True)) == expected.dt.sum()


@pytest.mark.parametrize("op", OPS, ids=by_id)
def test_gradients_of_gradients_of_what_was_saved(op: LearnedGate) -> None:
    """The eager backend's own second derivatives, beside those of the transforms."""
    x, t, gradients = example(op)
    x, t = x.requires_grad_(), t.requires_grad_()
    gradients = [g.requires_grad_() for g in gradients]
    _, dt = torch.autograd.grad(outputs_of(op(x, t, BANDWIDTH)), (x, t), gradients, create_graph=True)
    second = torch.autograd.grad(dt.sum(), gradients)
    inside = ((x - t).abs() < BANDWIDTH / 2).detach()
    for g, name in zip(second, ("step",) if op.name == "step" else ("jumprelu", "step"), strict=False):
        slope = torch.where(inside, -(t.detach() if name == "jumprelu" else 1) / BANDWIDTH, 0)
        equal(g, slope if g.shape == x.shape else slope.sum(-1))


@pytest.mark.parametrize("op", OPS, ids=by_id)
def test_grad_of_vmap(op: LearnedGate) -> None:
    """Gradients taken outside of vmap are those of the whole batch; so are tangents."""
    x, t, gradients = example(op)
    x = x.nan_to_num(0, 1, 1)
    expected = truth(op, x, t, BANDWIDTH, gradients)

    def batched(x: Tensor, t: Tensor) -> Tensor:
        found = outputs_of(torch.func.vmap(lambda row: op(row, t, BANDWIDTH), in_dims=1, out_dims=-1)(x.T))
        return sum(((o.T * g).sum() for o, g in zip(found, gradients, strict=True)), torch.zeros(()))

    dx, dt = torch.func.grad(batched, argnums=(0, 1))(x, t)
    equal(dx, expected.dx)
    equal(dt, expected.dt.sum(0).float())
    x, t = x.requires_grad_(), t.requires_grad_()
    dx, dt = torch.autograd.grad(batched(x, t), (x, t))
    equal(dx, expected.dx)
    equal(dt, expected.dt.sum(0).float())
    x, t = x.detach(), t.detach()
    _, tangent = torch.func.jvp(batched, (x, t), (torch.ones_like(x), torch.ones_like(t)))
    assert tangent == expected.dx.sum() + expected.dt.sum()


@pytest.mark.parametrize("spans", [(), (5,), (6, 5)], ids=str)
def test_one_output_alone(spans: tuple[int, ...]) -> None:
    """The other's gradient is not even zeros."""
    op = OPS[2]
    x, _, gradients = example(op)
    t = torch.full(spans, 0.5).requires_grad_()
    recorded = outputs_of(op(x.requires_grad_(), t, BANDWIDTH))
    for i, (output, g) in enumerate(zip(recorded, gradients, strict=True)):
        only = [g if i == j else torch.zeros_like(other) for j, other in enumerate(gradients)]
        expected = truth(op, x, t, BANDWIDTH, only)
        dx, dt = torch.autograd.grad(output, (x, t), g, retain_graph=True)
        equal(dx, expected.dx)
        equal(dt, expected.dt.sum_to_size(spans).float())


@pytest.mark.parametrize("op", OPS, ids=by_id)
def test_backward_twice_and_freed(op: LearnedGate) -> None:
    x, t, gradients = example(op)
    x, t = x.requires_grad_(), t.requires_grad_()
    recorded = outputs_of(op(x, t, BANDWIDTH))
    torch.autograd.backward(recorded, gradients, retain_graph=True)
    torch.autograd.backward(recorded, gradients)
    equal(t.grad, (2 * truth(op, x, t, BANDWIDTH, gradients).dt.sum(0)).float())
    with pytest.raises(RuntimeError, match="a second time"):
        torch.autograd.backward(recorded, gradients)


# ------------------------------------------------------------------------------------------------------------------ errors


@pytest.mark.parametrize("bandwidth", [0, -1.0, torch.nan, torch.inf])
@pytest.mark.parametrize("op", OPS, ids=by_id)
def test_bandwidth(op: LearnedGate, bandwidth: float) -> None:
    with pytest.raises(ValueError, match=f"{op.name}: bandwidth must be a finite number above 0, got {bandwidth}"):
        op(torch.ones(3), 0.5, bandwidth)


@pytest.mark.parametrize("op", OPS, ids=by_id)
def test_input_and_threshold(op: LearnedGate) -> None:
    with pytest.raises(TypeError, match=rf"{op.name}: input has dtype torch.int64, expected one of float16"):
        op(torch.ones(3, dtype=torch.int64), 0.5)
    with pytest.raises(ValueError, match=rf"{op.name}: threshold has shape \(4,\), which does not broadcast .* \(3,\)"):
        op(torch.ones(3), torch.ones(4))
    with pytest.raises(TypeError, match=f"{op.name}: threshold must be a number or a tensor, got str 'x'"):
        op(torch.ones(3), "x")


@pytest.mark.parametrize("op", OPS, ids=by_id)
def test_numbers_that_cannot_be(op: LearnedGate) -> None:
    x = torch.ones(3)
    with pytest.raises(ValueError, match=f"{op.name}: bandwidth requires grad, .* pass bandwidth.detach"):
        op(x, 0.5, torch.tensor(0.5, requires_grad=True))
    with pytest.raises(ValueError, match=rf"{op.name}: bandwidth must be .* \(of 1.2e-38 or more\), got 1e-39"):
        op(x, 0.5, 1e-39)
    for name, arguments in (("threshold", (10**400,)), ("bandwidth", (0.5, 10**400))):
        with pytest.raises(ValueError, match=f"{op.name}: {name} is an integer beyond what a float holds"):
            op(x, *arguments)
    with pytest.raises(TypeError, match=f"{op.name}: threshold has dtype torch.float8_e5m2, expected a real tensor"):
        op(x, torch.ones(3).to(torch.float8_e5m2))


def test_a_count_needs_a_dimension() -> None:
    with pytest.raises(ValueError, match=r"jumprelu_l0: input has shape \(\), expected at least one dimension"):
        tt.jumprelu_l0(torch.tensor(1.0), 0.5)


# ------------------------------------------------------------------------------------------------------------------ module


def test_module() -> None:
    module = tt.nn.JumpReLU(5, threshold=0.5, bandwidth=BANDWIDTH)
    x = inputs(0.5, torch.bfloat16, (8, 5), CPU)
    same(module(x).detach(), tt.jumprelu(x, 0.5))
    activations, count = module.l0(x)
    same(activations.detach(), tt.jumprelu(x, 0.5))
    count.sum().backward()
    equal(module.threshold.grad, truth(OPS[1], x, 0.5, BANDWIDTH, [torch.ones(8, 5)]).dt.sum(0).float())
    assert list(module.state_dict()) == ["threshold"]
    other = tt.nn.JumpReLU(5)
    other.load_state_dict(module.state_dict())
    equal(other.threshold, module.threshold)
    for copied in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        same(copied(x).detach(), module(x).detach())


def test_module_keeps_its_threshold_in_float32() -> None:
    net = torch.nn.Sequential(torch.nn.Linear(3, 5), tt.nn.JumpReLU(5, threshold=1 / 3))
    for cast in (net.bfloat16(), net.half(), net.to(torch.float16)):
        assert cast[0].weight.dtype.itemsize == 2
        assert cast[1].threshold.dtype == torch.float32
        assert cast[1].threshold[0].item() == torch.tensor(1 / 3).item()
    assert net.double()[1].threshold.dtype == torch.float64
    assert net.float()[1].threshold.dtype == torch.float32
    assert net.to("meta")[1].threshold.device.type == "meta"


def test_module_over_several_dimensions() -> None:
    module = tt.nn.JumpReLU((3, 5), threshold=0.5)
    x = torch.randn(2, 3, 5)
    same(module(x).detach(), tt.jumprelu(x, 0.5))


def test_module_without_memory_yet() -> None:
    module = tt.nn.JumpReLU(5, threshold=0.25, device="meta").to_empty(device="cpu")
    module.reset_parameters()
    equal(module.threshold.detach(), torch.full((5,), 0.25))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((2.5,), "num_features must be a size or a tuple of sizes, got 2.5"),
        ((-1,), "num_features must be a size or a tuple of sizes, got -1"),
        ((3, 0.1, -1.0), "bandwidth must be a finite number above 0, got -1.0"),
    ],
)
def test_module_arguments(arguments: tuple[Any, ...], words: str) -> None:
    with pytest.raises(ValueError, match=f"JumpReLU: {words}"):
        tt.nn.JumpReLU(*arguments)
