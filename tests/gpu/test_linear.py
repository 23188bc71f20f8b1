"""The loss of a linear layer on a GPU: the host never waits, no more memory than its budget, labels out of range make it NaN."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import triton_thresh as tt
from triton_thresh import linear, linear_threshold_loss

from .cases import DEVICE
from .test_host import no_host_wait
from .test_memory import PEAK_SLACK

pytestmark = pytest.mark.gpu

B, D, L, P = 1024, 256, 50_000, 8


def tensors(dtype: torch.dtype = torch.float32, rows: int = B, features: int = D, count: int = L) -> list[Tensor]:
    """Input, weight, bias and scale."""
    draw = torch.Generator(DEVICE).manual_seed(0)
    shapes = [(rows, features), (count, features), (count,)]
    made = [torch.randn(shape, device=DEVICE, generator=draw).div_(8).to(dtype) for shape in shapes]
    return [t.requires_grad_() for t in (*made, torch.tensor(1.5, device=DEVICE))]


def targets(kind: str, rows: int = B, count: int = L) -> dict[str, Tensor]:
    labels = torch.randint(-1, count, (rows, P), generator=torch.Generator().manual_seed(1))
    if kind == "labels":
        return {"labels": labels.to(DEVICE)}
    padded = torch.where(labels < 0, count, labels)
    target = torch.zeros(rows, count + 1).scatter(1, padded, 1.0)[:, :count].contiguous()
    return {"target": {"dense": target, "coo": target.to_sparse(), "csr": target.to_sparse_csr()}[kind].to(DEVICE)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ["dense", "labels", "coo", "csr"])
def test_the_host_never_waits(kind: str, dtype: torch.dtype) -> None:
    leaves, given = tensors(dtype, 64, 16, 2000), targets(kind, 64, 2000)
    upstream = torch.tensor(3.0, device=DEVICE)

    def step() -> list[Tensor]:
        input, weight, bias, scale = leaves
        loss = linear_threshold_loss(input, weight, base=tt.Focal(), bias=bias, scale=scale, chunk_size=300, **given)
        return [loss, *torch.autograd.grad(loss, leaves, upstream.to(loss.dtype))]

    expected = step()
    with no_host_wait():
        actual = step()
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("kind", ["dense", "labels"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_memory_is_two_chunks_and_their_target(dtype: torch.dtype, kind: str) -> None:
    leaves, given = tensors(dtype), targets(kind)
    input, weight, bias, scale = leaves

    def step() -> tuple[Any, ...]:
        loss = linear_threshold_loss(input, weight, bias=bias, scale=scale, **given)
        return loss, torch.autograd.grad(loss, leaves)

    step()
    torch.cuda.synchronize()
    held = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    result = step()
    extra = torch.cuda.max_memory_allocated() - held - sum(t.nbytes for t in leaves)
    del result
    target = linear.CHUNK_BYTES // dtype.itemsize
    wide = 4 * input.numel() if dtype is torch.bfloat16 else 0
    assert extra <= 2 * linear.CHUNK_BYTES + target + wide + PEAK_SLACK


def test_a_stray_label_makes_the_loss_nan() -> None:
    input, weight, *_ = tensors(torch.float32, 4, 8, 100)
    for stray in (100, 2**40, -2):
        labels = torch.tensor([[1], [stray], [2], [3]], device=DEVICE)
        loss = linear_threshold_loss(input, weight, labels=labels, chunk_size=30)
        assert loss.isnan()
        torch.autograd.grad(loss, (input, weight))
        torch.cuda.synchronize()
