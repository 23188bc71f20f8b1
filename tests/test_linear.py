"""The loss of a linear layer in chunks of labels: values and all gradients equal those of the formula, written out in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import triton_thresh as tt
from triton_thresh import linear, linear_threshold_loss

from .conftest import INTERPRETED

B, D, L, P = 7, 5, 53, 6
KINDS = ("dense", "labels", "coo", "csr")

pytestmark = pytest.mark.skipif(INTERPRETED, reason="the eager path: once is enough")


def layer(dtype: torch.dtype = torch.float64, batch: int = B, features: int = D, count: int = L) -> list[Tensor]:
    """Input, weight, bias and scale, all of which learn."""
    draw = torch.Generator().manual_seed(1)
    shapes = [(batch, features), (count, features), (count,), ()]
    made = [torch.randn(shape, generator=draw, dtype=torch.float64) for shape in shapes]
    made[3] = made[3].abs() + 0.5
    return [tensor.to(dtype).requires_grad_() for tensor in made]


def lists(batch: int = B, count: int = L, length: int = P) -> Tensor:
    """Labels of rows: duplicates, a row without any, padding anywhere."""
    labels = torch.randint(-1, count, (batch, length), generator=torch.Generator().manual_seed(2))
    if batch > 2 and length > 2:
        labels[2], labels[0, 1], labels[1, 0] = -1, labels[0, 0], -1
    return labels


def dense(labels: Tensor, count: int = L) -> Tensor:
    """The target that the lists stand for."""
    padded = torch.where(labels < 0, count, labels)
    return torch.zeros(*labels.shape[:-1], count + 1).scatter(-1, padded, 1.0)[..., :count]


def targets(kind: str, batch: int = B, count: int = L) -> dict[str, Tensor]:
    labels = lists(batch, count)
    if kind == "labels":
        return {"labels": labels}
    target = dense(labels, count)
    return {"target": {"dense": target, "coo": target.to_sparse(), "csr": target.to_sparse_csr()}[kind]}


def written(tensors: list[Tensor], target: Tensor, rule: Any = None, **options: Any) -> Tensor:
    """The formula, with all logits."""
    input, weight, bias, scale = tensors
    return tt.threshold_loss(scale * F.linear(input, weight) + bias, target, rule, **options)


def ours(tensors: list[Tensor], rule: Any = None, **options: Any) -> Tensor:
    input, weight, bias, scale = tensors
    return linear_threshold_loss(input, weight, rule=rule, bias=bias, scale=scale, **options)


def assert_equal(made: Tensor, expected: Tensor, one: list[Tensor], other: list[Tensor], **tolerance: float) -> None:
    """Loss and gradients, for an upstream gradient of 3."""
    tolerance = tolerance or dict(rtol=1e-10, atol=1e-12)
    (3 * made).backward()
    (3 * expected).backward()
    torch.testing.assert_close(made.double(), expected.double(), **tolerance)
    for a, b in zip(one, other):
        torch.testing.assert_close(a.grad.double(), b.grad.double(), **tolerance)  # type: ignore[union-attr]


# ------------------------------------------------------------------------------------------------- values and gradients


@pytest.mark.parametrize("chunk", [None, 7, 1])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "part", [(tt.BCEWithLogits(), tt.ByPrediction(0.6, 2.0, 0.5)), (tt.Focal(), None), (tt.Asymmetric(), None)], ids=str
)
def test_float64(part: Any, kind: str, chunk: int | None) -> None:
    base, rule = part
    one, other = layer(), layer()
    made = ours(one, rule, base=base, chunk_size=chunk, **targets(kind))
    assert_equal(made, written(other, dense(lists()), rule, base=base), one, other)


@pytest.mark.parametrize("rule", [tt.ByOutcome(), tt.ByConfidence(), tt.ByProximity(0.4), tt.ByLoss()], ids=str)
def test_rules(rule: Any) -> None:
    one, other = layer(), layer()
    made = ours(one, rule, reduction="sum", labels=lists(), chunk_size=20)
    assert_equal(made, written(other, dense(lists()), rule, reduction="sum"), one, other)


@pytest.mark.parametrize("base", [tt.MSE(), tt.Huber(0.5), tt.Hinge()], ids=str)
def test_other_bases(base: Any) -> None:
    one, other = layer(), layer()
    made = ours(one, base=base, target=dense(lists()), chunk_size=20)
    assert_equal(made, written(other, dense(lists()), base=base), one, other)


def test_base_of_probabilities() -> None:
    input, weight = (torch.rand(4, 3, dtype=torch.float64), torch.rand(6, 3, dtype=torch.float64) / 3)
    target = torch.rand(4, 6)
    made = linear_threshold_loss(input, weight, target, base="bce", chunk_size=4)
    torch.testing.assert_close(made, F.binary_cross_entropy(input @ weight.T, target.double()))


@pytest.mark.parametrize("shape", [(), (L,), (B, 1), (B, L)], ids=str)
def test_operands_are_sliced(shape: tuple[int, ...]) -> None:
    one, other = layer(), layer()
    operand = torch.rand(shape, generator=torch.Generator().manual_seed(3)) + 0.25
    rule, base = tt.ByPrediction(operand / 2, operand, 0.5), tt.BCEWithLogits(operand)
    made = ours(one, rule, base=base, labels=lists(), chunk_size=20)
    assert_equal(made, written(other, dense(lists()), rule, base=base), one, other)


def test_options() -> None:
    one, other = layer(), layer()
    options = dict(label_smoothing=0.1, divisor=torch.tensor(9.0))
    made = ours(one, labels=lists(), chunk_size=20, **options)
    assert_equal(made, written(other, dense(lists()), **options), one, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ["dense", "labels"])
def test_other_dtypes(kind: str, dtype: torch.dtype) -> None:
    """The error is about that of the formula in the same dtype."""
    one, other, true = layer(dtype), layer(dtype), [t.detach().double().requires_grad_() for t in layer(dtype)]
    made, formula, exact = (
        ours(one, chunk_size=20, **targets(kind)),
        written(other, dense(lists())),
        written(true, dense(lists())),
    )
    assert made.dtype is dtype
    for loss in (made, formula, exact):
        (3 * loss).backward()
    slack = 4 * torch.finfo(dtype).eps
    for a, b, c in zip(one, other, true):
        assert a.grad is not None
        assert b.grad is not None
        assert c.grad is not None
        assert a.grad.dtype is dtype
        error, allowed = ((g.grad.double() - c.grad).abs().max() for g in (a, b))
        assert error <= 2 * allowed + slack * c.grad.abs().max()


@pytest.mark.parametrize(("batch", "features", "count"), [(1, 5, 53), (7, 1, 53), (7, 5, 1), (1, 1, 1)])
@pytest.mark.parametrize("kind", ["dense", "labels", "csr"])
def test_single(kind: str, batch: int, features: int, count: int) -> None:
    sizes = dict(batch=batch, features=features, count=count)
    one, other = layer(**sizes), layer(**sizes)  # type: ignore[arg-type]
    made = ours(one, **targets(kind, batch, count))
    assert_equal(made, written(other, dense(lists(batch, count), count)), one, other)


@pytest.mark.parametrize("kind", ["dense", "labels", "coo"])
def test_more_rows_than_a_launch_has_in_its_second_dimension(kind: str) -> None:
    sizes = dict(batch=70_000, features=2, count=3)
    one, other = layer(**sizes), layer(**sizes)  # type: ignore[arg-type]
    made = ours(one, chunk_size=2, **targets(kind, 70_000, 3))
    assert_equal(made, written(other, dense(lists(70_000, 3), 3)), one, other)


def test_empty() -> None:
    one = layer(batch=0)
    loss = ours(one, labels=torch.empty((0, 3), dtype=torch.int64), reduction="sum")
    loss.backward()
    assert loss == 0
    assert all(t.grad is not None and not t.grad.any() for t in one)
    assert ours(layer(batch=0), target=torch.empty(0, L)).isnan()


@pytest.mark.parametrize(
    "labels", [torch.empty((B, 0), dtype=torch.int64), torch.full((B, 2), -1)], ids=["none", "padding"]
)
def test_rows_without_labels(labels: Tensor) -> None:
    one, other = layer(), layer()
    assert_equal(ours(one, labels=labels), written(other, torch.zeros(B, L)), one, other)


def test_leading_dimensions_and_strides() -> None:
    input = torch.randn(5, 2, 3, dtype=torch.float64).permute(1, 2, 0).requires_grad_()
    weight = torch.randn(5, 11, dtype=torch.float64).T.requires_grad_()
    target = torch.rand(11, 2, 3).permute(1, 2, 0)
    rule = tt.ByPrediction(torch.rand(2, 3, 1))
    made = linear_threshold_loss(input, weight, target, rule, bias=torch.tensor(0.5), chunk_size=4)
    expected = tt.threshold_loss(F.linear(input, weight) + 0.5, target, rule)
    torch.testing.assert_close(made, expected, rtol=1e-10, atol=0)
    grads = [torch.autograd.grad(loss, (input, weight)) for loss in (made, expected)]
    torch.testing.assert_close(*grads, rtol=1e-10, atol=1e-14)
    coo = target.round().to_sparse()
    made = linear_threshold_loss(input, weight, coo, chunk_size=4)
    torch.testing.assert_close(made, tt.threshold_loss(F.linear(input, weight), target.round()), rtol=1e-10, atol=0)


def test_bias_of_one_number() -> None:
    one, other = layer(), layer()
    one[2] = torch.tensor(-0.5, dtype=torch.float64, requires_grad=True)
    other[2] = one[2].detach().clone().requires_grad_()
    assert_equal(ours(one, labels=lists(), chunk_size=20), written(other, dense(lists())), one, other)


def test_sparse_values_are_targets_and_repeated_entries_count_once() -> None:
    one, other = layer(), layer()
    index = torch.tensor([[0, 0, 3], [4, 4, 9]])
    coo = torch.sparse_coo_tensor(index, torch.tensor([0.5, 0.5, 0.25]), (B, L))
    target = torch.zeros(B, L)
    target[0, 4], target[3, 9] = 0.5, 0.25
    assert_equal(ours(one, target=coo, chunk_size=5), written(other, target), one, other)


# ------------------------------------------------------------------------------------------------------------- autograd


def _second(loss: Tensor, tensors: list[Tensor]) -> list[Tensor]:
    first = torch.autograd.grad(loss, tensors, create_graph=True)
    return list(torch.autograd.grad(sum(g.square().sum() for g in first), tensors))


def test_second_backward_and_double_backward() -> None:
    one = layer()
    loss = ours(one, labels=lists(), chunk_size=20)
    loss.backward(retain_graph=True)
    first = [t.grad.clone() for t in one]  # type: ignore[union-attr]
    loss.backward()
    torch.testing.assert_close([t.grad for t in one], [2 * g for g in first])
    one, other = layer(), layer()
    made = _second(ours(one, labels=lists(), chunk_size=20), one)
    torch.testing.assert_close(made, _second(written(other, dense(lists())), other), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("wanted", range(4))
def test_one_gradient_alone(wanted: int) -> None:
    one, other = layer(), layer()
    for i, (a, b) in enumerate(zip(one, other)):
        if i != wanted:
            a.requires_grad_(False), b.requires_grad_(False)
    ours(one, labels=lists(), chunk_size=20).backward()
    written(other, dense(lists())).backward()
    torch.testing.assert_close(one[wanted].grad, other[wanted].grad, rtol=1e-10, atol=1e-12)
    assert all(t.grad is None for i, t in enumerate(one) if i != wanted)


def test_gradcheck() -> None:
    tensors = layer(batch=2, features=2, count=5)
    labels = torch.tensor([[1, -1], [0, 4]])
    call: Callable[..., Tensor] = lambda *given: ours(list(given), labels=labels, chunk_size=2)  # noqa: E731
    assert torch.autograd.gradcheck(call, tensors)
    assert torch.autograd.gradgradcheck(call, tensors)


def test_transforms() -> None:
    input, weight, bias, _ = (t.detach() for t in layer())
    labels = lists()

    def loss(input: Tensor, labels: Tensor) -> Tensor:
        return linear_threshold_loss(input, weight, bias=bias, labels=labels)

    each = torch.func.vmap(torch.func.grad(loss))(input, labels)
    rows = [torch.func.grad(loss)(row, own) for row, own in zip(input, labels)]
    torch.testing.assert_close(each, torch.stack(rows))


def test_the_callers_tensors_stay_as_they_were() -> None:
    one, kept = layer(), layer()
    labels, target = lists(), dense(lists())
    ours(one, labels=labels).backward()
    ours(one, target=target).backward()
    torch.testing.assert_close([*one, labels, target], [*kept, lists(), dense(lists())], rtol=0, atol=0)


def test_autocast() -> None:
    tensors = layer(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = ours(tensors, labels=lists(), chunk_size=20)
    loss.backward()
    halves = [
        t.detach().bfloat16().double() if i < 2 else t.detach().double() for i, t in enumerate(layer(torch.float32))
    ]
    torch.testing.assert_close(loss.double(), written(halves, dense(lists())), rtol=1e-2, atol=0)
    assert loss.dtype is torch.float32
    assert all(t.grad is not None and t.grad.dtype is torch.float32 for t in tensors)


@pytest.mark.parametrize(
    ("one", "other"), [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32), (torch.float16, torch.float32)]
)
def test_autocast_takes_what_a_linear_layer_takes(one: torch.dtype, other: torch.dtype) -> None:
    input, weight, bias, scale = layer(torch.float32)
    given = [input.detach().to(one).requires_grad_(), weight.detach().to(other).requires_grad_()]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert F.linear(*given).dtype is torch.bfloat16
        made = ours([*given, bias, scale], labels=lists(), chunk_size=20)
        expected = written([*given, bias, scale], dense(lists()))
    assert made.dtype is torch.float32
    torch.testing.assert_close(made, expected, rtol=1e-2, atol=0)
    for found, like in zip(torch.autograd.grad(made, given), given):
        assert found.dtype is like.dtype
        assert found.any()


def test_autocast_leaves_float64_alone() -> None:
    input, weight, *_ = layer()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = linear_threshold_loss(input, weight, labels=lists())
        with pytest.raises(TypeError, match=r"weight has dtype torch\.bfloat16, expected the input's torch\.float64"):
            linear_threshold_loss(input, weight.float(), labels=lists())
    torch.testing.assert_close(loss.double(), tt.threshold_loss(F.linear(input, weight), dense(lists())))


def test_float16_gradients_do_not_underflow() -> None:
    """The upstream gradient meets them in float32, so a GradScaler's factor comes in time."""
    input, weight, bias, _scale = layer(torch.float16)
    loss = linear_threshold_loss(input, weight, labels=lists(), divisor=1e9, bias=bias)
    loss.backward(torch.tensor(65504.0, dtype=torch.float16))
    true = [t.detach().double().requires_grad_() for t in (input, weight, bias)]
    tt.threshold_loss(F.linear(*true), dense(lists()), divisor=1e9).backward(torch.tensor(65504.0).double())
    assert weight.grad is not None
    assert true[1].grad is not None
    torch.testing.assert_close(weight.grad.double(), true[1].grad, rtol=0.05, atol=1e-6)


def test_compile_makes_one_op() -> None:
    from torch._inductor.compile_fx import compile_fx

    graphs: list[torch.fx.GraphModule] = []
    labels = lists()

    def backend(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        graphs.append(graph)
        return compile_fx(graph, inputs)

    def step(*tensors: Tensor) -> Tensor:
        return 2 * ours(list(tensors), tt.ByPrediction(), labels=labels, chunk_size=20)

    one, other = layer(torch.float32), layer(torch.float32)
    made, expected = torch.compile(step, fullgraph=True, backend=backend)(*one), step(*other)
    made.backward()
    expected.backward()
    torch.testing.assert_close(made, expected)
    torch.testing.assert_close([t.grad for t in one], [t.grad for t in other])
    called = [node.target for graph in graphs for node in graph.graph.nodes if node.op == "call_function"]
    assert torch.ops.triton_thresh.linear_loss.default in called
    assert F.linear not in called


def test_export_takes_the_formula() -> None:
    nodes = torch.export.export(Exported(), tuple(layer())).graph.nodes
    assert not any("triton_thresh" in str(node.target) for node in nodes)


class Exported(torch.nn.Module):
    def forward(self, *tensors: Tensor) -> Tensor:
        return ours(list(tensors), target=torch.zeros(B, L))


# ------------------------------------------------------------------------------------------------------------- memory, host


def test_memory_does_not_hold_the_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    """No tensor that the op makes is larger than a chunk, the gradients aside."""
    largest = 0
    monkeypatch.setattr(linear, "CHUNK_BYTES", 1 << 14)

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest
            found = function(*args, **(kwargs or {}))
            for each in found if isinstance(found, (tuple, list)) else [found]:
                if isinstance(each, Tensor) and each.shape != weight.shape:
                    largest = max(largest, each.numel() * each.element_size())
            return found

    weight = torch.randn(4000, 4)
    given = (torch.randn(32, 4), weight, None, None, None, *linear._listed(lists(32, 4000), 32))
    spec, operands = linear._specified(given[0], weight, "bce_with_logits", None, "mean", None, 0.0)
    with Watch():
        linear._forward(*given, operands, spec, "eager", 0, [True, True, False, False])
    assert largest <= 1 << 14


@pytest.mark.parametrize("chunk", [7, L])
@pytest.mark.parametrize("kind", ["labels", "coo", "csr"])
def test_a_device_scatters_what_a_cpu_does(kind: str, chunk: int) -> None:
    """All entries each time instead of a chunk's own. The buffer is clear again after each chunk."""
    marks = linear._listed(lists(), B) if kind == "labels" else linear._marked(targets(kind)["target"], B)
    for on_device in (False, True):
        scatter = linear._Scatter(marks, B, L, chunk)
        if on_device:
            scatter._bounds = None
        parts = []
        for start in range(0, L, chunk):
            parts.append(scatter.fill(start, min(chunk, L - start)).clone())
            scatter.clear()
            assert not scatter._buffer.any()
        torch.testing.assert_close(torch.cat(parts, 1).float(), dense(lists()), rtol=0, atol=0)


class Reads(torch.utils._python_dispatch.TorchDispatchMode):
    """Counts calls that make the host wait for a device."""

    count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        names = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select")
        self.count += any(function.name() == f"aten::{name}" for name in names)
        return function(*args, **(kwargs or {}))


def test_no_host_read_for_a_chunk() -> None:
    """A call reads as much on the host with 53 chunks as with one."""
    input, weight, bias, scale = layer(torch.float32)
    for given in ((dense(lists()), None, None, None), (None, *linear._listed(lists(), B))):
        reads = []
        for chunk in (1, L):
            spec, operands = linear._specified(input, weight, tt.Focal(), None, "mean", None, 0.0)
            with Reads() as seen:
                linear._forward(input, weight, bias, scale, *given, operands, spec, "eager", chunk, [True] * 4)
            reads.append(seen.count)
        assert reads[0] == reads[1]


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16], ids=str
)  # without CUDA a float16 chunk cannot be copied to
@pytest.mark.parametrize("kind", KINDS)
def test_a_device_is_never_waited_for(kind: str, dtype: torch.dtype) -> None:
    """Tensors of a pretended device have no values to read; nor may a mask select, whose result would have to be counted."""
    marks = None if kind == "dense" else linear._listed(lists(), B)
    if kind in ("coo", "csr"):
        marks = linear._marked(targets(kind)["target"], B)
    with FakeTensorMode(allow_non_fake_inputs=True):
        input, weight, bias, scale = (torch.empty_like(t, device="cuda", requires_grad=False) for t in layer(dtype))
        parts = (
            (None,) * 3
            if marks is None
            else [t if t is None else torch.empty(t.shape, dtype=t.dtype, device="cuda") for t in marks]
        )
        given = (torch.empty(B, L, device="cuda") if marks is None else None, *parts)
        spec, operands = linear._specified(input, weight, tt.Focal(), None, "mean", None, 0.0)
        found = linear._forward(input, weight, bias, scale, *given, operands, spec, "eager", 7, [True] * 4)
    assert all(t is not None and t.is_cuda for t in found)


# --------------------------------------------------------------------------------------------------------------- errors

REFUSED: dict[str, tuple[type[Exception], str, dict[str, Any]]] = {
    "none": (ValueError, "threshold_loss", dict(reduction="none")),
    "unknown": (ValueError, "reduction", dict(reduction="max")),
    "both": (ValueError, "both", dict(target=torch.zeros(B, L))),
    "neither": (ValueError, "neither", dict(labels=None)),
    "float labels": (TypeError, "int64", dict(labels=torch.zeros(B, P))),
    "int32 labels": (TypeError, "int64", dict(labels=torch.zeros(B, P, dtype=torch.int32))),
    "rows": (ValueError, r"\(3, 6\)", dict(labels=torch.zeros(3, P, dtype=torch.int64))),
    "too large": (ValueError, "53 in row 1", dict(labels=torch.tensor([[0], [53], *[[-1]] * 5]))),
    "too small": (ValueError, "-2 in row 6", dict(labels=torch.tensor([*[[-1]] * 6, [-2]]))),
    "smoothing": (ValueError, "label_smoothing", dict(base="mse", label_smoothing=0.1)),
    "ranks": (ValueError, "ByRank compares the losses of all elements.*threshold_loss", dict(rule=tt.ByRank())),
    "confidence": (ValueError, "ByConfidence", dict(base="mse", rule=tt.ByConfidence())),
    "divisor": (ValueError, "divisor", dict(reduction="sum", divisor=3.0)),
    "learning": (ValueError, "target requires grad", dict(labels=None, target=torch.zeros(B, L, requires_grad=True))),
    "learning threshold": (
        ValueError,
        "requires grad",
        dict(rule=tt.ByPrediction(torch.tensor(0.5, requires_grad=True))),
    ),
    "shape": (ValueError, "target has shape", dict(labels=None, target=torch.zeros(B, L + 1))),
    "complex": (TypeError, "target has dtype", dict(labels=None, target=torch.zeros(B, L, dtype=torch.complex64))),
    "base": (ValueError, "base", dict(base="l1")),
    "rule": (TypeError, "rule", dict(rule="rule")),
    "chunk": (ValueError, "chunk_size", dict(chunk_size=0)),
    "bias": (ValueError, "bias has shape", dict(bias=torch.zeros(3, dtype=torch.float64))),
    "scale": (ValueError, "scale has shape", dict(scale=torch.zeros(1, dtype=torch.float64))),
    "weight": (TypeError, "weight has dtype", dict(weight=torch.zeros(L, D))),
    "features": (ValueError, "weight has shape", dict(weight=torch.zeros(L, D + 1, dtype=torch.float64))),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(case: str) -> None:
    kind, words, options = REFUSED[case]
    input, weight, *_ = layer()
    given: dict[str, Any] = {"weight": weight, "labels": lists(), **options}
    with pytest.raises(kind, match=f"linear_threshold_loss: .*{words}"):
        linear_threshold_loss(input, **given)


# --------------------------------------------------------------------------------------------------------------- module


def test_module() -> None:
    torch.manual_seed(0)
    module = tt.nn.LinearThresholdLoss(D, L, tt.ByPrediction(0.6), base=tt.Focal(), dtype=torch.float64)
    torch.manual_seed(0)
    plain = torch.nn.Linear(D, L, dtype=torch.float64)
    plain.load_state_dict(module.state_dict())
    input = layer()[0].detach()
    assert torch.equal(module.logits(input), plain(input))
    loss = module(input, labels=lists())
    expected = tt.threshold_loss(plain(input), dense(lists()), tt.ByPrediction(0.6), base=tt.Focal())
    loss.backward()
    expected.backward()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(module.weight.grad, plain.weight.grad)
    torch.testing.assert_close(module(input, dense(lists())), loss)
    without = tt.nn.LinearThresholdLoss(D, L, bias=False)
    assert without.bias is None
    assert "bias=False" in repr(without)


# -------------------------------------------------------------------------------------------------------------- recipes


def test_siglip_equals_open_clips() -> None:
    """SigLipLoss: logits * exp(logit_scale) + logit_bias, labels 2 eye - 1, -logsigmoid(labels * logits).sum() / B."""
    batch, width = 9, 4
    draw = torch.Generator().manual_seed(5)
    image, text = (F.normalize(torch.randn(batch, width, generator=draw, dtype=torch.float64)) for _ in range(2))
    scale, bias = torch.tensor(math.log(10.0), dtype=torch.float64), torch.tensor(-10.0, dtype=torch.float64)
    one = [t.clone().requires_grad_() for t in (image, text, scale, bias)]
    other = [t.clone().requires_grad_() for t in (image, text, scale, bias)]
    labels = torch.arange(batch)[:, None]
    loss = linear_threshold_loss(
        one[0], one[1], labels=labels, scale=one[2].exp(), bias=one[3], divisor=batch, chunk_size=4
    )
    logits = other[2].exp() * other[0] @ other[1].T + other[3]
    expected = -F.logsigmoid((2 * torch.eye(batch) - 1) * logits).sum() / batch
    loss.backward()
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close([t.grad for t in one], [t.grad for t in other], rtol=1e-10, atol=1e-13)


# --------------------------------------------------------------------------------------------------------- closed forms


@pytest.mark.parametrize(
    "base",
    [
        *[tt.Focal(alpha, gamma) for alpha in (0.25, None) for gamma in (0, 1, 2)],
        *[tt.Asymmetric(4, positive, clip) for positive in (0, 1, 4) for clip in (0, 0.05)],
        tt.Asymmetric(0, 1, 0.05),
        tt.Asymmetric(detach_focal=True),
    ],
    ids=str,
)
def test_closed_forms_match_the_formula_and_its_tape(base: Any) -> None:
    """At infinities, saturation, the clamps and soft targets too."""
    inf = math.inf
    points = torch.tensor([-inf, -1e4, -50.0, -18.4, -5, -3.1, -1, 0, 2, 17, 18.5, 60, 1e4, inf], dtype=torch.float64)
    x = points.repeat_interleave(4).requires_grad_()
    y = torch.tensor([0.0, 1.0, 0.3, 0.999], dtype=torch.float64).repeat(len(points))
    loss = base.loss(x, y)
    (tape,) = torch.autograd.grad(loss.sum(), x)
    torch.testing.assert_close(base.value(x.detach(), y), loss.detach(), rtol=1e-9, atol=1e-13)
    torch.testing.assert_close(base.slope(x.detach(), y), tape, rtol=1e-9, atol=1e-13)


def test_under_another_default_device() -> None:
    """Tensors of a CPU stay there, whatever device new tensors get."""
    input, weight, labels = torch.ones(2, 3), torch.ones(5, 3), torch.tensor([[1], [4]])
    loss = linear_threshold_loss(input, weight, labels=labels, chunk_size=2)
    with torch.device("meta"):
        found = linear_threshold_loss(input, weight, labels=labels, chunk_size=2)
    assert torch.equal(found, loss)
