"""Cases of the gates, generated from the registry: op x dtype x operand x layout; and inputs that hold every boundary.

The oracle is the op's reference, and of the gradient the contract's rule: the upstream gradient where the element is
kept, else 0. What is kept is read off the reference, as its derivative.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .rows import OPS, Gate, LearnedGate

Shape = tuple[int, ...]

GATES = [op for op in OPS.values() if isinstance(op, Gate)]
DIFFERENTIABLE = [op for op in GATES if op.differentiable]
LEARNED = [op for op in GATES if op.learns]
INPLACE = [op for op in GATES if op.inplace]

SHAPE = (2, 3, 4, 5)
BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
REALS = (0.1, 256.0, -0.75, torch.nan, -0.0, 0.0, 3.0, torch.inf, 1e-41, 1.0, 2.5)
INTEGERS = (3, 257, -3, 0, 2, 1, 7)  # 257, a neighbour of 256, is no bfloat16


def label(value: object) -> str | None:
    """A short id for a parameter."""
    if isinstance(value, (Gate, LearnedGate)):
        return value.name
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else None


# ------------------------------------------------------------------------------------------------------------- layouts


def permuted(x: Tensor, order: Shape) -> Tensor:
    """The same tensor with its dimensions in this order in memory."""
    return x.permute(order).contiguous().permute(torch.tensor(order).argsort().tolist())


def spaced(x: Tensor) -> Tensor:
    """Every other element of a row of memory."""
    wide = x.new_zeros(*x.shape, 2)
    wide[..., 1] = x
    return wide[..., 1]


def cut(x: Tensor) -> Tensor:
    """Some columns and some rows of a larger tensor."""
    wide = x.new_zeros(*x.shape[:2], x.shape[2] + 1, x.shape[3] + 2)
    wide[:, :, 1:, 1:-1] = x
    return wide[:, :, 1:, 1:-1]


def shifted(x: Tensor) -> Tensor:
    """A view that starts one element after the start of its memory."""
    return torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)


@dataclass(frozen=True)
class Layout:
    """How an input lies in memory."""

    name: str
    lay: Callable[[Tensor], Tensor]
    shape: Shape = SHAPE


LAYOUTS = (
    Layout("contiguous", lambda x: x),
    Layout("transposed", lambda x: permuted(x, (3, 1, 0, 2))),
    Layout("channels_last", lambda x: permuted(x, (0, 2, 3, 1))),
    Layout("spaced", spaced),
    Layout("cut", cut),
    Layout("expanded", lambda x: x[:, :1].expand(x.shape)),
    Layout("shifted", shifted),
    Layout("0dim", lambda x: x, ()),
    Layout("empty", lambda x: x, (2, 0, 4, 5)),
)


# ------------------------------------------------------------------------------------------------------------ operands


@dataclass(frozen=True)
class Operand:
    """A kind of threshold: "number", "0dim", or the dimensions it spans, of nchw (1: a dimension of length 1)."""

    spans: str
    dtype: torch.dtype | None = None  # None: the input's
    cpu: bool = False

    @property
    def name(self) -> str:
        return "-".join(filter(None, (self.spans, label(self.dtype), "cpu" if self.cpu else "")))

    def fits(self, shape: Shape) -> bool:
        return self.spans in ("number", "0dim") or len(self.spans) <= len(shape)

    def make(self, op: Gate, shape: Shape, dtype: torch.dtype, device: torch.device) -> Any:
        if self.spans == "number":
            return op.example[0]
        dtype = self.dtype or dtype
        floating = dtype.is_floating_point
        if self.spans == "0dim":
            return torch.tensor(0.1 if floating else 1, dtype=dtype, device="cpu" if self.cpu else device)
        own = tuple(1 if s == "1" else shape["nchw".index(s)] for s in self.spans)
        pool = [float(v) for v in REALS] if floating else [v for v in INTEGERS if holds(dtype, v)]
        if not op.selects:
            pool = [abs(v) for v in pool]  # below 0 its formula has no meaning
        index = torch.arange(torch.Size(own).numel()).reshape(own) % len(pool)
        return torch.tensor(pool, dtype=dtype)[index].to(device)


OPERANDS = (
    Operand("number"),
    Operand("0dim"),
    Operand("0dim", torch.float64, cpu=True),
    Operand("w"),
    Operand("c11"),
    Operand("n111"),
    Operand("ch1"),
    Operand("1111"),
    Operand("nchw"),
    Operand("n11w"),
    Operand("1c1w"),
    Operand("c11", torch.float32),
    Operand("nchw", torch.float64),
    Operand("nchw", torch.int64),
    Operand("n111", torch.uint8),
    Operand("w", torch.bfloat16),
    Operand("1c1w", torch.float16),
)


# -------------------------------------------------------------------------------------------------------------- inputs


def holds(dtype: torch.dtype, value: int) -> bool:
    info = torch.iinfo(dtype)
    return info.min <= value <= info.max


def beside(t: Tensor, step: int) -> Tensor:
    """Each value's neighbour in its dtype: away from zero for step 1, towards it for -1; of 0 the least denormal."""
    if not t.is_floating_point():
        return t + step
    bits = t.view(BITS[t.itemsize])
    least = torch.ones_like(bits).view(t.dtype) * step
    return torch.where(t == 0, least, (bits + step).view(t.dtype))


def rounded(threshold: Any, dtype: torch.dtype, shape: Shape) -> Tensor:
    """A threshold as the nearest values of the input's dtype, on the CPU, one per element."""
    t = torch.as_tensor(threshold).detach().cpu()
    if not dtype.is_floating_point:
        info = torch.iinfo(dtype)
        t = t.double().nan_to_num(0).clamp(max(info.min, -1000), min(info.max, 1000))
    return t.to(dtype).expand(shape).contiguous()


def inputs(threshold: Any, dtype: torch.dtype, shape: Shape, device: torch.device) -> Tensor:
    """Thresholds, their neighbours, both negated, values that go wrong easily, and random ones, in random places."""
    generator = torch.Generator().manual_seed(7)
    t = rounded(threshold, dtype, shape)
    values = [v for sign in (t, -t) for v in (sign, beside(sign, 1), beside(sign, -1))]
    if dtype.is_floating_point:
        info = torch.finfo(dtype)
        denormal = info.tiny / 4
        hard = [0.0, -0.0, torch.inf, -torch.inf, torch.nan, info.tiny, denormal, -denormal, info.max, info.min]
        drawn = torch.randn(shape, generator=generator).to(dtype)
    else:
        limits = torch.iinfo(dtype)
        hard = [0, 1, limits.min, limits.max]
        drawn = torch.randint(-9, 9, shape, generator=generator).to(dtype)
    values += [torch.full(shape, v, dtype=dtype) for v in hard] + [drawn, 3 * drawn]
    which = torch.randperm(t.numel(), generator=generator).reshape(shape) % len(values)
    return torch.stack(values).gather(0, which[None])[0].to(device)


def upstream(like: Tensor, *, special: bool = True) -> Tensor:
    """Small whole gradients (their sums are exact), and if special, -0, infinities and NaN among them."""
    generator = torch.Generator().manual_seed(11)
    g = torch.randint(-8, 9, like.shape, generator=generator).to(like.dtype)
    if special and g.is_floating_point():
        flat = g.view(-1)
        for start, value in enumerate((-0.0, torch.inf, -torch.inf, torch.nan)):
            flat[start::9] = value
    return g.to(like.device)


# --------------------------------------------------------------------------------------------------------------- cases


def constants(op: Gate, dtype: torch.dtype) -> tuple[float, ...]:
    """The op's example of what follows the threshold, without a sign where the dtype has none."""
    return tuple(v if dtype.is_signed else abs(v) for v in op.example[1:])


@dataclass(frozen=True)
class Case:
    op: Gate
    dtype: torch.dtype
    operand: Operand
    layout: Layout

    @property
    def id(self) -> str:
        return f"{self.op.name}-{label(self.dtype)}-{self.operand.name}-{self.layout.name}"

    def make(self, device: torch.device) -> tuple[Tensor, tuple[Any, ...]]:
        """The input, and the op's other arguments. Of several thresholds the first is of the case's kind."""
        shape = self.layout.shape
        threshold = self.operand.make(self.op, shape, self.dtype, device)
        x = self.layout.lay(inputs(threshold, self.dtype, shape, device))
        return x, (threshold, *constants(self.op, self.dtype))


def cases(*, full: bool, ops: Sequence[Gate] = GATES) -> Iterator[Case]:
    """Op x dtype x operand x layout; if not full, of the layouts but the contiguous one in one dtype in turn."""
    for op in ops:
        product = itertools.product(LAYOUTS, OPERANDS)
        fitting = ((layout, operand) for layout, operand in product if operand.fits(layout.shape))
        for i, (layout, operand) in enumerate(fitting):
            one = op.dtypes[i % len(op.dtypes)]
            for dtype in op.dtypes:
                if full or layout.name == "contiguous" or dtype == one:
                    yield Case(op, dtype, operand, layout)


# ------------------------------------------------------------------------------------------------------------- oracles


def equal(actual: Tensor, expected: Tensor) -> None:
    """Same dtype, same shape, equal values, NaN where NaN is due."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


def same(actual: Tensor, expected: Tensor) -> None:
    """Same dtype, same shape, and the same bits but for the payload of NaN."""
    equal(actual, expected)
    if actual.is_floating_point():
        zeros = expected == 0
        assert torch.equal(actual.signbit() & zeros, expected.signbit() & zeros), "a zero has the wrong sign"


def bits(x: Tensor) -> Tensor:
    """The bytes of a tensor's elements."""
    return x.detach().contiguous().view(-1).view(torch.uint8).clone()


def kept(op: Gate, x: Tensor, *arguments: Any) -> Tensor:
    """Where dy/dx is 1; elsewhere it is 0."""
    x = x.detach().clone().requires_grad_()
    (slope,) = torch.autograd.grad(op.reference(x, *arguments).sum(), x)
    assert ((slope == 0) | (slope == 1)).all()
    return slope == 1


def gradient(op: Gate, x: Tensor, *arguments: Any, g: Tensor) -> Tensor:
    """The contract's rule: the upstream gradient where the element is kept, else 0; or that times the derivative."""
    if op.selects:
        return torch.where(kept(op, x, *arguments), g, 0)
    x_ = x.detach().double().requires_grad_()
    (slope,) = torch.autograd.grad(op.reference(x_, *(as_compared(x, t) for t in arguments)).sum(), x_)
    return torch.where(slope == 0, 0, g.double() * slope).to(x.dtype)  # an infinite gradient does not meet a slope of 0


def as_compared(x: Tensor, threshold: Any) -> Any:
    """A threshold as an input compares it, in float64."""
    if isinstance(threshold, Tensor) and threshold.dim():
        return threshold.double() if threshold.is_floating_point() else threshold.to(x.dtype).double()
    return torch.as_tensor(threshold, dtype=torch.float64).to(x.device, x.dtype).double()


def agree(op: Gate, actual: Tensor, expected: Tensor) -> None:
    """The same bits; of an op that computes more than a selection or a difference, four units in the last place."""
    if op.selects:
        same(actual, expected)
    else:
        kind = torch.finfo(actual.dtype)
        ulps, least = 4 * kind.eps, 4 * kind.tiny * kind.eps  # of denormals a unit is the smallest of them
        torch.testing.assert_close(actual, expected, rtol=ulps, atol=least, equal_nan=True)


def threshold_gradient(op: Gate, x: Tensor, threshold: Tensor, *constants: Any, g: Tensor) -> Tensor:
    """The gradient of a threshold that learns, in float64; compared as the op compares it."""
    t = threshold.detach().to(x.dtype) if threshold.dim() == 0 else threshold.detach()
    each = t.double().expand(x.shape).clone().requires_grad_()
    (slope,) = torch.autograd.grad(op.reference(x.detach().double(), each, *constants), each, g.double())
    return slope.sum_to_size(threshold.shape)
