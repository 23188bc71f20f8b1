"""Many gradients on the device: no host reads, streams, graphs, several devices, sizes beyond 32 bits, memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import triton_thresh as tt

from ..gates import inputs, same
from ..gradients import FOREACH, THRESHOLDS, by_name, each, gradients, large, parameter, parameters, thresholded
from ..rows import ForeachGate
from .cases import DEVICE
from .test_host import captured, no_host_wait
from .test_memory import EDGE, filled, need_memory, peak, windows

pytestmark = pytest.mark.gpu

foreach = pytest.mark.parametrize("op", FOREACH, ids=by_name)


def thresholds(kind: str) -> Any:
    made = {
        "number": 0.5,
        "list": list(THRESHOLDS),
        "0dim": torch.full((), 0.5, device=DEVICE),
        "1dim": torch.tensor(THRESHOLDS).to(DEVICE),
    }
    return made[kind]


@foreach
@pytest.mark.parametrize("count", [False, True])
@pytest.mark.parametrize("kind", ["number", "list", "0dim", "1dim"])
def test_the_host_never_waits(op: ForeachGate, kind: str, count: bool) -> None:
    threshold = thresholds(kind)
    op(parameters(threshold, torch.float32, DEVICE)[0], threshold, return_kept=count)  # compiles
    made, check = parameters(threshold, torch.float32, DEVICE)
    before = [g.clone() for g in gradients(made)]
    with no_host_wait():
        fraction = op(made, threshold, return_kept=count)
    for g, was, t in zip(gradients(made), before, each(threshold, len(made)), strict=True):
        same(g, thresholded(was, t))
    check()
    assert (fraction is None) is not count


@foreach
def test_a_thousand_gradients(op: ForeachGate) -> None:
    """Calls follow one another, each with a table of its own from reused pinned memory."""
    sizes = torch.randint(0, 3000, (1000,), generator=torch.Generator().manual_seed(3)).tolist()
    memory = [inputs(0.5, torch.bfloat16, (size,), DEVICE) for size in sizes]
    kept = sum(int(large(g, 0.5).sum()) for g in memory)
    calls = [[parameter(g.clone()) for g in memory] for _ in range(5)]
    fractions = [op(made, 0.5, return_kept=True) for made in calls]
    for made, fraction in zip(calls, fractions, strict=True):
        assert fraction is not None
        torch.testing.assert_close(fraction.item(), kept / sum(sizes), rtol=2e-7, atol=0)
        for p, g in zip(made, memory, strict=True):
            same(p.grad, op.gate.reference(g, 0.5))


@foreach
def test_side_stream(op: ForeachGate) -> None:
    """A kernel on any other stream would read the gradients before they are written."""
    fresh = inputs(0.5, torch.float32, (5000,), DEVICE)
    late = torch.zeros_like(fresh)
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(20_000_000)
        late.copy_(fresh)
        op(parameter(late), 0.5)
    torch.cuda.current_stream().wait_stream(side)
    same(late, thresholded(fresh, 0.5))


@foreach
@pytest.mark.parametrize("count", [False, True])
@pytest.mark.parametrize("kind", ["number", "list", "0dim"])
def test_graph_replay(op: ForeachGate, kind: str, count: bool) -> None:
    threshold = thresholds(kind)
    made, _ = parameters(threshold, torch.float32, DEVICE)
    first = [g.clone() for g in gradients(made)]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        op(made, threshold, return_kept=count)
    torch.cuda.current_stream().wait_stream(side)

    def call() -> list[torch.Tensor]:
        fraction = op(made, threshold, return_kept=count)
        return [] if fraction is None else [fraction]

    replay, outputs = captured(call)
    torch.empty(10**6, pin_memory=True).fill_(torch.nan)  # a table in host memory would be overwritten
    for _ in range(2):
        fresh = [torch.where(torch.rand(g.shape, device=DEVICE) < 0.5, g, 3 * g) for g in first]
        for g, new in zip(gradients(made), fresh, strict=True):
            g.copy_(new)
        replay()
        kept = 0
        for g, new, t in zip(gradients(made), fresh, each(threshold, len(made)), strict=True):
            same(g, thresholded(new, t))
            kept += int(large(new, t).sum())
        for fraction in outputs:
            torch.testing.assert_close(fraction.item(), kept / sum(g.numel() for g in first), rtol=2e-7, atol=0)


@foreach
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_several_devices(op: ForeachGate) -> None:
    devices = [torch.device("cuda", 1), torch.device("cpu"), torch.device("cuda", 0)]
    memory = [inputs(0.5, torch.float32, (5000,), device) for device in devices]
    before = [g.clone() for g in memory]
    with tt.use_backend("auto"), torch.cuda.device(0):
        fraction = op([parameter(g) for g in memory], [0.5, 0.1, 2.5], return_kept=True)
        assert torch.cuda.current_device() == 0
    for g, was, t in zip(memory, before, (0.5, 0.1, 2.5), strict=True):
        same(g, thresholded(was, t))
    assert fraction is not None
    assert fraction.device == devices[0]


@foreach
def test_cpu_and_gpu_gradients_together(op: ForeachGate) -> None:
    memory = [inputs(0.5, torch.float32, (5000,), torch.device(kind)) for kind in ("cuda", "cpu")]
    before = [g.clone() for g in memory]
    made = [parameter(g) for g in memory]
    with tt.use_backend("auto"):
        op(made, torch.tensor(0.5))
        for g, was in zip(memory, before, strict=True):
            same(g, thresholded(was, 0.5))
        with pytest.raises(RuntimeError, match=r"threshold is on cuda:0, expected cpu, where parameters\[1\]"):
            op(made, torch.full((), 0.5, device=DEVICE))


@foreach
@pytest.mark.slow
def test_beyond_32_bit_offsets(op: ForeachGate) -> None:
    need_memory()
    n = EDGE + 12345
    g = filled(n + 1, torch.bfloat16, 0)[1:]  # not aligned
    small = inputs(0.5, torch.bfloat16, (100,), DEVICE)
    was = [g[window].clone() for window in windows(n)]
    kept = sum(int(op.gate.reference(part, 0.5).ne(0).sum()) for part in g.split(2**28))
    made = [parameter(small), parameter(g)]
    fraction = op(made, 0.5, return_kept=True)
    for window, part in zip(windows(n), was, strict=True):
        same(g[window], op.gate.reference(part, 0.5))
    assert fraction is not None
    torch.testing.assert_close(fraction.item(), kept / n, rtol=1e-6, atol=0)


@foreach
def test_memory(op: ForeachGate) -> None:
    """A table, and nothing of the gradients' size."""
    made = [parameter(torch.randn(2**22, device=DEVICE)) for _ in range(8)]
    op(made, 0.5)
    used, _ = peak(lambda: op(made, 0.5))
    assert used <= 2**20


def test_an_optimizer_on_the_device() -> None:
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 1)).to(DEVICE)
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.1, fused=True)
    scaler = torch.amp.GradScaler(DEVICE.type, init_scale=2.0**10)
    hook = tt.GradientThreshold(optimizer, 0.01, track_kept=True)
    for _ in range(3):
        optimizer.zero_grad()
        scaler.scale(net(torch.randn(8, 64, device=DEVICE)).square().mean()).backward()
        scaler.unscale_(optimizer)
        before = [g.clone() for g in gradients(list(net.parameters()))]
        scaler.step(optimizer)
        scaler.update()
        for g, was in zip(gradients(list(net.parameters())), before, strict=True):
            same(g, thresholded(was, 0.01))
    assert hook.kept is not None
    assert hook.kept.device.type == DEVICE.type
    scaler.scale(net(torch.randn(8, 64, device=DEVICE)).mean()).backward()
    with pytest.raises(RuntimeError, match="unscale_"):
        scaler.step(optimizer)
