# pyright: strict, reportUnnecessaryTypeIgnoreComment=true
# pyright: reportUnknownMemberType=false
# The second line: torch leaves parts of backward and of its optimizers untyped.
"""How the package is called, for type checkers: nothing runs. tests/test_package.py and make lint read it.

A line that ends in ``# type: ignore`` is a mistake that must be reported: where it is not, the comment itself is an error.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from typing_extensions import assert_type

import triton_thresh as tt
import triton_thresh.functional as F
from triton_thresh import nn


def gates(x: Tensor, per_channel: Tensor) -> None:
    assert_type(tt.threshold(x, 0.1, 20.0), Tensor)
    assert_type(tt.hardshrink(x, per_channel, inplace=True), Tensor)
    assert_type(tt.softshrink(x, per_channel), Tensor)
    assert_type(tt.binary_threshold(x, x.mean(), dtype=torch.uint8), Tensor)
    assert_type(F.jumprelu(x, per_channel, bandwidth=0.05), Tensor)
    assert_type(tt.step(x, per_channel, input_gradient=True), Tensor)
    assert_type(tt.jumprelu_l0(x, per_channel), tuple[Tensor, Tensor])
    assert_type(tt.jumprelu_l0(x, 0.1, return_fired=True), tuple[Tensor, Tensor, Tensor])
    assert_type(tt.topk_threshold(x, 3), Tensor)
    assert_type(tt.hardshrink(x, tt.quantile_threshold(x, 0.9, dim=-1)), Tensor)
    assert_type(tt.batch_topk(x, 2.5), Tensor)
    tt.topk_threshold(x, "3")  # type: ignore[arg-type]
    tt.hardshrink(x, "0.5")  # type: ignore[arg-type]
    tt.hardshrink(x, 0.5, True)  # type: ignore[call-arg]
    tt.hardshrink(x, lambda_=0.5)  # type: ignore[call-arg]


def losses(x: Tensor, y: Tensor, weight: Tensor) -> None:
    assert_type(tt.threshold_bce_loss(x, y), Tensor)
    assert_type(tt.threshold_bce_with_logits_loss(x, y, 0.7, pos_weight=weight, reduction="sum"), Tensor)
    assert_type(tt.threshold_mse_loss(x, y, 0.5, weight=2), Tensor)
    assert_type(tt.proximity_mse_loss(x, y, 0.5), Tensor)
    assert_type(tt.exceedance_mse_loss(x, y, reduction="none"), Tensor)
    for rule in (tt.ByPrediction(0.5), tt.ByProximity(0.5), tt.ByLoss(weight)):
        assert_type(tt.threshold_loss(x, y, rule, base="mse"), Tensor)
    tt.threshold_bce_loss(x, y, reduction="avg")  # type: ignore[arg-type]
    tt.threshold_loss(x, y, tt.ByLoss(), base="bce_logits")  # type: ignore[call-overload]
    tt.threshold_loss(x, y, "ByLoss")  # type: ignore[call-overload]


@tt.fused_loss
def squared(x: Tensor, y: Tensor, scale: float = 1.0) -> Tensor:
    return scale * (x - y) ** 2


def own_loss(x: Tensor, y: Tensor) -> None:
    assert_type(squared(x, y, 2.0, mask=y > 0, divisor=3), Tensor)
    tt.fused_loss("squared")  # type: ignore[arg-type]


def gradients(parameters: list[Tensor], optimizer: torch.optim.Optimizer) -> None:
    assert_type(tt.threshold_grad(parameters[0], 0.1), Tensor)
    tt.threshold_gradients_(parameters, [0.1, 0.2])
    assert_type(tt.threshold_gradients_(parameters, 0.1, return_kept=True), Tensor)
    with tt.GradientThreshold(optimizer, 0.01, track_kept=True) as thresholding:
        optimizer.step()
        assert_type(thresholding.kept, Tensor | None)


def modules() -> torch.nn.Module:
    activation = nn.JumpReLU(512, threshold=0.1)
    assert_type(activation.threshold, torch.nn.Parameter)
    assert_type(activation.l0(torch.randn(2, 512)), tuple[Tensor, Tensor])
    assert_type(nn.BatchTopK(32).topk_threshold, Tensor)
    tt.nn.ThresholdMSELoss(0.5, reduction="avg")  # type: ignore[arg-type]
    return torch.nn.Sequential(nn.Threshold(0.1), nn.Hardshrink(0.1), nn.Softshrink(torch.tensor(0.1)), activation)


def backends(x: Tensor) -> None:
    before = tt.get_backend()
    tt.set_backend("triton")
    tt.set_backend(before)
    with tt.use_backend("eager"):
        assert_type(str(tt.explain("hardshrink", x, 0.5)), str)
    assert_type(tt.explain("hardshrink", x).saved_bytes, int | None)
    tt.set_backend("cuda")  # type: ignore[arg-type]
    tt.use_backend("Triton")  # type: ignore[arg-type]


def wrapped(x: Tensor, thresholds: Mapping[str, tt.Operand]) -> Tensor:
    """`Operand` is what a threshold, weight or factor may be."""
    for threshold in (0, 0.5, torch.tensor(0.5)):
        shown: tt.Operand = threshold
        x = tt.hardshrink(x, shown)
    return tt.hardshrink(x, thresholds["lambd"])
