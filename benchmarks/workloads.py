"""What the benchmark runs for each op: inputs, the pack's call, the eager baseline, the bytes, and what must come out.

One builder per family of the registry, in BUILDERS. A new op of a known family appears by itself; a new family needs a builder.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Union

import torch
from torch import Tensor

import triton_thresh as tt
from benchmarks import baselines
from triton_thresh import explain, reference
from triton_thresh.families import ForeachGate, Gate, GradientGate, LearnedGate, Loss, Op
from triton_thresh.registry import OPS
from triton_thresh.rounding import round_to
from triton_thresh.rules import ByLoss, ByPrediction, ByProximity, Rule

MODES = ("forward", "backward", "both")
WHOLE = "whole"  # how a workload's `whole` is run: forward and backward in one call, without autograd
FEATURES = 1 << 16
GRADIENT_THRESHOLD = 0.5
PARAMETERS = 1000
FLOAT16_SCALE = 256.0
CHUNK = 1 << 24  # elements the expected results are computed of at a time
# Every setting is exact in every dtype, so that no baseline compares with another number than the pack.
SETTINGS: Mapping[type[Rule], Rule] = {
    ByPrediction: ByPrediction(0.75, 1.0, 0.125),
    ByProximity: ByProximity(0.5, 0.25, 1.5),
    ByLoss: ByLoss(1.0, 2.0),
}
# Of the largest expected value: what may lie between a baseline, which rounds between its steps, and the expected result.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
ASTRAY = 0.02  # of a baseline's elements may lie further off: those beside a threshold, rounded to its other side


class Inputs(NamedTuple):
    """A call's tensors, and the upstream gradient of each output (None: 1, for a scalar)."""

    tensors: tuple[Tensor, ...]
    upstream: tuple[Tensor | None, ...] = (None,)

    @property
    def leaves(self) -> tuple[Tensor, ...]:
        """What is differentiated."""
        return tuple(t for t in self.tensors if t.requires_grad)

    @property
    def bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in (*self.tensors, *self.upstream) if t is not None)


Call = Callable[..., Any]
Result = tuple[tuple[Tensor, ...], tuple[Union[Tensor, None], ...]]  # outputs, gradients of the leaves


@dataclass(frozen=True)
class Workload:
    """An op at one dtype and size on one device.

    `pack` and `eager` take the tensors of `make(seed)` and return a tensor or a tuple of them; `expected` gives the outputs and,
    where the mode has them, the gradients of the leaves. `arguments` is the pack's call as `tt.explain` takes it. `whole` is
    `torch.func.grad_and_value` of a loss's formula: gradient and value of one call, in this order. `compiles`: torch.compile is
    a baseline too (over a thousand tensors it takes minutes).
    """

    name: str
    op: Op
    dtype: torch.dtype
    numel: int
    device: torch.device
    modes: tuple[str, ...]
    make: Callable[[int], Inputs]
    pack: Call
    eager: Call
    bytes: Mapping[str, int]
    expected: Callable[[Inputs], Result]
    arguments: Callable[[Inputs], tuple[tuple[Any, ...], dict[str, Any]]]
    whole: Call | None = None
    compiles: bool = True

    def blocks(self, inputs: Inputs, mode: str) -> str:
        """On Triton the block size of the pack's call, its warps and where they came from; elsewhere the backend."""
        positional, keywords = self.arguments(inputs)
        with torch.set_grad_enabled(mode != "forward"):
            found = explain(self.op.name, *positional, **keywords)
        return found.backend if found.block is None else f"{found.block}/{found.num_warps} {found.block_source}"


def outputs(result: Any) -> tuple[Tensor, ...]:
    """What a call returned, as a tuple."""
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
    """A call gave something else than the op's reference."""


def check(workload: Workload, call: Call, mode: str, *, strict: bool, inputs: Inputs | None = None) -> None:
    """Run a call once and hold it to what is expected; strict: no element may be astray (WrongResultError)."""
    inputs = inputs or workload.make(0)
    expected = workload.expected(inputs)
    actual = run(call, inputs, mode)
    for kind, found, wanted in zip(("output", "gradient"), actual, expected):
        for place, (a, b) in enumerate(zip(found, wanted, strict=True) if found else ()):
            _compare(f"{kind} {place}", a, b, workload.dtype, strict)


def _compare(what: str, actual: Tensor | None, expected: Tensor | None, dtype: torch.dtype, strict: bool) -> None:
    assert expected is not None
    actual = torch.zeros_like(expected) if actual is None else actual
    if actual.shape != expected.shape:
        raise WrongResultError(f"{what} has shape {tuple(actual.shape)}, expected {tuple(expected.shape)}")
    if expected.numel() == 0:
        return
    kind = torch.finfo(dtype)
    expected = expected.detach()
    limit = TOLERANCE[dtype] * float(expected.abs().max()) + kind.tiny * kind.eps
    pairs = zip(actual.detach().reshape(-1).split(CHUNK), expected.reshape(-1).split(CHUNK))
    wrong = sum(int((~((a.double() - b.double()).abs() <= limit)).sum()) for a, b in pairs)
    if wrong > (0 if strict else ASTRAY * expected.numel()):
        raise WrongResultError(f"{what}: {wrong} of {expected.numel()} elements differ by more than {limit:.3g}")


def _random(shape: Sequence[int], dtype: torch.dtype, device: torch.device, seed: int, *, normal: bool) -> Tensor:
    generator = torch.Generator(device).manual_seed(seed)
    draw = torch.randn if normal else torch.rand
    made = torch.empty(tuple(shape), dtype=dtype, device=device)
    for part in made.view(-1).split(CHUNK):
        part.copy_(draw(part.shape, generator=generator, device=device))
    return made


def _bytes(op: Any, x: Tensor, operands: Sequence[Tensor], arguments: Mapping[str, Any]) -> dict[str, int]:
    inference, _, _ = op.bytes_moved(x, operands, arguments, grad=False)
    forward, backward, _ = op.bytes_moved(x, operands, arguments, grad=True)
    return {"forward": inference, "backward": backward, "both": forward + backward}


# ----------------------------------------------------------------------------------------------------------------- gates


def gate(op: Gate, dtype: torch.dtype, numel: int, device: torch.device) -> Iterator[Workload]:
    """The gate with the numbers of its example, on normal inputs."""
    if dtype not in op.dtypes:
        return
    call, numbers = getattr(tt, op.name, op), tuple(round_to(v, dtype) for v in op.example)
    like = torch.empty(numel, dtype=dtype, device="meta")

    def make(seed: int) -> Inputs:
        x = _random((numel,), dtype, device, 2 * seed, normal=True).requires_grad_(op.differentiable)
        g = _random((numel,), dtype, device, 2 * seed + 1, normal=True) if op.differentiable else None
        return Inputs((x,), (g,))

    def expected(inputs: Inputs) -> Result:
        (x,), (g,) = inputs
        y, dx = torch.empty_like(x), torch.empty_like(x)
        for part in (slice(start, start + CHUNK) for start in range(0, numel, CHUNK)):
            leaf = x.detach()[part].requires_grad_(op.differentiable)
            y_part = op.reference(leaf, *numbers)
            y[part] = y_part.detach()
            if g is not None:
                (dx[part],) = torch.autograd.grad(y_part, leaf, g[part])
        return (y.detach(),), (dx.detach(),) if op.differentiable else ()

    yield Workload(
        name=op.name,
        op=op,
        dtype=dtype,
        numel=numel,
        device=device,
        modes=MODES if op.differentiable else ("forward",),
        make=make,
        pack=lambda x: call(x, *numbers),
        eager=baselines.gate(op, numbers, torch.empty(0, dtype=dtype, device=device)),
        bytes=_bytes(op, like.requires_grad_(op.differentiable), (), {}),
        expected=expected,
        arguments=lambda inputs: ((*inputs.tensors, *numbers), {}),
    )


# --------------------------------------------------------------------------------------------------------- learned gates


def learned(op: LearnedGate, dtype: torch.dtype, numel: int, device: torch.device) -> Iterator[Workload]:
    """Rows of up to FEATURES features with a float32 threshold each, which learns as the input does."""
    if dtype not in op.dtypes:
        return
    features = math.gcd(numel, FEATURES)
    shape = (numel // features, features)
    call, (threshold, bandwidth) = getattr(tt, op.name, op), op.example
    like = torch.empty(shape, dtype=dtype, device="meta", requires_grad=True)
    thresholds = torch.empty(features, device="meta", requires_grad=True)

    def make(seed: int) -> Inputs:
        x = _random(shape, dtype, device, 3 * seed, normal=True).requires_grad_()
        t = threshold * (0.75 + 0.5 * _random((features,), torch.float32, device, 3 * seed + 1, normal=False))
        g = _random(shape, dtype, device, 3 * seed + 2, normal=True)
        return Inputs((x, t.requires_grad_()), (g, g[:, 0].float()) if op.counts else (g,))

    def expected(inputs: Inputs) -> Result:
        with tt.use_backend("eager"):
            return run(lambda x, t: op(x, t, bandwidth), inputs, "both")

    yield Workload(
        name=op.name,
        op=op,
        dtype=dtype,
        numel=numel,
        device=device,
        modes=MODES,
        make=make,
        pack=lambda x, t: call(x, t, bandwidth),
        eager=baselines.learned(op, bandwidth),
        bytes=_bytes(op, like, (thresholds,), {}),
        expected=expected,
        arguments=lambda inputs: ((*inputs.tensors, bandwidth), {}),
    )


# ---------------------------------------------------------------------------------------------------------------- losses


def loss(op: Loss, dtype: torch.dtype, numel: int, device: torch.device) -> Iterator[Workload]:
    """The mean of a named loss, and of each cell of the grid that has no name of its own."""
    named = {cell for other in OPS.values() if isinstance(other, Loss) and other.rule for cell in other.cells}
    for base, rule in op.cells:
        if op.rule is not None:
            yield _loss(op.name, op, base, SETTINGS[rule], dtype, numel, device)
        elif (base, rule) not in named:
            yield _loss(f"{op.name}.{base}.{rule.__name__}", op, base, SETTINGS[rule], dtype, numel, device)


def _loss(name: str, op: Loss, base: str, rule: Rule, dtype: torch.dtype, numel: int, device: torch.device) -> Workload:
    call = getattr(tt, op.name)
    keywords = vars(rule) if op.rule is not None else {"rule": rule, "base": base}
    like = torch.empty(numel, dtype=dtype, device="meta", requires_grad=True)
    domain = reference.BASES[base].domain
    # 1, but in float16 scaled as a GradScaler does it: the baselines' gradients, divided by numel, would underflow
    scale = min(FLOAT16_SCALE, numel) if dtype == torch.float16 else 1.0
    upstream = torch.full((), scale, dtype=dtype, device=device) if scale != 1 else None
    eager = baselines.loss(base, rule, torch.empty(0, dtype=dtype, device=device))

    def scaled(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        value = eager(x, y)
        return value * scale, value

    def scaled_gradient_and_value(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        gradient, (_, value) = torch.func.grad_and_value(scaled, has_aux=True)(x, y)
        return gradient, value

    def make(seed: int) -> Inputs:
        x = _random((numel,), dtype, device, 2 * seed, normal=domain != "probability")
        if domain == "probability":
            x.clamp_(1 / 256, 1 - 1 / 256)
        y = _random((numel,), dtype, device, 2 * seed + 1, normal=domain == "real")
        return Inputs((x.requires_grad_(), y), (upstream,))

    def expected(inputs: Inputs) -> Result:
        x, y = inputs.tensors
        x = x.detach()
        spec, operands = reference.specify(x, rule, base)
        total = torch.zeros((), dtype=torch.float64, device=device)
        dx = torch.empty_like(x)
        for part in (slice(start, start + CHUNK) for start in range(0, numel, CHUNK)):
            value, slope = reference.loss_and_slope(spec, x[part], y[part], operands)
            total += value.sum(dtype=torch.float64)
            dx[part] = slope * scale / numel
        return ((total / numel).to(dtype),), (dx,)

    return Workload(
        name=name,
        op=op,
        dtype=dtype,
        numel=numel,
        device=device,
        modes=MODES,
        make=make,
        pack=lambda x, y: call(x, y, **keywords),
        eager=eager,
        bytes=_bytes(op, like, (like.detach(),), {"reduction": "mean"}),
        expected=expected,
        arguments=lambda inputs: (inputs.tensors, dict(keywords)),
        whole=torch.func.grad_and_value(eager) if scale == 1 else scaled_gradient_and_value,
    )


# ------------------------------------------------------------------------------------------------- gradient thresholding


def gradient(op: GradientGate, dtype: torch.dtype, numel: int, device: torch.device) -> Iterator[Workload]:
    """A gate on the gradient. Forward is a view: only backward moves anything."""
    if dtype not in op.gate.dtypes:
        return
    like = torch.empty(numel, dtype=dtype, device="meta", requires_grad=True)

    def make(seed: int) -> Inputs:
        x = _random((numel,), dtype, device, 2 * seed, normal=True).requires_grad_()
        return Inputs((x,), (_random((numel,), dtype, device, 2 * seed + 1, normal=True),))

    def expected(inputs: Inputs) -> Result:
        (x,), (g,) = inputs
        assert g is not None
        parts = [op.gate.reference(part, GRADIENT_THRESHOLD) for part in g.split(CHUNK)]
        return (x.detach(),), (torch.cat(parts),)

    yield Workload(
        name=op.name,
        op=op,
        dtype=dtype,
        numel=numel,
        device=device,
        modes=("backward", "both"),
        make=make,
        pack=lambda x: op(x, GRADIENT_THRESHOLD),
        eager=lambda x: baselines.hardshrink_gradient(x, GRADIENT_THRESHOLD),
        bytes=_bytes(op, like, (), {}),
        expected=expected,
        arguments=lambda inputs: ((*inputs.tensors, GRADIENT_THRESHOLD), {}),
    )


def foreach(op: ForeachGate, dtype: torch.dtype, numel: int, device: torch.device) -> Iterator[Workload]:
    """The gradients of up to PARAMETERS parameters, in place; what is kept stays kept, so that calls repeat."""
    if dtype not in op.gate.dtypes:
        return
    count = min(PARAMETERS, max(1, numel >> 10))

    def make(seed: int) -> Inputs:
        gradients = _random((numel,), dtype, device, seed, normal=True).tensor_split(count)
        parameters = [torch.nn.Parameter(torch.empty_like(g)) for g in gradients]
        for parameter, g in zip(parameters, gradients):
            parameter.grad = g.clone()  # at an address as aligned as any gradient's
        return Inputs(tuple(parameters))

    def run(call: Call) -> Call:
        def thresholded(*parameters: Tensor) -> tuple[Tensor, ...]:
            call(parameters)
            return tuple(p.grad for p in parameters if p.grad is not None)

        return thresholded

    def expected(inputs: Inputs) -> Result:
        return tuple(op.gate.reference(p.grad, GRADIENT_THRESHOLD) for p in inputs.tensors), ()

    size, _, _ = op.bytes_moved([torch.empty(numel, dtype=dtype, device="meta")], (), {}, grad=False)
    yield Workload(
        name=op.name,
        op=op,
        dtype=dtype,
        numel=numel,
        device=device,
        modes=("forward",),
        make=make,
        pack=run(lambda parameters: op(parameters, GRADIENT_THRESHOLD)),
        eager=run(lambda parameters: baselines.hardshrink_gradients_(parameters, GRADIENT_THRESHOLD)),
        bytes={"forward": size},
        expected=expected,
        arguments=lambda inputs: ((inputs.tensors, GRADIENT_THRESHOLD), {}),
        compiles=False,
    )


# -------------------------------------------------------------------------------------------------------------- registry

Builder = Callable[[Any, torch.dtype, int, torch.device], Iterator[Workload]]

BUILDERS: Mapping[str, Builder] = {
    "gate": gate,
    "learned": learned,
    "loss": loss,
    "gradient": gradient,
    "foreach": foreach,
}


def workloads(op: Op, dtype: torch.dtype, numel: int, device: torch.device) -> Iterator[Workload]:
    """The op's workloads (none for a dtype it does not take)."""
    if op.family not in BUILDERS:
        raise NotImplementedError(
            f"{op.name}: no benchmark for the family {op.family!r}; add one to {__name__}.BUILDERS"
        )
    yield from BUILDERS[op.family](op, dtype, numel, device)


@functools.cache
def names() -> tuple[str, ...]:
    """The names of every workload, in the order of the registry."""
    made = [w.name for op in OPS.values() for w in workloads(op, torch.float32, 1, torch.device("cpu"))]
    return tuple(made)
