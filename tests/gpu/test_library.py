"""Compiled by Inductor on a GPU: the kernels are the pack's own, the host never waits, CUDA graphs replay them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import triton_thresh as tt
from triton_thresh import launch

from ..calls import Case
from ..kernels.test_features import agree
from ..ops import FUSED, OURS, compiled, held, op_of
from ..rows import Loss
from .cases import DEVICE, step, three
from .test_host import no_host_wait

pytestmark = pytest.mark.gpu
SHAPE = (512, 1000)
every_fused = pytest.mark.parametrize("case", FUSED, ids=str)


@every_fused
def test_inductor_calls_the_kernels(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """One launch forward, one backward where the gradient is not ready, and no wait."""
    launched: list[str] = []

    own = launch.Kernel.__call__

    def spied(kernel: launch.Kernel, *arguments: Any) -> None:
        name = kernel._function.__name__.partition("_")[0]
        launched.extend([name] if name in ("forward", "backward") else [])
        own(kernel, *arguments)

    monkeypatch.setattr(launch.Kernel, "__call__", spied)
    call, counter = compiled(case.__call__, "inductor")
    leaves, scale = case.leaves(DEVICE, shape=SHAPE), three()
    expected = step(case, leaves, scale)
    agree(case, _step(call, leaves, scale), expected)
    assert [held(graph) for graph in counter.graphs] == [[op_of(case)]]
    launched.clear()
    with no_host_wait():
        actual = _step(call, leaves, scale)
    agree(case, actual, expected)
    ready = isinstance(case.op, Loss) and case.reduction != "none" and case.dtype != torch.float16
    assert launched == (["forward"] if ready else ["forward", "backward"])


def _step(call: Any, leaves: list[torch.Tensor], scale: torch.Tensor) -> list[torch.Tensor]:
    output = call(*leaves)
    upstream = scale.to(output.dtype).expand_as(output)
    return [output.detach(), *torch.autograd.grad(output, leaves, upstream)]


@every_fused
def test_reduce_overhead(case: Case) -> None:
    """Inductor's CUDA graphs: recorded once, replayed with other numbers."""
    torch.compiler.reset()
    call = torch.compile(case.__call__, fullgraph=True, mode="reduce-overhead")
    scale = three()
    for seed in range(5):
        torch.compiler.cudagraph_mark_step_begin()
        leaves = case.leaves(DEVICE, seed, SHAPE)
        found = [t.clone() for t in _step(call, leaves, scale)]
        agree(case, found, step(case, leaves, scale))


def test_backward_of_a_compiled_loss_is_fused_into_its_consumer() -> None:
    """Under a loss of 2x the rescale and the doubling are one kernel of Inductor's, which writes the gradient and no more."""
    y = torch.rand(1 << 24, device=DEVICE)
    x = torch.rand_like(y).requires_grad_()
    call = torch.compile(lambda x: tt.threshold_mse_loss(2 * x, y, 0.5), fullgraph=True)
    torch.autograd.grad(call(x), x)
    output = call(x)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    torch.autograd.grad(output, x)
    assert torch.cuda.max_memory_allocated() - before <= y.numel() * 4 + (1 << 22)


def test_named_ops_compiled() -> None:
    x = torch.randn(SHAPE, device=DEVICE, requires_grad=True)
    call, _ = compiled(lambda x: OURS.threshold_mse_loss(OURS.hardshrink(x, 0.25), x.detach(), 0.5), "inductor")
    expected = tt.threshold_mse_loss(tt.hardshrink(x, 0.25), x.detach(), 0.5)
    torch.testing.assert_close(call(x), expected)
    torch.testing.assert_close(torch.autograd.grad(call(x), x), torch.autograd.grad(expected, x))
