"""Losses where numbers are extreme: large and infinite logits, probabilities at a bound, NaN behind a mask, nothing that counts.

tests/test_extremes.py runs the same tests on the eager backend.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import triton_thresh as tt

from ..rows import BASE_NAMES, base_of

INF, NAN = math.inf, math.nan
LOGITS = [-INF, -1e4, -88.0, -16.0, -1.0, 0.0, 1.0, 16.0, 88.0, 1e4, INF]
EXPONENTIAL = [
    *(tt.Focal(0.25, gamma) for gamma in (0.0, 0.5, 1.0, 2.0, 4.0)),
    tt.Focal(None, torch.tensor(0.5)),
    tt.Asymmetric(),
    tt.Asymmetric(0.5, 0.5),
    tt.Asymmetric(0.0, 0.0, None),
    tt.Asymmetric(2.0, 0.5, 0.2, detach_focal=True),
]
NEAR = {  # relative; a power of a probability has the error of its logit's exponential, 88 units, so many times
    torch.float16: 2e-3,
    torch.bfloat16: 1e-2,
    torch.float32: 5e-5,
    torch.float64: 1e-12,
}


def _run(base: Any, x: Tensor, y: Tensor, rule: Any = None, **options: Any) -> tuple[Tensor, Tensor]:
    leaf = x.clone().requires_grad_()
    loss = tt.threshold_loss(leaf, y, rule, base=base, **options)
    (gradient,) = torch.autograd.grad(loss.sum(), leaf)
    return loss.detach(), gradient


@pytest.mark.parametrize("dtype", NEAR, ids=str)
@pytest.mark.parametrize("base", EXPONENTIAL, ids=str)
def test_logits(base: Any, dtype: torch.dtype, device: torch.device) -> None:
    """The formula in float64, soft targets and hard ones: no NaN, and infinite where the formula is or the dtype ends."""
    x = torch.tensor(LOGITS, dtype=dtype, device=device)
    for target in (torch.tensor([0.0, 0.3, 1.0], device=device), torch.tensor([0, 1], dtype=torch.int8, device=device)):
        given, labels = (part.contiguous() for part in torch.broadcast_tensors(x, target[:, None]))
        loss, gradient = _run(base, given, labels, reduction="none")
        wide = given.double().requires_grad_()
        expected = base.loss(wide, labels.double())
        (slope,) = torch.autograd.grad(expected.sum(), wide)
        assert not expected.isnan().any()
        assert slope.isfinite().all()
        for ours, truth in ((loss, expected.detach()), (gradient, slope)):
            least = max(1e-36, torch.finfo(dtype).tiny)
            torch.testing.assert_close(ours, truth.to(dtype), rtol=NEAR[dtype], atol=least)


@pytest.mark.parametrize("base", EXPONENTIAL, ids=str)
def test_logits_twice_differentiated(base: Any, device: torch.device) -> None:
    leaf = torch.tensor(LOGITS, device=device).requires_grad_()
    for y in (0.0, 0.3, 1.0):
        loss = tt.threshold_loss(leaf, torch.full_like(leaf, y), base=base)
        (gradient,) = torch.autograd.grad(loss, leaf, create_graph=True)
        (second,) = torch.autograd.grad(gradient.sum(), leaf, allow_unused=True, materialize_grads=True)
        assert not second.isnan().any(), (y, second)


@pytest.mark.parametrize("base", [tt.Focal(0.25, 0.5), tt.Focal(0.25, 1.5), tt.Asymmetric(0.5, 1.5, None)], ids=str)
def test_denormal_probabilities(base: Any, device: torch.device) -> None:
    """Their inverse is infinite, in float64 too, but the slope of their power is not."""
    x = torch.tensor([-740.0, 740.0, -88.0, 88.0], dtype=torch.float64, device=device)
    y = torch.tensor([0, 1, 0, 1], device=device)
    for logits in (x, x[2:].float()):
        for target in (y[-len(logits) :], y[-len(logits) :].to(logits.dtype)):
            loss, gradient = _run(base, logits, target, reduction="none")
            assert loss.abs().max() < 1e-18
            assert gradient.abs().max() < 1e-18
            _, gradient = _run(tt.BCEWithLogits(), logits, target, tt.ByConfidence(0.5, 0.5), reduction="none")
            assert gradient.abs().max() < 1e-18


@pytest.mark.parametrize("dtype", NEAR, ids=str)
def test_limits_of_focal_loss(dtype: torch.dtype, device: torch.device) -> None:
    x = torch.tensor([-INF, INF], dtype=dtype, device=device)
    for y in (torch.ones(2, device=device), torch.ones(2, dtype=torch.bool, device=device)):
        loss, gradient = _run(tt.Focal(), x, y, reduction="none")
        assert loss.tolist() == [INF, 0.0]
        assert gradient.tolist() == [-0.25, 0.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_probability_at_the_clip(dtype: torch.dtype, device: torch.device) -> None:
    """A clamp passes the gradient at equality: sigmoid(0) is 0.5, and there 1 - p + clip is 1."""
    x = torch.tensor([-0.25, 0.0, 0.25], dtype=dtype, device=device)
    for y in (torch.zeros_like(x), torch.zeros_like(x, dtype=torch.bool)):
        loss, gradient = _run(tt.Asymmetric(0.0, 0.0, 0.5), x, y, reduction="none")
        assert loss[:2].tolist() == [0.0, 0.0]
        assert gradient[0] == 0
        torch.testing.assert_close(gradient[1].item(), 0.25, rtol=1e-6, atol=0)
        assert (_run(tt.Asymmetric(2.0, 1.0, 0.5), x, y, reduction="none")[1] == 0).tolist() == [True, True, False]


def test_probability_at_the_threshold(device: torch.device) -> None:
    below = torch.nextafter(torch.tensor(0.75), torch.tensor(0.0)).item()
    x, y = torch.tensor([below, 0.75, 0.75], device=device), torch.tensor([1.0, 1.0, 0.5], device=device)
    whole = tt.threshold_loss(x, y, base="bce", reduction="none")
    sure = tt.threshold_loss(x, y, tt.ByConfidence(0.75, 2.0), base="bce", reduction="none")
    torch.testing.assert_close((sure / whole).cpu(), torch.tensor([1.0, 1 / 9, 1.0]))
    costs = tt.ByOutcome(0.75, 2.0, 3.0, 4.0, 5.0)
    found = tt.threshold_loss(x, y, costs, base="bce", reduction="none") / whole
    assert found.round().tolist() == [4.0, 2.0, 3.0], "a target at its threshold is not positive"


@pytest.mark.parametrize("base", BASE_NAMES)
def test_nan_behind_a_mask(base: str, device: torch.device) -> None:
    """In input, target and weight; for float16, whose gradient comes in backward, too."""
    mask = torch.tensor([True, False, True, False, False], device=device)
    for dtype in (torch.float32, torch.float16):
        x = torch.tensor([0.25, NAN, 0.75, INF, 0.5], dtype=dtype, device=device)
        y = torch.tensor([1.0, NAN, 0.0, 1.0, -INF], device=device)
        weight = torch.tensor([1.0, NAN, 2.0, INF, NAN], device=device)
        for reduction in ("mean", "none"):
            loss, gradient = _run(base_of(base), x, y, mask=mask, weight=weight, reduction=reduction)
            alone = _run(base_of(base), x[mask], y[mask], weight=weight[mask], reduction=reduction)
            torch.testing.assert_close(loss if reduction == "mean" else loss[mask], alone[0])
            torch.testing.assert_close(gradient[mask], alone[1])
            assert gradient[~mask].tolist() == [0.0] * 3
            assert reduction == "mean" or loss[~mask].tolist() == [0.0] * 3


@pytest.mark.parametrize("base", BASE_NAMES)
def test_nothing_counts(base: str, device: torch.device) -> None:
    """Everything masked, or ignored: the mean is NaN, with a divisor 0, and so is the sum; the gradient is 0."""
    x, y = torch.tensor([NAN, INF, 0.5], device=device), torch.full((3,), 1.0, device=device)
    nothing = torch.zeros(3, dtype=torch.bool, device=device)
    for options in ({"mask": nothing}, {"ignore_index": 1.0}):
        for more, expected in (({}, NAN), ({"divisor": 2.0}, 0.0), ({"reduction": "sum"}, 0.0)):
            loss, gradient = _run(base_of(base), x, y, **options, **more)
            assert str(loss.item()) == str(expected)
            assert gradient.tolist() == [0.0] * 3


@pytest.mark.parametrize("base", ["bce", "focal", "asymmetric"])
@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.float32], ids=str)
def test_targets_outside_0_to_1(base: str, dtype: torch.dtype, device: torch.device) -> None:
    x, y = torch.full((5,), 0.25, device=device), torch.tensor([-1, 0, 1, 2, 100], dtype=dtype, device=device)
    for result in _run(base_of(base), x, y, reduction="none"):
        assert result.isnan().tolist() == [True, False, False, True, True]


@pytest.mark.parametrize(
    "base", [tt.Focal(0.25, 2.0), tt.Focal(None, 1.5), tt.Asymmetric(), tt.Asymmetric(1.5, 0.5)], ids=str
)
@pytest.mark.parametrize("soft", [True, False])
def test_nan_logits(base: Any, soft: bool, device: torch.device) -> None:
    x = torch.tensor([NAN, NAN, 1.0], device=device)
    y = torch.tensor([0.0, 1.0, 1.0], device=device) if soft else torch.tensor([0, 1, 1], device=device)
    for result in _run(base, x, y, reduction="none"):
        assert result.isnan().tolist() == [True, True, False]
