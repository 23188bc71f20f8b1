"""nn.JumpReLU: both parametrizations, checkpoints of either, and float32 by whatever road a parameter comes."""

from __future__ import annotations

import copy
import io
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import triton_thresh as tt

from .conftest import INTERPRETED

pytestmark = pytest.mark.skipif(INTERPRETED, reason="once is enough")

WIDTH = 5
THETA = torch.tensor([0.05, 0.2, 0.4, 0.8, 1.6])
PARAMETER = {"raw": "threshold", "log": "log_threshold"}
HALVES = [torch.bfloat16, torch.float16]
each_form = pytest.mark.parametrize("form", ["raw", "log"])


def stored(form: str, theta: Tensor) -> Tensor:
    return theta if form == "raw" else theta.log()


def made(form: str, **settings: Any) -> tt.nn.JumpReLU:
    return tt.nn.JumpReLU(WIDTH, **{"threshold": THETA, "bandwidth": 0.5, "parametrization": form, **settings})


def parameter(module: tt.nn.JumpReLU) -> nn.Parameter:
    ((name, found),) = module.named_parameters()
    assert name == PARAMETER[module.parametrization]
    return found


# ----------------------------------------------------------------------------------------------------------- construction


@each_form
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("given", [0.25, torch.tensor(0.25), THETA, THETA.bfloat16(), torch.arange(1, 6)], ids=repr)
def test_initial_thresholds(form: str, dtype: torch.dtype, given: Any) -> None:
    module = made(form, threshold=given, dtype=dtype)
    expected = torch.as_tensor(given, dtype=dtype).expand(WIDTH)
    torch.testing.assert_close(parameter(module).detach(), stored(form, expected))
    torch.testing.assert_close(module.theta.detach(), expected)
    with torch.no_grad():
        parameter(module).fill_(7)
    module.reset_parameters()
    torch.testing.assert_close(module.theta.detach(), expected)


def test_the_tensor_given_is_copied() -> None:
    given = nn.Parameter(THETA.clone())
    module = made("raw", threshold=given)
    with torch.no_grad():
        given.zero_()
    for _ in range(2):
        assert torch.equal(module.threshold.detach(), THETA)
        assert module.threshold.requires_grad
        module.reset_parameters()


def test_signature_and_defaults() -> None:
    module = tt.nn.JumpReLU((2, 3), 0.5, 0.25)
    assert torch.equal(module.threshold.detach(), torch.full((2, 3), 0.5))
    assert repr(module) == (
        "JumpReLU((2, 3), threshold=0.5, bandwidth=0.25, parametrization='raw', input_gradient=False, dtype=torch.float32)"
    )
    assert repr(made("log", input_gradient=True, dtype=torch.float64)) == (
        "JumpReLU(5, threshold=tensor((5,), float32), bandwidth=0.5, parametrization='log', input_gradient=True, "
        "dtype=torch.float64)"
    )
    assert repr(tt.nn.JumpReLU(3).double()) == (
        "JumpReLU(3, threshold=0.001, bandwidth=0.001, parametrization='raw', input_gradient=False, dtype=torch.float64)"
    )


@pytest.mark.parametrize(
    ("settings", "error", "words"),
    [
        (
            {"threshold": THETA[:3]},
            ValueError,
            r"threshold has shape \(3,\), expected a number or a tensor of shape \(5,\)",
        ),
        ({"threshold": THETA[None]}, ValueError, r"threshold has shape \(1, 5\), expected a number"),
        ({"threshold": THETA.to(torch.complex64)}, TypeError, "threshold has dtype torch.complex64"),
        ({"threshold": "0.1"}, TypeError, "threshold must be a number, got str '0.1'"),
        ({"threshold": 10**400}, ValueError, "threshold is an integer beyond what a float holds"),
        ({"threshold": 0.0, "parametrization": "log"}, ValueError, "threshold must be above 0 .*'log', got 0.0"),
        ({"threshold": math.nan, "parametrization": "log"}, ValueError, "threshold must be above 0"),
        ({"threshold": THETA - 0.05, "parametrization": "log"}, ValueError, "threshold must be above 0"),
        ({"parametrization": "exp"}, ValueError, "parametrization must be 'raw' or 'log', got 'exp'"),
        ({"dtype": torch.bfloat16}, TypeError, "dtype must be torch.float32 or torch.float64, got torch.bfloat16"),
        ({"dtype": torch.float16}, TypeError, "dtype must be torch.float32 or torch.float64, got torch.float16"),
        ({"dtype": "float32"}, TypeError, "dtype must be torch.float32 or torch.float64, got 'float32'"),
    ],
    ids=lambda given: None,
)
def test_refused(settings: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=f"JumpReLU: {words}"):
        tt.nn.JumpReLU(WIDTH, **settings)


# ----------------------------------------------------------------------------------------------------------------- values


@each_form
@pytest.mark.parametrize("input_gradient", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_and_gradients(form: str, input_gradient: bool, dtype: torch.dtype) -> None:
    """Those of the functions at θ, whose gradient reaches the logarithm by the chain rule."""
    module = made(form, input_gradient=input_gradient)
    x = torch.linspace(-1, 2, 40).view(8, WIDTH).to(dtype).requires_grad_()
    theta = module.theta.detach().requires_grad_()
    settings: dict[str, Any] = {"bandwidth": 0.5, "input_gradient": input_gradient}
    pairs = [
        ((module(x),), (tt.jumprelu(x, theta, **settings),)),
        (module.l0(x), tt.jumprelu_l0(x, theta, **settings)),
        (module(x, return_l0=True), tt.jumprelu_l0(x, theta, **settings)),
    ]
    for found, expected in pairs:
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
        upstream = [torch.linspace(-1, 3, y.numel(), dtype=y.dtype).view_as(y) for y in expected]
        dx, dt = torch.autograd.grad(expected, (x, theta), upstream)
        along_x, along_parameter = torch.autograd.grad(found, (x, parameter(module)), upstream)
        assert torch.equal(along_x, dx)
        assert dt.count_nonzero() > 2
        torch.testing.assert_close(along_parameter, dt if form == "raw" else dt * theta.detach())


@each_form
def test_a_step_moves_it(form: str) -> None:
    module = made(form).bfloat16()
    optimizer = torch.optim.SGD(module.parameters(), lr=1e-5)
    before = parameter(module).detach().clone()
    module.l0(torch.linspace(-1, 2, 40).view(8, WIDTH).bfloat16())[1].sum().backward()
    optimizer.step()
    moved = (parameter(module).detach() - before).abs()
    assert moved.max() > 0
    assert moved.max() < 0.01, "so small that 16 bits would not show it"


def test_projection() -> None:
    module = made("raw")
    with torch.no_grad():
        module.threshold.copy_(torch.tensor([-0.5, 0.0, 0.5, -1e-30, math.nan]))
    version = module.threshold._version
    assert module.project_() is module
    assert module.threshold._version > version
    assert module.threshold.is_leaf
    assert module.threshold.requires_grad
    torch.testing.assert_close(
        module.threshold.detach(), torch.tensor([0.0, 0.0, 0.5, 0.0, math.nan]), rtol=0, atol=0, equal_nan=True
    )
    module = made("log")
    before = module.log_threshold.detach().clone()
    assert module.project_() is module
    assert torch.equal(module.log_threshold.detach(), before)


def test_the_count_passes_hooks() -> None:
    """What gathers a sharded parameter, and whatever else waits for calls of the module, sees them."""
    module, seen = made("raw"), []
    module.register_forward_pre_hook(lambda _, args: seen.append(args))
    module.l0(torch.zeros(2, WIDTH))
    assert len(seen) == 1


@each_form
def test_compiled(form: str) -> None:
    torch.compiler.reset()
    module, x = made(form), torch.linspace(-1, 2, 40).view(8, WIDTH)
    outputs = [*module.l0(x), module(x)]
    twin = copy.deepcopy(module)
    compiled = torch.compile(lambda x: (*twin.l0(x), twin(x)), fullgraph=True)(x)
    for a, b in zip(compiled, outputs, strict=True):
        torch.testing.assert_close(a, b)
    for each in (compiled, outputs):
        sum(o.sum() for o in each).backward()
    torch.testing.assert_close(parameter(twin).grad, parameter(module).grad)


@each_form
def test_copies(form: str) -> None:
    module, x = made(form), torch.linspace(-1, 2, 40).view(8, WIDTH)
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    stored = torch.load(buffer, weights_only=False)
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), stored):
        assert repr(twin) == repr(module)
        assert torch.equal(twin(x), module(x))
        twin.reset_parameters()
        assert torch.equal(parameter(twin), parameter(module))


# ------------------------------------------------------------------------------------------------------------ checkpoints


def late(form: str) -> nn.Module:
    with torch.device("meta"):
        return nn.Sequential(nn.Linear(3, WIDTH), made(form, threshold=0.5))


def later(form: str) -> nn.Module:
    return late(form).to_empty(device="cpu")


def early(form: str) -> nn.Module:
    return nn.Sequential(nn.Linear(3, WIDTH), made(form, threshold=0.5))


@each_form
@pytest.mark.parametrize("source", ["raw", "log"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *HALVES])
@pytest.mark.parametrize(
    ("make", "assign"), [(early, False), (early, True), (late, True), (later, False), (later, True)]
)
@pytest.mark.parametrize("swaps", [False, True])
def test_checkpoints_of_either_name(
    form: str, source: str, dtype: torch.dtype, make: Callable[[str], nn.Module], assign: bool, swaps: bool
) -> None:
    """Under a prefix, as tensors or as parameters of a state; the caller's dict is left as it was."""
    theta = stored(source, THETA).to(dtype)
    state: dict[str, Tensor] = {"0.weight": torch.ones(WIDTH, 3), "0.bias": torch.ones(WIDTH)}
    state[f"1.{PARAMETER[source]}"] = nn.Parameter(theta)
    given = dict(state)
    versions = [t._version for t in state.values()]
    torch.__future__.set_swap_module_params_on_conversion(swaps)
    try:
        net = make(form)
        result = net.load_state_dict(state, assign=assign)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    assert not result.missing_keys
    assert not result.unexpected_keys
    assert list(state) == list(given)
    assert all(state[key] is given[key] for key in given)
    assert [t._version for t in state.values()] == versions
    if not (swaps and assign):  # which is documented to take over what it is given
        assert state[f"1.{PARAMETER[source]}"].dtype is dtype
    found = parameter(net[1])  # type: ignore[arg-type]
    assert isinstance(found, nn.Parameter)
    assert found.requires_grad
    assert found.is_leaf
    assert found.dtype is (torch.float64 if assign and dtype is torch.float64 else torch.float32)
    expected = (theta if source == "raw" else theta.double().exp()).double()
    torch.testing.assert_close(net[1].theta.detach().double(), expected, rtol=2e-6, atol=0)  # type: ignore[operator, union-attr]
    if form == source:
        assert torch.equal(found.detach().double(), theta.double())


def test_assigned_as_it_is_where_it_is_wide() -> None:
    module, given = made("raw"), nn.Parameter(THETA.clone())
    module.load_state_dict({"threshold": given}, assign=True)
    assert module.threshold is given


@each_form
def test_checkpoints_that_do_not_fit(form: str) -> None:
    module = made(form)
    other = "log" if form == "raw" else "raw"
    with pytest.raises(RuntimeError, match=rf"Unexpected key.*{PARAMETER[other]}"):
        module.load_state_dict({PARAMETER[name]: stored(name, THETA) for name in ("raw", "log")})
    with pytest.raises(RuntimeError, match=rf'Missing key.*"{PARAMETER[form]}"'):
        module.load_state_dict({})
    with pytest.raises(RuntimeError, match=rf"size mismatch for {PARAMETER[form]}"):
        module.load_state_dict({PARAMETER[other]: stored(other, THETA[:3])})
    before = parameter(module).detach().clone()
    result = module.load_state_dict({"other": THETA}, strict=False)
    assert (result.missing_keys, result.unexpected_keys) == ([PARAMETER[form]], ["other"])
    assert torch.equal(parameter(module).detach(), before)


@pytest.mark.parametrize("wrong", [0.0, -1.0, math.nan])
def test_thresholds_without_a_logarithm(wrong: float) -> None:
    module = nn.Sequential(made("log"))
    theta = THETA.clone()
    theta[2] = wrong
    before = module[0].log_threshold.detach().clone()  # type: ignore[operator, union-attr]
    with pytest.raises(RuntimeError, match=r"0\.threshold has values that are not above 0.*parametrization='raw'"):
        module.load_state_dict({"0.threshold": theta})
    assert torch.equal(module[0].log_threshold.detach(), before)  # type: ignore[operator, union-attr]


def test_a_state_of_its_own_name() -> None:
    for form, name in PARAMETER.items():
        assert list(nn.ModuleDict({"a": made(form)}).state_dict()) == [f"a.{name}"]


# ------------------------------------------------------------------------------------------------------------------ width


@each_form
@pytest.mark.parametrize("half", HALVES)
def test_width_by_any_road(form: str, half: torch.dtype) -> None:
    def assigned(module: tt.nn.JumpReLU) -> tt.nn.JumpReLU:
        setattr(module, PARAMETER[form], nn.Parameter(parameter(module).detach().to(half)))
        return module

    def frozen(module: tt.nn.JumpReLU) -> tt.nn.JumpReLU:
        setattr(module, PARAMETER[form], nn.Parameter(parameter(module).detach().to(half), requires_grad=False))
        assert not parameter(module).requires_grad
        return module.requires_grad_()

    def by_default(module: tt.nn.JumpReLU) -> tt.nn.JumpReLU:
        torch.set_default_dtype(half)
        try:
            return made(form, threshold=0.25)
        finally:
            torch.set_default_dtype(torch.float32)

    def with_gradient(module: tt.nn.JumpReLU) -> tt.nn.JumpReLU:
        module(torch.ones(2, WIDTH)).sum().backward()
        module.to(half)
        grad = parameter(module).grad
        assert grad is not None
        assert grad.dtype is torch.float32
        return module

    roads: list[Callable[[tt.nn.JumpReLU], Any]] = [
        lambda module: module.to(half),
        lambda module: module.to("cpu", half),
        lambda module: module.to(torch.empty(0, dtype=half)),
        lambda module: module.type(half),
        lambda module: module.to("meta").to(half).to_empty(device="cpu"),
        lambda module: nn.Sequential(module).to(half)[0],
        lambda module: copy.deepcopy(module).to(half),
        assigned,
        frozen,
        by_default,
        with_gradient,
    ]
    for road in roads:
        module = road(made(form))
        assert parameter(module).dtype is torch.float32
        assert parameter(module).requires_grad
        assert module(torch.ones(2, WIDTH, dtype=half)).dtype is half
    module = made(form)
    values = parameter(module).detach().clone()
    module.to(half)
    assert torch.equal(parameter(module).detach(), values), "not rounded on the way"
    assert parameter(module.double()).dtype is torch.float64
    assert parameter(module.to(half)).dtype is torch.float64
    assert parameter(module.float()).dtype is torch.float32
