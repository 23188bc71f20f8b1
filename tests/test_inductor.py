"""torch.compile by Inductor, forward and backward: gates give the bits of an eager call, losses are as right as one.

One program holds all ops of a dtype and a kind of operand, since each that is compiled takes seconds. A number is a constant
of the program or, "dynamic", one of its arguments: what serves one number and one size serves the next, and what has a value
for each channel beside it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import triton_thresh as tt
from triton_thresh import cells
from triton_thresh.bases import BASES
from triton_thresh.eager import closed_form, loss_and_slope
from triton_thresh.rules import RULES, Unweighted

from .programs import (
    CHANNELS,
    GATES,
    LEARNED,
    LOSSES,
    ROWS,
    T,
    V,
    equal,
    inputs,
    outputs,
    targets,
    upstream,
)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
KINDS = ("constant", "dynamic", "0-dim", "per-channel")


def some_of(kept: Mapping[torch.dtype, Sequence[str]]) -> Any:
    """Every dtype with every kind, of which `make test` runs those kept."""
    every = [(dtype, kind) for dtype in DTYPES for kind in KINDS]
    marks = [() if kind in kept[dtype] else (pytest.mark.matrix,) for dtype, kind in every]
    values = [pytest.param(*pair, marks=mark) for pair, mark in zip(every, marks)]
    return pytest.mark.parametrize(("dtype", "kind"), values, ids=lambda value: str(value).removeprefix("torch."))


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch.compiler.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        yield


def compiled(function: Callable[..., Any], kind: str = "dynamic") -> Any:
    return torch.compile(function, fullgraph=True, dynamic=kind == "dynamic")


def operand(kind: str, number: float, step: float = 0.01, channels: int = CHANNELS) -> Any:
    """A threshold, or another setting, that a program is called with."""
    if kind == "0-dim":
        return torch.tensor(number)
    return number + torch.arange(channels) * step if kind == "per-channel" else number


SMALLER = (21, 29)  # the second size of a dynamic program


def test_every_op_is_compiled_here() -> None:
    assert {name.split(",")[0] for name in (*GATES, *LEARNED, *LOSSES)} | {"threshold_gradients_"} == set(tt.ops())


# ----------------------------------------------------------------------------------------------------------------- gates


def leaves(x: Tensor, count: int) -> list[Tensor]:
    """Zeros to add to an input that many ops share: the gradient of each is that of its op. -0 changes no bit of a sum."""
    return [torch.full_like(x, -0.0).requires_grad_() for _ in range(count)]


def gates(kind: str) -> Callable[..., list[Tensor]]:
    """Each gate of an input; what copies or puts in numbers is widened, so that a rounding left out shows."""

    def program(x: Tensor, zeros: list[Tensor], learned: list[Tensor], t: Any, v: Any) -> list[Tensor]:
        if kind == "constant":
            t, v = T, V
        found = []
        for call, zero in zip(GATES.values(), zeros):
            found.append(call(x + zero, t, v))
        for call, zero, learns in zip(LEARNED.values(), zeros[len(GATES) :], learned or [t] * len(LEARNED)):
            found += outputs(call(x + zero, learns, v))
        return [y if name in ROUNDED else y.float() for name, y in zip(NAMES, found)]

    return program


NAMES = (*GATES, *LEARNED, "jumprelu_l0's count")
ROUNDED = ("softshrink", "threshold_grad")  # which compute, forward or backward
PRODUCTS = ("garrote", "firm")  # of several roundings, which a compiler may contract


@some_of(
    {
        torch.float32: ["0-dim"],
        torch.bfloat16: ["dynamic"],
        torch.float16: ["constant", "per-channel"],
    }
)
def test_gates(kind: str, dtype: torch.dtype) -> None:
    program = gates(kind)
    call = compiled(program, kind)
    for number in (T, 0.37) if kind == "dynamic" else (T,):
        t = operand(kind, number)
        x = inputs([torch.as_tensor(t)], dtype)
        if number != T:
            x = x[: SMALLER[0], : SMALLER[1]].contiguous()
        thresholds = operand("per-channel", number, channels=x.shape[1]) if kind == "dynamic" else t
        ours, theirs = [], []
        for run, found in ((call, ours), (program, theirs)):
            zeros = leaves(x, len(GATES) + len(LEARNED))
            learned = []
            if isinstance(thresholds, Tensor):
                learned = [thresholds.clone().requires_grad_() for _ in LEARNED]
            found += run(x, zeros, learned, t, V)
            recorded = [
                (x if name == "threshold_grad" else upstream(y), y) for name, y in zip(NAMES, found) if y.requires_grad
            ]
            g, recorded = zip(*recorded)
            found += torch.autograd.grad(recorded, zeros + learned, g, allow_unused=True, materialize_grads=True)
        names = (*NAMES, *(f"d {name}" for name in (*GATES, *LEARNED)), *(f"dt {name}" for name in LEARNED))
        for name, actual, expected in zip(names, ours, theirs):
            if name.removeprefix("d ") in PRODUCTS:
                limits = torch.finfo(dtype)
                close = {"rtol": 4 * limits.eps, "atol": 4 * limits.tiny * limits.eps, "equal_nan": True}
                torch.testing.assert_close(actual, expected, **close, msg=lambda text, name=name: f"{name}: {text}")
            elif name.startswith("dt"):  # sums, whose order may differ
                torch.testing.assert_close(actual, expected, msg=lambda text, name=name: f"{name}: {text}")
            else:
                equal(actual, expected, name)


# ---------------------------------------------------------------------------------------------------------------- losses


SETTINGS = (0.5, 1.25, 0.25, 0.75)  # a rule's three and the weight: each is the same number in every dtype
EPS = torch.finfo(torch.float32).eps


def losses(kind: str, calls: Sequence[Callable[..., Any]]) -> Callable[..., list[Tensor]]:
    """Losses of one input, target, rule and weight."""

    def program(zeros: list[Tensor], x: Tensor, y: Tensor, a: Any, b: Any, c: Any, w: Any) -> list[Tensor]:
        if kind == "constant":
            a, b, c, w = SETTINGS
        return [call(x + zero, y, a, b, c, w) for call, zero in zip(calls, zeros)]

    return program


def programs() -> Iterator[Any]:
    """Every dtype with every kind. `make test` runs every second loss in float32 and in float16, the others in bfloat16."""
    every = list(LOSSES)
    here = {
        (torch.float32, "dynamic"): every[::2],
        (torch.bfloat16, "constant"): every[1::2],
        (torch.float16, "per-channel"): every[::2],
    }
    for dtype, kind in itertools.product(DTYPES, KINDS):
        name = f"{kind}-{str(dtype).removeprefix('torch.')}"
        kept = here.get((dtype, kind), [])
        if kept:
            yield pytest.param(kind, dtype, kept, id=name)
        if rest := [loss for loss in every if loss not in kept]:
            yield pytest.param(kind, dtype, rest, id=f"{name}-rest", marks=pytest.mark.matrix)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "dtype", "names"), list(programs()))
def test_losses(kind: str, dtype: torch.dtype, names: list[str]) -> None:
    """The error against float64 is no larger than eager's, but for a few roundings of float32 and one to the dtype."""
    program = losses(kind, [LOSSES[name] for name in names])
    call = compiled(program, kind)
    for shift in (0.0, 0.0625) if kind == "dynamic" else (0.0,):
        settings = [operand(kind, number + shift, step=1 / 64) for number in SETTINGS]
        x = torch.randn(ROWS, CHANNELS, generator=torch.Generator().manual_seed(0)).to(dtype)
        x[0, :4] = torch.tensor([SETTINGS[0], 0.0, 6.0, -6.0])  # float16 holds what BCE's gradient is there
        y = targets(dtype)
        if shift:
            x, y = (whole[: SMALLER[0], : SMALLER[1]].contiguous() for whole in (x, y))
        if kind == "dynamic":
            settings[3] = operand("per-channel", SETTINGS[3] + shift, 1 / 64, x.shape[1])
        results = []
        for run, held in ((program, torch.float64), (program, dtype), (call, dtype)):
            zeros = leaves(x.to(held), len(names))
            given = [s.to(torch.promote_types(s.dtype, held)) if isinstance(s, Tensor) else s for s in settings]
            found = run(zeros, x.to(held), y.to(held), *given)
            g = [upstream(loss) if loss.ndim else torch.ones_like(loss) for loss in found]
            results.append([*found, *torch.autograd.grad(found, zeros, g)])
        for name, truth, eager, actual in zip((*names, *(f"d {name}" for name in names)), *results):
            assert actual.dtype == eager.dtype == dtype
            size = truth.abs()
            slack = 8 * EPS * torch.maximum(size, size.mean()) + torch.finfo(dtype).eps / 2 * size
            worse = (actual.double() - truth).abs() - (eager.double() - truth).abs() - slack
            assert (worse <= 0).all(), f"{name}: the error is larger than eager's by {worse.max():.3g}"


EDGES = (math.nan, math.inf, -math.inf, 1e4, -1e4, 88.0, -88.0, 2.0, -0.5, 0.0, -0.0, 0.001, 0.25, 0.5, 1.0)


@pytest.mark.parametrize("rules", [False, pytest.param(True, marks=pytest.mark.matrix)], ids=["no rule", "every rule"])
def test_edges_of_closed_forms(rules: bool) -> None:
    """For NaN, infinities and targets that are no labels the backend "inductor" gives what eager torch gives."""
    x, y = (edges.contiguous() for edges in torch.cartesian_prod(torch.tensor(EDGES), torch.tensor(EDGES)).unbind(1))
    forms = []
    for base in (kind(*kind.example) for kind in BASES):
        of_kind = [rule(*rule.example) for rule in RULES if rules and base.kind in rule.kinds]
        for rule in (Unweighted(), *of_kind):
            spec, operands = cells.specify(base, rule, {}, False, "none", torch.float32)
            forms.append((spec, [torch.tensor(float(value)) for value in operands]))

    def program(x: Tensor, y: Tensor, settings: list[list[Tensor]]) -> list[tuple[Tensor, Tensor] | None]:
        return [closed_form(spec, x, y, own, None) for (spec, _), own in zip(forms, settings)]

    for (spec, operands), found in zip(forms, compiled(program)(x, y, [operands for _, operands in forms])):
        assert found is not None, spec.cell
        for ours, theirs in zip(found, loss_and_slope(spec, x, y, operands)):
            torch.testing.assert_close(
                ours, theirs, rtol=1e-4, atol=1e-5, equal_nan=True, msg=f"{spec.cell}: {ours}, expected {theirs}"
            )
