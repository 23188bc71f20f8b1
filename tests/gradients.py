"""Cases of gradient thresholding, generated from the registry, and its oracle: the formula on Python numbers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from .gates import Case, Shape, cases, inputs, same
from .interpreted.tools import sentinel_view
from .rows import OPS, ForeachGate, GradientGate

GRADIENT_GATES = [op for op in OPS.values() if isinstance(op, GradientGate)]
FOREACH = [op for op in OPS.values() if isinstance(op, ForeachGate)]
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
SHAPES: tuple[Shape, ...] = ((5,), (0,), (3, 7), (), (9000,), (8192,), (2, 0, 3), (8191,), (16385,), (2, 3, 4, 5), (1,))
THRESHOLDS = (0.5, 0.1, 0.0, -0.0, -0.75, math.inf, -math.inf, math.nan, 1e-41, 65519.0, 1e6)


def gradient_cases(*, full: bool) -> list[tuple[GradientGate, Case]]:
    """Op x dtype x threshold x layout, of the gradient."""
    return [(op, case) for op in GRADIENT_GATES for case in cases(full=full, ops=(op.gate,))]


def by_name(value: object) -> str | None:
    return getattr(value, "id", None) or getattr(value, "name", None)


gradient_gates = pytest.mark.parametrize("op", GRADIENT_GATES, ids=by_name)
foreach = pytest.mark.parametrize("op", FOREACH, ids=by_name)


def _exact(threshold: float | Tensor) -> Tensor:
    return threshold if isinstance(threshold, Tensor) else torch.tensor(threshold, dtype=torch.float64)


def large(g: Tensor, threshold: float | Tensor) -> Tensor:
    """Where |g| > t or g is NaN, on Python numbers; t rounded to g's dtype."""
    t = _exact(threshold).to(g.dtype).item()
    kept = [abs(v) > t or math.isnan(v) for v in g.double().flatten().tolist()]
    return torch.tensor(kept, dtype=torch.bool, device=g.device).view(g.shape)


def thresholded(g: Tensor, threshold: float | Tensor) -> Tensor:
    return torch.where(large(g, threshold), g, 0)


def each(threshold: Any, count: int) -> list[Any]:
    """The threshold of each parameter."""
    one = isinstance(threshold, (int, float)) or (isinstance(threshold, Tensor) and threshold.dim() == 0)
    return [threshold] * count if one else list(threshold)


def parameter(gradient: Tensor | None, like: Tensor | None = None) -> torch.nn.Parameter:
    """A parameter with this gradient."""
    like = gradient if like is None else like
    assert like is not None
    made = torch.nn.Parameter(torch.zeros(like.shape, dtype=like.dtype, device=like.device))
    made.grad = gradient
    return made


def parameters(
    threshold: Any, dtype: torch.dtype, device: torch.device, shapes: Sequence[Shape] = SHAPES
) -> tuple[list[torch.nn.Parameter], Callable[[], None]]:
    """Parameters whose gradients hold every boundary, at offsets of all alignments inside of larger buffers; and a check of
    what lies around them."""
    made, checks = [], []
    for place, (shape, t) in enumerate(zip(shapes, each(threshold, len(shapes)), strict=True)):
        view, check = sentinel_view(inputs(_exact(t), dtype, shape, device), place)
        made.append(parameter(view))
        checks.append(check)

    def check_all() -> None:
        for check in checks:
            check()

    return made, check_all


def gradients(made: Sequence[Tensor]) -> list[Tensor]:
    return [p.grad for p in made if p.grad is not None]


def any_list(op: ForeachGate, data: st.DataObject, device: torch.device) -> None:
    """Draw shapes, empty ones too, dtypes, layouts, missing gradients and thresholds: each gradient is as it should be."""
    shapes = data.draw(st.lists(st.lists(st.integers(0, 30), max_size=3).map(tuple), max_size=12))
    shapes += data.draw(st.lists(st.sampled_from(shapes), max_size=6)) if shapes else []
    dtypes = [data.draw(st.sampled_from(FLOATS)) for _ in shapes]
    numbers = st.floats(-1, 4, width=32) | st.sampled_from(THRESHOLDS)
    threshold = data.draw(numbers | st.just([data.draw(numbers) for _ in shapes]))
    made = []
    for shape, dtype, t in zip(shapes, dtypes, each(threshold, len(shapes)), strict=True):
        g = inputs(_exact(t), dtype, shape, device)
        if g.dim() and data.draw(st.booleans()):
            g = g.transpose(0, -1).contiguous().transpose(0, -1)
        made.append(parameter(g) if data.draw(st.integers(0, 4)) else parameter(None, g))
    before = [None if p.grad is None else p.grad.clone() for p in made]
    op(made, threshold)
    for p, was, t in zip(made, before, each(threshold, len(made)), strict=True):
        assert (p.grad is None) == (was is None)
        if p.grad is not None and was is not None:
            same(p.grad, thresholded(was, t))
