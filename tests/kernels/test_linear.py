"""The loss of a linear layer on Triton: the in-place kernel, by all gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import triton_thresh as tt
from triton_thresh import linear, linear_threshold_loss

from ..conftest import INTERPRETED

B, D, L = 5, 3, 37


def _tensors(dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """Input, weight, bias and scale."""
    draw = torch.Generator().manual_seed(1)
    made = [torch.randn(shape, generator=draw, dtype=torch.float64) for shape in ((B, D), (L, D), (L,), ())]
    return [t.to(device, dtype).requires_grad_() for t in made]


def _labels(device: torch.device) -> Tensor:
    labels = torch.randint(-1, L, (B, 4), generator=torch.Generator().manual_seed(2))
    labels[2], labels[0, 1] = -1, labels[0, 0]
    return labels.to(device)


def _target(labels: Tensor) -> Tensor:
    padded = torch.where(labels < 0, L, labels)
    return torch.zeros(B, L + 1, device=labels.device).scatter(1, padded, 1.0)[:, :L]


@pytest.mark.parametrize("kind", ["labels", "dense", "transposed", "coo"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_values_and_gradients(dtype: torch.dtype, kind: str, device: torch.device) -> None:
    labels = _labels(device)
    target = _target(labels)
    given: dict[str, Any] = {"labels": labels} if kind == "labels" else {"target": target}
    if kind == "transposed":
        given["target"] = target.T.contiguous().T
    elif kind == "coo":
        given["target"] = target.to_sparse()
    rule, base = (
        tt.ByPrediction(torch.rand(B, 1, device=device), 2.0, 0.5),
        tt.BCEWithLogits(torch.rand(L, device=device)),
    )
    input, weight, bias, scale = one = _tensors(dtype, device)
    made = linear_threshold_loss(
        input, weight, rule=rule, base=base, bias=bias, scale=scale, label_smoothing=0.1, chunk_size=16, **given
    )
    true = [t.detach().double().requires_grad_() for t in one]
    logits = true[3] * true[0] @ true[1].T + true[2]
    with tt.use_backend("eager"):
        expected = tt.threshold_loss(logits, target, rule, base=base, label_smoothing=0.1)
        (3 * expected).backward()
    (3 * made).backward()
    eps = torch.finfo(dtype).eps
    near = dict(rtol=32 * eps, atol=32 * eps)
    torch.testing.assert_close(made.double(), expected, **near)
    for a, b in zip(one, true):
        torch.testing.assert_close(a.grad.double(), b.grad, **near)  # type: ignore[union-attr]


@pytest.mark.parametrize("base", [tt.MSE(), tt.Focal(), tt.Asymmetric(), tt.Hinge()], ids=str)
def test_bases(base: Any, device: torch.device) -> None:
    labels = _labels(device)
    one, other = _tensors(torch.float32, device)[:2], _tensors(torch.float32, device)[:2]
    linear_threshold_loss(*one, labels=labels, base=base, reduction="sum").backward()  # type: ignore[misc]
    with tt.use_backend("eager"):
        tt.threshold_loss(other[0] @ other[1].T, _target(labels), base=base, reduction="sum").backward()
    torch.testing.assert_close([t.grad for t in one], [t.grad for t in other], rtol=1e-4, atol=1e-5)


def test_without_gradient_nothing_is_written(device: torch.device) -> None:
    input, weight, *_ = (t.detach() for t in _tensors(torch.float32, device))
    spec, operands = linear._specified(input, weight, "bce_with_logits", None, "sum", None, 0.0)
    loop = linear._Loop(input, weight, None, None, operands, spec, "triton", 0, [False] * 4)
    part = input @ weight.T
    kept, target = part.clone(), _target(_labels(device))
    partials = loop._on_triton(part, target, operands, 0)
    torch.testing.assert_close(partials.sum(), tt.threshold_loss(part, target, reduction="sum"))
    assert torch.equal(part, kept)


def test_a_device_meets_a_stray_label_with_nan(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """And writes nowhere else: the scatter of a device sends it behind the buffer."""
    if device.type == "cpu":
        monkeypatch.setattr(linear, "_check_labels", lambda marks, count: None)
    labels = torch.tensor([[0, 400], [-7, 2]], device=device)
    marks = linear._listed(labels, 2)
    assert linear._strays(marks, L).tolist() == [False, True, True, False]
    scatter = linear._Scatter(marks, 2, L, 16)
    scatter._bounds = None  # as on a device
    for start in range(0, L, 16):
        width = min(16, L - start)
        target = scatter.fill(start, width)
        assert target.nonzero().tolist() == ([[0, 0], [1, 2]] if start == 0 else [])
        scatter.clear()
        assert not scatter._buffer.any()


def test_more_rows_than_a_launch_has_in_its_second_dimension(device: torch.device) -> None:
    """Each launch has one dimension. The target of a chunk has rows that are further apart than the chunk is wide."""
    input, weight = torch.randn(70_000, 2, device=device), torch.randn(5, 2, device=device)
    target = (torch.rand(70_000, 5, device=device) < 0.2).float()
    one, other = weight.clone().requires_grad_(), weight.clone().requires_grad_()
    made = linear_threshold_loss(input, one, target, chunk_size=2)
    expected = torch.nn.functional.binary_cross_entropy_with_logits(input @ other.T, target)
    torch.testing.assert_close(made, expected)
    torch.testing.assert_close(torch.autograd.grad(made, one), torch.autograd.grad(expected, other))


@pytest.mark.skipif(not INTERPRETED, reason="the interpreter counts the bytes")
def test_traffic_of_a_chunk() -> None:
    """The product is read once and written once, and a byte of target is read."""
    from .test_traffic import Arena, watched

    input, weight, *_ = (t.detach() for t in _tensors(torch.float32, torch.device("cpu")))
    spec, operands = linear._specified(input, weight, "bce_with_logits", None, "mean", None, 0.0)
    loop = linear._Loop(input, weight, None, None, operands, spec, "triton", 0, [True] * 4)
    part, target = input @ weight.T, _target(_labels(input.device)).bool()
    with watched(Arena(), part=part, target=target) as moved:
        partials = loop._on_triton(part, target, operands, 0)
    assert moved.loaded == {"part": 4 * part.numel(), "target": part.numel()}
    assert moved.stored == {"part": 4 * part.numel(), "made": 4 * partials.numel()}
