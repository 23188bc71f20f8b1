"""Calls of every public op, and inputs full of boundaries: what tests of compilers, exporters and tracers put into programs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import triton_thresh as tt

Call = Callable[..., Any]

ROWS, CHANNELS = 33, 37
T, V, BANDWIDTH = 0.1, 0.3, 0.25  # no bfloat16 and no float16

# What is called with an input, a threshold, and the number that its constants, or a second threshold, are made of.
GATES: dict[str, Call] = {
    "threshold": lambda x, t, v: tt.threshold(x, t, v),
    "hardshrink": lambda x, t, v: tt.hardshrink(x, t),
    "softshrink": lambda x, t, v: tt.softshrink(x, t),
    "garrote": lambda x, t, v: tt.garrote(x, t),
    "firm": lambda x, t, v: tt.firm(x, t, t + v),
    "binary_threshold": lambda x, t, v: tt.binary_threshold(x, t, 3 * v, -v),
    "threshold_grad": lambda x, t, v: tt.threshold_grad(x, t),
}
LEARNED: dict[str, Call] = {
    "softshrink": lambda x, t, v: tt.softshrink(x, t),
    "jumprelu": lambda x, t, v: tt.jumprelu(x, t, BANDWIDTH),
    "step": lambda x, t, v: tt.step(x, t, BANDWIDTH),
    "jumprelu_l0": lambda x, t, v: tt.jumprelu_l0(x, t, BANDWIDTH, input_gradient=True),
}


def _loss(base: str, rule: Callable[..., Any], reduction: str) -> Call:
    """What is called with an input, a target, three settings of the rule, and a weight."""
    return lambda x, y, a, b, c, w: tt.threshold_loss(x, y, rule(a, b, c), base=base, weight=w, reduction=reduction)


def _by_loss(bound: Any, factor: Any, _: Any) -> Any:
    return tt.ByLoss(bound, factor)


def _by_confidence(threshold: Any, gamma: Any, _: Any) -> Any:
    return tt.ByConfidence(threshold, gamma)


LOSSES: dict[str, Call] = {
    "threshold_bce_loss": lambda x, y, a, b, c, w: tt.threshold_bce_loss(x.sigmoid(), y, a, b, c, weight=w),
    "threshold_bce_with_logits_loss": lambda x, y, a, b, c, w: tt.threshold_bce_with_logits_loss(
        x, y, a, b, c, weight=w, pos_weight=b
    ),
    "threshold_mse_loss": lambda x, y, a, b, c, w: tt.threshold_mse_loss(x, y, a, b, c, weight=w, reduction="none"),
    "proximity_mse_loss": lambda x, y, a, b, c, w: tt.proximity_mse_loss(x, y, a, b, c, weight=w, reduction="sum"),
    "exceedance_mse_loss": lambda x, y, a, b, c, w: tt.exceedance_mse_loss(x, y, a, b, weight=w),
    "sigmoid_focal_loss": lambda x, y, a, b, c, w: tt.sigmoid_focal_loss(x, y, c, b, weight=w),
    "asymmetric_loss": lambda x, y, a, b, c, w: tt.asymmetric_loss(x, y, b, w, 0.0625, weight=w),
    "threshold_loss, logits by proximity": _loss("bce_with_logits", tt.ByProximity, "none"),
    "threshold_loss, logits by loss": _loss("bce_with_logits", _by_loss, "mean"),
    "threshold_loss, logits by outcome": _loss("bce_with_logits", tt.ByOutcome, "none"),
    "threshold_loss, logits by confidence": _loss("bce_with_logits", _by_confidence, "sum"),
}


def neighbours(t: Tensor) -> list[Tensor]:
    """Values of a dtype, the next ones on both sides, and all of these negated."""
    away, towards = (torch.nextafter(t.float(), torch.full_like(t, limit).float()) for limit in (torch.inf, -torch.inf))
    if t.dtype in (torch.bfloat16, torch.float16):
        bits = t.view(torch.int16)
        away, towards = ((bits + step).view(t.dtype) for step in (1, -1))
    found = [t, away.to(t.dtype), towards.to(t.dtype)]
    return found + [-value for value in found]


def inputs(thresholds: list[Tensor], dtype: torch.dtype, seed: int = 0, rows: int = ROWS) -> Tensor:
    """Random rows, among them the thresholds as the dtype holds them and what lies beside them, NaN, infinities and zeros."""
    x = torch.randn(rows, CHANNELS, generator=torch.Generator().manual_seed(seed)).to(dtype)
    rows_of = [row for t in thresholds for row in neighbours(t.detach().to(dtype).expand(CHANNELS).clone())]
    x[: len(rows_of)] = torch.stack(rows_of)[:rows]
    x.view(-1)[-6:] = torch.tensor([torch.nan, torch.inf, -torch.inf, 0.0, -0.0, 1e-6]).to(dtype)
    return x


def targets(dtype: torch.dtype, rows: int = ROWS) -> Tensor:
    """Soft labels."""
    return torch.rand(rows, CHANNELS, generator=torch.Generator().manual_seed(1)).to(dtype)


def upstream(like: Tensor, seed: int = 2) -> Tensor:
    """Small whole gradients, which every dtype holds."""
    return torch.randint(-8, 9, like.shape, generator=torch.Generator().manual_seed(seed)).to(like.dtype)


def outputs(called: Any) -> list[Tensor]:
    """An op's outputs as a list."""
    return [called] if isinstance(called, Tensor) else list(called)


def equal(actual: Tensor, expected: Tensor, name: str) -> None:
    """Same shape, same dtype, equal values, NaN where NaN is due; zeros of either sign."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True, msg=lambda text: f"{name}: {text}")
