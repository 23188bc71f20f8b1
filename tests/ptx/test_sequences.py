"""What a launch specialises on and a cache may confuse: alignment, lengths of 1 and of multiples of 16, dtypes, channels."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import triton_thresh as tt

from ..gates import equal, inputs, same, upstream
from ..interpreted.tools import sentinel_view
from ..learned import outputs_of
from ..losses import Cell, Setup, assert_loss, run
from .sample import case, sampled, some

pytestmark = pytest.mark.usefixtures("compiled")

DTYPES = (torch.float32, torch.bfloat16)
LENGTHS = (1, 16, 17, 32, 1600, 1601)


def check_gate(x: Tensor, t: float | Tensor) -> None:
    """Forward and backward as in eager torch, from wherever x starts."""
    leaf = x.requires_grad_()
    found = []
    for name in ("triton", "eager"):
        with tt.use_backend(name):  # type: ignore[arg-type]
            y = tt.hardshrink(leaf, t)
            found.append([y.detach(), *torch.autograd.grad(y, leaf, upstream(y))])
    for ours, theirs in zip(*found, strict=True):
        same(ours, theirs)


def check_loss(x: Tensor, y: Tensor, t: float | Tensor, reduction: str) -> None:
    made = Setup(Cell("mse", tt.ByPrediction), x.detach(), y, tt.ByPrediction(t, 2.0, 0.5))
    assert_loss(made, reduction, *run(made, reduction))


def at(x: Tensor, offset: int) -> Tensor:
    """The same so many elements behind an aligned address, in memory that nobody else may touch."""
    return sentinel_view(x, offset)[0]


@pytest.mark.parametrize(("dtype", "offsets"), sampled(DTYPES, [(0, 4, 1, 0), (1, 0)]), ids=str)
def test_aligned_then_not(dtype: torch.dtype, offsets: tuple[int, ...]) -> None:
    for offset in offsets:
        x = inputs(0.5, dtype, (2200,), torch.device("cpu"))
        check_gate(at(x, offset), 0.5)
        x = torch.randn(2200, generator=torch.Generator().manual_seed(0)).to(dtype)
        check_loss(at(x, offset), x.flip(0), 0.25, "mean")
        check_loss(x, at(x.flip(0), offset), 0.25, "mean")


@pytest.mark.parametrize("lengths", [LENGTHS, case(False, LENGTHS[::-1])], ids=str)
def test_lengths(lengths: tuple[int, ...]) -> None:
    for n in lengths:
        for dtype in DTYPES:
            x = inputs(0.5, dtype, (n,), torch.device("cpu"))
            check_gate(x, 0.5)
            check_loss(torch.linspace(0, 1, n).to(dtype), torch.linspace(1, 0, n).to(dtype), 0.25, "mean")


def test_dtypes_and_kinds_in_turn() -> None:
    draw = torch.Generator().manual_seed(1)
    for step in range(12):
        n, dtype = (17, 1600, 1601)[step % 3], DTYPES[step % 2]
        x = at(torch.randn(n, generator=draw).to(dtype), step % 4 // 2)
        t = (0.5, torch.tensor(0.5, dtype=dtype), torch.rand(n, generator=draw).to(dtype))[step // 2 % 3]
        check_gate(x, t)
        check_loss(x, torch.rand(n, generator=draw).to(dtype), 0.5, "mean")


def test_devices_in_turn(folder: Path) -> None:
    """Each driver is a device of its own, and a launch of what was compiled for the other raises."""
    from .driver import PtxDriver, on_ptx

    drivers = PtxDriver(80, folder), PtxDriver(90, folder)
    x = torch.randn(1601, generator=torch.Generator().manual_seed(5))
    for driver in drivers * 2:
        executed = driver.executed.total()
        with on_ptx(driver):
            check_gate(x.clone(), 0.5)
            check_loss(x, x.flip(0), 0.25, "mean")
        assert driver.executed.total() > executed
    compiled = [len(driver.kernels) for driver in drivers]
    assert compiled[0] == compiled[1], "the second turn compiles nothing"
    for driver in drivers:
        driver.forget()


SHAPES = ((1, 16), (16, 3), (1, 1), (16, 1), (3, 16), (5, 17), (2, 16, 3, 16))


@pytest.mark.parametrize("shape", some(SHAPES, lambda shape: shape in SHAPES[:2]), ids=str)
def test_channels_of_every_length(shape: tuple[int, ...]) -> None:
    """Inner and outer lengths are compiled in where they are 1, and their divisibility by 16."""
    for place, length in enumerate(shape):
        t = torch.linspace(0.1, 1, length).reshape([length if d == place else 1 for d in range(len(shape))])
        check_gate(inputs(t, torch.float32, shape, torch.device("cpu")), t)


@pytest.mark.parametrize("shape", [(40, 1), (40, 33), case(False, (40, 16))], ids=str)
def test_thresholds_of_every_length(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(2), requires_grad=True)
    t = torch.linspace(0.1, 1, shape[-1], requires_grad=True)
    found = []
    for name in ("triton", "eager"):
        with tt.use_backend(name):  # type: ignore[arg-type]
            y = tt.softshrink(x, t)
            found.append([y.detach(), *torch.autograd.grad(y, (x, t), upstream(y, special=False))])
    for ours, theirs in zip(*found, strict=True):
        equal(ours, theirs)


@pytest.mark.ptx
@pytest.mark.parametrize("op", [tt.jumprelu_l0, tt.jumprelu, tt.softshrink])
def test_gradients_lie_as_in_eager_torch(op: Any) -> None:
    """Those of thresholds per element, too."""
    for lies, other in itertools.product((lambda x: x, lambda x: x.t().contiguous().t()), repeat=2):
        x = lies(torch.randn(40, 33, generator=torch.Generator().manual_seed(3))).requires_grad_()
        t = other(torch.rand(40, 33, generator=torch.Generator().manual_seed(4))).requires_grad_()
        found = []
        for name in ("triton", "eager"):
            with tt.use_backend(name):  # type: ignore[arg-type]
                outputs = outputs_of(op(x, t, *(() if op is tt.softshrink else (0.5,))))
                given = torch.autograd.grad(outputs, (x, t), [torch.ones_like(output) for output in outputs])
                found.append([outputs[0].stride(), *(each.stride() for each in given)])
        assert found[0] == found[1]


def test_a_kernel_for_each_specialisation(compiled: object) -> None:
    """The tests above would see nothing if nothing were specialised."""
    from .driver import PtxDriver

    assert isinstance(compiled, PtxDriver)
    x = torch.zeros(64)
    before = len(compiled.kernels)
    for view in (x[:32], x[1:33], x[:32]):
        tt.threshold(view, 0.3, 0.7)
    assert len(compiled.kernels) == before + 2
