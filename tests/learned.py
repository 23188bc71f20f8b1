"""Cases of the gates whose threshold learns, from the registry; the straight-through formulas in float64 as their oracle.

Thresholds, bandwidths and upstream gradients are such that every product and every sum is exact in float32, so that
gradients are compared bit for bit. Inputs hold the edges of the window and their neighbours.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import gates
from .gates import LAYOUTS, OPERANDS, Layout, Operand, Shape, beside, label, same
from .rows import LEARNED_GATES, LearnedGate

OPS = list(LEARNED_GATES.values())
BANDWIDTH = 0.25
SHAPE = (33, 3, 4, 5)
POOL = (0.5, -0.75, 0.0, 2.0, torch.nan, -0.0, 1.25, torch.inf, 1.0, -torch.inf, 0.375)
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
BATCHED = [dataclasses.replace(layout, shape=SHAPE) if layout.shape == gates.SHAPE else layout for layout in LAYOUTS]


def threshold(operand: Operand, shape: Shape, dtype: torch.dtype, device: torch.device) -> Any:
    """A threshold of this kind, its values from POOL where it has several."""
    if operand.spans == "number":
        return 0.5
    made = operand.make(OPS[0], shape, dtype, device)  # type: ignore[arg-type]
    dtype = operand.dtype or dtype
    if not dtype.is_floating_point:
        return made
    if operand.spans == "0dim":
        return torch.full_like(made, 0.5)
    index = torch.arange(made.numel()).reshape(made.shape) % len(POOL)
    return torch.tensor(POOL, dtype=dtype)[index].to(device)


def inputs(t: Any, dtype: torch.dtype, shape: Shape, device: torch.device, bandwidth: float = BANDWIDTH) -> Tensor:
    """Thresholds and the edges of their windows, the neighbours of all, hard values and random ones, in random places."""
    generator = torch.Generator().manual_seed(5)
    center = torch.as_tensor(t).detach().cpu().to(dtype).expand(shape).contiguous()
    values = [center + shift for shift in (0, bandwidth / 2, -bandwidth / 2, bandwidth / 4)]
    values += [beside(v, step) for v in values[:3] for step in (1, -1)]
    info = torch.finfo(dtype)
    values += [torch.full(shape, v, dtype=dtype) for v in (0.0, -0.0, torch.inf, -torch.inf, torch.nan, info.tiny / 4)]
    values += [scale * torch.randn(shape, generator=generator).to(dtype) for scale in (1, 1, 3)]
    which = torch.randperm(center.numel(), generator=generator).reshape(shape) % len(values)
    return torch.stack(values).gather(0, which[None])[0].to(device)


def upstream(outputs: Sequence[Tensor], *, special: bool = False) -> list[Tensor]:
    """Whole gradients from -4 to 4, one per output; if special, infinities and NaN among them."""
    generator = torch.Generator().manual_seed(3)
    found = []
    for output in outputs:
        g = torch.randint(-4, 5, output.shape, generator=generator).to(output.dtype)
        if special:
            flat = g.view(-1)
            for start, value in enumerate((torch.inf, -0.0, torch.nan, -torch.inf)):
                flat[start::23] = value
        found.append(g.to(output.device))
    return found


class Truth(NamedTuple):
    outputs: list[Tensor]
    dx: Tensor
    dt: Tensor  # elementwise
    size: Tensor  # of what is summed


def truth(
    op: LearnedGate, x: Tensor, t: Any, bandwidth: float, gradients: Sequence[Tensor], input_gradient: bool = False
) -> Truth:
    """The contract's formulas in float64, on inputs and thresholds as they were given (a number rounded to float32)."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    if not isinstance(t, Tensor):
        t = torch.tensor(t, dtype=wide, device=x.device)
    x64, t64 = x.detach().double(), t.detach().to(x.device).double()
    above = x64 > t64
    u = (x64 - t64) / bandwidth
    rect = (u > -0.5) & (u < 0.5)
    g, *counted = [each.double() for each in gradients]
    zero = torch.zeros((), dtype=torch.float64, device=x.device)
    jumps, steps = op.name.startswith("jumprelu"), [g] if op.name == "step" else [c[..., None] for c in counted]
    dx = torch.where(above, g, zero) if jumps else torch.zeros_like(x64)
    dt = torch.where(rect, -(t64 / bandwidth) * g, zero) if jumps else torch.zeros_like(x64)
    for each in steps:
        dt = dt + torch.where(rect, -each / bandwidth, zero)
    y = torch.where(above, x.detach(), 0) if jumps else above.to(x.dtype)
    outputs = [y, above.sum(-1).to(wide)] if op.counts else [y]
    return Truth(outputs, (dx - dt if input_gradient else dx).to(x.dtype), dt, dt.abs())


def outputs_of(result: Any) -> list[Tensor]:
    return list(result) if isinstance(result, tuple) else [result]


@dataclasses.dataclass(frozen=True)
class Case:
    op: LearnedGate
    dtype: torch.dtype
    operand: Operand
    layout: Layout

    @property
    def id(self) -> str:
        return f"{self.op.name}-{label(self.dtype)}-{self.operand.name}-{self.layout.name}"

    def make(self, device: torch.device) -> tuple[Tensor, Any]:
        shape = self.layout.shape
        t = threshold(self.operand, shape, self.dtype, device)
        return self.layout.lay(inputs(t, self.dtype, shape, device)), t


def cases(*, full: bool) -> Iterator[Case]:
    """Op x dtype x operand x layout; if not full, of the layouts but the contiguous one in one dtype in turn."""
    for op in OPS:
        for i, (layout, operand) in enumerate(itertools.product(BATCHED, OPERANDS)):
            if not operand.fits(layout.shape) or (op.counts and layout.shape == ()):
                continue
            for j, dtype in enumerate(FLOATS):
                if full or layout.name == "contiguous" or i % 4 == j:
                    yield Case(op, dtype, operand, layout)


def check(case: Case, device: torch.device, *, input_gradient: bool, special: bool) -> None:
    """Values and gradients, bit for bit; arguments unharmed."""
    op = case.op
    x, t = case.make(device)
    learns = isinstance(t, Tensor) and t.is_floating_point()
    with torch.no_grad():
        outputs = outputs_of(op(x, t, BANDWIDTH, input_gradient=input_gradient))
    gradients = upstream(outputs, special=special)
    expected = truth(op, x, t, BANDWIDTH, gradients, input_gradient)
    arguments = [x, *gradients, *([t] if isinstance(t, Tensor) else [])]
    before, versions = [gates.bits(a) for a in arguments], [a._version for a in arguments]
    x.requires_grad_()
    if learns:
        t.requires_grad_()
    recorded = outputs_of(op(x, t, BANDWIDTH, input_gradient=input_gradient))
    for plain, output, value in zip(outputs, recorded, expected.outputs, strict=True):
        same(output.detach(), value)
        same(plain, value)
    assert recorded[0].stride() == torch.empty_like(x).stride()
    dx, *dt = torch.autograd.grad(recorded, [x, t] if learns else [x], gradients)
    gates.equal(dx, expected.dx)
    if learns:
        gates.equal(dt[0], expected.dt.sum_to_size(t.shape).to(t.device, t.dtype))
    assert all(torch.equal(gates.bits(a), b) for a, b in zip(arguments, before, strict=True)), (
        "an argument was written to"
    )
    assert [a._version for a in arguments] == versions
