"""Calls that torch's own functions and modules take, taken here too, and refusals that say what to do instead."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.fx
import torch.nn.functional as F
from torch import Tensor, nn

import triton_thresh as tt

from .conftest import INTERPRETED

pytestmark = pytest.mark.skipif(INTERPRETED, reason="once is enough")

INTEGERS = [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64]


def outcome(call: Callable[[], Tensor]) -> Any:
    """The result's values and dtype, or that the call raised."""
    try:
        result = call()
    except (RuntimeError, OverflowError):
        return "raises"
    return result.dtype, result.tolist()


# ------------------------------------------------------------------------------------------------------------- threshold


def test_inplace_is_positional() -> None:
    given = list(inspect.signature(F.threshold).parameters)[1:]
    assert list(inspect.signature(tt.threshold).parameters)[1:] == given
    assert list(inspect.signature(tt.nn.Threshold).parameters) == given
    for inplace in (False, True):
        x, y = (torch.tensor([-1.0, 0.1, 0.5]) for _ in range(2))
        found = tt.threshold(x, 0.1, 20, inplace)
        assert torch.equal(found, F.threshold(y, 0.1, 20, inplace))
        assert torch.equal(x, y)
        assert (found is x) == inplace


NUMBERS = [
    *(
        -1,
        -3,
        -127,
        -128,
        -129,
        -255,
        -256,
        -257,
        0,
        1,
        127,
        128,
        255,
        256,
        True,
        False,
        2**31,
        -(2**31) - 1,
        2**63 - 1,
    ),
    *(
        2**63,
        -(2**63),
        -(2**63) - 1,
        2**64,
        10**30,
        0.0,
        -0.0,
        0.7,
        -0.3,
        -1.0,
        2.0,
        3.9,
        -128.5,
        255.5,
        256.0,
        1e10,
        -1e30,
    ),
    *(float("inf"), float("-inf"), float("nan")),
]


def as_torch_takes_it(number: float, dtype: torch.dtype) -> float:
    """255.5 without its fraction, which uint8 cannot hold: torch cuts it off since 2.15, and refused the number before."""
    return int(number) if number == 255.5 and dtype is torch.uint8 else number


@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
def test_numbers_on_integers_are_cast_as_torch_casts_them(dtype: torch.dtype) -> None:
    info = torch.iinfo(dtype)
    x = torch.tensor([0, 1, 2, 100, 126, 127, info.min, info.min + 1, info.max - 1, info.max], dtype=dtype)
    wrapped = 0
    for number in NUMBERS:
        for numbers in ((number, 7), (2, number)):
            known = [as_torch_takes_it(n, dtype) for n in numbers]
            expected = outcome(lambda known=known: F.threshold(x, *known))
            wrapped += dtype is torch.uint8 and expected != "raises" and number < 0
            for call in (
                lambda numbers=numbers: tt.threshold(x, *numbers),
                lambda numbers=numbers: tt.threshold(x.clone(), *numbers, True),
                lambda numbers=numbers: tt.nn.Threshold(*numbers)(x),
            ):
                assert outcome(call) == expected, numbers
        if abs(number) < 2**63 and not isinstance(number, bool):
            t = torch.tensor(number)
            assert outcome(lambda t=t: tt.threshold(x, t, 7)) == outcome(
                lambda number=number: F.threshold(x, as_torch_takes_it(number, dtype), 7)
            )
    assert wrapped == (2 * 6 if dtype is torch.uint8 else 0)


@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
def test_values_of_a_step_are_cast_as_torch_fills(dtype: torch.dtype) -> None:
    x = torch.tensor([0.0, 1.0])
    for number in NUMBERS:
        expected = outcome(lambda number=number: torch.full((2,), as_torch_takes_it(number, dtype), dtype=dtype))
        assert outcome(lambda number=number: tt.binary_threshold(x, -1.0, number, 0, dtype=dtype)) == expected, number


@pytest.mark.parametrize("number", [-1, -255, 3, 0.7])
def test_numbers_on_integers_compiled(number: float) -> None:
    torch.compiler.reset()
    x = torch.tensor([0, 1, 5, 254, 255], dtype=torch.uint8)
    compiled = torch.compile(lambda x: tt.threshold(x, number, number), fullgraph=True)
    assert torch.equal(compiled(x), F.threshold(x, number, number))


# --------------------------------------------------------------------------------------------------------------- targets


def cells() -> Iterator[tuple[str, Any, dict[str, Any]]]:
    channel = torch.tensor([0.3, 0.5, 0.7])
    for base in ("bce", "bce_with_logits", "mse"):
        for t in (0.5, channel):
            for rule in (tt.ByPrediction(t, 2.0, 0.5), tt.ByProximity(t, 0.4, 1.5), tt.ByLoss(t, 3.0)):
                yield base, rule, {}
                yield base, rule, {"weight": channel}
                if base == "bce_with_logits":
                    yield base, rule, {"pos_weight": channel}


def by_hand(base: str, rule: Any, x: Tensor, y: Tensor, rest: dict[str, Any]) -> Tensor:
    """The element loss in torch's own functions, times the rule's weight."""
    functions = {"bce": F.binary_cross_entropy, "mse": F.mse_loss}
    if base == "bce_with_logits":
        loss = F.binary_cross_entropy_with_logits(x, y, reduction="none", pos_weight=rest.get("pos_weight"))
    else:
        loss = functions[base](x, y, reduction="none")
    q = x.sigmoid() if base == "bce_with_logits" else x
    if isinstance(rule, tt.ByPrediction):
        w = torch.where(q >= rule.threshold, rule.weight_above, rule.weight_below)
    elif isinstance(rule, tt.ByProximity):
        w = 1 + rule.penalty_factor * (1 - (q - rule.threshold).abs() / rule.penalty_range).clamp(min=0)
    else:
        w = torch.where(loss > rule.loss_threshold, rule.penalty_factor, 1.0)
    return loss * w * rest.get("weight", 1.0)


def data(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    made = torch.rand(2, 6, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)
    return made[0].clone().requires_grad_(), made[1].clone().requires_grad_()


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_a_target_that_requires_grad(reduction: str) -> None:
    """Both gradients, those of both gradients, and their tangents are those of torch's own functions."""
    for base, rule, rest in cells():
        x, y = data()

        def loss(x: Tensor, y: Tensor, base: str = base, rule: Any = rule, rest: dict[str, Any] = rest) -> Tensor:
            return tt.threshold_loss(x, y, rule, base=base, reduction=reduction, **rest)

        def expected(x: Tensor, y: Tensor, base: str = base, rule: Any = rule, rest: dict[str, Any] = rest) -> Tensor:
            each = by_hand(base, rule, x, y, rest)
            return each if reduction == "none" else getattr(each, reduction)()

        outcomes = []
        for function in (loss, expected):
            output = function(x, y)
            g = torch.linspace(0.5, 2, output.numel(), dtype=x.dtype).view_as(output)
            first = torch.autograd.grad(output, (x, y), g, create_graph=True)
            second = torch.autograd.grad(sum(d.square().sum() for d in first), (x, y))
            tangents = torch.func.jvp(function, (x.detach(), y.detach()), (y.detach(), x.detach()))
            outcomes.append((output, *first, *second, *tangents))
        torch.testing.assert_close(*outcomes)
        alone = torch.autograd.grad(loss(x.detach(), y).sum(), y)
        torch.testing.assert_close(alone, torch.autograd.grad(expected(x.detach(), y).sum(), (y,)))
        torch.testing.assert_close(loss(x, y.detach()), outcomes[0][0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_dtypes_of_both_gradients(dtype: torch.dtype) -> None:
    x, y = data(dtype)
    wide = y.detach().double().requires_grad_()
    for target in (y, wide):
        loss = tt.threshold_bce_loss(x, target, 0.5, 1.0, 1.0)
        assert loss.dtype is dtype
        dx, dy = torch.autograd.grad(loss, (x, target))
        assert (dx.dtype, dy.dtype) == (dtype, target.dtype)
        a, b = (t.detach().float().requires_grad_() for t in (x, target))
        due = torch.autograd.grad(F.binary_cross_entropy(a, b), (a, b))
        torch.testing.assert_close(dx, due[0].to(dtype))
        torch.testing.assert_close(dy.to(dtype), due[1].to(dtype))


@pytest.mark.parametrize("name", ["threshold_bce_loss", "threshold_bce_with_logits_loss"])
def test_a_target_that_requires_grad_at_the_ends(name: str) -> None:
    torch_s = {
        "threshold_bce_loss": F.binary_cross_entropy,
        "threshold_bce_with_logits_loss": F.binary_cross_entropy_with_logits,
    }
    x = torch.tensor([0.0, 1.0, 0.0, 1.0, 1e-40, 0.5], requires_grad=True)
    y = torch.tensor([0.0, 1.0, 1.0, 0.0, 1.0, 0.5], requires_grad=True)
    found = torch.autograd.grad(getattr(tt, name)(x, y, 0.5, 1.0, 1.0), (x, y))
    torch.testing.assert_close(found, torch.autograd.grad(torch_s[name](x, y), (x, y)))


def test_a_target_that_requires_grad_compiled() -> None:
    torch.compiler.reset()
    compiled = torch.compile(lambda x, y: tt.threshold_bce_with_logits_loss(x, y, 0.6), fullgraph=True)
    x, y = data(torch.float32)
    found = torch.autograd.grad(compiled(x, y), (x, y))
    torch.testing.assert_close(found, torch.autograd.grad(tt.threshold_bce_with_logits_loss(x, y, 0.6), (x, y)))


def test_transforms_of_the_target() -> None:
    x, y = (t.detach() for t in data())
    for base, rule, rest in cells():

        def loss(y: Tensor, x: Tensor, base: str = base, rule: Any = rule, rest: dict[str, Any] = rest) -> Tensor:
            return tt.threshold_loss(x, y, rule, base=base, reduction="sum", **rest)

        slopes = torch.func.grad(loss)(y, x)
        due = torch.func.grad(lambda y: by_hand(base, rule, x, y, rest).sum())(y)  # noqa: B023
        torch.testing.assert_close(slopes, due)
        rows = torch.func.vmap(torch.func.grad(loss))(y, x)
        torch.testing.assert_close(rows, due)


OUTSIDE = [
    torch.tensor([-1.0, 1.0, 0.0, 0.5]),
    torch.tensor([0, 255, 1, 0], dtype=torch.uint8),
    torch.tensor([-1, 1, 0, 2]),
    torch.tensor([2.0, 0.0, 1.0, -1e-30]).bfloat16(),
    torch.tensor([1 + 1e-7, float("inf"), float("-inf"), float("nan")]),
    torch.tensor([1 + 2e-16, 1.0, -1e-300, 0.0], dtype=torch.float64),
]


@pytest.mark.parametrize(
    "rule", [tt.ByPrediction(0.5), tt.ByProximity(0.5), tt.ByLoss(0.5)], ids=lambda r: type(r).__name__
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("target", OUTSIDE, ids=str)
def test_targets_of_a_cross_entropy_outside_0_to_1(target: Tensor, dtype: torch.dtype, rule: Any) -> None:
    """NaN, loss and gradient, and nowhere else; however the target is read it counts in the compute type."""
    wide = torch.float64 if dtype is torch.float64 else torch.float32
    y = target.to(wide)
    inside = (y >= 0) & (y <= 1)
    p = torch.tensor([0.3, 0.6, 0.2, 0.9], dtype=dtype, requires_grad=True)
    due = tt.threshold_loss(p.detach(), torch.where(inside, y, 0.5), rule, base="bce", reduction="none")

    def check(values: Tensor, slopes: Tensor) -> None:
        assert torch.equal(values.isnan(), ~inside)
        assert torch.equal(slopes.isnan(), ~inside)
        torch.testing.assert_close(values[inside], due[inside])

    for given in (target, *([target.clone().requires_grad_()] if target.is_floating_point() else [])):
        loss = tt.threshold_loss(p, given, rule, base="bce", reduction="none")
        check(loss.detach(), torch.autograd.grad(loss.sum(), p)[0])
        for reduction in ("mean", "sum"):
            loss = tt.threshold_loss(p, given, rule, base="bce", reduction=reduction)
            assert loss.isnan() == (not inside.all())
            check(due.where(inside, torch.nan), torch.autograd.grad(loss, p)[0])

    def one(p: Tensor, y: Tensor) -> Tensor:
        return tt.threshold_loss(p, y, rule, base="bce", reduction="sum")

    check(torch.func.vmap(one)(p.detach(), target), torch.func.vmap(torch.func.grad(one))(p.detach(), target))


def test_targets_outside_0_to_1_compiled() -> None:
    torch.compiler.reset()
    compiled = torch.compile(lambda p, y: tt.threshold_bce_loss(p, y, reduction="none"), fullgraph=True)
    p = torch.tensor([0.3, 0.6, 0.9], requires_grad=True)
    loss = compiled(p, torch.tensor([-1.0, 1.0, 255.0]))
    loss.sum().backward()
    assert loss.isnan().tolist() == [True, False, True]
    assert p.grad is not None
    assert p.grad.isnan().tolist() == [True, False, True]


def test_targets_of_other_bases_may_be_any_number() -> None:
    x, y = torch.tensor([0.3, 0.6]), torch.tensor([-1.0, 2.0])
    for base, function in (("bce_with_logits", F.binary_cross_entropy_with_logits), ("mse", F.mse_loss)):
        found = tt.threshold_loss(x, y, tt.ByLoss(0.0, 1.0), base=base)
        torch.testing.assert_close(found, function(x, y))


@pytest.mark.parametrize("argument", ["weight", "weight_above"])
def test_what_the_words_advise_for_a_weight_is_right(argument: str) -> None:
    """The gradient that a product gives is not that of the detached weight, which is what the words used to say."""
    x, y = data()
    net = torch.tensor([0.5, 1.0, 2.0], dtype=x.dtype)
    weight = (x.detach() * net.requires_grad_()).sigmoid()
    with pytest.raises(ValueError, match=rf"{argument} requires grad.*reduction='none' and multiply"):
        tt.threshold_mse_loss(x, y.detach(), 0.5, **{argument: weight})
    loss = tt.threshold_mse_loss(x, y.detach(), 0.5, 1.0, 1.0, reduction="none")
    advised = (loss * weight).mean()
    due = ((x - y.detach()).square() * weight).mean()
    torch.testing.assert_close(
        torch.autograd.grad(advised, (x, net), retain_graph=True), torch.autograd.grad(due, (x, net))
    )


def test_a_threshold_from_the_data_while_training() -> None:
    x = torch.rand(8, requires_grad=True)
    for op in (tt.hardshrink, tt.threshold, tt.binary_threshold):
        with pytest.raises(ValueError, match=r"requires grad.*x\.detach\(\)\.mean\(\)"):
            op(x, x.mean())
        op(x, x.detach().mean())


# ---------------------------------------------------------------------------------------------------------------- jagged


def jagged(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    values = torch.linspace(-1, 1, 18, dtype=torch.float64).view(6, 3).to(dtype).requires_grad_()
    return values, torch.nested.nested_tensor_from_jagged(values, torch.tensor([0, 2, 2, 6]))


CHANNEL = torch.tensor([0.1, 0.2, 0.3])
RAGGED: dict[str, tuple[Callable[..., Any], bool]] = {
    "threshold": (lambda x, t: tt.threshold(x, 0.1, 20.0), False),
    "threshold per channel": (lambda x, t: tt.threshold(x, t, 20.0), False),
    "hardshrink": (lambda x, t: tt.hardshrink(x, 0.2), False),
    "hardshrink per channel": (lambda x, t: tt.hardshrink(x, t), False),
    "hardshrink by a 0-dim tensor": (lambda x, t: tt.hardshrink(x, t[0]), False),
    "hardshrink in place": (lambda x, t: tt.hardshrink(x * 1, 0.2, inplace=True), False),
    "softshrink": (lambda x, t: tt.softshrink(x, 0.2), False),
    "softshrink that learns": (lambda x, t: tt.softshrink(x, t), True),
    "binary_threshold": (lambda x, t: tt.binary_threshold(x, 0.2, 3.0, -1.0), False),
    "binary_threshold in bool": (lambda x, t: tt.binary_threshold(x, t, True, False, dtype=torch.bool), False),
    "jumprelu": (lambda x, t: tt.jumprelu(x, 0.2, 0.5), False),
    "jumprelu that learns": (lambda x, t: tt.jumprelu(x, t, 0.5), True),
    "jumprelu with input_gradient": (lambda x, t: tt.jumprelu(x, t, 0.5, input_gradient=True), True),
    "step that learns": (lambda x, t: tt.step(x, t, 0.5), True),
    "jumprelu_l0 that learns": (lambda x, t: tt.jumprelu_l0(x, t, 0.5), True),
    "threshold_grad": (lambda x, t: tt.threshold_grad(x, 0.5), False),
    "threshold_grad per channel": (lambda x, t: tt.threshold_grad(x, t), False),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", RAGGED)
def test_jagged_nested_tensors(name: str, dtype: torch.dtype) -> None:
    """Values and gradients are those of the values in a dense tensor; the structure is the input's."""
    call, learns = RAGGED[name]
    values, ragged = jagged(dtype)
    dense = values.detach().clone().requires_grad_()
    thresholds = [CHANNEL.clone().requires_grad_(learns) for _ in range(2)]
    found, due = call(ragged, thresholds[0]), call(dense, thresholds[1])
    found, due = (y if isinstance(y, tuple) else (y,) for y in (found, due))
    assert found[0].is_nested
    assert found[0].shape == ragged.shape
    assert all(torch.equal(y.values(), z) for y, z in zip(found, due, strict=True))
    _ = found[0] + ragged  # which torch refuses for other structures
    if not due[0].requires_grad:
        return
    upstream = [torch.linspace(-1, 1, z.numel()).view_as(z).to(z.dtype) for z in due]
    torch.autograd.backward([y.values() for y in found], upstream)
    torch.autograd.backward(list(due), upstream)
    assert torch.equal(values.grad, dense.grad)  # type: ignore[arg-type]
    if learns:
        torch.testing.assert_close(thresholds[0].grad, thresholds[1].grad)


def test_jagged_in_modules_and_compiled() -> None:
    torch.compiler.reset()
    values, ragged = jagged(torch.float32)
    net = nn.Sequential(tt.nn.Hardshrink(0.2), tt.nn.Softshrink(CHANNEL), tt.nn.JumpReLU(3, CHANNEL))
    assert torch.equal(net(ragged).values(), net(values))
    compiled = torch.compile(net, fullgraph=True)
    assert torch.equal(compiled(ragged).values(), net(values))


def test_jagged_and_losses() -> None:
    """torch's own losses take none either."""
    _, ragged = jagged(torch.float32)
    with pytest.raises(
        TypeError, match=r"layout torch.jagged, expected a dense .* pass the values\(\) of input and target"
    ):
        tt.threshold_mse_loss(ragged, ragged, 0.5)
    with pytest.raises(ValueError, match="expected the input's shape"):
        tt.threshold_mse_loss(torch.rand(3, 4, 3), ragged, 0.5)


def test_jagged_operands_of_another_structure() -> None:
    _, ragged = jagged(torch.float32)
    other = torch.nested.nested_tensor_from_jagged(torch.rand(6, 3), torch.tensor([0, 3, 5, 6]))
    with pytest.raises(ValueError, match="does not broadcast"):
        tt.hardshrink(ragged, other)
    each = torch.nested.nested_tensor_from_jagged(torch.full((6, 3), 0.2), ragged.offsets())
    assert torch.equal(tt.hardshrink(ragged, each).values(), tt.hardshrink(ragged.values(), 0.2))


# --------------------------------------------------------------------------------------------------------------- tracers

SETTINGS: dict[str, tuple[Any, ...]] = {
    "Threshold": (0.1, 2.0),
    "Hardshrink": (CHANNEL,),
    "Softshrink": (0.2,),
    "JumpReLU": (3, 0.2, 0.5),
    "BatchTopK": (1.5, 0.5),
    "BinaryThreshold": (0.2,),
    "ThresholdBCELoss": (),
    "ThresholdBCEWithLogitsLoss": (0.5,),
    "ThresholdMSELoss": (CHANNEL,),
    "ProximityMSELoss": (0.5,),
    "ExceedanceMSELoss": (),
    "SigmoidFocalLoss": (0.5, 1.0, "mean"),
    "AsymmetricLoss": (),
    "ThresholdLoss": (tt.ByOutcome(CHANNEL), tt.Focal()),
    "LinearThresholdLoss": (3, 3),
}


PARTS = ("triton_thresh.rules", "triton_thresh.bases")  # a graph makes rules and bases that hold tensors


def module(name: str) -> nn.Module:
    made: nn.Module = getattr(tt.nn, name)(*SETTINGS[name])
    return made


def test_every_module_is_here() -> None:
    assert set(SETTINGS) == set(tt.nn.__all__)


@pytest.mark.parametrize("name", SETTINGS)
def test_symbolic_trace_of_modules(name: str) -> None:
    """Each is a node, as torch's functions are; the graph trains what it has."""
    net = module(name)
    traced = torch.fx.symbolic_trace(net)
    x, y = torch.rand(4, 3, requires_grad=True), torch.rand(4, 3)
    arguments = (x, y) if name.endswith("Loss") else (x,)
    expected = net(*arguments)
    for graph in (traced, torch.fx.symbolic_trace(traced)):
        assert torch.equal(graph(*arguments), expected)
        calls = [node.target.__module__ for node in graph.graph.nodes if node.op == "call_function"]
        assert [name for name in calls if name not in PARTS] == ["triton_thresh.functional"]
    if expected.requires_grad:
        leaves = [x, *net.parameters()]
        due = torch.autograd.grad(expected.sum(), leaves)
        assert all(
            torch.equal(a, b) for a, b in zip(torch.autograd.grad(traced(*arguments).sum(), leaves), due, strict=True)
        )


class Net(nn.Module):
    """Functions by both of their names, a count, a logarithm, layers of torch."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(3, 3), nn.BatchNorm1d(3)
        self.activation = tt.nn.JumpReLU(3, 0.2, 0.5, parametrization="log")

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        h = tt.softshrink(tt.functional.hardshrink(self.norm(self.linear(x)), lambd=0.1), self.linear.bias.abs())
        activations, l0 = self.activation.l0(tt.threshold_grad(h, 1e-6))
        return tt.threshold_mse_loss(activations, y, 0.5) + 0.1 * l0.mean()


def test_symbolic_trace_of_functions() -> None:
    torch.manual_seed(0)
    net = Net().eval()
    traced = torch.fx.symbolic_trace(net)
    x, y = torch.rand(4, 3), torch.rand(4, 3)
    expected = net(x, y)
    assert torch.equal(traced(x, y), expected)
    parameters = list(net.parameters())
    found = torch.autograd.grad(traced(x, y), parameters, allow_unused=True)
    for a, b in zip(found, torch.autograd.grad(expected, parameters, allow_unused=True), strict=True):
        assert (a is b is None) or torch.equal(a, b)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", SETTINGS)
def test_script_says_what_to_do(name: str) -> None:
    for net in (module(name), nn.Sequential(module(name))):
        with pytest.raises(
            NotImplementedError, match=rf"{name}: torch.jit.script cannot .* torch.export or torch.jit.trace"
        ):
            torch.jit.script(net)
