"""Losses on the Triton path: values and gradients against float64 truth, and how they behave under autograd.

tests/test_eager_losses.py runs the same tests on the eager backend.
"""

from __future__ import annotations

import functools
import math
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import triton_thresh as tt
from triton_thresh import ByConfidence, ByLoss, ByOutcome, ByPrediction, ByProximity, losses
from triton_thresh.rules import Unweighted

from ..losses import (
    CELLS,
    DTYPES,
    LAYOUTS,
    NAMED,
    OPERANDS,
    PAIRS,
    REDUCTIONS,
    SETTINGS,
    SHAPE,
    TARGETS,
    Cell,
    Setup,
    assert_loss,
    assert_near,
    name,
    plain,
    run,
    setup,
    truth,
)
from ..rows import BASE_NAMES, base_of, square

MSE, LOGITS = Cell("mse", ByPrediction), Cell("bce_with_logits", ByPrediction)
DIAGONAL = [
    Cell("bce", ByPrediction),
    Cell("bce_with_logits", ByLoss),
    Cell("mse", ByProximity),
    Cell("focal", ByOutcome),
    Cell("asymmetric", ByConfidence),
]
PROBABILITIES = [cell for cell in CELLS if cell.base == "bce"]
TORCH = {
    "mse": functools.partial(F.mse_loss, reduction="none"),
    "bce_with_logits": functools.partial(F.binary_cross_entropy_with_logits, reduction="none"),
    "huber": functools.partial(F.huber_loss, delta=0.5, reduction="none"),
}
ON_LOGITS = [cell for cell in PAIRS if BASE_NAMES[cell.base].kind == "logits"]
WIDE = [torch.bfloat16, torch.float32, torch.float64]
INF, NAN = math.inf, math.nan

cells = pytest.mark.parametrize("cell", PAIRS, ids=name)
some_cells = pytest.mark.parametrize("cell", DIAGONAL, ids=name)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=name)
reductions = pytest.mark.parametrize("reduction", REDUCTIONS)
reduced = pytest.mark.parametrize("reduction", ["mean", "sum"])


@pytest.fixture
def shell() -> ModuleType:
    """The module whose functions compute losses."""
    return losses


# --------------------------------------------------------------------------------------------------------------- values


@pytest.mark.parametrize("cell", CELLS, ids=name)
def test_every_pair(cell: Cell, device: torch.device) -> None:
    case = setup(cell, torch.float32, device)
    assert_loss(case, "mean", *run(case, "mean"))


@some_cells
@dtypes
@reductions
def test_value_and_gradient(cell: Cell, dtype: torch.dtype, reduction: str, device: torch.device) -> None:
    case = setup(cell, dtype, device, weighted=True)
    output, gradient = run(case, reduction)
    assert output.dtype == dtype
    assert_loss(case, reduction, output, gradient)
    assert torch.equal(case(reduction), output), "another loss without grad than with"


@cells
@dtypes
def test_no_less_exact_than_the_formula_in_torch(cell: Cell, dtype: torch.dtype, device: torch.device) -> None:
    case = setup(cell, dtype, device)
    output, gradient = run(case, "none")
    x = case.input.detach().requires_grad_()
    by_hand = plain(case, x)
    (by_tape,) = torch.autograd.grad(by_hand.sum(), x)
    expected = truth(case)
    slack = 4 * torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    for ours, theirs, value, size in (
        (output, by_hand.detach(), expected.loss, expected.loss_size),
        (gradient, by_tape, expected.slope, expected.slope_size),
    ):
        own = torch.finfo(dtype).eps / 2 * value.abs().max()
        worst = torch.maximum((theirs.double() - value).abs().max(), own) + slack * size.max()
        assert (ours.double() - value).abs().max() <= worst


INTEGERS = (
    "class-int64",
    "element-uint8",
    "class-bool",
)  # of which some are 0, which no threshold of confidence may be


sweep = pytest.mark.parametrize(
    ("cell", "kind"),
    [(c, kind) for c in DIAGONAL for kind in OPERANDS if c.rule is not ByConfidence or kind not in INTEGERS],
    ids=str,
)


@sweep
def test_operand_kinds(cell: Cell, kind: str, device: torch.device) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        case = setup(cell, dtype, device, kind=kind, weighted=True)
        assert_loss(case, "mean", *run(case, "mean"))
    assert_loss(case, "none", *run(case, "none"))


@some_cells
@pytest.mark.parametrize("kind", ["number", "0dim-float64", "class", "row", "element-float64"])
def test_operand_kinds_over_float64(cell: Cell, kind: str, device: torch.device) -> None:
    case = setup(cell, torch.float64, device, kind=kind, weighted=True)
    assert_loss(case, "sum", *run(case, "sum"))


@cells
def test_every_operand_alone_may_be_a_tensor(cell: Cell, device: torch.device) -> None:
    tensors = setup(cell, torch.float32, device, kind="class", weighted=True)
    numbers = setup(cell, torch.float32, device, weighted=True)
    for field in vars(tensors.rule):
        settings = {**vars(numbers.rule), field: getattr(tensors.rule, field)}
        case = numbers._replace(rule=cell.rule(**settings))
        assert_loss(case, "mean", *run(case, "mean"))
    for field in ("weight", "pos_weight"):
        case = numbers._replace(weight=None, pos_weight=None)._replace(**{field: getattr(tensors, field)})
        assert_loss(case, "mean", *run(case, "mean"))


@cells
def test_a_0dim_cpu_tensor_counts_as_a_number(cell: Cell, device: torch.device) -> None:
    """Alone, and beside settings that are tensors on the input's device."""
    numbers, tensors = (setup(cell, torch.float32, device, kind=kind, weighted=True) for kind in ("number", "class"))
    for field, value in vars(numbers.rule).items():
        for case in (numbers, tensors):
            rule = cell.rule(**{**vars(case.rule), field: torch.tensor(value)})
            mixed = case._replace(rule=rule, weight=torch.tensor(0.75))
            assert_loss(mixed, "mean", *run(mixed, "mean"))
    if cell.base == "bce_with_logits":
        case = numbers._replace(pos_weight=torch.tensor(1.5))
        assert_loss(case, "mean", *run(case, "mean"))


@some_cells
@pytest.mark.parametrize("target", TARGETS, ids=name)
def test_target_dtypes(cell: Cell, target: torch.dtype, device: torch.device) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        case = setup(cell, dtype, device, target=target)
        assert_loss(case, "mean", *run(case, "mean"))
    assert_loss(case, "none", *run(case, "none"))


@pytest.mark.parametrize(
    ("cell", "layout", "kind"), square(DIAGONAL, list(LAYOUTS), ["class", "row", "element"]), ids=str
)
def test_layouts(cell: Cell, layout: str, kind: str, device: torch.device) -> None:
    shape, lay = LAYOUTS[layout]
    for other in {layout, "contiguous", "sliced" if shape == (4, 6) else layout}:
        case = setup(cell, torch.float32, device, shape=shape, kind=kind if shape else "0dim", weighted=True)
        case = case._replace(input=lay(case.input), target=LAYOUTS[other][1](case.target))
        for reduction in ("mean", "none"):
            output, gradient = run(case, reduction)
            assert_loss(case, reduction, output, gradient)
            if layout not in ("sliced", "expanded"):
                assert gradient.stride() == case.input.stride()
                assert reduction != "none" or output.stride() == case.input.stride()


@pytest.mark.parametrize(
    ("size", "cell", "reduction"), square([1, 4095, 4096, 4097, 10000], DIAGONAL, REDUCTIONS), ids=str
)
def test_sizes(cell: Cell, size: int, reduction: str, device: torch.device) -> None:
    kind = "element" if size == 4097 else "number"
    case = setup(cell, torch.float32, device, shape=(size,), kind=kind, weighted=True)
    assert_loss(case, reduction, *run(case, reduction))


@pytest.mark.parametrize("op", NAMED)
def test_named_losses_are_cells_of_the_grid(op: str, device: torch.device) -> None:
    case = setup(NAMED[op], torch.float32, device, kind="class", weighted=True)
    settings: dict[str, Any] = {**vars(case.rule), "weight": case.weight}
    if case.cell.rule is Unweighted:
        settings |= vars(base_of(case.cell.base))
    settings = {name: value for name, value in settings.items() if name != "factor_below"}  # 1 in exceedance_mse_loss
    case = case if NAMED[op].rule is not ByLoss else case._replace(rule=replace(case.rule, factor_below=1.0))
    if case.pos_weight is not None:
        settings["pos_weight"] = case.pos_weight
    for reduction in REDUCTIONS:
        assert torch.equal(getattr(tt, op)(case.input, case.target, **settings, reduction=reduction), case(reduction))


@pytest.mark.parametrize("op", NAMED)
def test_defaults(op: str, device: torch.device) -> None:
    settings = {} if NAMED[op].rule is ByLoss or NAMED[op].base != "mse" else {"threshold": 0.4}
    case = setup(NAMED[op], torch.float32, device)
    if NAMED[op].rule is Unweighted:
        by_default = BASE_NAMES[NAMED[op].base]()
        reduction = {"focal": "none", "asymmetric": "sum"}[NAMED[op].base]
        expected = tt.threshold_loss(case.input, case.target, base=by_default, reduction=reduction)
        assert torch.equal(getattr(tt, op)(case.input, case.target), expected)
        return
    defaults = {
        ByPrediction: {"threshold": 0.7, "weight_above": 1.0, "weight_below": 0.1},
        ByProximity: {"penalty_range": 0.2, "penalty_factor": 1.5},
        ByLoss: {"loss_threshold": 1.0, "penalty_factor": 2.0},
    }[NAMED[op].rule]
    expected = truth(case._replace(rule=NAMED[op].rule(**{**defaults, **settings})))
    output = getattr(tt, op)(case.input, case.target, **settings)
    assert_near(output, expected.loss.mean(), expected.loss_size.mean(), terms=35)


# --------------------------------------------------------------------------------------------- boundaries and specials


def _case(
    cell: Cell, x: Any, y: Any, device: torch.device, *settings: Any, dtype: torch.dtype = torch.float32
) -> Setup:
    x, y = (torch.as_tensor(v, dtype=dtype).to(device) for v in (x, y))
    return Setup(cell, x, y.expand(x.shape).contiguous(), cell.rule(*settings))


def _around(value: float, dtype: torch.dtype = torch.float32) -> Tensor:
    """A value of `dtype`, between its neighbours."""
    x = torch.tensor(value).to(dtype)
    bits = x.view(torch.int16 if dtype.itemsize == 2 else torch.int32)
    return torch.stack([(bits + step).view(dtype) for step in (-1, 0, 1)])


@pytest.mark.parametrize("kind", ["number", "0dim", "class"])
@pytest.mark.parametrize("base", ["mse", "bce"])
def test_prediction_at_the_threshold_is_above(base: str, kind: str, device: torch.device) -> None:
    """Also where the threshold is not a value of the input's 16-bit type: it is not rounded to it."""
    for t in (0.5, 0.7):
        x = _around(t)
        case = _case(Cell(base, ByPrediction), x, 0.25, device, t, 8.0, 1.0)
        made = OPERANDS[kind](t, (3,)) if kind != "class" else torch.full((3,), t)
        case = case._replace(rule=ByPrediction(made.to(device) if isinstance(made, Tensor) else made, 8.0, 1.0))
        expected = truth(case)
        assert [round(v) for v in (case() / run(_unweighted(case), "none")[0]).tolist()] == [1, 8, 8]
        assert_near(case(), expected.loss, expected.loss_size)
    rounded = torch.tensor([0.7], dtype=torch.bfloat16)  # 0.69921875
    case = _case(Cell(base, ByPrediction), rounded, 0.0, device, 0.7, 8.0, 1.0, dtype=torch.bfloat16)
    assert_near(case(), truth(case).loss, truth(case).loss_size)
    assert case().item() < 2


def _unweighted(case: Setup) -> Setup:
    return case._replace(rule=ByPrediction(0.0, 1.0, 1.0))


def test_logit_at_the_threshold_is_above(device: torch.device) -> None:
    x = torch.cat([_around(1e-30) * torch.tensor([-1.0, 0.0, 1.0]), torch.tensor([-0.0])])
    weights = _case(LOGITS, x, 0.0, device, 0.5, 8.0, 1.0)() / math.log(2)
    assert weights.round().tolist() == [1, 8, 8, 8]


@pytest.mark.parametrize("y", [0.0, 0.25, 1.0])
@pytest.mark.parametrize("base", ["bce_with_logits", "focal"])
def test_a_logit_of_0_is_sure_at_a_half(base: str, y: float, device: torch.device) -> None:
    """Every target is as probable as the threshold, so that the weight, 1, has a slope."""
    case = _case(Cell(base, ByConfidence), torch.tensor([0.0, -0.0]), y, device, 0.5, 2.0)
    assert_loss(case, "none", *run(case, "none"))


@pytest.mark.parametrize("kind", ["number", "class"])
def test_thresholds_outside_0_to_1_on_logits(kind: str, device: torch.device) -> None:
    x = torch.tensor([-1e4, -3.0, 0.0, 3.0, 1e4], device=device)
    for t, weight in ((0.0, 2.0), (-0.5, 2.0), (1.0, 3.0), (1.5, 3.0)):
        threshold = t if kind == "number" else torch.full((5,), t, device=device)
        rule = ByPrediction(threshold, 2.0, 3.0)
        case, other = (Setup(LOGITS, x, torch.full_like(x, 0.5), r) for r in (rule, ByPrediction(0.5, weight, weight)))
        assert torch.equal(case(), other())
        assert torch.equal(run(case, "mean")[1], run(other, "mean")[1])


@pytest.mark.parametrize("base", ["mse", "bce"])
def test_proximity_at_its_kinks(base: str, device: torch.device) -> None:
    """x == t: full weight, no pull either way. d == range: no weight. t and range are exact in binary."""
    x = torch.cat([_around(0.5), _around(0.75), _around(0.25)])
    case = _case(Cell(base, ByProximity), x, 0.125, device, 0.5, 0.25, 1.5)
    output, gradient = run(case, "sum")
    assert_loss(case, "sum", output, gradient)
    base_slope = run(_unweighted(case._replace(cell=Cell(base, ByPrediction))), "sum")[1]
    torch.testing.assert_close(gradient[1], base_slope[1] * 2.5)
    torch.testing.assert_close(gradient[[4, 5, 6, 7]][[0, 3]], base_slope[[4, 7]])
    assert gradient[0] > gradient[1] > gradient[2]


def test_proximity_on_logits_at_zero(device: torch.device) -> None:
    """The sigmoid of 0 is 0.5, so that a zero logit with threshold 0.5 feels no pull."""
    case = _case(Cell("bce_with_logits", ByProximity), [0.0, -0.0, 0.0], [0.0, 0.5, 1.0], device, 0.5, 0.2, 1.5)
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        typed = case._replace(input=case.input.to(dtype))
        assert_loss(typed, "sum", *run(typed, "sum"))


def test_proximity_with_a_range_of_zero_weighs_nothing(device: torch.device) -> None:
    for reach in (0.0, torch.zeros(3, device=device)):
        for base in ("mse", "bce", "bce_with_logits"):
            case = _case(Cell(base, ByProximity), [0.25, 0.5, 0.75], 1.0, device, 0.5, reach, 1.5)
            other = case._replace(cell=Cell(base, ByPrediction), rule=ByPrediction(0.5, 1.0, 1.0))
            for ours, theirs in zip(run(case, "mean"), run(other, "mean"), strict=True):
                torch.testing.assert_close(ours, theirs)


def test_loss_at_the_bound_is_not_above(device: torch.device) -> None:
    x = torch.cat([torch.tensor([0.5]), _around(1.5)])  # losses 1 (x = 0.5, y = 1.5), then 0
    case = _case(Cell("mse", ByLoss), x, [1.5, 0.5, 0.5, 0.5], device, 1.0, 16.0)
    expected = truth(case)
    output, gradient = run(case, "none")
    assert_near(output, expected.loss, expected.loss_size)
    assert_near(gradient, expected.slope, expected.slope_size)
    assert output.round().tolist() == [1, 1, 1, 16]


@pytest.mark.parametrize("cell", PROBABILITIES, ids=name)
@pytest.mark.parametrize("base_dtype", [torch.float32, torch.bfloat16, torch.float64], ids=name)
def test_probabilities_at_the_ends(cell: Cell, base_dtype: torch.dtype, device: torch.device) -> None:
    p = torch.tensor([0.0, -0.0, 1e-40, 1e-30, 1e-9, 1e-6, 1e-3, 0.5, 1 - 2**-9, 1 - 2**-24, 1.0], dtype=torch.float64)
    x, y = torch.meshgrid(p, torch.tensor([0.0, 0.3, 1.0], dtype=torch.float64), indexing="ij")
    case = _case(cell, x, y, device, *SETTINGS[cell.rule], dtype=base_dtype)
    expected = truth(case)
    output, gradient = run(case, "none")
    assert_near(output, expected.loss, expected.loss_size)
    assert_near(gradient, expected.slope, expected.slope_size)


@pytest.mark.parametrize("cell", PROBABILITIES, ids=name)
@dtypes
def test_probabilities_outside_their_range_are_nan(cell: Cell, dtype: torch.dtype, device: torch.device) -> None:
    info = torch.finfo(dtype)
    x = [-INF, -1.0, -info.tiny, -info.tiny * info.eps, 1 + info.eps, 2.0, INF, NAN, 0.5]
    for y in (0.0, 0.5, 1.0):
        case = _case(cell, x, y, device, *SETTINGS[cell.rule], dtype=dtype)
        for result in run(case, "none"):
            assert result.isnan().tolist() == [True] * 8 + [False]
        output, gradient = run(case, "mean")
        assert output.isnan()
        assert gradient.isnan().tolist() == [True] * 8 + [False]


@pytest.mark.parametrize("cell", ON_LOGITS, ids=name)
@pytest.mark.parametrize("y", [0.0, 0.5, 1.0])
def test_large_logits(cell: Cell, y: float, device: torch.device) -> None:
    x = torch.tensor([20.0, 50.0, 88.0, 100.0, 104.0, 1e4, 1e30])
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        case = _case(cell, torch.cat([x, -x]), y, device, *SETTINGS[cell.rule], dtype=dtype)
        expected = truth(case)
        output, gradient = run(case, "none")
        assert_near(output, expected.loss, expected.loss_size)
        assert_near(gradient, expected.slope, expected.slope_size)


@pytest.mark.parametrize("cell", [cell for cell in PAIRS if cell.base in TORCH], ids=name)
@pytest.mark.parametrize("threshold", [0.1, 0.5, 0.95])
def test_infinities_as_in_torch(cell: Cell, threshold: float, device: torch.device) -> None:
    """Loss as torch's own loss has it; gradient as its own backward has it, times a weight that is finite there."""
    x = torch.tensor([INF, INF, INF, -INF, -INF, -INF, NAN, 1.0], device=device)
    y = torch.tensor([0.0, 0.5, 1.0, 0.0, 0.5, 1.0, 1.0, NAN], device=device)
    case = _case(cell, x, y, device, threshold, *SETTINGS[cell.rule][1:])
    leaf = x.clone().requires_grad_()
    expected = TORCH[cell.base](leaf, y)
    (slope,) = torch.autograd.grad(expected.sum(), leaf)
    output, gradient = run(case, "none")
    for ours, theirs in ((output, expected), (gradient, slope)):
        assert ours.isnan().tolist() == theirs.isnan().tolist()
        assert ours.isinf().tolist() == theirs.isinf().tolist()
        assert torch.equal(ours[theirs.isinf()], theirs[theirs.isinf()])
    assert torch.equal(run(case, "sum")[1].isnan(), slope.isnan())


def test_settings_that_are_not_finite(device: torch.device) -> None:
    x, ones = torch.tensor([-2.0, 0.0, 3.0], device=device), [1.0, 1.0, 1.0]
    for t, expected in ((INF, [3.0] * 3), (-INF, [2.0] * 3), (NAN, [3.0] * 3)):
        case = Setup(MSE, x, x + 1, ByPrediction(t, 2.0, 3.0))
        assert case().tolist() == expected
    for bound, expected in ((INF, ones), (NAN, ones), (-INF, [5.0] * 3)):
        assert Setup(Cell("mse", ByLoss), x, x + 1, ByLoss(bound, 5.0))().tolist() == expected
    for t in (INF, -INF):
        assert Setup(Cell("mse", ByProximity), x, x + 1, ByProximity(t))().tolist() == ones
    assert Setup(MSE, x, x + 1, ByPrediction(0.0, INF, 0.0))().tolist() == [0.0, INF, INF]


@pytest.mark.parametrize("shape", [(0,), (3, 0), (0, 4)])
@some_cells
def test_empty(cell: Cell, shape: tuple[int, ...], device: torch.device) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.empty(shape, dtype=dtype, device=device)
        case = Setup(cell, x, x.clone(), cell.rule(*SETTINGS[cell.rule]))
        for reduction in REDUCTIONS:
            output, gradient = run(case, reduction)
            assert output.dtype == gradient.dtype == dtype
            assert gradient.shape == shape
            if reduction == "none":
                assert output.shape == shape
            else:
                assert output.isnan() if reduction == "mean" else output == 0


# ----------------------------------------------------------------------------------------------------------- gradients


@pytest.mark.parametrize(
    ("cell", "reduction", "upstream", "dtype"),
    square(DIAGONAL, ["mean", "sum"], [1.0, 65536.0, 0.0, -2.5], WIDE),
    ids=str,
)
def test_upstream_gradient(
    cell: Cell, reduction: str, upstream: float, dtype: torch.dtype, device: torch.device
) -> None:
    case = setup(cell, dtype, device)
    output, gradient = run(case, reduction, torch.tensor(upstream, dtype=dtype, device=device))
    assert_loss(case, reduction, output, gradient, upstream)


@pytest.mark.parametrize(
    ("cell", "form", "dtype"),
    square(DIAGONAL, ["contiguous", "transposed", "expanded", "class", "sliced"], DTYPES),
    ids=str,
)
def test_upstream_gradient_per_element(cell: Cell, dtype: torch.dtype, form: str, device: torch.device) -> None:
    case = setup(cell, dtype, device)
    g = torch.randn(SHAPE, generator=torch.Generator().manual_seed(5)).to(device, dtype)
    g = {
        "contiguous": g,
        "transposed": g.t().contiguous().t(),
        "expanded": g[0, 0].expand(SHAPE),
        "class": g[0].expand(SHAPE),
        "sliced": g.repeat(2, 2)[::2, ::2],
    }[form]
    output, gradient = run(case, "none", g)
    assert_loss(case, "none", output, gradient, g)


def test_sum_of_the_element_loss(device: torch.device) -> None:
    """`loss.sum().backward()` hands an expanded gradient of stride 0 to backward."""
    case = setup(LOGITS, torch.float32, device)
    x = case.input.requires_grad_()
    case("none", x).sum().backward()
    assert x.grad is not None
    assert_loss(case, "sum", case("sum").detach(), x.grad)


@pytest.mark.parametrize(("cell", "dtype", "reduction"), square(DIAGONAL, DTYPES, REDUCTIONS), ids=str)
def test_backward_twice_gives_twice_the_gradient(
    cell: Cell, reduction: str, dtype: torch.dtype, device: torch.device
) -> None:
    case = setup(cell, dtype, device)
    x = case.input.requires_grad_()
    output = case(reduction, x).sum()
    output.backward(retain_graph=True)
    assert x.grad is not None
    once = x.grad.clone()
    output.backward(retain_graph=True)
    assert torch.equal(x.grad, 2 * once)
    output.backward()
    torch.testing.assert_close(x.grad, 3 * once)
    assert_loss(case, reduction, case(reduction).detach(), once)


@pytest.mark.parametrize("change", ["zero_", "mul_", "none", "resize"])
@pytest.mark.parametrize("upstream", [1.0, 2.0])
@some_cells
def test_what_becomes_of_grad_between_backwards(cell: Cell, change: str, upstream: float, device: torch.device) -> None:
    case = setup(cell, torch.float32, device)
    x = case.input.requires_grad_()
    output = case("mean", x) * upstream
    output.backward(retain_graph=True)
    assert x.grad is not None
    once = x.grad.clone()
    if change == "zero_":
        x.grad.zero_()
    elif change == "mul_":
        x.grad.mul_(3)
    elif change == "none":
        x.grad = None
    else:
        x.grad.untyped_storage().resize_(0)
        x.grad = None
    output.backward(retain_graph=True)
    assert x.grad is not None
    assert torch.equal(x.grad, {"mul_": 4}.get(change, 1) * once)


def test_gradients_of_inputs_that_are_not_leaves(device: torch.device) -> None:
    case = setup(Cell("mse", ByProximity), torch.float32, device)
    x = case.input.requires_grad_()
    output = case("sum", x * 2)
    (once,) = torch.autograd.grad(output, x, retain_graph=True)
    kept = once.clone()
    (again,) = torch.autograd.grad(output, x, retain_graph=True)
    assert torch.equal(kept, once)
    assert torch.equal(again, once)
    expected = truth(case._replace(input=(x * 2).detach()))
    assert_near(once, 2 * expected.slope, 2 * expected.slope_size, roundings=2)


@reduced
def test_the_gradient_buffer_is_handed_on(
    reduction: str, shell: ModuleType, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No copy, and no second pass: a leaf's .grad is the memory that the forward wrote."""
    written: list[int] = []
    forward, calls = shell.loss_forward, []

    def spy(*args: Any, **keywords: Any) -> Any:
        found = forward(*args, **keywords)
        written.append(found[-1].data_ptr())
        return found

    monkeypatch.setattr(shell, "loss_forward", spy)
    monkeypatch.setattr(shell, "loss_backward", lambda *args: calls.append(args))
    for upstream in (1.0, 3.0):
        case = setup(LOGITS, torch.float32, device, shape=(40, 7))
        x = case.input.requires_grad_()
        (case(reduction, x) * upstream).backward()
        assert x.grad is not None
        assert x.grad.data_ptr() == written.pop()
        assert_loss(case, reduction, torch.zeros_like(case(reduction)) + case(reduction).detach(), x.grad, upstream)
        written.clear()
    assert calls == []


@some_cells
@reductions
def test_nothing_of_the_callers_is_written(cell: Cell, reduction: str, device: torch.device) -> None:
    for dtype in (torch.float32, torch.float16):
        case = setup(cell, dtype, device, kind="element", weighted=True)
        case.input.requires_grad_()
        before = [(t.detach().clone(), t._version) for t in case.tensors()]
        output = case(reduction, case.input)
        upstream = torch.full_like(output, 3.0)
        output.backward(upstream, retain_graph=True)
        output.backward(upstream)
        assert bool((upstream == 3).all())
        for tensor, (value, version) in zip(case.tensors(), before, strict=True):
            assert torch.equal(tensor.detach(), value)
            assert tensor._version == version


@reductions
@pytest.mark.parametrize("field", ["input", "target", "weight", "threshold"])
def test_a_saved_tensor_changed_in_place_is_an_error(field: str, reduction: str, device: torch.device) -> None:
    case = setup(MSE, torch.float32, device, kind="class", weighted=True)
    output = case(reduction, case.input.requires_grad_()).sum()
    with torch.no_grad():
        getattr(case.rule if field == "threshold" else case, field).add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.backward()


@reductions
def test_a_freed_graph_is_an_error(reduction: str, device: torch.device) -> None:
    case = setup(MSE, torch.float32, device)
    output = case(reduction, case.input.requires_grad_()).sum()
    output.backward()
    with pytest.raises(RuntimeError, match="second time"):
        output.backward()


@cells
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_double_backward(cell: Cell, reduction: str, device: torch.device) -> None:
    """Against the derivative of the float64 slope, for an upstream gradient that is itself differentiated."""
    for dtype in (torch.float32, torch.float64):
        case = setup(cell, dtype, device, kind="class", weighted=True)
        case.input[0, :3] = 0.5 if cell.base == "bce" else 0.0
        x = case.input.detach().requires_grad_()
        output = case(reduction, x)
        upstream = torch.full_like(output, 1.5).requires_grad_()
        (gradient,) = torch.autograd.grad(output, x, upstream, create_graph=True)
        direction = torch.randn(SHAPE, generator=torch.Generator().manual_seed(9)).to(device, dtype)
        second, mixed = torch.autograd.grad(
            gradient, (x, upstream), direction, allow_unused=True, materialize_grads=True
        )

        wide = case.input.detach().double().requires_grad_()
        slope = truth(case._replace(input=wide)).slope
        curve = torch.zeros_like(wide)
        if slope.requires_grad:
            (curve,) = torch.autograd.grad((slope * direction.double()).sum(), wide)
        n = case.input.numel() if reduction == "mean" else 1
        rtol, atol = (1e-5, 1e-5) if dtype == torch.float32 else (1e-12, 1e-12)
        torch.testing.assert_close(second.double(), curve * 1.5 / n, rtol=rtol, atol=atol)
        pairing = slope.detach() * direction.double() / n
        pairing = pairing.sum() if reduction == "mean" else pairing
        torch.testing.assert_close(mixed.double(), pairing, rtol=rtol, atol=atol)


@pytest.mark.parametrize(("cell", "reduction"), square(PAIRS, ["mean", "sum"]), ids=str)
def test_gradcheck(cell: Cell, reduction: str, device: torch.device) -> None:
    """At smooth points in float64: first and second derivatives, and batched gradients."""
    x = torch.tensor([0.15, 0.33, 0.52, 0.81], dtype=torch.float64, device=device, requires_grad=True)
    case = _case(cell, x.detach(), 0.9, device, *SETTINGS[cell.rule], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: case(reduction, x), x, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(lambda x: case(reduction, x), x, check_batched_grad=True)


@reductions
def test_batched_gradients(reduction: str, device: torch.device) -> None:
    case = setup(Cell("mse", ByProximity), torch.float32, device)
    x = case.input.requires_grad_()
    output = case(reduction, x)
    upstream = torch.randn((3, *output.shape), generator=torch.Generator().manual_seed(2)).to(device)
    (batched,) = torch.autograd.grad(output, x, upstream, retain_graph=True, is_grads_batched=True)
    for row, g in zip(batched, upstream, strict=True):
        (single,) = torch.autograd.grad(output, x, g, retain_graph=True)
        torch.testing.assert_close(row, single)


# --------------------------------------------------------------------------------------- mixed precision, saved tensors


@some_cells
@reductions
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=name)
def test_autocast_gives_float32(cell: Cell, reduction: str, dtype: torch.dtype, device: torch.device) -> None:
    case = setup(cell, dtype, device, target=torch.float32, weighted=True)
    with torch.autocast(device.type, dtype=dtype):
        output, gradient = run(case, reduction)
    assert output.dtype == torch.float32
    assert_loss(case, reduction, output, gradient)


@some_cells
def test_small_float16_gradients_survive_a_grad_scaler(cell: Cell, device: torch.device) -> None:
    """Scaled by 1/N they would be less than the smallest float16; GradScaler's factor must reach them first."""
    case = setup(cell, torch.float16, device, shape=(4097,))
    case = case._replace(weight=1e-4)
    with torch.autocast(device.type, dtype=torch.float16):
        output, gradient = run(case, "mean", torch.tensor(65536.0, device=device))
    assert_loss(case, "mean", output, gradient, 65536.0)
    assert float(gradient.abs().median()) > 0


def _saved(case: Setup, reduction: str) -> list[Tensor]:
    found: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: found.append(t) or t, lambda t: t):
        case(reduction, case.input.detach().requires_grad_())
    return found


@pytest.mark.parametrize(
    ("reduction", "dtype", "buffers"),
    [("mean", torch.float32, 1), ("sum", torch.bfloat16, 1), ("mean", torch.float16, 0), ("none", torch.float32, 0)],
)
def test_saved_memory(reduction: str, dtype: torch.dtype, buffers: int, device: torch.device) -> None:
    """The caller's own tensors, and at most one gradient; nothing where no gradient is needed."""
    case = setup(LOGITS, dtype, device, kind="element", weighted=True)
    own = {t.data_ptr() for t in case.tensors()} | {t.data_ptr() for t in vars(case.rule).values()}
    extra = [t for t in _saved(case, reduction) if t.data_ptr() not in own and t.numel() == case.input.numel()]
    derived = 1  # logit(t) of a threshold per element
    assert sum(t.nbytes for t in extra) == buffers * case.input.nbytes + derived * case.rule.threshold.nbytes
    assert not [t for t in _saved(case._replace(rule=ByPrediction()), reduction) if t.dtype == torch.bool]
    with torch.no_grad():
        assert _saved(case, reduction) == []


@reductions
@some_cells
def test_saved_tensor_hooks(cell: Cell, reduction: str, device: torch.device) -> None:
    case = setup(cell, torch.float32, device, kind="class", weighted=True)
    plain_result = run(case, reduction)[1]
    for hooks in (
        torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone().cpu(), lambda t: t.clone().to(device)),
        torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t),
        torch.autograd.graph.save_on_cpu(),
    ):
        x = case.input.detach().requires_grad_()
        with hooks:
            output = case(reduction, x).sum()
        output.backward(retain_graph=True)
        output.backward()
        assert x.grad is not None
        torch.testing.assert_close(x.grad, 2 * plain_result)


@reductions
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoint(reduction: str, reentrant: bool, device: torch.device) -> None:
    case = setup(Cell("mse", ByProximity), torch.float32, device)
    x = case.input.requires_grad_()
    checkpoint(lambda x: case(reduction, x), x, use_reentrant=reentrant).sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, run(case, reduction)[1])


@some_cells
@reductions
def test_same_bits_every_time(cell: Cell, reduction: str, device: torch.device) -> None:
    case = setup(cell, torch.float32, device, shape=(4099,))
    first = run(case, reduction)
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(run(case, reduction), first, strict=True))


def test_two_losses_share_an_input(device: torch.device) -> None:
    case = setup(MSE, torch.float32, device)
    other = case._replace(cell=Cell("mse", ByLoss), rule=ByLoss(0.5, 2.0))
    x = case.input.requires_grad_()
    (case("mean", x) + other("mean", x)).backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, run(case, "mean")[1] + run(other, "mean")[1])


def test_inference_mode_and_parameters(device: torch.device) -> None:
    case = setup(MSE, torch.float32, device)
    with torch.inference_mode():
        inferred = case("mean")
    assert torch.equal(inferred, case("mean"))
    parameter = torch.nn.Parameter(case.input.clone())
    case("mean", parameter).backward()
    assert parameter.grad is not None
    assert torch.equal(parameter.grad, run(case, "mean")[1])
