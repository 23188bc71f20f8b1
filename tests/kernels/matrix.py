"""The whole matrix of losses: every base with every rule in every dtype, with each kind of operand, reduction and option.

`make matrix` runs it. `make test` takes pairs of these, because the whole takes too long.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

import triton_thresh as tt
from triton_thresh import ByConfidence

from ..losses import CELLS, DTYPES, OPERANDS, REDUCTIONS, TARGETS, Cell, Setup, assert_loss, name, run, setup, truth
from ..rows import BASE_NAMES, base_of
from .test_losses import INTEGERS
from .test_options import TOLERANCE

IGNORED = 7
OPTIONS: dict[str, tuple[str, ...]] = {
    **{option: (option,) for option in ("mask", "ignore_index", "divisor", "label_smoothing", "return_stats")},
    "all": ("mask", "ignore_index", "divisor", "label_smoothing", "return_stats"),
}

cells = pytest.mark.parametrize("cell", CELLS, ids=name)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=name)


def _kinds(cell: Cell) -> list[str]:
    """The kinds of operands. No threshold of confidence may be 0, which some integers are."""
    return [kind for kind in OPERANDS if cell.rule is not ByConfidence or kind not in INTEGERS]


@cells
@dtypes
def test_operands(cell: Cell, dtype: torch.dtype, device: torch.device) -> None:
    for kind, reduction in itertools.product(_kinds(cell), REDUCTIONS):
        case = setup(cell, dtype, device, kind=kind, weighted=True)
        assert_loss(case, reduction, *run(case, reduction))


@cells
@dtypes
def test_targets(cell: Cell, dtype: torch.dtype, device: torch.device) -> None:
    for target, reduction in itertools.product(TARGETS, REDUCTIONS):
        case = setup(cell, dtype, device, target=target)
        assert_loss(case, reduction, *run(case, reduction))


@cells
@dtypes
@pytest.mark.parametrize("option", OPTIONS)
def test_options(cell: Cell, dtype: torch.dtype, option: str, device: torch.device) -> None:
    for kind, reduction, target in itertools.product(_kinds(cell), REDUCTIONS, (dtype, torch.int8)):
        _check(setup(cell, dtype, device, kind=kind, target=target, weighted=True), reduction, OPTIONS[option])


def _check(case: Setup, reduction: str, names: tuple[str, ...]) -> None:
    """Loss and gradient with options, against the truth of the elements that count."""
    base = base_of(case.cell.base)
    kind = BASE_NAMES[case.cell.base].kind
    decides = type(case.rule).decides or kind != "values"
    names = tuple(
        option
        for option in names
        if not (option == "divisor" and reduction != "mean")
        and not (option == "label_smoothing" and kind == "values")
        and not (option == "return_stats" and not decides)
    )
    made = torch.Generator().manual_seed(3)
    mask, ignored = (torch.rand(case.input.shape, generator=made) > share for share in (0.3, 0.8))
    mask, ignored = mask.to(case.input.device), ignored.to(case.input.device)
    x, y, valid, options = case.input, case.target, torch.ones_like(mask), dict[str, Any]()
    if "mask" in names:
        x, valid, options["mask"] = torch.where(mask, x, torch.nan), valid & mask, mask
    if "ignore_index" in names:
        y, valid, options["ignore_index"] = torch.where(ignored, IGNORED, y), valid & ~ignored, IGNORED
    share = 0.25 if "label_smoothing" in names else 0.0
    divisor: Any = valid.sum()
    if "divisor" in names:
        divisor = options["divisor"] = 12.0
    leaf = x.detach().requires_grad_()
    weights = {"weight": case.weight, "pos_weight": case.pos_weight, "label_smoothing": share}
    given = {**weights, **options, "reduction": reduction, "return_stats": "return_stats" in names}
    found = tt.threshold_loss(leaf, y, case.rule, base=base, **given)
    output = found[0] if "return_stats" in names else found
    if "return_stats" in names:
        assert int(found[1].valid) == int(valid.sum())
    (gradient,) = torch.autograd.grad(output.sum(), leaf)

    expected = truth(case._replace(target=case.target.double() * (1 - share) + share / 2))
    total, slope = (torch.where(valid, part, 0.0) for part in (expected.loss, expected.slope))
    if reduction == "mean":
        total, slope = total.sum() / divisor, slope / divisor
    elif reduction == "sum":
        total = total.sum()
    for ours, theirs in ((output, total), (gradient, slope)):
        _close(ours.detach(), theirs.detach())


def _close(ours: Tensor, theirs: Tensor) -> None:
    tolerance = TOLERANCE[ours.dtype]
    torch.testing.assert_close(ours.double(), theirs, rtol=tolerance, atol=tolerance)
