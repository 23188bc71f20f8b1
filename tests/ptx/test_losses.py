"""Losses on compiled PTX: each base and each rule, dtypes, operands, options, special values, the linear loss."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import triton_thresh as tt

from ..kernels import test_linear as linear_tests
from ..kernels import test_losses as loss_tests
from ..kernels import test_options as option_tests
from ..kernels.test_losses import DIAGONAL
from ..losses import DTYPES, PAIRS, Cell, assert_loss, name, run, setup
from .approximation import Mode
from .driver import PtxDriver
from .sample import case, sampled, some

pytestmark = pytest.mark.usefixtures("compiled")

SHAPE = (19, 83)  # full tiles and a tail in every dtype


@pytest.mark.parametrize(
    ("cell", "reduction"),
    [case((r == "none") == (c in DIAGONAL), c, r) for c in PAIRS for r in ("mean", "none")],
    ids=name,
)
def test_each_base_and_each_rule(cell: Cell, reduction: str, device: torch.device) -> None:
    made = setup(cell, torch.float32, device, shape=SHAPE)
    assert_loss(made, reduction, *run(made, reduction))


@pytest.mark.parametrize(("cell", "dtype"), sampled(DIAGONAL, [torch.float16, torch.float64, torch.bfloat16]), ids=name)
def test_dtypes(cell: Cell, dtype: torch.dtype, device: torch.device) -> None:
    made = setup(cell, dtype, device, shape=SHAPE)
    assert_loss(made, "mean", *run(made, "mean"))


@pytest.mark.parametrize(("kind", "cell"), sampled(["0dim", "class", "row", "element"], DIAGONAL[:3]), ids=str)
def test_operands(cell: Cell, kind: str, device: torch.device) -> None:
    made = setup(cell, torch.bfloat16, device, shape=SHAPE, kind=kind, weighted=True)
    assert_loss(made, "sum", *run(made, "sum"))


@pytest.mark.parametrize("dtype", some(DTYPES, lambda dtype: dtype in (torch.float16, torch.bfloat16)), ids=name)
def test_upstream_gradients(dtype: torch.dtype, device: torch.device) -> None:
    """Other than 1: the gradient that forward made is scaled in place, or made anew."""
    made = setup(DIAGONAL[0], dtype, device, shape=SHAPE)
    assert_loss(made, "mean", *run(made, "mean", torch.tensor(3.0, dtype=dtype)), upstream=3.0)


@pytest.mark.parametrize(
    "base", some(["bce_with_logits", tt.Focal(), tt.Hinge()], lambda b: b == "bce_with_logits"), ids=str
)
def test_options(base: Any, device: torch.device) -> None:
    """A mask, targets to ignore, weights; a divisor on the device, and smoothed labels."""
    sample = option_tests.Sample(1600, torch.float32, device)
    option_tests.check(sample, base, tt.ByOutcome(0.6, false_negative=2.0), "mean")
    option_tests.check(sample, base, None, "mean", divisor=torch.tensor(7), label_smoothing=0.1)
    option_tests.check(sample, base, None, "none", label_smoothing=0.1)


@pytest.mark.parametrize("n", some([1, 1600], lambda n: n > 1))
def test_statistics(n: int, device: torch.device) -> None:
    option_tests.test_sizes_and_statistics(n, device)


@pytest.mark.parametrize(
    ("dtype", "index"),
    [
        (torch.int64, 2**40 + 1),
        (torch.bfloat16, 1.0),
        case(False, torch.uint8, 300),
        case(False, torch.int8, torch.nan),
        case(False, torch.bool, 1),
    ],
    ids=str,
)
def test_what_is_ignored(dtype: torch.dtype, index: float, device: torch.device) -> None:
    ignored = [False, False, dtype in (torch.bool, torch.bfloat16)]
    option_tests.test_what_is_ignored(dtype, index, ignored, device)


def test_by_rank(device: torch.device) -> None:
    """The largest losses: three kernels and a selection between them."""
    option_tests.test_by_rank_keeps_the_largest(0.25, "bce_with_logits", device)


@pytest.mark.parametrize("dtype", some([torch.float32, torch.bfloat16], lambda d: d == torch.float32), ids=name)
@pytest.mark.parametrize("cell", [cell for cell in DIAGONAL if cell.base == "bce"], ids=name)
def test_probabilities(cell: Cell, dtype: torch.dtype, device: torch.device) -> None:
    """At the ends of their range, and outside of it."""
    loss_tests.test_probabilities_at_the_ends(cell, dtype, device)
    loss_tests.test_probabilities_outside_their_range_are_nan(cell, dtype, device)


@pytest.mark.ptx
@pytest.mark.parametrize("cell", loss_tests.ON_LOGITS, ids=name)
def test_large_logits(cell: Cell, device: torch.device) -> None:
    """Of 20 to 1e30, of both signs, against targets of 0, a half and 1."""
    for y in (0.0, 0.5, 1.0):
        loss_tests.test_large_logits(cell, y, device)


def test_infinities_and_nan(device: torch.device) -> None:
    for base in ("mse", "bce_with_logits"):
        loss_tests.test_infinities_as_in_torch(Cell(base, tt.ByPrediction), 0.5, device)


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        ("labels", torch.bfloat16),
        case(False, "labels", torch.float32),
        case(False, "transposed", torch.bfloat16),
        case(False, "transposed", torch.float32),
    ],
    ids=str,
)
def test_linear_loss(kind: str, dtype: torch.dtype, device: torch.device) -> None:
    linear_tests.test_values_and_gradients(dtype, kind, device)


def test_linear_loss_without_gradient(device: torch.device) -> None:
    linear_tests.test_without_gradient_nothing_is_written(device)


@pytest.mark.parametrize("mode", ["exact", "plus", "minus"])
def test_logit_at_the_threshold(mode: Mode, compiled: PtxDriver, device: torch.device) -> None:
    """A logit of 0 is sure at a half, however wrong the instructions are: the slope of the weight, -log 2, is there."""
    x = torch.zeros(2, device=device, requires_grad=True)
    compiled.approximate.mode = mode
    try:
        with tt.use_backend("triton"):
            loss = tt.threshold_loss(x, torch.ones_like(x), tt.ByConfidence(0.5, 2.0), reduction="none")
            (slope,) = torch.autograd.grad(loss, x, torch.ones_like(x))
    finally:
        compiled.approximate.mode = "exact"
    torch.testing.assert_close(slope, torch.full_like(x, -0.5 - math.log(2)), rtol=1e-5, atol=0)


@pytest.mark.parametrize("kind", ["number", "class"])
def test_prediction_at_the_threshold(kind: str, device: torch.device) -> None:
    """Which is not rounded to the input's bfloat16."""
    loss_tests.test_prediction_at_the_threshold_is_above("mse", kind, device)
