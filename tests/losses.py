"""Cases of the losses, generated from the registry's grid, and their oracle: the contract's formulas in float64.

A selection (x >= t, d < range, l > bound) is taken in the compute type, as the contract says, so that the wider type
cannot move it. `size` beside a value adds up the magnitudes of its terms: a rounding error is measured against that.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import fields
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import triton_thresh as tt
from triton_thresh import ByConfidence, ByLoss, ByPrediction, ByProximity
from triton_thresh.rules import Element, Unweighted

from .rows import BASE_NAMES, OPS, RULE_CLASSES, base_of

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
TARGETS = (*DTYPES, torch.int64, torch.uint8, torch.bool)
REDUCTIONS = ("mean", "sum", "none")
SHAPE = (5, 7)
SLACK = 4  # units in the last place of the compute type, of `size`


class Cell(NamedTuple):
    """A base and a rule."""

    base: str
    rule: type[Any]

    def __repr__(self) -> str:
        return f"{self.base}-{self.rule.__name__}"


NAMED = {name: Cell(op.base, op.rule) for name, op in OPS.items() if op.family == "loss" and op.rule}
CELLS = [Cell(*cell) for cell in OPS["threshold_loss"].cells]
PAIRS = [
    Cell(base.snake_name(), rule) for base, rule in OPS["threshold_loss"].row.pairs
]  # each base once, each rule once
OWN = {
    ByPrediction: (0.4, 1.25, 0.3),
    ByProximity: (0.4, 0.3, 1.5),
    ByLoss: (0.35, 2.5, 0.75),
    ByConfidence: (0.4, 1.5),
}
SETTINGS = {rule: OWN.get(rule, rule.example) for rule in (*RULE_CLASSES, Unweighted)}


def name(value: object) -> str | None:
    """A short id for a parameter."""
    return str(value).removeprefix("torch.") if isinstance(value, (Cell, torch.dtype)) else None


def _spread(value: float, shape: tuple[int, ...]) -> Tensor:
    return value * torch.linspace(0.8, 1.25, math.prod(shape), dtype=torch.float64).reshape(shape)


def _row(shape: tuple[int, ...]) -> tuple[int, ...]:
    return (shape[0],) + (1,) * (len(shape) - 1)


OPERANDS: dict[str, Callable[[float, tuple[int, ...]], Any]] = {
    "number": lambda v, shape: v,
    "0dim": lambda v, shape: torch.tensor(v),
    "0dim-float64": lambda v, shape: torch.tensor(v, dtype=torch.float64),
    "class": lambda v, shape: _spread(v, shape[-1:]).float(),
    "row": lambda v, shape: _spread(v, _row(shape)).float(),
    "element": lambda v, shape: _spread(v, shape).float(),
    "element-float64": lambda v, shape: _spread(v, shape),
    "class-bfloat16": lambda v, shape: _spread(v, shape[-1:]).bfloat16(),
    "row-float16": lambda v, shape: _spread(v, _row(shape)).half(),
    "class-int64": lambda v, shape: torch.arange(shape[-1]) % 3,
    "element-uint8": lambda v, shape: (torch.arange(math.prod(shape)) % 3).reshape(shape).byte(),
    "class-bool": lambda v, shape: torch.arange(shape[-1]) % 2 == 0,
    "element-transposed": lambda v, shape: _spread(v, shape[::-1]).float().permute(*reversed(range(len(shape)))),
    "class-strided": lambda v, shape: _spread(v, (2 * shape[-1],)).float()[::2],
    "element-expanded": lambda v, shape: torch.tensor(v).expand(shape),
}


class Setup(NamedTuple):
    """Everything a loss is called with."""

    cell: Cell
    input: Tensor
    target: Tensor
    rule: Any
    weight: Any = None
    pos_weight: Any = None

    def __call__(self, reduction: str = "none", input: Tensor | None = None) -> Tensor:
        x = self.input if input is None else input
        weights = {"weight": self.weight, "pos_weight": self.pos_weight}
        return tt.threshold_loss(
            x, self.target, self.rule, base=base_of(self.cell.base), reduction=reduction, **weights
        )

    def tensors(self) -> list[Tensor]:
        """Every tensor of the caller's."""
        values = (self.input, self.target, *vars(self.rule).values(), self.weight, self.pos_weight)
        return [value for value in values if isinstance(value, Tensor)]


def inputs(base: str, shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Predictions inside the base's domain."""
    generator = torch.Generator().manual_seed(seed)
    kind = BASE_NAMES[base].kind
    if kind == "probabilities":
        return (torch.rand(shape, generator=generator, dtype=torch.float64) * 0.98 + 0.01).to(dtype)
    scale = 4 if kind == "logits" else 1
    return (torch.randn(shape, generator=generator, dtype=torch.float64) * scale).to(dtype)


def targets(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 1) -> Tensor:
    """Soft labels, or 0 and 1 in an integer dtype."""
    y = torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return y.to(dtype) if dtype.is_floating_point else (y > 0.5).to(dtype)


def setup(
    cell: Cell,
    dtype: torch.dtype,
    device: torch.device,
    *,
    shape: tuple[int, ...] = SHAPE,
    kind: str = "number",
    target: torch.dtype | None = None,
    weighted: bool = False,
) -> Setup:
    """A case of the matrix: every setting of the rule of one kind, and if `weighted` the weights too."""

    def operand(value: float) -> Any:
        made = OPERANDS[kind](value, shape)
        return made.to(device) if isinstance(made, Tensor) else made

    x, y = inputs(cell.base, shape, dtype).to(device), targets(shape, target or dtype).to(device)
    rule = cell.rule(*(operand(value) for value in SETTINGS[cell.rule]))
    if not weighted:
        return Setup(cell, x, y, rule)
    return Setup(cell, x, y, rule, operand(0.75), operand(1.5) if cell.base == "bce_with_logits" else None)


# --------------------------------------------------------------------------------------------------------------- oracle


class Truth(NamedTuple):
    """The element loss and its derivative in float64, and the size of each."""

    loss: Tensor
    slope: Tensor
    loss_size: Tensor
    slope_size: Tensor


def compute(dtype: torch.dtype) -> torch.dtype:
    """The compute type the contract gives a dtype."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _logit(t: Any) -> Tensor:
    t = t.double() if isinstance(t, Tensor) else torch.tensor(t, dtype=torch.float64)
    return torch.where(t > 1, math.nan, torch.where(t <= 0, -math.inf, t.log() - (1 - t).log()))


def _element(base: str, x: Tensor, y: Tensor, pos_weight: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss, slope and their sizes."""
    if base == "mse":
        d = x - y
        return d**2, 2 * d, d**2, 2 * d.abs()
    if base == "bce":
        terms = y * x.log().clamp(min=-100), (1 - y) * (-x).log1p().clamp(min=-100)
        slope = torch.where((x < 0) | (x > 1), math.nan, (x - y) / (x * (1 - x)).clamp(min=1e-12))
        return -sum(terms), slope, terms[0].abs() + terms[1].abs(), slope.abs()  # type: ignore[return-value]
    w = 1 + (pos_weight - 1) * y
    softplus = -F.logsigmoid(x)
    loss = (1 - y) * x + w * softplus
    slope = (1 - y) - w * torch.sigmoid(-x)
    decay = x.abs() * torch.exp(-x.abs())  # exp2 of a rounded product: relative error |x| units
    return loss, slope, ((1 - y) * x).abs() + w * (softplus + decay), (1 - y).abs() + w


def _own(kind: Any, operands: list[Tensor], x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The same for a base with no oracle here, by its formula in float64, which tests/test_sources.py holds to its source.

    A size is what changing x and y by 1 and by their sizes makes, and every operand by its size.
    """
    x, y = (x if x.requires_grad else x.requires_grad_()), y.detach().requires_grad_()
    settings = [value.expand(x.shape).clone().requires_grad_() for value in operands]
    leaves, steps = (x, y, *settings), (1 + x.abs(), 1 + y.abs(), *settings)
    known: Any = {"allow_unused": True, "materialize_grads": True}
    loss = kind(*settings).loss(x, y)
    along = torch.autograd.grad(loss.sum(), leaves, create_graph=True, **known)
    bends = [torch.zeros_like(x) for _ in leaves]
    if along[0].requires_grad:
        bends = torch.autograd.grad(along[0].sum(), leaves, retain_graph=True, **known)
    size = loss.abs() + sum((step * slope).abs() for step, slope in zip(steps, along))
    slope_size = along[0].abs() + sum((step * bend).abs() for step, bend in zip(steps, bends))
    return loss, along[0], size.detach(), slope_size.detach()


def _own_weight(rule: Any, base: Any, x: Tensor, y: Tensor, loss: Tensor, narrow: Callable[[Any], Tensor]) -> Any:
    """A rule's weight and its slope, by its formula in float64, and the size of each."""
    made = type(rule)(*(narrow(getattr(rule, field.name)).double() for field in fields(rule)))
    leaf = x.detach().double().requires_grad_()
    w = made.weight(Element(base, leaf, y.double(), loss))
    if w is None:
        w = torch.ones_like(leaf)
    if not made.slopes:
        return w, 0.0 * w, w.abs(), 0.0 * w
    (dw,) = torch.autograd.grad(w.sum(), leaf, create_graph=True)
    (bend,) = torch.autograd.grad(dw.sum(), leaf, retain_graph=True)
    live = x.double()  # so that the truth differentiates once more, as a series about x
    d = live - live.detach()
    w, dw = w.detach() + dw.detach() * d, dw.detach() + bend.detach() * d
    size = (w + (x * dw).abs() + dw.abs()).detach()
    return w, dw, size, (dw.abs() + (x * bend).abs() + bend.abs()).detach()


def truth(setup: Setup) -> Truth:
    """The contract in float64; differentiable once more."""
    base, x = setup.cell.base, setup.input
    dtype = compute(x.dtype)
    kind = BASE_NAMES[base].kind
    logits = kind == "logits"

    def narrow(value: Any) -> Tensor:
        return (value if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.float64)).to(x.device, dtype)

    x_, y_ = x.to(dtype), setup.target.to(dtype)
    one = 1.0 if setup.pos_weight is None else setup.pos_weight
    if base in ("bce", "bce_with_logits", "mse"):
        loss, slope, loss_size, slope_size = _element(base, x_.double(), y_.double(), narrow(one).double())
    else:
        own = [narrow(value).double() for value in BASE_NAMES[base].example]
        loss, slope, loss_size, slope_size = _own(BASE_NAMES[base], own, x_.double(), y_.double())
    q_, q = (x_, x_.double()) if not logits else (x_.sigmoid(), x_.double().sigmoid())
    first, *rest = (*(getattr(setup.rule, field.name) for field in fields(setup.rule)), None)
    if isinstance(setup.rule, ByPrediction):
        above = x_ >= narrow(_logit(first) if logits else first)
        w = torch.where(above, narrow(rest[0]), narrow(rest[1])).double()
        weights = w, 0.0 * w, w.abs(), 0.0 * w
    elif isinstance(setup.rule, ByLoss):
        l_ = setup_loss(setup, x_, y_, narrow)
        w = torch.where(l_ > narrow(first), narrow(rest[0]), narrow(rest[1])).double()
        weights = w, 0.0 * w, w.abs(), 0.0 * w
    elif isinstance(setup.rule, ByProximity):
        weights = _proximity(q_, q, narrow(first), narrow(rest[0]), narrow(rest[1]), base)
    else:
        weights = _own_weight(setup.rule.on(BASE_NAMES[base]()), BASE_NAMES[base](), x_, y_, loss, narrow)
    w, dw, w_size, dw_size = weights
    factor = narrow(1.0 if setup.weight is None else setup.weight).double()
    push = torch.where(dw == 0, 0.0, loss * dw)
    return Truth(
        loss * w * factor,
        (slope * w + push) * factor,
        loss_size * w_size * factor.abs(),
        (slope_size * w_size + torch.where(dw == 0, 0.0, loss_size * dw_size)) * factor.abs(),
    )


def setup_loss(setup: Setup, x: Tensor, y: Tensor, narrow: Callable[[Any], Tensor]) -> Tensor:
    """The element loss in the compute type, by which a rule may choose."""
    base = setup.cell.base
    if base in ("bce", "bce_with_logits", "mse"):
        return _element(base, x, y, narrow(1.0 if setup.pos_weight is None else setup.pos_weight))[0]
    kind = BASE_NAMES[base]
    return kind(*map(narrow, kind.example)).loss(x, y)  # type: ignore[no-any-return]


def _proximity(q_: Tensor, q: Tensor, t: Tensor, reach: Tensor, factor: Tensor, base: str) -> tuple[Tensor, ...]:
    near, sign = (q_ - t).abs() < reach, (q_ - t).sign().double()
    t, reach, factor = t.double(), torch.where(reach == 0, 1.0, reach.double()), factor.double()
    logits = BASE_NAMES[base].kind == "logits"
    dq = q * (1 - q) if logits else torch.ones_like(q)
    d = (q - t).abs()
    w = torch.where(near, 1 + factor * (1 - d / reach), 1.0)
    dw = torch.where(near, -(factor / reach) * sign * dq, 0.0)
    size = torch.where(near, 1 + factor.abs() * (1 + (d + (q if logits else 0)) / reach), 1.0)
    return w, dw, size, dw.abs()


def plain(setup: Setup, input: Tensor) -> Tensor:
    """The element loss as a user writes it by hand, in the input's own dtype; settings are numbers."""
    x, y = input, setup.target.to(input.dtype)
    if setup.cell.base == "mse":
        loss = (x - y) ** 2
    elif setup.cell.base == "bce":
        loss = F.binary_cross_entropy(x, y, reduction="none")
    elif setup.cell.base == "bce_with_logits":
        loss = F.binary_cross_entropy_with_logits(x, y, reduction="none")
    else:
        loss = base_of(setup.cell.base).loss(x, y)
    first, *rest = (*(getattr(setup.rule, field.name) for field in fields(setup.rule)), None)
    q = x.sigmoid() if BASE_NAMES[setup.cell.base].kind == "logits" else x
    if isinstance(setup.rule, ByPrediction):
        return loss * torch.where(q >= first, rest[0], rest[1])
    if isinstance(setup.rule, ByLoss):
        return loss * torch.where(loss > first, rest[0], rest[1])
    if isinstance(setup.rule, ByProximity):
        return loss * (1 + rest[1] * (1 - (q - first).abs() / rest[0]).clamp(min=0))
    base = BASE_NAMES[setup.cell.base]()
    weight = setup.rule.on(base).weight(Element(base, x, y, loss))
    return loss if weight is None else loss * weight


def allowance(dtype: torch.dtype, expected: Tensor, size: Tensor, terms: int = 1, roundings: int = 1) -> Tensor:
    """How far off a result of `dtype` may be: its own rounding, and SLACK units of the compute type.

    A sum adds a unit for every doubling of its `terms`. In float64 the truth has as many roundings of its own: where the two
    were further apart than half of this, 50 digits showed the kernel to be the nearer.
    """
    info = torch.finfo(dtype)
    own = expected.abs() * info.eps / 2 + info.smallest_normal * info.eps
    # A GPU's ex2.approx.ftz drops denormals. Weights (here of 3 at most) multiply what is lost, and in the asymmetric loss so do
    # 1 / clip = 20 and gamma log(clip) = 12.
    flushed = 3 * 32 * torch.finfo(compute(dtype)).smallest_normal
    units = (SLACK + math.log2(terms)) * (2 if dtype == torch.float64 else 1)
    return roundings * own + units * torch.finfo(compute(dtype)).eps * size + flushed


def assert_near(actual: Tensor, expected: Tensor, size: Tensor, terms: int = 1, roundings: int = 1) -> None:
    """`actual` is as near to `expected` (float64) as its dtype and the compute type let it be."""
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    error = (actual.double() - expected).abs()
    bound = allowance(actual.dtype, expected, size, terms, roundings)
    worst = int((error - bound).argmax()) if error.numel() else 0
    assert bool((error <= bound).all()), (
        f"element {worst}: got {actual.flatten()[worst].item()!r}, expected {expected.flatten()[worst].item()!r}, "
        f"error {error.flatten()[worst].item():.3g} > {bound.flatten()[worst].item():.3g}"
    )


def assert_loss(setup: Setup, reduction: str, output: Tensor, gradient: Tensor, upstream: Tensor | float = 1.0) -> None:
    """Output and gradient against the truth."""
    expected = truth(setup)
    n = setup.input.numel()
    share = n if reduction == "mean" else 1
    if reduction == "none":
        assert_near(output, expected.loss, expected.loss_size)
    else:
        assert_near(output, expected.loss.sum() / share, expected.loss_size.sum() / share, terms=n)
    g = upstream.double() if isinstance(upstream, Tensor) else torch.tensor(upstream, dtype=torch.float64)
    g = g.to(output.device) / share
    assert gradient.dtype == setup.input.dtype, gradient.dtype
    roundings = 2 if isinstance(upstream, float) and upstream != 1 else 1  # a gradient ready in 16 bits, then scaled
    assert_near(gradient, expected.slope * g, expected.slope_size * g.abs(), roundings=roundings)


def run(setup: Setup, reduction: str, upstream: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The loss and, by backward, its gradient."""
    x = setup.input.detach().requires_grad_()
    output = setup(reduction, x)
    (gradient,) = torch.autograd.grad(output, x, torch.ones_like(output) if upstream is None else upstream)
    return output.detach(), gradient


# -------------------------------------------------------------------------------------------------------------- layouts


def _offset(x: Tensor) -> Tensor:
    return torch.cat([x.new_full((3,), 77), x.flatten(), x.new_full((5,), 77)])[3:-5].view(x.shape)


LAYOUTS: dict[str, tuple[tuple[int, ...], Callable[[Tensor], Tensor]]] = {
    "contiguous": ((4, 6), lambda x: x),
    "transposed": ((4, 6), lambda x: x.t().contiguous().t()),
    "permuted": ((2, 3, 4), lambda x: x.permute(2, 0, 1).contiguous().permute(1, 2, 0)),
    "channels_last": ((2, 3, 2, 4), lambda x: x.contiguous(memory_format=torch.channels_last)),
    "sliced": ((4, 6), lambda x: x.repeat_interleave(2, 1)[:, ::2]),
    "expanded": ((4, 6), lambda x: x[:1].expand(4, 6)),
    "offset": ((4, 6), _offset),
    "ones": ((1, 4, 1, 6), lambda x: x.permute(2, 3, 0, 1).contiguous().permute(2, 3, 0, 1)),
    "0dim": ((), lambda x: x),
    "1element": ((1, 1), lambda x: x),
}
