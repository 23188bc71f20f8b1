"""Bases and rules against the software that they stand for: formulas of the sources, written out, and torch's own losses."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator
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


# --------------------------------------------------------------------------------------------- sources that are installed


def _result(loss: Callable[..., Tensor], y: Tensor, *settings: Any) -> tuple[Tensor, Tensor]:
    x = X[:, None].clone().requires_grad_()
    value = loss(x, y[:, None], *settings)
    return value.detach(), torch.autograd.grad(value.sum(), x)[0]


@pytest.mark.parametrize("alpha", [-1, 0.25, 0.9])
@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_focal_loss_is_fvcores(alpha: float, gamma: float) -> None:
    """Which computes in float32 whatever it is given."""
    source = pytest.importorskip("fvcore.nn.focal_loss").sigmoid_focal_loss
    for reduction, y in itertools.product(("none", "mean", "sum"), (SOFT, HARD)):
        ours, theirs = (_result(loss, y, alpha, gamma, reduction) for loss in (tt.sigmoid_focal_loss, source))
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=2e-6, check_dtype=False)


@pytest.mark.parametrize("alpha", [0.25, 0.9])
@pytest.mark.parametrize("gamma", [0.5, 1.0, 2.0])
def test_focal_loss_is_kornias_on_hard_targets(alpha: float, gamma: float) -> None:
    source = pytest.importorskip("kornia.losses").binary_focal_loss_with_logits
    ours, theirs = (_result(loss, HARD, alpha, gamma, "none") for loss in (tt.sigmoid_focal_loss, source))
    torch.testing.assert_close(ours, theirs)


def test_losses_of_scikit_learn() -> None:
    """Its hinge loss has targets of -1 and 1; its loss of support vector regression is not public, but its objective is."""
    metrics = pytest.importorskip("sklearn.metrics")
    for q in (0.1, 0.5, 0.9):
        found = tt.threshold_loss(X, SOFT, base=tt.Quantile(q))
        assert found.item() == pytest.approx(metrics.mean_pinball_loss(SOFT, X, alpha=q), rel=1e-12)
    found = tt.threshold_loss(X, HARD, base=tt.Hinge())
    assert found.item() == pytest.approx(metrics.hinge_loss(2 * HARD - 1, X), rel=1e-12)


def test_epsilon_insensitive_loss_is_that_of_support_vector_regression() -> None:
    """The weights that scikit-learn finds have the least objective, by this loss; their gradient is that of its solver."""
    svm = pytest.importorskip("sklearn.svm")
    made = torch.Generator().manual_seed(0)
    x = torch.randn(200, 3, generator=made, dtype=torch.float64)
    y = x @ torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64) + 0.3 * torch.randn(200, generator=made, dtype=x.dtype)
    fitted = svm.LinearSVR(epsilon=0.25, C=1.0, fit_intercept=False, tol=1e-8, max_iter=100_000).fit(x, y)
    w = torch.tensor(fitted.coef_, dtype=torch.float64)

    def objective(w: Tensor) -> float:
        loss = tt.threshold_loss(x @ w, y, base=tt.EpsilonInsensitive(0.25), reduction="sum")
        return (0.5 * (w * w).sum() + loss).item()

    least = objective(w)
    for step in torch.randn(50, 3, generator=made, dtype=torch.float64):
        assert objective(w + 0.01 * step) > least


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
