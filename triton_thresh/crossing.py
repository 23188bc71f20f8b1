"""Measures the crossovers of "auto": the sizes from which Triton is faster than eager torch, host time and all."""

from __future__ import annotations

import time
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .backend import use_backend
from .dispatch import crossover_key
from .families import ForeachGate, Gate, GradientGate, LearnedGate, Loss, Op
from .reference import cell_key
from .rules import ByLoss, ByPrediction, ByProximity

RULES = {ByPrediction: ByPrediction(), ByProximity: ByProximity(0.5), ByLoss: ByLoss()}
Call = Callable[[], Any]
TensorCall = Callable[[Tensor], Any]
SIZES = tuple(range(0, 23, 2))
COUNTS = (1, 2, 4, 8, 16, 32, 64)  # of tensors
ROUNDS, REPEATS = 5, 30
MARGIN = 1.05


def gate_crossings(op: Gate) -> Iterator[tuple[str, bool, TensorCall]]:
    yield op.name, op.differentiable, lambda x: op(x, *op.example)


def learned_crossings(op: LearnedGate) -> Iterator[tuple[str, bool, TensorCall]]:
    def call(x: Tensor) -> Any:
        result = op(x, *op.example)
        return result[0] if op.counts else result

    yield op.name, True, call


def loss_crossings(op: Loss) -> Iterator[tuple[str, bool, TensorCall]]:
    for base, rule in op.cells:
        made = RULES[rule]
        keywords = {"base": base} if op.rule is None else {}
        yield cell_key(base, rule), True, lambda x, made=made, more=keywords: op(x, x.detach(), made, **more)  # type: ignore[misc]


def gradient_crossings(op: GradientGate) -> Iterator[tuple[str, bool, TensorCall]]:
    yield op.gate.name, False, lambda x: op.gate(x, *op.gate.example)


# By family: a crossover's name in the tables, whether it differs with a backward, and the call. Of "foreach" see `crossovers`.
CROSSINGS: Mapping[str, Callable[[Any], Iterator[tuple[str, bool, TensorCall]]]] = {
    "gate": gate_crossings,
    "learned": learned_crossings,
    "loss": loss_crossings,
    "gradient": gradient_crossings,
}


def _seconds(call: Call, device: torch.device) -> float:
    """REPEATS calls until the device has finished: their time on the host, or on the device where that is longer."""
    wait = torch.get_device_module(device).synchronize
    times = []
    for _ in range(ROUNDS + 1):
        wait()
        start = time.perf_counter()
        for _ in range(REPEATS):
            call()
        wait()
        times.append(time.perf_counter() - start)
    return min(times[1:])


def _step(call: TensorCall, x: Tensor, records: bool) -> Call:
    if not records:
        return lambda: call(x)
    x = x.requires_grad_()
    ones = torch.ones_like(call(x))
    return lambda: torch.autograd.grad(call(x), x, ones)


def crossing(sizes: Sequence[int], step: Callable[[int], Call], device: torch.device) -> int:
    """The least of `sizes` from which Triton is nowhere slower than eager torch by more than MARGIN; 0 if it is at none."""
    least = 0
    for place, size in reversed(list(enumerate(sizes))):
        seconds = {}
        for backend in ("eager", "triton"):
            with use_backend(backend):
                seconds[backend] = _seconds(step(size), device)
        if seconds["triton"] > MARGIN * seconds["eager"]:
            least = sizes[min(place + 1, len(sizes) - 1)]
            break
    return least


def crossovers(
    op: Op, dtype: torch.dtype, device: torch.device, known: Container[str] = ()
) -> Iterator[tuple[str, int]]:
    """The crossovers of an op at a dtype, with their keys, but for those known; 0 where Triton is never slower."""

    def random(size: int) -> Tensor:
        return torch.rand(size, device=device).to(dtype)

    if isinstance(op, ForeachGate):

        def many(count: int) -> Call:
            parameters = [torch.nn.Parameter(random(256)) for _ in range(count)]
            for parameter in parameters:
                parameter.grad = random(256)
            return lambda: op(parameters, *op.gate.example)

        yield crossover_key(op.name, dtype, False), crossing(COUNTS, many, device)
        return
    for name, differs, call in CROSSINGS[op.family](op):
        for records in (False, True) if differs else (False,):
            if crossover_key(name, dtype, records) in known:
                continue

            def step(size: int, call: TensorCall = call, records: bool = records) -> Call:
                return _step(call, random(size), records)

            yield crossover_key(name, dtype, records), crossing([1 << size for size in SIZES], step, device)
