"""The benchmark's cases of each op: inputs, this package's call, the formula in torch, the bytes, and what must come out.

One builder for each family of the registry, in BUILDERS. A new op of a known family appears by itself.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, Union

import torch
from torch import Tensor

from benchmarks import baselines
from triton_thresh import explain, gates, losses
from triton_thresh import gradients as gradient_gates
from triton_thresh.backend import Plan
from triton_thresh.bases import Base
from triton_thresh.checks import round_to
from triton_thresh.functional import function_of
from triton_thresh.registry import OPS, Gate, GradientGate, Loss, Op
from triton_thresh.rules import Rule

MODES = ("forward", "backward", "both")
WHOLE = "whole"  # how a workload's `whole` is run: forward and backward in one call, without autograd
FEATURES = 1 << 16
GRADIENT_THRESHOLD = 0.5
PARAMETERS = 1000
FLOAT16_SCALE = 256.0
CHUNK = 1 << 24  # elements that are drawn, and compared, at a time
# Shares of the largest expected value that may lie between a formula, which rounds between its steps, and the expected result.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
SELECTED = 1e-6  # of this package's elements may: a rule compares a loss or a prediction that rounding has moved past a threshold
ASTRAY = 0.02  # of a formula's elements may lie further off: those beside a threshold, rounded to its other side


class Inputs(NamedTuple):
    """A call's tensors, and the upstream gradient of each output (None: 1, for a scalar)."""

    tensors: tuple[Tensor, ...]
    upstream: tuple[Tensor | None, ...] = (None,)

    @property
    def leaves(self) -> tuple[Tensor, ...]:
        """The tensors that are differentiated."""
        return tuple(t for t in self.tensors if t.requires_grad)

    @property
    def bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in (*self.tensors, *self.upstream) if t is not None)

    def to(self, dtype: torch.dtype) -> Inputs:
        """The same in another dtype. What `.grad` holds is copied, since a call may write there."""
        tensors = [t.detach().to(dtype).requires_grad_(t.requires_grad) for t in self.tensors]
        for t, own in zip(tensors, self.tensors):
            t.grad = None if own.grad is None else own.grad.to(dtype, copy=True)
        return Inputs(tuple(tensors), tuple(None if g is None else g.to(dtype) for g in self.upstream))


Call = Callable[..., Any]
Result = tuple[tuple[Tensor, ...], tuple[Union[Tensor, None], ...]]  # outputs, gradients of the leaves


@dataclass(frozen=True)
class Workload:
    """An op at one dtype and size on one device.

    `pack` is this package's call, and `formula(like)` the formula in torch for inputs of a tensor's dtype and device: both take
    the tensors of `make(seed)` and return a tensor or a tuple of them. `arguments` gives the package's call as `tt.explain` takes
    it. `scale` is the upstream gradient of a loss. `compiles`: torch.compile is a baseline too (over a thousand tensors it takes
    minutes).
    """

    name: str
    op: Op
    dtype: torch.dtype
    numel: int
    device: torch.device
    modes: tuple[str, ...]
    make: Callable[[int], Inputs]
    pack: Call
    formula: Callable[[Tensor], Call]
    bytes: Mapping[str, int]
    arguments: Callable[[tuple[Tensor, ...]], tuple[tuple[Any, ...], dict[str, Any]]]
    scale: float | None = None
    compiles: bool = True

    @cached_property
    def eager(self) -> Call:
        """The formula for inputs of this dtype."""
        return self.formula(torch.empty(0, dtype=self.dtype, device=self.device))

    @cached_property
    def whole(self) -> Call | None:
        """`torch.func.grad_and_value` of a loss's formula: gradient and value of one call, in this order; None for other ops.

        The order matters: with the value first Inductor makes two passes of what it fuses into one with the gradient first.
        """
        formula, scale = self.eager, self.scale
        if scale is None or scale == 1:
            return torch.func.grad_and_value(formula) if scale else None

        def scaled(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
            value = formula(x, y)
            return value * scale, value

        def gradient_and_value(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
            gradient, (_, value) = torch.func.grad_and_value(scaled, has_aux=True)(x, y)
            return gradient, value

        return gradient_and_value

    def expected(self, inputs: Inputs) -> Result:
        """The results of the formula in float32 or wider: outputs, and gradients where the op has a backward pass."""
        wide = torch.promote_types(self.dtype, torch.float32)
        return run(self.formula(torch.empty(0, dtype=wide, device=self.device)), inputs.to(wide), self.modes[-1])

    def blocks(self, inputs: Inputs, mode: str) -> str:
        """On Triton the block size of the package's call, its warps and where they came from; elsewhere the backend."""
        positional, keywords = self.arguments(inputs.tensors)
        with torch.set_grad_enabled(mode != "forward"):
            found = explain(self.op.name, *positional, **keywords)
        return found.backend if found.block is None else f"{found.block}/{found.num_warps} {found.block_source}"


def outputs(result: Any) -> tuple[Tensor, ...]:
    """A call's results, as a tuple."""
    return (result,) if isinstance(result, Tensor) else tuple(result)


def gradients(result: Any, inputs: Inputs) -> tuple[Tensor | None, ...]:
    """The leaves' gradients for the upstream gradients; None where none arrives, as from a `step` to its input."""
    return torch.autograd.grad(outputs(result), inputs.leaves, inputs.upstream, allow_unused=True)


def run(call: Call, inputs: Inputs, mode: str) -> Result:
    """One call in this mode: outputs, gradients (none for "forward")."""
    if mode == WHOLE:
        gradient, value = call(*(t.detach() for t in inputs.tensors))
        return outputs(value), outputs(gradient)
    with torch.set_grad_enabled(mode != "forward"):
        result = call(*inputs.tensors)
    return outputs(result), gradients(result, inputs) if mode != "forward" else ()


class WrongResultError(AssertionError):
    """A call gave something else than the op's formula."""


def check(workload: Workload, call: Call, mode: str, *, strict: bool, inputs: Inputs | None = None) -> None:
    """Run a call once and hold it to what is expected; strict: hardly an element may be astray (WrongResultError)."""
    inputs = inputs or workload.make(0)
    expected = workload.expected(inputs)
    actual = run(call, inputs, mode)
    for kind, found, wanted in zip(("output", "gradient"), actual, expected):
        for place, (a, b) in enumerate(zip(found, wanted, strict=True) if found else ()):
            if a is None:
                a = None if b is None else torch.zeros_like(b)
            if a is not None:
                _compare(f"{kind} {place}", a.detach(), b, workload.dtype, strict)


def _compare(what: str, actual: Tensor, expected: Tensor | None, dtype: torch.dtype, strict: bool) -> None:
    expected = torch.zeros_like(actual) if expected is None else expected.detach()
    if actual.shape != expected.shape:
        raise WrongResultError(f"{what} has shape {tuple(actual.shape)}, expected {tuple(expected.shape)}")
    if expected.numel() == 0:
        return
    kind = torch.finfo(dtype)
    limit = TOLERANCE[dtype] * float(expected.abs().max()) + kind.tiny * kind.eps
    pairs = zip(actual.reshape(-1).split(CHUNK), expected.reshape(-1).split(CHUNK))
    wrong = sum(int((~((a.double() - b.double()).abs() <= limit)).sum()) for a, b in pairs)
    if wrong > (SELECTED if strict else ASTRAY) * expected.numel():
        raise WrongResultError(f"{what}: {wrong} of {expected.numel()} elements differ by more than {limit:.3g}")


def _random(
    shape: Sequence[int], dtype: torch.dtype, device: torch.device, seed: int, *, normal: bool = True
) -> Tensor:
    generator = torch.Generator(device).manual_seed(seed)
    draw = torch.randn if normal else torch.rand
    made = torch.empty(tuple(shape), dtype=dtype, device=device)
    for part in made.view(-1).split(CHUNK):
        part.copy_(draw(part.shape, generator=generator, device=device))
    return made


def _bytes(plan: Callable[[], Plan]) -> dict[str, int]:
    """The bytes of a call, as its plan counts them: without a gradient and with."""
    with torch.no_grad():
        inference = plan().forward_bytes or 0
    found = plan()
    forward, backward = found.forward_bytes or 0, found.backward_bytes or 0
    return {"forward": inference, "backward": backward, "both": forward + backward}


def gate(op: Gate, dtype: torch.dtype, numel: int, device: torch.device) -> Iterator[Workload]:
    """The gate with the numbers of its example, on normal inputs."""
    if dtype not in op.dtypes:
        return
    call, numbers = function_of(op), tuple(round_to(v, dtype) for v in op.example)
    differentiable = op.saves != "nothing"

    def make(seed: int) -> Inputs:
        x = _random((numel,), dtype, device, 2 * seed).requires_grad_(differentiable)
        return Inputs((x,), (_random((numel,), dtype, device, 2 * seed + 1) if differentiable else None,))

    like = torch.empty(numel, dtype=dtype, device="meta", requires_grad=differentiable)

    yield Workload(
        op.name,
        op,
        dtype,
        numel,
        device,
        MODES if differentiable else ("forward",),
        make,
        pack=lambda x: call(x, *numbers),
        formula=lambda like: baselines.gate(op, numbers, like),
        bytes=_bytes(lambda: gates.plan(op, like, *numbers)),
        arguments=lambda tensors: ((*tensors, *numbers), {}),
    )


def learned(op: Gate, dtype: torch.dtype, numel: int, device: torch.device) -> Iterator[Workload]:
    """Rows of up to FEATURES features with a float32 threshold each, which learns as the input does."""
    if dtype not in op.dtypes:
        return
    features = math.gcd(numel, FEATURES)
    shape = (numel // features, features)
    call, (threshold, bandwidth) = function_of(op), op.example

    def make(seed: int) -> Inputs:
        x = _random(shape, dtype, device, 3 * seed).requires_grad_()
        t = threshold * (0.75 + 0.5 * _random((features,), torch.float32, device, 3 * seed + 1, normal=False))
        g = _random(shape, dtype, device, 3 * seed + 2)
        return Inputs((x, t.requires_grad_()), (g, g[:, 0].float()) if op.counts else (g,))

    like = torch.empty(shape, dtype=dtype, device="meta", requires_grad=True)
    thresholds = torch.empty(features, device="meta", requires_grad=True)
    yield Workload(
        op.name,
        op,
        dtype,
        numel,
        device,
        MODES,
        make,
        pack=lambda x, t: call(x, t, bandwidth),
        formula=lambda like: baselines.learned(op, bandwidth),
        bytes=_bytes(lambda: gates.plan(op, like, thresholds, bandwidth)),
        arguments=lambda tensors: ((*tensors, bandwidth), {}),
    )


def loss(op: Loss, dtype: torch.dtype, numel: int, device: torch.device) -> Iterator[Workload]:
    """The mean of a named loss; of the grid, what has no name of its own and holds a base or a rule for the first time."""
    named = {pair for other in OPS.values() if isinstance(other, Loss) and other.rule for pair in other.cells}
    for kind, rule in op.pairs:
        base, made = kind(*kind.example), rule(*rule.example)
        if op.rule is not None:
            yield _loss(op.name, op, base, made, dtype, numel, device)
        elif (kind, rule) not in named:
            name = f"{op.name}.{kind.snake_name()}.{rule.__name__}"
            yield _loss(name, op, base, made, dtype, numel, device)


def _loss(
    name: str, op: Loss, base: Base, rule: Rule, dtype: torch.dtype, numel: int, device: torch.device
) -> Workload:
    call = function_of(op)
    keywords: dict[str, Any] = {"rule": rule, "base": base}
    if op.rule is not None:
        names = inspect.signature(call).parameters
        keywords = {name: value for name, value in {**vars(base), **vars(rule)}.items() if name in names}
    keywords["reduction"] = "mean"
    # 1, but in float16 scaled as a GradScaler does it: the formulas' gradients, divided by numel, would underflow
    scale = min(FLOAT16_SCALE, numel) if dtype == torch.float16 else 1.0
    upstream = torch.full((), scale, dtype=dtype, device=device) if scale != 1 else None

    def make(seed: int) -> Inputs:
        x = _random((numel,), dtype, device, 2 * seed, normal=base.kind != "probabilities")
        if base.kind == "probabilities":
            x.clamp_(1 / 256, 1 - 1 / 256)
        y = _random((numel,), dtype, device, 2 * seed + 1, normal=base.kind == "values")
        return Inputs((x.requires_grad_(), y), (upstream,))

    like = torch.empty(numel, dtype=dtype, device="meta", requires_grad=True)
    return Workload(
        name,
        op,
        dtype,
        numel,
        device,
        MODES,
        make,
        pack=lambda x, y: call(x, y, **keywords),
        formula=lambda like: baselines.loss(base, rule, like),
        bytes=_bytes(lambda: losses.plan(op.name, like, like.detach(), base, rule)),
        arguments=lambda tensors: (tensors, dict(keywords)),
        scale=scale,
    )


def gradient(op: GradientGate, dtype: torch.dtype, numel: int, device: torch.device) -> Iterator[Workload]:
    """A gate on the gradient. Forward is a view: only backward moves anything."""
    if dtype not in op.gate.dtypes:
        return

    def make(seed: int) -> Inputs:
        x = _random((numel,), dtype, device, 2 * seed).requires_grad_()
        return Inputs((x,), (_random((numel,), dtype, device, 2 * seed + 1),))

    call, like = function_of(op), torch.empty(numel, dtype=dtype, device="meta", requires_grad=True)
    yield Workload(
        op.name,
        op,
        dtype,
        numel,
        device,
        ("backward", "both"),
        make,
        pack=lambda x: call(x, GRADIENT_THRESHOLD),
        formula=lambda like: lambda x: baselines.hardshrink_gradient(x, GRADIENT_THRESHOLD),
        bytes=_bytes(lambda: gradient_gates.plan_one(op.name, like, GRADIENT_THRESHOLD)),
        arguments=lambda tensors: ((*tensors, GRADIENT_THRESHOLD), {}),
    )


def foreach(op: GradientGate, dtype: torch.dtype, numel: int, device: torch.device) -> Iterator[Workload]:
    """The gradients of up to PARAMETERS parameters, in place; what is kept stays kept, so that calls repeat."""
    if dtype not in op.gate.dtypes:
        return
    count = min(PARAMETERS, max(1, numel >> 10))

    def make(seed: int) -> Inputs:
        gradients = _random((numel,), dtype, device, seed).tensor_split(count)
        parameters = [torch.nn.Parameter(torch.empty_like(g)) for g in gradients]
        for parameter, g in zip(parameters, gradients):
            parameter.grad = g.clone()  # at an address as aligned as any gradient's
        return Inputs(tuple(parameters))

    def of(call: Call) -> Call:
        def thresholded(*parameters: Tensor) -> tuple[Tensor, ...]:
            call(parameters, GRADIENT_THRESHOLD)
            return tuple(p.grad for p in parameters if p.grad is not None)

        return thresholded

    hollow = torch.nn.Parameter(torch.empty(numel, dtype=dtype, device="meta"))
    hollow.grad = torch.empty_like(hollow)
    yield Workload(
        op.name,
        op,
        dtype,
        numel,
        device,
        ("forward",),
        make,
        pack=of(function_of(op)),
        formula=lambda like: of(baselines.hardshrink_gradients_),
        bytes={"forward": gradient_gates.plan_many(op.name, [hollow], GRADIENT_THRESHOLD).forward_bytes or 0},
        arguments=lambda tensors: ((tensors, GRADIENT_THRESHOLD), {}),
        compiles=False,
    )


BUILDERS: Mapping[str, Callable[[Any, torch.dtype, int, torch.device], Iterator[Workload]]] = {
    "gate": gate,
    "learned": learned,
    "loss": loss,
    "gradient": gradient,
    "foreach": foreach,
}


def family(op: Op) -> str:
    """The key of the op's builder."""
    if isinstance(op, Gate):
        return "learned" if op.straight_through else "gate"
    if isinstance(op, Loss):
        return "loss"
    return "foreach" if op.many else "gradient"


def workloads(op: Op, dtype: torch.dtype, numel: int, device: torch.device) -> Iterator[Workload]:
    """The op's workloads (none for a dtype it does not take)."""
    yield from BUILDERS[family(op)](op, dtype, numel, device)
