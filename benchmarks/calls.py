"""Host time of a call on tiny inputs: the CPU path against eager torch, the Triton path against a bare ``kernel[grid]``.

Without a GPU a stub takes the driver's place: all that the host does is done, and nothing runs.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import triton
import triton.language as tl
from torch import Tensor

import triton_thresh as tt
from benchmarks.records import Stamp, now
from benchmarks.stub_driver import StubDriver
from benchmarks.workloads import Inputs, Workload, family, outputs, workloads
from triton_thresh import backend, tuning
from triton_thresh.registry import OPS, Gate

NUMEL = 256
EXPLANATION = (
    "Microseconds until a call returns, the least of many short rounds. Forward: no gradient is wanted. Both: "
    "`torch.autograd.grad` of the call. `kernel[grid]`: the launch of a plain kernel of the same tensors and its output's "
    "allocation, twice where the op takes two launches; in both, an `autograd.Function` with one such launch forward and one "
    "backward. On a stub driver nothing runs on a GPU, and its own launch costs nothing."
)
ROUNDS, CALLS = 300, 8  # the least of ROUNDS means of CALLS calls: what the host takes when nothing disturbs it


@dataclass(frozen=True)
class CallRecord:
    """Host microseconds of a call of `op`, and of the `baseline` beside it, on the CPU path or the Triton path."""

    path: str
    op: str
    mode: str
    us: float
    baseline: str
    baseline_us: float
    device: str
    torch: str
    triton: str | None
    commit: str
    timestamp: str


@triton.jit  # type: ignore[untyped-decorator]
def bare(x_ptr, y_ptr, n, t, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """The least that a gate is: what ``kernel[grid]`` costs is measured by it."""
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + o, mask=o < n)
    tl.store(y_ptr + o, tl.where(x > t, x, 0.0), mask=o < n)


@triton.jit  # type: ignore[untyped-decorator]
def bare_learned(x_ptr, t_ptr, y_ptr, n, e, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """The same for a gate with a threshold for each feature."""
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + o, mask=o < n)
    t = tl.load(t_ptr + o, mask=o < n)
    tl.store(y_ptr + o, tl.where(x > t + e, x, 0.0), mask=o < n)


@triton.jit  # type: ignore[untyped-decorator]
def bare_loss(x_ptr, y_ptr, out_ptr, n, t, a, b, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """The same for a loss: its tensors and numbers."""
    o = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + o, mask=o < n, other=0.0)
    y = tl.load(y_ptr + o, mask=o < n, other=0.0)
    tl.store(out_ptr, tl.sum((x - y) * (x - y) * tl.where(x > t, a, b), axis=0))


def _launch(kind: str, x: Tensor, *others: Tensor) -> Tensor:
    """The launches of an op of the family, made plainly."""
    if kind == "loss":
        out = torch.empty((), device=x.device)
        bare_loss[(1,)](x, others[0], out, x.numel(), 0.5, 1.0, 0.1, BLOCK=1024, num_warps=4)
        return out
    y = torch.empty_like(x)
    grid = (triton.cdiv(x.numel(), 1024),)
    if kind == "learned":
        bare_learned[grid](x, others[0], y, x.numel(), 0.5, BLOCK=1024, num_warps=4)
    else:
        bare[grid](x, y, x.numel(), 0.5, BLOCK=1024, num_warps=4)
    return y


class _Bare(torch.autograd.Function):
    """One launch forward and one backward: what it costs if somebody writes it for one case."""

    @staticmethod
    def forward(ctx: Any, kind: str, x: Tensor, *others: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return _launch(kind, x, *others)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        return (None, _launch("gate", x), *[None] * (len(ctx.needs_input_grad) - 2))


def _us(call: Callable[[], Any], clear: Callable[[], None]) -> Iterator[float]:
    """Means of CALLS calls each."""
    while True:
        start = time.perf_counter_ns()
        for _ in range(CALLS):
            call()
        yield (time.perf_counter_ns() - start) / CALLS / 1e3
        clear()


def _least(calls: Sequence[Callable[[], Any]], clear: Callable[[], None]) -> list[float]:
    """The least time of each, measured in turn."""
    measured = [_us(call, clear) for call in calls]
    rounds = [[next(each) for each in measured] for _ in range(ROUNDS + 1)][1:]
    return [min(each) for each in zip(*rounds)]


def _steps(workload: Workload, inputs: Inputs) -> Iterator[tuple[str, Callable[[Any], Callable[[], Any]]]]:
    """The modes measured, each with what makes a step of a call."""
    detached = tuple(t.detach() for t in inputs.tensors)
    if "forward" in workload.modes:
        yield "forward", lambda call: lambda: call(*detached)
    if "both" in workload.modes:
        ones = tuple(torch.ones_like(t) for t in outputs(workload.pack(*inputs.tensors)))
        yield (
            "both",
            lambda call: lambda: torch.autograd.grad(call(*inputs.tensors), inputs.leaves, ones, allow_unused=True),
        )


def _found(kind: tuning.Kind, op: str, dtype: torch.dtype, *_: Any) -> tuning.Choice:
    """Where the user's table has an entry, as `_resolve` finds it."""
    return tuning.Choice(tuning.default(kind, dtype.itemsize), "user's table")


@contextlib.contextmanager
def _triton_on(device: torch.device) -> Iterator[Callable[[], None]]:
    """Calls go to Triton; where there is no GPU to a stub, which records launches until they are cleared."""
    with contextlib.ExitStack() as stack:
        clear: Callable[[], None] = torch.cuda.synchronize
        if device.type == "cpu":
            stub = stack.enter_context(StubDriver())
            clear = stub.clear
            stack.enter_context(patch.object(backend, "is_driven", lambda device: True))
            stack.enter_context(patch.object(tuning, "_resolve", _found))
            stack.enter_context(patch.object(tuning, "_settled", {}))
            stack.enter_context(patch.object(tuning, "device_name", lambda device: "stub"))
        stack.enter_context(tt.use_backend("triton"))
        yield clear


def measure(name: str, device: torch.device, stamp: Stamp) -> Iterator[CallRecord]:
    """An op without a gradient and with, on the CPU path and on the Triton path; none where a call is of many tensors."""
    where = "triton" if device.type != "cpu" else "triton, stub driver"
    facts = {field: getattr(stamp, field) for field in ("device", "torch", "triton", "commit")} | {"timestamp": now()}
    if family(OPS[name]) == "foreach":
        return
    gc.disable()
    try:
        with tt.use_backend("eager"):
            for workload in workloads(OPS[name], torch.float32, NUMEL, torch.device("cpu")):
                for mode, step in _steps(workload, workload.make(0)):
                    us, other = _least([step(workload.pack), step(workload.eager)], lambda: None)
                    yield CallRecord("cpu", workload.name, mode, us, "eager torch", other, **facts)
        with _triton_on(device) as clear:
            for workload in workloads(OPS[name], torch.float32, NUMEL, device):
                inputs = workload.make(0)
                for mode, step in _steps(workload, inputs):
                    us, other = _least([step(workload.pack), _kernel(workload, inputs, mode)], clear)
                    yield CallRecord(where, workload.name, mode, us, "kernel[grid]", other, **facts)
    finally:
        gc.enable()


def _kernel(workload: Workload, inputs: Inputs, mode: str) -> Callable[[], Any]:
    op, kind = workload.op, family(workload.op)
    x, *others = (t.detach() for t in inputs.tensors)
    if mode == "forward":
        launches = range(2 if isinstance(op, Gate) and op.counts else 1)
        return lambda: [_launch(kind, x, *others) for _ in launches]
    x.requires_grad_()
    ones = torch.ones_like(_launch(kind, x.detach(), *others))
    return lambda: torch.autograd.grad(_Bare.apply(kind, x, *others), x, ones)  # type: ignore[no-untyped-call]


def table(records: Sequence[CallRecord]) -> list[str]:
    """The records as a table in Markdown."""
    lines = [
        "| path | op | mode | µs | baseline | µs | difference | ratio |",
        "| --- | --- | --- | --: | --- | --: | --: | --: |",
    ]
    for r in records:
        beside = f"{r.baseline} | {r.baseline_us:.2f} | {r.us - r.baseline_us:+.2f} | {r.us / r.baseline_us:.2f}"
        lines.append(f"| {r.path} | `{r.op}` | {r.mode} | {r.us:.2f} | {beside} |")
    return lines


def write(records: Sequence[CallRecord], folder: Path, name: str) -> list[Path]:
    """One JSON object a line, and the table."""
    folder.mkdir(parents=True, exist_ok=True)
    lines, page = folder / f"{name}.jsonl", folder / f"{name}.md"
    lines.write_text("".join(json.dumps(dataclasses.asdict(record)) + "\n" for record in records))
    first = records[0]
    versions = f"{first.device}, torch {first.torch}, triton {first.triton}, commit {first.commit}"
    title = f"Host time of a call on {NUMEL} float32 elements: {versions}"
    page.write_text("\n".join([title, "", EXPLANATION, "", *table(records), ""]))
    return [lines, page]
