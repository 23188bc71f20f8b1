"""The host never waits; graphs replay; streams, devices and the choice of backend and block size hold."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import triton_thresh as tt
from triton_thresh import launch, tuning

from ..calls import SHAPE, Case, all_same
from ..rows import OPS
from .cases import DEVICE, every_case, plain_cases, step, three

pytestmark = pytest.mark.gpu


@contextmanager
def no_host_wait() -> Iterator[None]:
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@every_case
def test_the_host_never_waits(case: Case) -> None:
    leaves, scale = case.leaves(DEVICE), three()
    expected = step(case, leaves, scale)  # compiles, and searches for the block size
    with no_host_wait():
        actual = step(case, leaves, scale)
    all_same(actual, expected)


def test_a_host_that_waits_is_noticed() -> None:
    x = three()
    with no_host_wait(), pytest.raises(RuntimeError, match="synchronizing"):
        x.item()


def captured(function: Callable[[], list[Tensor]]) -> tuple[Callable[[], None], list[Tensor]]:
    """What replays a captured call, and the tensors that a replay writes."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = function()
    return graph.replay, outputs


@every_case
def test_graph_replay_equals_eager_mode(case: Case) -> None:
    leaves, scale = case.leaves(DEVICE), three()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            step(case, leaves, scale)
    torch.cuda.current_stream().wait_stream(side)
    replay, outputs = captured(lambda: step(case, leaves, scale))
    for seed, factor in ((1, 1.0), (2, 0.5), (3, 3.0)):
        with torch.no_grad():
            for leaf, fresh in zip(leaves, case.leaves(DEVICE, seed), strict=True):
                leaf.copy_(fresh)
        scale.fill_(factor)
        replay()
        all_same(outputs, step(case, leaves, scale))


def test_no_search_under_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(OPS["hardshrink"])
    leaves, scale = case.leaves(DEVICE), three()
    monkeypatch.setattr(tuning, "_settled", {})
    monkeypatch.setenv("TRITON_THRESH_AUTOTUNE", "0")
    expected = step(case, leaves, scale)  # compiles the default
    monkeypatch.delenv("TRITON_THRESH_AUTOTUNE")
    searched = []

    def search(configs: Sequence[tuning.Config], launch: object) -> tuning.Config:
        searched.append(configs)
        return configs[0]

    monkeypatch.setattr(tuning, "search", search)
    replay, outputs = captured(lambda: step(case, leaves, scale))
    replay()
    all_same(outputs, expected)
    assert not searched
    step(case, leaves, scale)
    assert len(searched) == 1, "the search that was put off is made up for"


@every_case
def test_side_stream(case: Case) -> None:
    """A kernel on any other stream would read the input before it is written."""
    leaves, scale = case.leaves(DEVICE), three()
    expected = step(case, leaves, scale)
    late = case.leaves(DEVICE, seed=1)
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(20_000_000)
        with torch.no_grad():
            for leaf, fresh in zip(late, leaves, strict=True):
                leaf.copy_(fresh)
        actual = step(case, late, scale)
    torch.cuda.current_stream().wait_stream(side)
    all_same(actual, expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@every_case
def test_a_gpu_that_is_not_the_current_one(case: Case) -> None:
    other = torch.device("cuda", 1)
    leaves, scale = case.leaves(other), three(other)
    with torch.cuda.device(other):
        expected = step(case, leaves, scale)
    with torch.cuda.device(0):
        actual = step(case, leaves, scale)
        assert torch.cuda.current_device() == 0
    assert all(tensor.device == other for tensor in actual)
    all_same(actual, expected)


# ----------------------------------------------------------------------------------------------- backend, search, compiler


@plain_cases
def test_auto_takes_triton(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []
    own = launch.Kernel.__call__

    def spied(kernel: launch.Kernel, *arguments: Any) -> None:
        ran.append(kernel._function.__name__)
        own(kernel, *arguments)

    monkeypatch.setattr(launch.Kernel, "__call__", spied)
    leaves = case.leaves(DEVICE, shape=(4096, 1024))
    with tt.use_backend("auto"):
        output = case(*leaves)
        positional, keywords = case.arguments(*leaves)
        explanation = tt.explain(case.op.name, *positional, **keywords)
    assert ran[0] == "forward"
    assert output.device.type == DEVICE.type
    assert explanation.backend == "triton"
    assert explanation.reason.startswith("auto")
    assert explanation.block_source in ("search", "user's table", "default")


@pytest.mark.parametrize("name", ["threshold", "hardshrink", "softshrink"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_auto_leaves_small_gates_to_torch(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same bits as the kernel's, forward and backward, NaN, infinities and the boundary too; and no kernel is launched."""
    special = torch.tensor([math.nan, math.inf, -math.inf, 0.3, -0.3, 0.0, -0.0, 0.30000001, 5e-324])
    x = torch.cat([special, torch.linspace(-1, 1, 1001)]).to(DEVICE, dtype).requires_grad_()
    g = torch.randn(len(x), device=DEVICE).to(dtype)
    call = getattr(tt, name)
    expected = call(x, 0.3)
    wanted = torch.autograd.grad(expected, x, g)
    monkeypatch.setattr(launch.Kernel, "__call__", None)
    with tt.use_backend("auto"):
        assert tt.explain(name, x, 0.3).backend == "eager"
        output = call(x, 0.3)
        torch.testing.assert_close(output, expected, rtol=0, atol=0, equal_nan=True)
        torch.testing.assert_close(torch.autograd.grad(output, x, g), wanted, rtol=0, atol=0, equal_nan=True)
        seen = tt.threshold_grad(x, 0.3)
        torch.autograd.grad(seen, x, g)
        large = torch.zeros(1 << 23, device=DEVICE, dtype=dtype)
        assert tt.explain(name, large, 0.3).backend == "eager"
        assert tt.explain(name, large.requires_grad_(), 0.3).backend == "triton"


SEARCH = """
import torch, triton_thresh as tt
x = torch.randn(4096, device="cuda")
tt.hardshrink(x)
print(tt.explain("hardshrink", x).block_source)
"""


def test_a_search_is_remembered_on_disk(tmp_path: Path) -> None:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_THRESH_AUTOTUNE"}
    environment.update(TRITON_THRESH_CACHE_DIR=str(tmp_path), TRITON_THRESH_BACKEND="triton")
    for source in ("search", "user's table"):
        done = subprocess.run([sys.executable, "-c", SEARCH], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip() == source
        (file,) = tmp_path.iterdir()
        assert list(json.loads(file.read_text())) == ["hardshrink/float32/12"]


@pytest.mark.parametrize("op", ["hardshrink", "threshold_mse_loss"])
def test_inductor(op: str) -> None:
    x = torch.randn(SHAPE, device=DEVICE, requires_grad=True)
    arguments = (0.5,) if op == "hardshrink" else (torch.rand(SHAPE, device=DEVICE), 0.4)
    function = getattr(tt, op)
    torch._dynamo.reset()
    actual = torch.compile(lambda x: function(x, *arguments), fullgraph=True)(x)
    expected = function(x, *arguments)
    torch.testing.assert_close(actual, expected)
    slopes = [torch.autograd.grad(3 * output.sum(), x)[0] for output in (actual, expected)]
    torch.testing.assert_close(*slopes)
