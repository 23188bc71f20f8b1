"""Bases and rules against the software that they stand for: formulas of the sources, written out, and torch's own losses."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import triton_thresh as tt

X = torch.linspace(-9, 9, 61, dtype=torch.float64)
SOFT = torch.linspace(0, 1, 61, dtype=torch.float64).roll(17)
HARD = (torch.arange(61) % 3 == 0).double()


def torchvision_focal(x: Tensor, y: Tensor, alpha: float, gamma: float) -> Tensor:
    """torchvision.ops.sigmoid_focal_loss."""
    p = torch.sigmoid(x)
    loss = F.binary_cross_entropy_with_logits(x, y, reduction="none")
    loss = loss * (1 - (p * y + (1 - p) * (1 - y))) ** gamma
    return loss if alpha < 0 else (alpha * y + (1 - alpha) * (1 - y)) * loss


def asymmetric(x: Tensor, y: Tensor, neg: float, pos: float, clip: float | None, detach: bool = False) -> Tensor:
    """AsymmetricLossOptimized, before it is summed."""
    p, q = torch.sigmoid(x), 1 - torch.sigmoid(x)
    if clip:
        q = (q + clip).clamp(max=1)
    loss = y * p.clamp(min=1e-8).log() + (1 - y) * q.clamp(min=1e-8).log()
    factor = (1 - p * y - q * (1 - y)) ** (pos * y + neg * (1 - y))
    return -loss * (factor.detach() if detach else factor)


def reduced_focal(x: Tensor, y: Tensor, threshold: float, gamma: float) -> Tensor:
    """segmentation_models_pytorch's focal_loss_with_logits with reduced_threshold, without alpha."""
    cross = F.binary_cross_entropy_with_logits(x, y, reduction="none")
    pt = torch.exp(-cross)
    factor = ((1 - pt) / threshold) ** gamma
    return torch.where(pt < threshold, 1.0, factor) * cross


def _cases() -> Iterator[Any]:
    for alpha in (-1, 0.25, 0.9):
        for gamma in (0.0, 0.5, 1.0, 2.0, 3.0, 4.0, 2.5):
            yield tt.Focal(alpha, gamma), functools.partial(torchvision_focal, alpha=alpha, gamma=gamma)
    for neg, pos in ((4.0, 1.0), (0.0, 0.0), (2.0, 2.0), (2.5, 0.5), (4.0, 0.0)):
        for clip in (0.05, 0.2, None):
            yield tt.Asymmetric(neg, pos, clip), functools.partial(asymmetric, neg=neg, pos=pos, clip=clip)
    detached = functools.partial(asymmetric, neg=4.0, pos=1.0, clip=0.05, detach=True)
    yield tt.Asymmetric(detach_focal=True), detached
    for delta in (0.5, 1.0):
        yield tt.Huber(delta), functools.partial(F.huber_loss, delta=delta, reduction="none")
    yield tt.EpsilonInsensitive(0.3), lambda x, y: ((x - y).abs() - 0.3).clamp(min=0)
    for q in (0.0, 0.1, 0.5, 1.0):
        yield tt.Quantile(q), lambda x, y, q=q: torch.maximum(q * (y - x), (q - 1) * (y - x))
    yield tt.Hinge(0.7), lambda x, y: (0.7 - (2 * y - 1) * x).clamp(min=0)


@pytest.mark.parametrize("target", [SOFT, HARD], ids=["soft", "hard"])
@pytest.mark.parametrize(("base", "source"), [pytest.param(*case, id=str(case[0])) for case in _cases()])
def test_values_and_gradients_are_the_sources(base: Any, source: Any, target: Tensor) -> None:
    x = X.clone().requires_grad_()
    expected = source(x, target)
    (slope,) = torch.autograd.grad(expected.sum(), x)
    output = tt.threshold_loss(x, target, base=base, reduction="none")
    (gradient,) = torch.autograd.grad(output.sum(), x)
    torch.testing.assert_close(output, expected, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(gradient, slope, rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize("gamma", [0.5, 1.0, 2.0, 2.5])
@pytest.mark.parametrize("threshold", [0.2, 0.5, 1.0])
def test_by_confidence_is_reduced_focal_loss(threshold: float, gamma: float) -> None:
    x = X.clone().requires_grad_()
    expected = reduced_focal(x, HARD, threshold, gamma)
    (slope,) = torch.autograd.grad(expected.sum(), x)
    output = tt.threshold_loss(x, HARD, tt.ByConfidence(threshold, gamma), reduction="none")
    (gradient,) = torch.autograd.grad(output.sum(), x)
    torch.testing.assert_close(output, expected, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(gradient, slope, rtol=1e-8, atol=1e-11)


def test_drop_ins_have_their_sources_order_and_defaults() -> None:
    torch.testing.assert_close(tt.sigmoid_focal_loss(X, SOFT), torchvision_focal(X, SOFT, 0.25, 2.0))
    for reduction in ("mean", "sum"):
        expected = getattr(torchvision_focal(X, SOFT, 0.5, 1.0), reduction)()
        torch.testing.assert_close(tt.sigmoid_focal_loss(X, SOFT, 0.5, 1.0, reduction), expected)
        torch.testing.assert_close(tt.nn.SigmoidFocalLoss(0.5, 1.0, reduction)(X, SOFT), expected)
    torch.testing.assert_close(tt.asymmetric_loss(X, HARD), asymmetric(X, HARD, 4, 1, 0.05).sum())
    torch.testing.assert_close(tt.asymmetric_loss(X, HARD, 2, 0, 0.1), asymmetric(X, HARD, 2, 0, 0.1).sum())
    torch.testing.assert_close(tt.nn.AsymmetricLoss(2, 0, 0.1)(X, HARD), asymmetric(X, HARD, 2, 0, 0.1).sum())


EXTREME = [
    *(tt.Focal(None, gamma) for gamma in (0.0, 0.5, 1.0, 2.0, 4.0)),
    tt.Asymmetric(),
    tt.Asymmetric(0.5, 0.5),
    tt.Asymmetric(0, 0, None),
]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("base", EXTREME, ids=str)
def test_extreme_logits_are_finite_where_the_truth_is(base: Any, dtype: torch.dtype) -> None:
    """No NaN; an infinite loss only at an infinite logit on the wrong side, or beyond the dtype."""
    x = torch.tensor([-math.inf, -1e4, -88.0, -16.0, 0.0, 16.0, 88.0, 1e4, math.inf], dtype=dtype)
    for y in (0.0, 0.3, 1.0):
        for target in (torch.full_like(x, y), torch.full(x.shape, y).round().to(torch.int8)):
            leaf = x.clone().requires_grad_()
            loss = tt.threshold_loss(leaf, target, base=base, reduction="none")
            (gradient,) = torch.autograd.grad(loss.sum(), leaf, create_graph=True)
            (second,) = torch.autograd.grad(gradient.sum(), leaf, allow_unused=True, materialize_grads=True)
            assert not loss.isnan().any(), (y, loss)
            assert gradient.isfinite().all(), (y, gradient)
            assert not second.isnan().any(), (y, second)


def test_limits_of_focal_loss() -> None:
    x = torch.tensor([-math.inf, math.inf], requires_grad=True)
    loss = tt.sigmoid_focal_loss(x, torch.ones(2))
    (gradient,) = torch.autograd.grad(loss.sum(), x)
    assert loss.tolist() == [math.inf, 0.0]
    assert gradient.tolist() == [-0.25, 0.0]


# ---------------------------------------------------------------------------------------------------------------- shrinkage


def _close_to_pywt(found: Tensor, expected: Any, x: Tensor, steepness: float = 1.0) -> None:
    """Within two units in the last place of the input, where the curve is not steep."""
    unit = torch.nextafter(x.abs(), torch.tensor(math.inf, dtype=x.dtype)) - x.abs()
    assert ((found - torch.from_numpy(expected)).abs() <= 2 * steepness * unit).all()


@pytest.mark.parametrize("value", [0.0, 0.3, 1.0, 7.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_shrinkage_is_pywts(dtype: torch.dtype, value: float) -> None:
    pywt = pytest.importorskip("pywt")
    x = torch.randn(5000, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).mul(3).to(dtype)
    for mode, gate in (("soft", tt.softshrink), ("hard", tt.hardshrink), ("garrote", tt.garrote)):
        _close_to_pywt(gate(x, value), pywt.threshold(x.numpy(), value, mode), x)
    for high in (value + 0.5, 2 * value + 1):
        steepness = max(1.0, high / (high - value) / 2)
        _close_to_pywt(tt.firm(x, value, high), pywt.threshold_firm(x.numpy(), value, high), x, steepness)
    at = torch.tensor([-value, value], dtype=dtype)
    assert not tt.hardshrink(at, value).any(), "pywt keeps them, torch does not"
