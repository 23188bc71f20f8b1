"""Mask, ignore_index, divisor, label_smoothing, return_stats and ByRank: a loss over the elements that count.

tests/test_options.py runs the same tests on the eager backend, and on that of Inductor.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import triton_thresh as tt

BASES = ["bce_with_logits", tt.Focal(0.25, 2.0), tt.Asymmetric(), tt.Hinge()]
RULES = [None, tt.ByOutcome(0.6, false_negative=2.0), tt.ByConfidence()]
PAIRS = [(base, rule) for base in BASES for rule in RULES if not (isinstance(base, tt.Hinge) and rule is RULES[2])]
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}

pairs = pytest.mark.parametrize(("base", "rule"), PAIRS, ids=str)
some_pairs = pytest.mark.parametrize(("base", "rule"), [PAIRS[0], PAIRS[4], PAIRS[8]], ids=str)


def close(actual: Tensor, expected: Tensor) -> None:
    tolerance = TOLERANCE[actual.dtype]
    torch.testing.assert_close(actual.double(), expected.double(), rtol=tolerance, atol=tolerance, equal_nan=True)


class Sample:
    """Elements of which some are ignored and some masked; what those hold is NaN or infinite."""

    def __init__(self, n: int, dtype: torch.dtype, device: torch.device, target: torch.dtype = torch.int64) -> None:
        made = torch.Generator().manual_seed(n)
        x, labels = torch.randn(n, generator=made) * 3, torch.rand(n, generator=made) > 0.5
        keep, ignored, weight = (torch.rand(n, generator=made) for _ in range(3))
        mask = keep > 0.3
        labels = torch.where(ignored > 0.7, -100, labels.long()).to(target)
        self.valid = (mask & (labels != -100)).to(device)
        self.mask, self.target, self.own_weight = mask.to(device), labels.to(device), weight.to(device)
        self.x = torch.where(mask, x, math.nan).to(device, dtype)
        self.weight = torch.where(mask, weight, math.inf).to(device)

    def expected(self, base: Any, rule: Any, reduction: str, divisor: Any, smoothing: float) -> tuple[Tensor, Tensor]:
        """Loss and gradient in float64, of the valid elements alone."""
        x = self.x[self.valid].detach().double().requires_grad_()
        y = self.target[self.valid].double() * (1 - smoothing) + smoothing / 2
        with tt.use_backend("eager"):
            loss = tt.threshold_loss(x, y, rule, base=base, weight=self.own_weight[self.valid], reduction="none")
        whole = torch.zeros(self.x.shape, dtype=torch.float64, device=x.device).masked_scatter(self.valid, loss)
        count = self.valid.sum() if divisor is None else divisor
        total = {"none": whole, "sum": whole.sum(), "mean": whole.sum() / count}[reduction]
        gradient = torch.zeros_like(whole)
        if len(x):
            gradient[self.valid] = torch.autograd.grad(total.sum(), x)[0]
        return total.detach(), gradient


def check(sample: Sample, base: Any, rule: Any, reduction: str, **options: Any) -> None:
    """Loss and gradient with a mask and an index to ignore are those of the valid elements."""
    x = sample.x.clone().requires_grad_()
    given = {"weight": sample.weight, "mask": sample.mask, "ignore_index": -100, **options}
    loss = tt.threshold_loss(x, sample.target, rule, base=base, reduction=reduction, **given)
    (gradient,) = torch.autograd.grad(loss.sum(), x)
    expected = sample.expected(base, rule, reduction, options.get("divisor"), options.get("label_smoothing", 0.0))
    close(loss, expected[0])
    close(gradient, expected[1])


@pairs
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_only_valid_elements_count(base: Any, rule: Any, reduction: str, device: torch.device) -> None:
    check(Sample(37, torch.float32, device), base, rule, reduction)


@some_pairs
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_dtypes(base: Any, rule: Any, dtype: torch.dtype, device: torch.device) -> None:
    for target in (torch.int64, torch.float64, torch.bfloat16):
        check(Sample(37, dtype, device, target), base, rule, "mean")


@some_pairs
def test_divisors_and_smoothing(base: Any, rule: Any, device: torch.device) -> None:
    sample = Sample(5000, torch.float32, device)
    check(sample, base, rule, "mean", divisor=7.0)
    check(sample, base, rule, "mean", divisor=torch.tensor(7, device=device))
    for reduction in ("mean", "none"):
        check(sample, base, rule, reduction, label_smoothing=0.1)


@pytest.mark.parametrize("n", [1, 37, 4096, 9001])
def test_sizes_and_statistics(n: int, device: torch.device) -> None:
    sample, rule = Sample(n, torch.float32, device), tt.ByOutcome(0.6)
    for reduction in ("mean", "none"):
        given = {"mask": sample.mask, "ignore_index": -100, "reduction": reduction}
        loss, stats = tt.threshold_loss(sample.x.requires_grad_(), sample.target, rule, return_stats=True, **given)
        assert torch.equal(loss, tt.threshold_loss(sample.x, sample.target, rule, **given)) or loss.isnan()
        above, positive = sample.x.sigmoid() >= 0.6, sample.target > 0.5
        valid = sample.valid
        counts = [valid, valid & positive, valid & above, valid & above & positive]
        assert [int(count) for count in stats] == [int(count.sum()) for count in counts]
        assert all(count.dtype == torch.int64 and count.dim() == 0 and not count.requires_grad for count in stats)


def test_properties_of_the_statistics(device: torch.device) -> None:
    x, y = torch.tensor([2.0, -1.0, 3.0, -4.0], device=device), torch.tensor([1, 1, 0, 0], device=device)
    _, stats = tt.threshold_loss(x, y, return_stats=True)
    assert [float(v) for v in (stats.precision, stats.recall, stats.f1, stats.accuracy)] == [0.5, 0.5, 0.5, 0.5]
    _, nothing = tt.threshold_loss(x - 9, y * 0, return_stats=True)
    assert nothing.precision.isnan()
    assert nothing.recall.isnan()
    assert nothing.accuracy == 1


def test_positive_values_are_those_from_the_threshold_on(device: torch.device) -> None:
    x, y = torch.tensor([1.0, 2.0, 3.0, 0.0], device=device), torch.tensor([2.0, 1.0, 4.0, 0.0], device=device)
    _, stats = tt.threshold_loss(x, y, tt.ByPrediction(2.0), base="mse", return_stats=True)
    assert [int(count) for count in stats] == [4, 2, 2, 1]


def test_nothing_valid(device: torch.device) -> None:
    x = torch.full((5,), math.nan, device=device, requires_grad=True)
    y, none = torch.zeros(5, device=device), torch.zeros(5, dtype=torch.bool, device=device)
    for divisor, expected in ((None, math.nan), (3.0, 0.0)):
        loss = tt.threshold_loss(x, y, mask=none, divisor=divisor)
        (gradient,) = torch.autograd.grad(loss, x)
        assert loss.isnan() if math.isnan(expected) else loss == 0
        assert gradient.tolist() == [0.0] * 5
    assert tt.threshold_loss(x, y, mask=none, reduction="sum") == 0


@pytest.mark.parametrize("kind", ["row", "class", "0dim"])
def test_masks_broadcast(kind: str, device: torch.device) -> None:
    x = torch.randn(6, 5, generator=torch.Generator().manual_seed(0)).to(device)
    y = (x > 1).float()
    mask = {"row": torch.arange(6)[:, None] % 2 == 0, "class": torch.arange(5) != 2, "0dim": torch.tensor(True)}[kind]
    mask = mask.to(device)
    whole = mask.expand(6, 5)
    assert_same = torch.testing.assert_close
    assert_same(tt.threshold_loss(x, y, mask=mask), tt.threshold_loss(x[whole], y[whole]))
    lying = x.t().contiguous().t()
    assert_same(tt.threshold_loss(lying, y, mask=mask), tt.threshold_loss(x[whole], y[whole]))


@pytest.mark.parametrize(
    ("dtype", "index", "ignored"),
    [
        (torch.int64, -100, [True, False, False]),
        (torch.int64, 2**40 + 1, [False, False, False]),
        (torch.uint8, -100, [False, False, False]),
        (torch.uint8, 300, [False, False, False]),
        (torch.int8, 0.5, [False, False, False]),
        (torch.int8, math.nan, [False, False, False]),
        (torch.bool, 1, [False, False, True]),
        (torch.float32, 1.0, [False, False, True]),
        (torch.bfloat16, 1.001, [False, False, True]),
        (torch.float64, 1.001, [False, False, False]),
        (torch.float32, math.nan, [False, False, False]),
    ],
    ids=str,
)
def test_what_is_ignored(dtype: torch.dtype, index: float, ignored: list[bool], device: torch.device) -> None:
    """By value, rounded to a floating target's dtype; what the dtype does not hold matches nothing."""
    y = torch.tensor([-100 if dtype == torch.int64 else 0, 0, 1]).to(device, dtype)
    x = torch.tensor([0.5, -0.5, 2.0], device=device)
    loss = tt.threshold_loss(x, y, base=tt.BCEWithLogits(), ignore_index=index, reduction="none")
    assert (loss == 0).tolist() == ignored
    kept = loss[~torch.tensor(ignored, device=device)]
    torch.testing.assert_close(tt.threshold_loss(x, y, base=tt.BCEWithLogits(), ignore_index=index), kept.mean())


def test_targets_that_are_nan_may_be_ignored(device: torch.device) -> None:
    x, y = torch.tensor([0.5, 1.0, 2.0], device=device), torch.tensor([math.nan, 1.0, 0.0], device=device)
    expected = tt.threshold_loss(x[1:], y[1:])
    torch.testing.assert_close(tt.threshold_loss(x, y, ignore_index=math.nan), expected)


def test_targets_out_of_range_stay_nan_when_smoothed(device: torch.device) -> None:
    x, y = torch.zeros(3, device=device), torch.tensor([0.5, 1.05, -0.01], device=device)
    loss = tt.sigmoid_focal_loss(x, y, label_smoothing=0.5)
    assert loss.isnan().tolist() == [False, True, True]


# -------------------------------------------------------------------------------------------------------------- ByRank


def by_rank(losses: Tensor, k: int) -> Tensor:
    """Where a loss is at least the k-th largest."""
    bound = losses.flatten().topk(k).values[-1]
    return (losses >= bound) | losses.isnan()


@pytest.mark.parametrize("keep", [0.25, 0.01, 1.0, 3, 1000])
@pytest.mark.parametrize("base", ["bce_with_logits", "mse"])
def test_by_rank_keeps_the_largest(keep: float, base: Any, device: torch.device) -> None:
    made = torch.Generator().manual_seed(1)
    x = torch.randn(31, 11, generator=made).to(device).requires_grad_()
    y = (torch.rand(31, 11, generator=made) > 0.5).float().to(device)
    losses = tt.threshold_loss(x, y, base=base, reduction="none")
    k = min(keep, x.numel()) if isinstance(keep, int) else max(1, math.ceil(keep * x.numel()))
    kept = by_rank(losses, k)
    expected = losses[kept].mean()
    output = tt.threshold_loss(x, y, tt.ByRank(keep), base=base)
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(torch.autograd.grad(output, x)[0], torch.autograd.grad(expected, x)[0])


def test_by_rank_among_the_valid(device: torch.device) -> None:
    x = torch.tensor([5.0, 4.0, 3.0, 2.0, 1.0], device=device, requires_grad=True)
    y, mask = torch.zeros(5, device=device), torch.tensor([False, True, True, True, True], device=device)
    call = lambda rule, **given: tt.threshold_loss(x, y, rule, base="mse", mask=mask, **given)  # noqa: E731
    assert call(tt.ByRank(0.5), reduction="none").tolist() == [0, 16, 9, 0, 0]
    assert call(tt.ByRank(0.5)) == 12.5
    assert call(tt.ByRank(0.5), divisor=5.0) == 5
    assert call(tt.ByRank(0.1, min_kept=3), reduction="sum") == 29
    assert call(tt.ByRank(1), weight=torch.tensor([1.0, 0.5, 9.0, 9.0, 9.0], device=device)) == 8


def test_ties_and_nan_are_kept(device: torch.device) -> None:
    x = torch.tensor([1.0, 2.0, 2.0, math.nan], device=device)
    loss = tt.threshold_loss(x, torch.zeros(4, device=device), tt.ByRank(2), base="mse", reduction="none")
    assert loss.isnan().tolist() == [False, False, False, True]
    assert loss[:3].tolist() == [0, 4, 4]
