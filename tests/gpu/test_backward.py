"""Backward on the device: again, accumulated, scaled, and with the same bits every time."""

from __future__ import annotations

import pytest
import torch

from triton_thresh import ByLoss

from ..calls import Case
from ..losses import CELLS, Cell, assert_near, name, setup, setup_loss, truth
from .cases import DEVICE, SUMMED, every_case, step, three

pytestmark = pytest.mark.gpu


@every_case
def test_backward_again_and_accumulation(case: Case) -> None:
    leaves, scale = case.leaves(DEVICE), three()
    output = case(*leaves)
    if not output.requires_grad:
        pytest.skip("no gradient")
    before = [leaf.detach().clone() for leaf in leaves]
    upstream = scale.to(output.dtype).expand_as(output)
    output.backward(upstream, retain_graph=True)
    once = [leaf.grad.clone() for leaf in leaves if leaf.grad is not None]
    output.backward(upstream)
    case(*leaves).backward(upstream)
    for leaf, first, untouched in zip(leaves, once, before, strict=True):
        torch.testing.assert_close(leaf.grad, 3 * first)
        assert torch.equal(leaf, untouched)


@pytest.mark.parametrize("cell", CELLS, ids=name)
@pytest.mark.parametrize("autocast", [True, False])
def test_grad_scaler(cell: Cell, autocast: bool) -> None:
    """float16 gradients of a mean over 2**18 elements: scaled by 1/N before the factor arrives, they would be denormal."""
    case = setup(cell, torch.float16, DEVICE, shape=(2**18,))
    n = case.input.numel()
    factor = 2.0**16 if autocast else 2.0**10  # a float16 loss holds no upstream gradient of 2**16
    weights = torch.nn.Parameter(case.input.float())
    optimizer = torch.optim.SGD([weights], lr=n)
    scaler = torch.amp.GradScaler(DEVICE.type, init_scale=factor)
    with torch.autocast(DEVICE.type, torch.float16, enabled=autocast):
        loss = case("mean", weights.to(torch.float16))
    assert loss.dtype == (torch.float32 if autocast else torch.float16)
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    assert weights.grad is not None
    expected = truth(case)
    scaled = (weights.grad * factor).half()  # exact: factors are powers of 2
    chosen = torch.ones_like(scaled, dtype=torch.bool)
    if isinstance(
        case.rule, ByLoss
    ):  # of so many elements some lie beside the bound, on whose other side rounding may put them
        chosen = (
            setup_loss(case, case.input.double(), case.target.double(), torch.tensor) - case.rule.loss_threshold
        ).abs() > 1e-5
    assert_near(*(t[chosen] for t in (scaled, expected.slope * factor / n, expected.slope_size * factor / n)))
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == factor, "an infinity was found"
    assert not torch.equal(weights, case.input.float())


@pytest.mark.parametrize("case", SUMMED, ids=str)
def test_a_hundred_runs_give_the_same_bits(case: Case) -> None:
    leaves, scale = case.leaves(DEVICE, shape=(1025, 1023)), three()
    expected = step(case, leaves, scale)
    for _ in range(100):
        for tensor, first in zip(step(case, leaves, scale), expected, strict=True):
            assert torch.equal(tensor.flatten().view(torch.uint8), first.flatten().view(torch.uint8))
