"""What `explain` says a call saves is what autograd's saved tensors hold, on the backend that runs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import triton_thresh as tt

from .conftest import INTERPRETED

SHAPES = [(64, 256), (7, 5), (1, 1), (0, 3)]
WHOLE = (64, 256)  # a multiple of every tile, whose rest a kernel's bits are rounded up by


class Call(NamedTuple):
    name: str
    arguments: tuple[Any, ...]
    keywords: dict[str, Any]

    def __call__(self) -> Any:
        return getattr(tt, self.name)(*self.arguments, **self.keywords)

    def explained(self) -> tt.Explanation:
        return tt.explain(self.name, *self.arguments, **self.keywords)


def calls(shape: tuple[int, ...], dtype: torch.dtype) -> Iterator[Call]:
    """Every op, with each kind of operand."""
    x = torch.rand(shape).to(dtype).requires_grad_()
    y, each = torch.rand(shape).to(dtype), torch.rand(shape)
    channel = torch.rand(shape[-1])
    for t in (0.5, torch.tensor(0.5), channel, each):
        for name in ("threshold", "hardshrink", "softshrink", "binary_threshold", "threshold_grad"):
            yield Call(name, (x, t), {})
        for name in ("jumprelu", "step", "jumprelu_l0"):
            yield Call(name, (x, t), {})
        for name in ("threshold_mse_loss", "threshold_bce_loss", "threshold_bce_with_logits_loss"):
            yield Call(name, (x, y, t), {})
            yield Call(name, (x, y, t), {"reduction": "none"})
        yield Call("proximity_mse_loss", (x, y, t), {"weight": each})
        yield Call("exceedance_mse_loss", (x, y, t), {"reduction": "sum"})
        yield Call("threshold_loss", (x, y, tt.ByProximity(t)), {"pos_weight": channel})
    for name in ("sigmoid_focal_loss", "asymmetric_loss"):
        yield Call(name, (x, y), {"mask": each > 0.5})
    yield Call("threshold_loss", (x, y, tt.ByRank(0.5)), {"return_stats": True, "ignore_index": 0.0})
    for t in (channel, each):
        learning = t.clone().requires_grad_()
        for input in (x, x.detach()):
            for name in ("softshrink", "jumprelu", "step", "jumprelu_l0"):
                yield Call(name, (input, learning), {})
        yield Call("jumprelu", (x, t), {"input_gradient": True})
    yield Call("threshold_mse_loss", (x, y.bool(), 0.5), {})
    yield Call("hardshrink", (x.t(),), {})
    yield Call("hardshrink", (x.detach(),), {})
    yield Call("threshold_mse_loss", (x.detach(), y, 0.5), {})
    for threshold in (0.5, channel):
        yield Call("hardshrink", (x * 1, threshold), {"inplace": True})


def saved(call: Call) -> int:
    """Bytes of all that autograd keeps, each tensor as often as it is kept."""
    kept = []

    def count(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel() * tensor.element_size())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        call()
    return sum(kept)


def check(call: Call) -> tt.Explanation:
    told = call.explained()
    assert told.saved_bytes == saved(call), f"{call.name}, {call.arguments[1:]}, {call.keywords}: {told}"
    return told


@pytest.mark.skipif(INTERPRETED, reason="for the CPU's own ops; tests/kernels/test_saved.py has the kernels")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_eager(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    for call in calls(shape, dtype):
        told = check(call)
        assert told.backend == "eager"
        assert told.forward_bytes is None
        assert told.backward_bytes is None
        assert f"saves {told.saved_bytes:,} bytes for backward" in str(told)
        assert "moves" not in str(told)


@pytest.mark.skipif(INTERPRETED, reason="once is enough")
def test_the_input_of_a_shrink_is_saved() -> None:
    x = torch.empty(1 << 20, requires_grad=True)
    assert tt.explain("hardshrink", x, 0.5).saved_bytes == 1 << 22
    with torch.no_grad():
        assert tt.explain("hardshrink", x, 0.5).saved_bytes == 0


@pytest.mark.skipif(INTERPRETED, reason="once is enough")
def test_a_target_that_requires_grad() -> None:
    x, y = torch.rand(WHOLE, requires_grad=True), torch.rand(WHOLE, requires_grad=True)
    told = check(Call("threshold_bce_loss", (x, y), {}))
    assert "a target that requires grad" in told.reason


@pytest.mark.skipif(INTERPRETED, reason="once is enough")
def test_what_nobody_knows_is_not_told() -> None:
    x = torch.rand(4, requires_grad=True)
    told = []
    torch.func.vmap(lambda x: told.append(tt.explain("hardshrink", x)) or x)(x)  # type: ignore[func-returns-value]
    assert told[0].saved_bytes is None
    assert "saves" not in str(told[0])


@pytest.mark.skipif(INTERPRETED, reason="once is enough")
def test_gradients_save_nothing() -> None:
    p = torch.rand(4, requires_grad=True)
    assert tt.explain("threshold_gradients_", [p], 0.5).saved_bytes == 0
    p.grad = torch.rand(4)
    told = tt.explain("threshold_gradients_", [p], 0.5)
    assert (told.forward_bytes, told.backward_bytes, told.saved_bytes) == (None, None, 0)
