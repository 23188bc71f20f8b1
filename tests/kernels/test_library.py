"""torch.ops.triton_thresh on Triton: compiled and exported programs hold the ops, whose kernels give what plain calls give."""

from __future__ import annotations

import io

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.library import opcheck

import triton_thresh as tt
from triton_thresh import gates, tuning

from ..calls import Case
from ..gates import upstream
from ..ops import FUSED, OURS, SHAPE, Called, Recorder, compiled, held, op_of, recorded
from ..rows import OPS, Loss
from .test_features import agree, outcome, plain

SIZES = (SHAPE, (5, 10), (37, 16), (64, 64))  # of three power-of-two buckets
every_case = pytest.mark.parametrize("case", FUSED, ids=str)


@every_case
def test_opcheck(case: Case, device: torch.device) -> None:
    for call in recorded(case, device):
        opcheck(*call)


def test_opcheck_without_gradients_and_of_codes(device: torch.device) -> None:
    for case in (FUSED[0], FUSED[-1]):
        call = recorded(case, device)[0]
        opcheck(call.op, tuple(a.detach() if isinstance(a, Tensor) else a for a in call.args))
    backward = recorded(FUSED[-1], device)[1]
    _, _, _, codes, *rest = backward.args
    opcheck(OURS.gate_bits.default, (torch.float32, codes, *rest))


@every_case
def test_ops_give_what_calls_give(case: Case, device: torch.device) -> None:
    """Values, gradients once and again, gradients of gradients, and for several upstream gradients at once."""
    leaves = case.leaves(device, shape=SHAPE)
    expected = plain(case, leaves)
    again = case(*leaves)
    g = upstream(again.detach(), special=False).requires_grad_()
    gradients = torch.autograd.grad(again, leaves, g, create_graph=True)
    twice = torch.autograd.grad([each.sum() for each in gradients if each.requires_grad], g)
    with Recorder() as recorder:
        output = case(*leaves)
    assert [call.op for call in recorder.calls] == [getattr(OURS, op_of(case)).default]
    agree(case, outcome(output, leaves, retain_graph=True), expected)
    agree(case, outcome(output, leaves, retain_graph=True), expected)
    gradients = torch.autograd.grad(output, leaves, g, create_graph=True)
    agree(case, [each.detach() for each in gradients], expected[1:])
    agree(case, torch.autograd.grad([each.sum() for each in gradients if each.requires_grad], g), twice)
    several = torch.stack([g.detach(), 2 * g.detach()])
    batched = torch.autograd.grad(output, leaves, several, is_grads_batched=True)
    agree(case, [each[1] for each in batched], [2 * each for each in expected[1:]])


@pytest.mark.slow
@every_case
def test_saved_bytes(case: Case, device: torch.device) -> None:
    """Of a loss whose gradient is ready that gradient; else its inputs; of a gate two bits an element, in at most twice that."""
    call, _ = compiled(case.__call__)
    leaves = case.leaves(device, shape=(64, 128))
    saved: dict[int, Tensor] = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.setdefault(id(t), t), lambda t: t):
        output = call(*leaves)
    n, size = leaves[0].numel(), case.dtype.itemsize
    bits = 2 if case.kind.startswith("learned") else 1
    found = sum(
        t.numel() * t.element_size() for t in saved.values() if t.shape not in {leaf.shape for leaf in leaves[1:]}
    )
    if not isinstance(case.op, Loss):
        assert n * bits // 8 <= found <= n * bits // 4 + 1024
    elif case.reduction == "mean":
        assert n * size <= found <= n * size + 1024
    else:
        operands = 4 * 4 * n if case.kind == "element" else 2048
        assert 2 * n * size <= found <= 2 * n * size + operands
    assert output.requires_grad


@pytest.mark.slow
@pytest.mark.parametrize("case", [FUSED[0], FUSED[5]], ids=str)
def test_inductor(case: Case, device: torch.device) -> None:
    call, counter = compiled(case.__call__, "inductor")
    leaves = case.leaves(device, shape=SHAPE)
    agree(case, outcome(call(*leaves), leaves), plain(case, leaves))
    assert [held(graph) for graph in counter.graphs] == [[op_of(case)]]


@pytest.mark.parametrize("kind", ["grad", "vmap"])
@pytest.mark.parametrize("case", [FUSED[0], FUSED[3]], ids=str)
def test_transforms_inside_a_compiled_function_see_formulas(case: Case, kind: str, device: torch.device) -> None:
    points = [leaf.detach() for leaf in case.leaves(device, shape=SHAPE)]

    def transformed(*points: Tensor) -> Tensor:
        if kind == "grad":
            return torch.func.grad(lambda x: case(x, *points[1:]).sum())(points[0])
        return torch.func.vmap(lambda x: case(x, *points[1:]))(points[0])

    call, counter = compiled(transformed)
    agree(case, call(*points), transformed(*points))
    assert [held(graph) for graph in counter.graphs] == [[]]


def test_exported_without_gradients_used_with_them(device: torch.device) -> None:
    """Nothing was saved for backward: the op saves its inputs."""
    case = FUSED[3]
    leaves = case.leaves(device, shape=SHAPE)
    program = torch.export.export(Called(case), tuple(leaf.detach() for leaf in leaves))
    assert held(program.graph_module) == ["gate"]
    agree(case, outcome(program.module()(*leaves), leaves), plain(case, leaves))


def test_backward_ops_are_not_differentiated(device: torch.device) -> None:
    op, args, _ = recorded(FUSED[1], device)[1]
    with pytest.raises(RuntimeError, match="differentiate the forward op twice"):
        op(args[0].requires_grad_(), *args[1:]).sum().backward()


@pytest.mark.slow
@every_case
def test_compiled_for_every_size(case: Case, device: torch.device) -> None:
    """One graph, which holds the op; values and gradients are those of the plain call."""
    call, counter = compiled(case.__call__, dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for shape in SIZES:
            leaves = case.leaves(device, shape=shape)
            agree(case, outcome(call(*leaves), leaves), plain(case, leaves))
    assert held(counter.graphs[-1]) == [op_of(case)]


def test_compiled_with_one_dynamic_dimension(device: torch.device) -> None:
    case = FUSED[0]
    call, counter = compiled(case.__call__)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for rows in (6, 9, 64):
            (x,) = case.leaves(device, shape=(rows, 10))
            torch._dynamo.mark_dynamic(x, 0)
            agree(case, outcome(call(x), [x]), plain(case, [x]))
    assert held(counter.graphs[-1]) == ["loss"]


@pytest.mark.slow
@pytest.mark.parametrize("case", [case for case in FUSED if case.kind in ("learned", "number")], ids=str)
def test_strided_inputs(case: Case, device: torch.device) -> None:
    """Dense but permuted, and not dense: the layout of the output and the gradient too."""
    for lay in (lambda x: x.t().contiguous().t(), lambda x: x.repeat_interleave(2, 1)[:, ::2]):
        x, *learning = case.leaves(device, shape=SHAPE)
        leaves = [lay(x.detach()).requires_grad_(), *learning]
        call, _ = compiled(case.__call__)
        found, expected = outcome(call(*leaves), leaves), plain(case, leaves)
        agree(case, found, expected)
        assert [t.stride() for t in found] == [t.stride() for t in expected]


def test_exported_and_loaded(device: torch.device) -> None:
    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.activation = tt.nn.JumpReLU(10, 0.25, 0.5).to(device)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            kept, count = self.activation.l0(x)
            return tt.threshold_mse_loss(kept, y, 0.5) + count.mean()

    model = Model()
    x, y = torch.linspace(-1, 1, 120, device=device).view(2, 6, 10)
    rows = {0: torch.export.Dim.DYNAMIC}
    program = torch.export.export(model, (x, y), dynamic_shapes=(rows, rows))
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    buffer.seek(0)
    loaded = torch.export.load(buffer).module()
    assert held(program.graph_module) == ["gate", "loss"]
    for size in (6, 3):
        found, expected = (m(x[:size], y[:size]) for m in (loaded, model))
        torch.testing.assert_close(found, expected)
        (gradient,) = torch.autograd.grad(found, list(loaded.parameters()))
        torch.testing.assert_close((gradient,), torch.autograd.grad(expected, list(model.parameters())))


def test_the_kernels_run(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """And not under "eager": the backend is read when a program is traced, and another one traces it anew."""
    launched = []
    forward = gates.GATE._forward
    monkeypatch.setattr(gates.GATE, "_forward", lambda *a, **k: launched.append("forward") or forward(*a, **k))
    call, counter = compiled(lambda x: tt.jumprelu(x, 0.25))
    x = torch.linspace(-1, 1, 20, device=device)
    for name, count, graphs in (("triton", 1, 1), ("eager", 1, 2), ("triton", 2, 2)):
        with tt.use_backend(name):
            call(x)
        assert (len(launched), counter.frame_count) == (count, graphs)


def test_explain_of_what_is_traced(device: torch.device) -> None:
    with FakeTensorMode() as mode, tt.use_backend("triton"):
        x = mode.from_tensor(torch.rand(60, device=device))
        assert tt.explain("jumprelu", x, 0.5).reason == "asked for; traced as one op"
        assert "plain torch" in tt.explain("hardshrink", x, 0.5).reason


def test_named_ops_are_traced_to_the_kernels(device: torch.device) -> None:
    def program(x: Tensor) -> Tensor:
        kept, count = OURS.jumprelu_l0(OURS.hardshrink(x, 0.25), x[0], 0.5)
        return OURS.threshold_mse_loss(kept, x, 0.5) + count.mean()

    x = torch.linspace(-1, 1, 60, device=device).view(SHAPE)
    graph = make_fx(program)(x)
    assert held(graph) == ["gate", "loss"]
    torch.testing.assert_close(graph(x), program(x))


@pytest.mark.parametrize("block", [32, 512, 4096, 65536])
def test_codes_fit_their_memory(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the shapes and the block: fake kernels know neither."""
    choice = tuning.Choice(tuning.Config(block, 4), "test")
    monkeypatch.setattr(tuning, "choose", lambda *arguments: choice)
    shapes = [(n,) for n in (1, 15, 16, 127, 129, 4095, 70000)]
    shapes += [
        (3, 5),
        (7, 48),
        (9, 1003),
        (130, 1003),
        (1000, 17),
        (65, 4096),
        (4, 70000),
        (8, 3, 5, 7),
        (16, 12, 8, 8),
    ]
    for shape in shapes:
        x = torch.empty(shape, device="meta")
        thresholds = [0.5, *(torch.empty(shape[i:], device="meta") for i in range(len(shape)))]
        thresholds += [torch.empty(shape[i], *[1] * (len(shape) - i - 1), device="meta") for i in range(len(shape))]
        for threshold in thresholds:
            for op in ("jumprelu", "jumprelu_l0"):
                tensor = threshold if isinstance(threshold, Tensor) else None
                numbers = (0.5, 0.5)[tensor is not None :]
                _, first, _, variant, _ = gates._decode(x, tensor, numbers, op, False, 2)
                width = gates._bit_layout_of(x.dtype, x.device, x.shape, x.stride(), variant, first).width
                used = 2 * width * -(-x.numel() // (8 * width))
                memory = gates._bit_memory(x, 2, OPS[op].counts).numel()
                assert used <= memory <= 4 * used + 64 * shape[-1] + 64, (shape, threshold, op, used, memory)


def test_empty_inputs(device: torch.device) -> None:
    for op, shape in (("jumprelu_l0", (0, 4)), ("jumprelu_l0", (4, 0)), ("step", (0,))):
        x = torch.empty(shape, device=device, requires_grad=True)
        t = torch.zeros(shape[-1:], device=device, requires_grad=True)
        case = Case(OPS[op], "learned")
        call, _ = compiled(case.__call__)
        agree(case, outcome(call(x, t), [x, t]), plain(case, [x, t]))
    for reduction in ("mean", "sum", "none"):
        x = torch.empty(0, 4, device=device, requires_grad=True)
        call, counter = compiled(lambda x, r=reduction: tt.threshold_mse_loss(x, x.detach(), 0.5, reduction=r))
        expected = tt.threshold_mse_loss(x, x.detach(), 0.5, reduction=reduction)
        torch.testing.assert_close(outcome(call(x), [x]), outcome(expected, [x]), equal_nan=True)
        assert held(counter.graphs[0]) == ["loss"]


def test_gradients_in_place(device: torch.device) -> None:
    gradients = [torch.linspace(-1, 1, n, device=device) for n in (5, 1000)]
    expected = [torch.where(g.abs() > 0.5, g, 0) for g in gradients]
    opcheck(OURS.threshold_gradients_.default, ([g.clone() for g in gradients], [0.5]))

    def work(*gradients: Tensor) -> Tensor:
        return OURS.threshold_gradients_(list(gradients), [0.5], return_kept=True)

    call, _ = compiled(work)
    kept = call(*gradients)
    torch.testing.assert_close(kept, torch.stack([(e != 0).sum() for e in expected]).sum() / 1005)  # Inductor divides
    assert all(map(torch.equal, gradients, expected))
