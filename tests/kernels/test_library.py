"""torch.ops.triton_thresh on Triton: compiled and exported programs hold the ops, whose kernels give what plain calls give."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.library import opcheck

import triton_thresh as tt
from triton_thresh import backend, dispatch, launch, learned, library, measured, tuning
from triton_thresh.families import Loss
from triton_thresh.registry import OPS

from ..calls import Case
from ..ops import FUSED, OURS, SHAPE, compiled, held, op_of, recorded
from .test_features import agree, outcome, plain

SIZES = (SHAPE, (5, 10), (37, 16), (64, 64))  # of three power-of-two buckets
every_case = pytest.mark.parametrize("case", FUSED, ids=str)


@every_case
def test_opcheck(case: Case, device: torch.device) -> None:
    for call in recorded(case, device):
        opcheck(*call)


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
    assert held(program.graph_module) == ["learned_gate", "loss"]
    for size in (6, 3):
        found, expected = (m(x[:size], y[:size]) for m in (loaded, model))
        torch.testing.assert_close(found, expected)
        (gradient,) = torch.autograd.grad(found, list(loaded.parameters()))
        torch.testing.assert_close((gradient,), torch.autograd.grad(expected, list(model.parameters())))


@pytest.mark.parametrize("case", [case for case in FUSED if not isinstance(case.op, Loss)], ids=str)
def test_a_backend_reads_what_the_other_wrote(case: Case, device: torch.device) -> None:
    """The setting may differ between forward and backward, which may be another thread's."""
    call, _ = compiled(case.__call__)
    leaves = case.leaves(device, shape=SHAPE)
    expected = plain(case, leaves)
    for first, second in (("triton", "eager"), ("eager", "triton")):
        with tt.use_backend(first):
            output = call(*leaves)
        with tt.use_backend(second):
            agree(case, outcome(output, leaves), expected)


def test_the_kernels_run(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """And not under "eager", which the op asks for when it runs: no new graph."""
    launched = []
    forward = learned.forward
    monkeypatch.setattr(learned, "forward", lambda *a, **k: launched.append("forward") or forward(*a, **k))
    call, counter = compiled(lambda x: tt.jumprelu(x, 0.25))
    x = torch.linspace(-1, 1, 20, device=device)
    for name, count in (("triton", 1), ("eager", 1), ("triton", 2)):
        with tt.use_backend(name):
            call(x)
        assert len(launched) == count
    assert counter.frame_count == 1


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_crossovers_hold_for_the_ops(reduction: str, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph runs on the backend that the size of the moment asks for, forward and backward."""
    ran = []
    for module in (learned, launch):
        for name in ("forward", "backward", "loss_forward", "loss_backward"):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, spied(getattr(module, name), ran))
    monkeypatch.setattr(backend, "is_driven", lambda device: True)
    monkeypatch.setattr(dispatch, "crossover", lambda op, dtype, device, records: 30 if records else 10**9)
    call, _ = compiled(
        lambda x: tt.threshold_mse_loss(tt.jumprelu(x, 0.25), x.detach(), 0.5, reduction=reduction).sum()
    )
    again = ["loss_backward"] if reduction == "none" else []
    for numel, names in ((20, []), (60, ["forward", "loss_forward", *again, "backward"])):
        x = torch.linspace(-1, 1, numel, device=device, requires_grad=True)
        ran.clear()
        with tt.use_backend("auto"):
            (dx,) = torch.autograd.grad(call(x), x)
            assert ran == names
            call(x.detach())
            assert ran == names, "without a gradient eager torch is faster at every size"
        with tt.use_backend("eager"):
            (expected,) = torch.autograd.grad(call(x), x)
        assert torch.allclose(dx, expected)


def spied(function: Any, ran: list[str]) -> Any:
    def run(*arguments: Any, **keywords: Any) -> Any:
        ran.append(function.__name__)
        return function(*arguments, **keywords)

    return run


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
    assert held(graph) == ["learned_gate", "loss"]
    torch.testing.assert_close(graph(x), program(x))


@pytest.mark.parametrize("block", [32, 512, 4096, 65536])
def test_codes_fit_their_memory(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the shapes and the block: fake kernels know neither."""
    choice = tuning.Choice(measured.Config(block, 4), "test")
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
                gate = library._Gate(tensor, 0.5, op, (0.5,), False, 2)
                width, _ = learned.rows(*gate.lowered(x), x, x.device)
                used = 2 * width * -(-x.numel() // (8 * width))
                memory = library._codes_of(x, gate, OPS[op].counts).numel()
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
    assert torch.equal(kept, torch.stack([(e != 0).sum() for e in expected]).sum() / 1005)
    assert all(map(torch.equal, gradients, expected))
