"""The selection kernels: values against torch, numpy and skimage; bytes; layouts; ops of torch.library."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.library import opcheck

import triton_thresh as tt
from triton_thresh import gates, thresholds
from triton_thresh.functional import batch_topk, otsu_threshold, quantile_threshold, topk_threshold
from triton_thresh.nn import BatchTopK
from triton_thresh.thresholds import kth_largest

from ..conftest import INTERPRETED
from ..interpreted.tools import sentinel_view, traffic
from ..selection import DTYPES, FLOATS, batch_topk_of, numbers, otsu_of, same

OPS = torch.ops.triton_thresh
counted = pytest.mark.skipif(not INTERPRETED, reason="the interpreter counts: TRITON_INTERPRET is not 1")


@pytest.fixture(params=["registers", "digits"])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Rows in registers, or, as if they were too long for that, by digits."""
    if request.param == "digits":
        monkeypatch.setattr(thresholds, "IN_REGISTERS", 0)
    return str(request.param)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_in_registers(dtype: torch.dtype, device: torch.device) -> None:
    for n, ranks in ((1, (1,)), (140, (1, 47, 140))):
        x = torch.stack(list(numbers(dtype, n)))
        for k in ranks:
            same(topk_threshold(x.to(device), k, -1).cpu(), torch.topk(x, k).values[..., -1:])
    wide = x.double().numpy() if dtype != torch.int64 else x.numpy()
    expected = torch.tensor(np.quantile(wide, 0.3, axis=-1, keepdims=True, method="inverted_cdf")).to(dtype)
    same(quantile_threshold(x.to(device), 0.3, -1).cpu(), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_tensor_by_digits(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    monkeypatch.setattr(thresholds, "IN_REGISTERS", 0)
    first, *others = numbers(dtype, 300)
    x = torch.cat([first, *others])
    for k in (1, len(x) // 3, len(x) - 2):
        same(topk_threshold(x.to(device), k).cpu(), torch.topk(x, k).values[-1])
    same(quantile_threshold(first.to(device), 0.3).cpu(), first.kthvalue(90).values)
    same(
        quantile_threshold(x.to(device), 0.3).cpu(),
        x.kthvalue(len(x)).values if x.isnan().any() else x.kthvalue(270).values,
    )


@pytest.mark.parametrize(("dtype", "n"), [(torch.bfloat16, 40_001), (torch.float32, 40_960)], ids=str)
def test_more_than_registers_hold(dtype: torch.dtype, n: int, device: torch.device) -> None:
    x = next(numbers(dtype, n))
    same(topk_threshold(x.to(device), n // 3).cpu(), torch.topk(x, n // 3).values[-1])


@pytest.mark.parametrize(("height", "cols"), [(1, 3), (5, 1), (70, 64), (3, 1000)])
def test_heights_and_widths(height: int, cols: int, device: torch.device) -> None:
    x = torch.randn(height, cols)
    same(topk_threshold(x.to(device), cols // 2 + 1, -1).cpu(), torch.topk(x, cols // 2 + 1).values[..., -1:])


def test_many_rows_of_many_programs(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    monkeypatch.setattr(thresholds, "IN_REGISTERS", 0)
    monkeypatch.setattr(thresholds, "PROGRAMS", 6)
    x = torch.randn(3, 12_300).to(torch.float16)
    same(topk_threshold(x.to(device), 777, -1).cpu(), torch.topk(x, 777).values[..., -1:])


@pytest.mark.parametrize("dim", [None, -1])
def test_layouts(dim: int | None, kernels: str, device: torch.device) -> None:
    """Digits are counted of what is laid out for registers, too: there a few views show it."""
    x = torch.arange(24.0, device=device).view(2, 3, 4)
    views = [x.transpose(0, 2), x[:, ::2], x[..., 1:3], x[:1, :1].expand(2, 3, 4)]
    if kernels == "registers":
        views += [x, x.flip(-1), x[1, 2, 3], x[..., :1]]
    for given in views:
        view, check = sentinel_view(given)
        same(topk_threshold(view, 1, dim), view.max() if dim is None else view.amax(-1, keepdim=bool(view.dim())))
        if kernels == "registers":
            least = view.min() if dim is None else view.amin(-1, keepdim=bool(view.dim()))
            same(quantile_threshold(view, 0, dim), least)
        check()
    assert topk_threshold(x[:0], 2, -1).shape == (0, 3, 1)


def test_rows_further_apart_than_32_bits_reach(kernels: str, device: torch.device) -> None:
    if device.type == "cpu":  # numpy asks for zeroed memory, which costs nothing until it is touched
        buffer = torch.from_numpy(np.zeros(2**31 + 100, np.uint8))
    else:
        buffer = torch.zeros(2**31 + 100, dtype=torch.uint8, device=device)
    rows = buffer.as_strided((2, 100), (2**31, 1))
    rows[1] = 7
    assert topk_threshold(rows, 100, -1).flatten().tolist() == [0, 7]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_rank_on_the_device_among_the_positive(dtype: torch.dtype, kernels: str, device: torch.device) -> None:
    x = torch.cat(list(numbers(dtype, 100)))
    positive = x[x > 0]
    for values, k in ((x, 0), (x, 100), (x, 1000), (-x.abs(), 100)):
        rank, few = torch.tensor(k, device=device), min(k, int((values > 0).sum()))
        smallest = positive.topk(few).values[-1] if few > 0 else torch.tensor(torch.nan, dtype=dtype)
        same(kth_largest(values.to(device), rank, positive=True).cpu(), smallest)
    for k in (-1, 150):
        largest = x.topk(min(k, len(x))).values[-1] if k > 0 else torch.tensor(torch.nan, dtype=dtype)
        same(kth_largest(x.to(device), torch.tensor(k, device=device)).cpu(), largest)


@pytest.mark.parametrize(("dtype", "held"), [*((dtype, True) for dtype in FLOATS), (torch.float32, False)], ids=str)
def test_batch_topk(dtype: torch.dtype, held: bool, monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    """In registers, and once by digits, whose ranks among the positive are tested above."""
    if not held:
        monkeypatch.setattr(thresholds, "IN_REGISTERS", 0)
    x = torch.cat([each.view(12, 7) for each in numbers(dtype, 84)])
    own = x.to(device).requires_grad_()
    for k in (0.01, 9):
        y = batch_topk(own, k)
        same(y.detach().cpu(), batch_topk_of(x, k))
        (dx,) = torch.autograd.grad(y, own, torch.full_like(own, 3))
        same(dx, torch.where(y.detach() != 0, 3, 0).to(dtype))


def test_module(device: torch.device) -> None:
    module, plain = BatchTopK(2.5, momentum=0.5).to(device), BatchTopK(2.5, momentum=0.5)
    for scale in (1, 3, -1):
        x = torch.randn(8, 10).abs() * scale
        with tt.use_backend("eager"):
            expected = plain(x)
        same(module(x.to(device)).cpu(), expected)
        same(module.topk_threshold.cpu(), plain.topk_threshold)
    same(module.eval()(x.to(device)).cpu(), torch.where(x > plain.topk_threshold, x, 0))


# ------------------------------------------------------------------------------------------------------------------ Otsu


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16], ids=str)
def test_otsu_of_integers(dtype: torch.dtype, device: torch.device) -> None:
    for seed, n in itertools.product(range(3), (1, 50, 5000)):
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(n, generator=generator) * 9 + 60 * (torch.rand(n, generator=generator) > 0.6)
        x = (x + (30 if dtype == torch.uint8 else -40)).to(dtype)
        assert otsu_threshold(x.to(device)).item() == otsu_of(x.numpy())


@pytest.mark.parametrize(
    ("dtype", "bins"),
    [*((dtype, 256) for dtype in FLOATS), *((torch.float32, bins) for bins in (2, 100, 600, 2000))],
    ids=str,
)
def test_otsu_of_floats(dtype: torch.dtype, bins: int, device: torch.device) -> None:
    generator = torch.Generator().manual_seed(bins)
    x = (torch.randn(5000, generator=generator) + 3 * (torch.rand(5000, generator=generator) > 0.6)).to(dtype)
    width = (x.double().max() - x.double().min()).item() / bins
    rounding = torch.finfo(dtype).eps * 8
    assert (
        abs(otsu_threshold(x.to(device), bins).item() - otsu_of(x.double().numpy(), bins)) <= 1.001 * width + rounding
    )


def test_otsu_of_special_floats(device: torch.device) -> None:
    for value in (torch.nan, torch.inf, -torch.inf):
        assert otsu_threshold(torch.tensor([1.0, 2.0, value], device=device)).isnan()
    for value in (3.0, 0.1, torch.finfo(torch.float32).max):
        assert otsu_threshold(torch.full((5,), value, device=device)) == value


# --------------------------------------------------------------------------------------------------------------- traffic


def bytes_of(x: Tensor, call: Callable[[], Tensor]) -> tuple[float, int]:
    """How often x is read, and the bytes of all else that kernels read and write."""
    memory, used = torch.zeros(1 << 18, dtype=torch.uint8), 0

    def served(stock: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def create(*arguments: Any, **options: Any) -> Tensor:
            nonlocal used
            made = stock(*arguments, **options)
            start, used = used, used + -(-made.nbytes // 64) * 64
            return memory[start : start + made.nbytes].view(made.dtype).view(made.shape).copy_(made)

        return create

    with traffic(x=x, made=memory) as moved, ExitStack() as patches:
        for owner, name in ((torch, "zeros"), (torch, "stack"), (Tensor, "new_empty")):
            patches.enter_context(patch.object(owner, name, served(getattr(owner, name))))
        call()
    assert not moved.stored["x"]
    assert moved.distinct("load", "x") == x.nbytes
    return moved.loaded["x"] / x.nbytes, moved.total - moved.loaded["x"]


READS = [(torch.float32, 4), (torch.bfloat16, 2), (torch.float16, 2), (torch.uint8, 1), (torch.float64, 8)]


@counted
@pytest.mark.parametrize(("dtype", "reads"), READS, ids=str)
def test_reads_of_a_tensor(dtype: torch.dtype, reads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """One for each 8 bits. Each program reads 2 KiB of counts, and adds its own, at most as much."""
    monkeypatch.setattr(thresholds, "IN_REGISTERS", 0)
    x = next(numbers(dtype, 6000))
    found, rest = bytes_of(x, lambda: topk_threshold(x, 100))
    assert found == reads
    assert rest <= (reads * 3 + 1) * 2 * 2048 + 512


@counted
def test_reads_of_rows_and_of_a_small_tensor() -> None:
    """One, and a threshold is written."""
    x = next(numbers(torch.float32, 900))
    assert bytes_of(x.view(9, 100), lambda: quantile_threshold(x.view(9, 100), 0.3, -1)) == (1, 9 * 4)
    assert bytes_of(x, lambda: topk_threshold(x, 5)) == (1, 4)


@counted
def test_reads_of_otsu() -> None:
    """One for the histogram; torch's own kernel reads once for the range."""
    x = torch.rand(6000)
    found, rest = bytes_of(x, lambda: otsu_threshold(x))
    assert found == 1
    assert rest <= 2 * (2048 + 12)


# ------------------------------------------------------------------------------------------------- features that fired


def fired_of(x: Tensor, threshold: Tensor) -> Tensor:
    return (x.double() > threshold.double()).unsqueeze(0).flatten(0, -2).sum(0)


SHAPES = [(7,), (100, 16), (33, 40), (9, 700), (3, 2, 77), (130, 1), (0, 4), (4, 0)]


@pytest.mark.parametrize(
    ("shape", "dtype"), [*((shape, torch.float32) for shape in SHAPES), ((33, 40), torch.bfloat16)], ids=str
)
def test_fired(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    """Whatever else is saved; lanes beyond the last element are above a negative threshold, and do not count."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator).to(dtype)
    by_feature = torch.randn(shape[-1], generator=generator)
    for threshold in (torch.tensor(-0.25), by_feature, torch.randn(shape, generator=generator)):
        for learns in (False, True) if shape == (33, 40) else (threshold is by_feature,):
            own = threshold.to(device, copy=True).requires_grad_(learns)
            leaf = x.to(device, copy=True).requires_grad_(learns)
            y, l0, fired = tt.jumprelu_l0(leaf, own, 0.5, return_fired=True)
            assert fired.dtype == torch.int64
            assert not fired.requires_grad
            assert torch.equal(fired.cpu(), fired_of(x, threshold))
            if shape == (33, 40):
                for found, expected in zip((y, l0), tt.jumprelu_l0(leaf, own, 0.5), strict=True):
                    assert torch.equal(found, expected)
                    assert found.requires_grad == expected.requires_grad


@counted
@pytest.mark.parametrize(("rows", "features"), [(512, 64), (40, 1000), (600, 8)])
def test_fired_reads_an_eighth_of_a_byte_an_element(rows: int, features: int) -> None:
    n, width = rows * features, features * 2
    bits, fired = torch.zeros(-(-n // (8 * width)) * width, dtype=torch.uint8), torch.zeros(features, dtype=torch.int64)
    bits.random_(0, 256)
    with traffic(bits=bits, fired=fired) as moved:
        gates._count_fired(bits, fired, n, width)
    assert moved.loaded == {"bits": bits.nbytes}
    assert bits.nbytes <= n / 8 + width
    assert moved.atomics["fired"] <= -(-rows // 512) * width * 8
    kept = ((bits.view(-1, 1, width) >> torch.arange(8, dtype=torch.uint8)[:, None]) & 1).reshape(-1)[:n]
    assert torch.equal(fired, kept.view(rows, features).sum(0))


def test_fired_when_compiled(device: torch.device) -> None:
    names: list[str] = []

    def backend(graph: Any, inputs: Any) -> Any:
        names[:] = [str(node.target) for node in graph.graph.nodes if "triton_thresh" in str(node.target)]
        return graph

    def both(x: Tensor, threshold: Tensor) -> tuple[Tensor, ...]:
        return tt.jumprelu_l0(x, threshold, 0.5, return_fired=True)

    torch._dynamo.reset()
    compiled = torch.compile(both, fullgraph=True, dynamic=True, backend=backend)
    for learns in (False, True):
        threshold = torch.linspace(-1, 1, 12, device=device, requires_grad=learns)
        x = torch.randn(40, 12, device=device, requires_grad=learns)
        for found, expected in zip(compiled(x, threshold), both(x, threshold), strict=True):
            assert torch.equal(found, expected)
        assert names == ["triton_thresh.gate.default", "triton_thresh.gate_fired.default"]


# ------------------------------------------------------------------------------------------------ compilers, transforms


def test_opcheck(device: torch.device) -> None:
    x, k = torch.randn(6, 50, device=device), torch.tensor(7, device=device)
    opcheck(OPS.kth_largest.default, (x, None, 7, True, True, False))
    opcheck(OPS.kth_largest.default, (x, k, 0, False, False, True))
    opcheck(OPS.histogram.default, (x, torch.tensor([1.0, -5.0, 9.0], device=device), 100))
    opcheck(OPS.histogram.default, (x.byte(), None, 256))


def test_compiled_calls_are_ops(device: torch.device) -> None:
    def every(x: Tensor) -> list[Tensor]:
        return [
            topk_threshold(x, 3),
            topk_threshold(x, fraction=0.3, dim=-1),
            quantile_threshold(x, 0.7),
            otsu_threshold(x),
            kth_largest(x, (x > 0).sum() // 2),
            batch_topk(x, 2.5),
        ]

    graphs = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append([str(node.target) for node in graph.graph.nodes])
        return graph

    torch._dynamo.reset()
    compiled = torch.compile(every, fullgraph=True, dynamic=True, backend=backend)
    seen = []
    for rows in (16, 24):
        x = torch.randn(rows, 12, device=device)
        for actual, expected in zip(compiled(x), every(x), strict=True):
            same(actual, expected)
        seen.append(len(graphs))
    assert seen[0] == seen[1], "another size needs no other program"
    names = graphs[-1]
    assert sum("kth_largest" in name for name in names) == 5
    assert sum("histogram" in name for name in names) == 1


def test_transforms_use_plain_torch(device: torch.device) -> None:
    x = torch.randn(3, 4, 10, device=device)
    for call in (
        lambda x: topk_threshold(x, 3),
        lambda x: quantile_threshold(x, 0.3, -1),
        lambda x: batch_topk(x, 2),
        otsu_threshold,
    ):
        same(torch.func.vmap(call)(x), torch.stack([call(each) for each in x]))


@pytest.mark.gpu
def test_more_than_32_bits_count() -> None:
    n = 2**31 + 4097
    x = torch.zeros(n, dtype=torch.uint8, device="cuda")
    x[-3:] = torch.tensor([5, 9, 7])
    assert [topk_threshold(x, k).item() for k in (1, 2, 3, 4, n)] == [9, 7, 5, 0, 0]


@pytest.mark.gpu
def test_the_host_never_waits() -> None:
    x = torch.randn(300, 400, device="cuda")
    module = BatchTopK(3).to("cuda")
    rank = torch.tensor(5, device="cuda")

    def every() -> None:
        topk_threshold(x, 3), quantile_threshold(x, 0.3, -1), otsu_threshold(x), kth_largest(x, rank), module(x)

    every()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        every()
    finally:
        torch.cuda.set_sync_debug_mode("default")
