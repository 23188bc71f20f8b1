"""Losses in eager torch: the tests of the Triton path over again, then transforms and modules."""

from __future__ import annotations

import copy
import inspect
import io
import itertools
import pickle
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

import triton_thresh as tt
from triton_thresh import ByLoss, ByPrediction, ByProximity, checks, eager
from triton_thresh.cells import element_loss, specify
from triton_thresh.rules import select

from .kernels.test_losses import *  # noqa: F403
from .kernels.test_losses import _case, cells, some_cells, sweep
from .losses import CELLS, NAMED, PAIRS, REDUCTIONS, SETTINGS, SHAPE, Cell, Setup, assert_loss, run, setup, truth
from .rows import BASE_NAMES, base_of, square

VALUES = [0.15, 0.33, 0.52, 0.81]  # smooth points of every cell


@pytest.fixture
def device() -> torch.device:
    return torch.device("cpu")


@pytest.fixture
def shell() -> ModuleType:
    return eager


LARGE = ("test_sizes", "test_same_bits_every_time")  # of thousands of elements, which would be hundreds of slices


@pytest.fixture(autouse=True)
def eager_in_small_slices(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[None]:
    monkeypatch.setattr(eager, "SLICE", 2048 if request.node.originalname in LARGE else 16)
    monkeypatch.setattr(checks, "FEW", 8)  # the last slice holds few
    with tt.use_backend("eager"):
        yield


def _smooth(cell: Cell, dtype: torch.dtype = torch.float64) -> Setup:
    return _case(cell, VALUES, 0.9, torch.device("cpu"), *SETTINGS[cell.rule], dtype=dtype)


@sweep
@pytest.mark.parametrize(("size", "first"), [(6, "mean"), (1000, "none")])
def test_slices_meet_their_operands(
    cell: Cell, first: str, kind: str, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A slice of one row, and one slice for all; shapes are reduced and left whole by turns."""
    monkeypatch.setattr(eager, "SLICE", size)
    turns = itertools.cycle(("mean", "none") if first == "mean" else ("none", "mean"))
    for shape, reduction in zip(((40,), (6, 7), (3, 2, 5), (1, 30)), turns):
        case = setup(cell, torch.float32, torch.device("cpu"), shape=shape, kind=kind, weighted=True)
        assert_loss(case, reduction, *run(case, reduction))


@cells
def test_the_slices_are_small(cell: Cell, monkeypatch: pytest.MonkeyPatch) -> None:
    """No more than SLICE elements at a time, so that the passes stay in the cache."""
    seen: list[int] = []
    inner = eager.loss_and_slope

    def spy(spec: Any, x: Tensor, *args: Any, **keywords: Any) -> Any:
        seen.append(x.numel())
        return inner(spec, x, *args, **keywords)

    monkeypatch.setattr(eager, "loss_and_slope", spy)
    for kind in ("number", "class", "row", "element"):
        run(setup(cell, torch.float32, torch.device("cpu"), shape=(20, 8), kind=kind), "mean")
    assert max(seen) == 16
    assert sum(seen) == 4 * 160


def test_closed_form_slopes_match_the_tape() -> None:
    """Each base and each rule against autograd of its own value, in float64, off the kinks."""
    x = torch.tensor(VALUES, dtype=torch.float64, requires_grad=True)
    y, one = torch.full_like(x, 0.9), torch.ones(4, dtype=torch.float64)
    for kind in BASE_NAMES.values():
        base = kind(*kind.example)
        loss = base.loss(x, y)
        torch.testing.assert_close(base.value(x.detach(), y), loss.detach())
        (tape,) = torch.autograd.grad(loss.sum(), x)
        closed = base.slope(x.detach(), y)
        if closed is not None:
            torch.testing.assert_close(closed, tape)
        (tape,) = torch.autograd.grad((base.prediction(x) + 0 * x).sum(), x)
        torch.testing.assert_close(base.prediction_slope(x) * one, tape)
    logits = tt.BCEWithLogits(1.7)
    (tape,) = torch.autograd.grad(logits.loss(x, y).sum(), x)
    torch.testing.assert_close(logits.slope(x.detach(), y), tape)


@cells
def test_slopes_match_the_tape_of_the_value(cell: Cell) -> None:
    case = _smooth(cell)
    x = case.input.requires_grad_()
    kind = BASE_NAMES[cell.base]
    base = tt.BCEWithLogits(1.5) if cell.base == "bce_with_logits" else kind(*kind.example)
    spec, operands = specify(base, case.rule, {"weight": 0.75}, False, "sum", x.dtype)
    value, slope = eager.loss_and_slope(spec, x.detach(), case.target, operands)
    loss = element_loss(spec, x, case.target, operands)
    torch.testing.assert_close(value, loss.detach())
    (tape,) = torch.autograd.grad(loss.sum(), x)
    torch.testing.assert_close(slope, tape)


# ----------------------------------------------------------------------------------------------------------- transforms


@pytest.mark.parametrize(("cell", "reduction"), square(PAIRS, REDUCTIONS), ids=str)
def test_gradcheck_forward_mode(cell: Cell, reduction: str) -> None:
    case = _smooth(cell)
    x = case.input.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x: case(reduction, x), x, check_forward_ad=True, check_batched_forward_grad=True, check_batched_grad=True
    )
    assert torch.autograd.gradgradcheck(
        lambda x: case(reduction, x), x, check_fwd_over_rev=True, check_rev_over_rev=True
    )


@cells
def test_func_grad_vmap_jvp_jacobians(cell: Cell) -> None:
    case = _smooth(cell)
    x, y = case.input, case.target
    value = truth(case)

    def loss(x: Tensor, y: Tensor, reduction: str = "sum") -> Tensor:
        return case._replace(target=y)(reduction, x)

    close = torch.testing.assert_close
    close(torch.func.grad(loss)(x, y), value.slope)
    close(torch.func.vmap(loss)(x, y), value.loss)
    close(torch.func.vmap(torch.func.grad(loss))(x, y), value.slope)
    close(torch.func.vmap(loss, in_dims=(0, None))(x, y[0]), value.loss)
    tangent = torch.linspace(-1, 1, 4, dtype=torch.float64)
    primal, pushed = torch.func.jvp(lambda x: loss(x, y, "none"), (x,), (tangent,))
    close(primal, value.loss)
    close(pushed, value.slope * tangent)
    for jacobian in (torch.func.jacrev, torch.func.jacfwd):
        close(jacobian(lambda x: loss(x, y, "none"))(x), value.slope.diag())
    leaf = x.clone().requires_grad_()
    (curve,) = torch.autograd.grad(truth(case._replace(input=leaf)).slope.sum(), leaf, allow_unused=True)
    close(torch.func.hessian(lambda x: loss(x, y))(x), curve.diag())


def test_func_over_tensor_settings() -> None:
    """Settings that are tensors go through transforms beside the input."""
    case = setup(Cell("mse", ByProximity), torch.float64, torch.device("cpu"), kind="class", weighted=True)
    torch.testing.assert_close(torch.func.grad(lambda x: case("sum", x))(case.input), truth(case).slope)
    rows = torch.func.vmap(lambda x, y, t: tt.proximity_mse_loss(x, y, t, 0.3, reduction="sum"), in_dims=(0, 0, 0))(
        case.input, case.target, torch.linspace(0, 1, SHAPE[0], dtype=torch.float64)
    )
    looped = [
        tt.proximity_mse_loss(x, y, float(t), 0.3, reduction="sum")
        for x, y, t in zip(case.input, case.target, torch.linspace(0, 1, SHAPE[0], dtype=torch.float64), strict=True)
    ]
    torch.testing.assert_close(rows, torch.stack(looped))


def test_forward_ad() -> None:
    case = setup(Cell("bce_with_logits", ByProximity), torch.float32, torch.device("cpu"))
    tangent = torch.randn(SHAPE, generator=torch.Generator().manual_seed(3))
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(case.input, tangent)
        value, pushed = torch.autograd.forward_ad.unpack_dual(case("mean", dual))
    expected = truth(case)
    torch.testing.assert_close(value.double(), expected.loss.mean(), rtol=1e-5, atol=1e-6)
    assert pushed is not None
    torch.testing.assert_close(pushed.double(), (expected.slope * tangent).mean(), rtol=1e-5, atol=1e-6)


def test_functional_call() -> None:
    module = tt.nn.ThresholdMSELoss(torch.tensor([0.2, 0.5, 0.8]))
    x, y = torch.rand(4, 3), torch.rand(4, 3)
    settings = {"threshold": torch.tensor([0.6, 0.1, 0.3])}
    expected = tt.threshold_mse_loss(x, y, settings["threshold"])
    assert torch.equal(torch.func.functional_call(module, settings, (x, y)), expected)


@pytest.mark.parametrize("argument", ["weight", "threshold"])
def test_func_grad_of_a_weight_or_a_setting_is_an_error(argument: str) -> None:
    x, others = torch.rand(3), {"target": torch.rand(3), "threshold": 0.5}
    with pytest.raises(ValueError, match=f"{argument} requires grad"):
        torch.func.grad(lambda v: tt.threshold_mse_loss(x, **{**others, argument: v}))(torch.rand(3))


def test_meta_tensors() -> None:
    """Shapes and dtypes without data, as fake tensors need."""
    x = torch.empty(3, 4, device="meta", requires_grad=True)
    for cell in CELLS:
        output = tt.threshold_loss(x, x.detach(), cell.rule(*SETTINGS[cell.rule]), base=base_of(cell.base))
        output.backward()
        assert output.shape == ()
        assert x.grad is not None
        assert x.grad.shape == x.shape


# -------------------------------------------------------------------------------------------------------------- modules

MODULES = {
    "threshold_bce_loss": tt.nn.ThresholdBCELoss,
    "threshold_bce_with_logits_loss": tt.nn.ThresholdBCEWithLogitsLoss,
    "threshold_mse_loss": tt.nn.ThresholdMSELoss,
    "proximity_mse_loss": tt.nn.ProximityMSELoss,
    "exceedance_mse_loss": tt.nn.ExceedanceMSELoss,
    "sigmoid_focal_loss": tt.nn.SigmoidFocalLoss,
    "asymmetric_loss": tt.nn.AsymmetricLoss,
}


def test_every_named_loss_has_a_module() -> None:
    assert set(MODULES) == set(NAMED)


def _settings(op: str, kind: str) -> dict[str, Any]:
    case = setup(NAMED[op], torch.float32, torch.device("cpu"), kind=kind, weighted=True)
    names = inspect.signature(getattr(tt, op)).parameters
    found = {**vars(BASE_NAMES[NAMED[op].base]()), **vars(case.rule)}
    settings = {name: value for name, value in found.items() if name in names}
    settings |= {"weight": case.weight, "reduction": "sum"}
    return {**settings, "pos_weight": case.pos_weight} if case.pos_weight is not None else settings


def _data(op: str) -> tuple[Tensor, Tensor]:
    case = setup(NAMED[op], torch.float32, torch.device("cpu"))
    return case.input, case.target


@pytest.mark.parametrize("kind", ["number", "0dim", "class"])
@pytest.mark.parametrize("op", MODULES)
def test_modules(op: str, kind: str) -> None:
    settings, data = _settings(op, kind), _data(op)
    module = MODULES[op](**settings)
    expected = getattr(tt, op)(*data, **settings)
    assert torch.equal(module(*data), expected)
    shown = repr(module)
    for setting, value in settings.items():
        assert f"{setting}={value!r}" in shown if not isinstance(value, Tensor) else f"{setting}=tensor(" in shown
    assert not list(module.parameters())
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), loaded):
        assert torch.equal(twin(*data), expected)
        assert repr(twin) == shown


@pytest.mark.parametrize("op", MODULES)
def test_tensor_settings_are_state(op: str) -> None:
    settings = _settings(op, "class")
    module = MODULES[op](**settings)
    tensors = {setting for setting, value in settings.items() if isinstance(value, Tensor)}
    assert set(module.state_dict()) == tensors
    other = MODULES[op](**{k: v * 0 if k in tensors else v for k, v in settings.items()})
    other.load_state_dict(module.state_dict())
    assert torch.equal(other(*_data(op)), module(*_data(op)))
    moved = copy.deepcopy(module).to("meta")
    assert all(getattr(moved, setting).device.type == "meta" for setting in tensors)
    assert all(getattr(module.double(), setting).dtype == torch.float64 for setting in tensors)


@pytest.mark.parametrize("op", MODULES)
def test_module_defaults(op: str) -> None:
    x, y = _data(op)
    needs = {"threshold": 0.4} if op in ("threshold_mse_loss", "proximity_mse_loss") else {}
    assert torch.equal(MODULES[op](**needs)(x, y), getattr(tt, op)(x, y, **needs))


def test_rules_are_frozen_values() -> None:
    for rule in (ByPrediction(), ByProximity(0.5), ByLoss()):
        assert rule == copy.deepcopy(rule)
        with pytest.raises(AttributeError):
            rule.penalty_factor = 3  # type: ignore[misc]


@cells
def test_grad_and_jvp_of_vmap(cell: Cell) -> None:
    """Taken outside of vmap they are those of the whole batch."""
    case = _smooth(cell)
    x, y = case.input.detach().expand(3, -1).clone(), case.target.expand(3, -1)

    def one(x: Tensor, y: Tensor) -> Tensor:
        return tt.threshold_loss(x, y, case.rule, base=base_of(cell.base), reduction="sum")

    def batched(x: Tensor) -> Tensor:
        return (torch.func.vmap(one)(x, y) * torch.arange(1.0, 4.0)).sum()

    slopes = torch.stack([k * torch.func.grad(one)(x[0], y[0]) for k in (1, 2, 3)])
    torch.testing.assert_close(torch.func.grad(batched)(x), slopes)
    x = x.requires_grad_()
    (dx,) = torch.autograd.grad(batched(x), x)
    torch.testing.assert_close(dx, slopes)
    _, tangent = torch.func.jvp(batched, (x.detach(),), (torch.full_like(x, 2.0),))
    torch.testing.assert_close(tangent, 2 * slopes.sum())


@some_cells
def test_integers_are_numbers(cell: Cell) -> None:
    x, y = torch.rand(SHAPE), torch.rand(SHAPE)
    for values in ((1, 1, 2), (1, 2, 1)):
        settings = values[: len(cell.rule.__dataclass_fields__)]
        found = tt.threshold_loss(x, y, cell.rule(*settings), base=base_of(cell.base))
        assert found.equal(tt.threshold_loss(x, y, cell.rule(*map(float, settings)), base=base_of(cell.base)))
        tensors = [torch.tensor(float(value)) for value in settings]
        torch.testing.assert_close(found, tt.threshold_loss(x, y, cell.rule(*tensors), base=base_of(cell.base)))


def test_a_rule_may_carry_more_than_its_settings() -> None:
    rule = ByLoss(0.5, torch.tensor(2.0))
    expected = tt.threshold_loss(torch.ones(2), torch.zeros(2), rule, base="mse")
    object.__setattr__(rule, "note", 3.0)
    assert tt.threshold_loss(torch.ones(2), torch.zeros(2), rule, base="mse") == expected


def test_an_integer_beyond_a_float() -> None:
    with pytest.raises(ValueError, match="threshold is an integer beyond what a float holds"):
        tt.threshold_mse_loss(torch.rand(3), torch.rand(3), 10**400)


@pytest.mark.parametrize("few", [0, 1 << 13])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_select_is_torch_where(dtype: torch.dtype, few: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "FEW", few)
    left = torch.tensor([-0.5, 0.25, 0.5, torch.nan, torch.inf, -torch.inf], dtype=dtype)
    numbers = (0.25, -0.0, 0.0, 1.0, torch.inf, torch.nan, 1e39)
    for right in (0.25, torch.nan, torch.full_like(left, 0.25)):
        for a in numbers:
            for b in numbers:
                limit = torch.finfo(dtype).max
                held = [torch.inf if limit < v < torch.inf else v for v in (a, b)]
                found = select(torch.gt, left, right, a, b)
                expected = torch.where(left > right, *(torch.tensor(v, dtype=dtype) for v in held))
                assert found.dtype == dtype
                assert torch.equal(found.nan_to_num(7.0), expected.nan_to_num(7.0))
                assert torch.equal(found.signbit()[~found.isnan()], expected.signbit()[~found.isnan()])


@pytest.mark.parametrize("y", [-0.5, 1.5, torch.nan])
def test_targets_outside_0_to_1_with_exponents_that_are_tensors(y: float) -> None:
    """Also where the clamp of the logarithm leaves the gradient 0: the formula that autograd differentiates."""
    x = torch.tensor([-20.0, -0.5, 20.0], requires_grad=True)
    base = tt.Asymmetric(torch.tensor(4.0), torch.tensor(1.0))
    loss = tt.threshold_loss(x, torch.full((3,), y), base=base, reduction="none")
    assert loss.isnan().all()
    assert torch.autograd.grad(loss.sum(), x)[0].isnan().all()


@pytest.mark.parametrize("gamma", [0.0, torch.tensor(0.0)], ids=["number", "tensor"])
@pytest.mark.parametrize("y", [0.0, 0.25, 1.0])
def test_a_power_of_0_keeps_nan(y: float, gamma: Any) -> None:
    """NaN ** 0 is 1, so the cross entropy has to keep it: in every form of the loss."""
    x, target = torch.tensor([torch.nan]), torch.tensor([y])
    for base in (tt.Asymmetric(gamma, gamma), tt.Asymmetric(gamma, gamma, None, 0.0), tt.Focal(None, gamma)):

        def loss_of(x: Tensor, base: tt.Asymmetric | tt.Focal = base) -> Tensor:
            return tt.threshold_loss(x, target, base=base, reduction="none")

        assert loss_of(x).isnan().all()
        assert torch.func.vmap(loss_of)(x[None]).isnan().all()
        assert torch.func.grad(lambda x: loss_of(x).sum())(x).isnan().all()


@pytest.mark.parametrize("delta", [1.0, torch.tensor(1.0), torch.full((6,), 1.0)], ids=["number", "0-dim", "each"])
def test_huber_at_its_limits(delta: Any) -> None:
    """The formula's gradient is NaN for NaN, as that of torch is, and its curvature at the target is 1."""
    x = torch.tensor([0.0, 0.5, -0.25, torch.inf, torch.nan, -3.0], requires_grad=True)
    loss = tt.threshold_loss(x, torch.zeros(6), base=tt.Huber(delta), reduction="none")
    (slope,) = torch.autograd.grad(loss.sum(), x, create_graph=True)
    torch.testing.assert_close(slope.detach(), torch.tensor([0.0, 0.5, -0.25, 1.0, torch.nan, -1.0]), equal_nan=True)
    (curvature,) = torch.autograd.grad(slope.sum(), x)
    assert curvature.tolist() == [1.0, 1.0, 1.0, 0.0, 0.0, 0.0]


def test_huber_of_an_infinite_delta_is_half_the_square() -> None:
    x = torch.tensor([0.0, 2.0, -3.0])
    loss = tt.threshold_loss(x, torch.zeros(3), base=tt.Huber(torch.tensor(torch.inf)), reduction="none")
    assert loss.tolist() == [0.0, 2.0, 4.5]
